//! `ashlar zoo profile`: measures what each distinct block of some models costs on this machine by rows, and keeps it beside the block
//! (docs/profile.md). One block at a time is in memory, twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, ensure};
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::outputs::Outputs;
use ashlar_executor::model::profile::{CONTEXT_TOKENS, Profiler, ROWS, SEQUENCES_MAX, can_measure};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa, probe};
use ashlar_kernels::ops::{Bf16Compute, KvFormat, Ops};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{Stage, human_bytes};
use ashlar_zoo::inspect::{Resolved, kind};
use ashlar_zoo::manifest::Block;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::profiles::{DeviceKey, POINTS_MAX, Profile, ROWS_MAX};
use ashlar_zoo::store::{StoreError, Zoo};
use ashlar_zoo::tensor::MappedTensor;
use ashlar_zoo::tensor_file::payload_bytes;
use clap::{ArgGroup, Args};
use serde_json::{Value, json};

use super::{measure, progress, table};
use crate::bench::args::threads;
use crate::devices::{check_isa, device_key};
use crate::output;

/// Bytes that are read to know the machine's bandwidth.
const PROBE_BYTES: usize = 256 << 20;

/// Arguments of `ashlar zoo profile`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true))]
pub(crate) struct ProfileArgs {
    /// TENANT/MODEL, any number
    #[arg(group = "which")]
    models: Vec<ModelId>,
    /// All models of the zoo
    #[arg(long, group = "which")]
    all: bool,
    /// Rows to measure at, comma-separated: 1 to 32, or multiples of 32 up to 4096 [default: 1,2,4,8,16,32,64,128,256]
    #[arg(long, value_name = "ROWS", value_delimiter = ',', allow_negative_numbers = true, value_parser = rows)]
    rows: Vec<u32>,
    /// Threads, as executor.threads of those who will serve [default: all cores]
    #[arg(long, default_value = "0", hide_default_value = true, allow_negative_numbers = true, value_parser = threads)]
    threads: usize,
    /// Instruction set, as executor.isa: avx512-bf16, avx512, avx-vnni, avx2 or scalar [default: the best that the machine has]
    #[arg(long)]
    isa: Option<Isa>,
    /// How keys and values are held, as executor.kv_format: f32, bf16 or int8
    #[arg(long, default_value = "f32")]
    kv_format: KvFormat,
    /// What layers with bf16 weights are computed from, as executor.bf16_compute: f32 or bf16
    #[arg(long, default_value = "f32")]
    bf16_compute: Bf16Compute,
    /// Measure also those that have a record of this device, in place of it
    #[arg(long)]
    force: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Reads a number of rows.
fn rows(text: &str) -> Result<u32, String> {
    let rows = text.parse().ok().filter(|rows| *rows <= ROWS_MAX && can_measure(*rows));
    rows.ok_or_else(|| format!("expected a whole number from 1 to {SEQUENCES_MAX}, or a multiple of {SEQUENCES_MAX} up to {ROWS_MAX}"))
}

/// A block and what it costs.
struct Row {
    kind: &'static str,
    bytes: u64,
    is_measured: bool,
    profile: Profile,
}

/// Runs `ashlar zoo profile`. It keeps all cores busy, so it runs outside the async threads.
pub(super) async fn run(zoo: &Zoo, args: ProfileArgs) -> anyhow::Result<()> {
    check_isa("--isa", args.isa)?;
    let (zoo, runtime) = (zoo.clone(), tokio::runtime::Handle::current());
    tokio::task::spawn_blocking(move || runtime.block_on(profile(&zoo, args))).await?
}

async fn profile(zoo: &Zoo, args: ProfileArgs) -> anyhow::Result<()> {
    let wanted: BTreeSet<u32> = if args.rows.is_empty() { ROWS.into() } else { args.rows.iter().copied().collect() };
    ensure!(wanted.len() <= POINTS_MAX, "profile at {} numbers of rows: a record has {POINTS_MAX} at most", wanted.len());
    let blocks = distinct(models(zoo, &args).await?);
    let ops = Arc::new(Cpu::new(CpuOptions { threads: args.threads, isa: args.isa, bf16_compute: args.bf16_compute }));
    let device = device_key(&*ops);
    // What is there already, and at what rows the rest is measured: those of a sound record stay.
    let (mut known, mut open) = (BTreeMap::new(), Vec::new());
    for (digest, block) in &blocks {
        let of_block = found(zoo, *digest, &device).await?.filter(|profile| profile.kv_format == args.kv_format);
        let rows: BTreeSet<u32> = of_block.iter().flat_map(|profile| &profile.points).map(|point| point.rows).collect();
        match of_block {
            Some(profile) if !args.force && profile.version == env!("CARGO_PKG_VERSION") && rows.is_superset(&wanted) => {
                known.insert(*digest, profile);
            }
            _ => {
                let rows = rows.into_iter().filter(|rows| can_measure(*rows)).chain(wanted.iter().copied()).collect::<BTreeSet<_>>();
                let rows = if rows.len() <= POINTS_MAX { rows } else { wanted.clone() };
                open.push((*digest, block, rows));
            }
        }
    }
    if !args.json {
        output::line(format_args!("{}: {device}", ops.describe()))?;
    }
    let bandwidth = match open.is_empty() {
        true => None,
        false => Some(probe::read_bandwidth(&ops, PROBE_BYTES).context("probe the machine's bandwidth")?),
    };
    let mut measured = BTreeMap::new();
    if !open.is_empty() {
        let mut profiler = Profiler::new(Arc::clone(&ops)).context("make room to fill the caches between runs")?;
        let progress = progress::for_terminal();
        progress.begin(Stage::Profile, open.iter().map(|(_, block, _)| bytes(block)).sum());
        for (digest, block, rows) in open {
            let rows: Vec<u32> = rows.into_iter().collect();
            let twins = load(zoo, &ops, digest).await.with_context(|| format!("profile block {digest}"))?;
            let points = profiler.measure(twins, &rows, args.kv_format).with_context(|| format!("profile block {digest}"))?;
            let profile = Profile {
                block: digest,
                device: device.clone(),
                points,
                context_tokens: CONTEXT_TOKENS,
                sequences_max: SEQUENCES_MAX,
                kv_format: args.kv_format,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                created_ms: measure::now_ms(),
            };
            profile.check().with_context(|| format!("store what block {digest} costs"))?;
            // At once, so that whoever breaks off has what was measured.
            zoo.put_profile(&profile).await.context("store what a block costs")?;
            measured.insert(digest, profile);
            progress.advance(bytes(block));
        }
        progress.end();
    }
    let (measured_count, known_count) = (measured.len(), known.len());
    let rows: Vec<Row> = (blocks.iter())
        .filter_map(|(digest, block)| {
            let is_measured = measured.contains_key(digest);
            let profile = measured.remove(digest).or_else(|| known.remove(digest))?;
            Some(Row { kind: kind(&block.params), bytes: bytes(block), is_measured, profile })
        })
        .collect();
    if args.json {
        let report = json!({
            "device": device,
            "read_bytes_per_second": bandwidth,
            "measured": measured_count,
            "known": known_count,
            "blocks": rows.iter().map(|row| row.json(bandwidth)).collect::<Vec<_>>(),
        });
        return Ok(output::line(serde_json::to_string_pretty(&report)?)?);
    }
    output::text(drawn(&rows, bandwidth))?;
    if let Some(bandwidth) = bandwidth {
        output::line(format_args!(
            "microseconds by rows; of bandwidth: a row's share of reading the weights at {:.1} GB/s",
            bandwidth / 1e9
        ))?;
    }
    let again = if known_count > 0 { " (--force measures them again)" } else { "" };
    Ok(output::line(format_args!("{measured_count} blocks measured, {known_count} had a record of this device{again}"))?)
}

/// The models that were asked for; of all those that cannot be read are told of.
async fn models(zoo: &Zoo, args: &ProfileArgs) -> anyhow::Result<Vec<Resolved>> {
    let mut models = Vec::new();
    if args.all {
        for (id, model) in zoo.resolve_all().await.context("list the models")? {
            match model {
                Ok(model) => models.push(model),
                Err(error) => eprintln!("leaving out {id}: {error}"),
            }
        }
    }
    for id in &args.models {
        models.push(zoo.resolve(id).await.with_context(|| format!("profile {id}"))?);
    }
    Ok(models)
}

/// Blocks of models, each once, in the order in which they come.
fn distinct(models: Vec<Resolved>) -> Vec<(Digest, Block)> {
    let mut seen = BTreeSet::new();
    let blocks = models.into_iter().flat_map(|model| std::iter::zip(model.chain.blocks, model.blocks));
    blocks.filter(|(digest, _)| seen.insert(*digest)).collect()
}

/// The record of a block, if there is a sound one. A damaged one is told of, and measured anew.
async fn found(zoo: &Zoo, block: Digest, device: &DeviceKey) -> anyhow::Result<Option<Profile>> {
    match zoo.read_profile(block, device).await {
        Ok(profile) => Ok(Some(profile)),
        Err(StoreError::Missing { .. }) => Ok(None),
        Err(error @ StoreError::Damaged { .. }) => {
            eprintln!("{error}; measuring it anew");
            Ok(None)
        }
        Err(error) => Err(error).context("look for what was measured before"),
    }
}

/// Two copies of a block.
async fn load(zoo: &Zoo, ops: &Cpu, block: Digest) -> anyhow::Result<[LoadedBlock<Cpu>; 2]> {
    let mapped = zoo.map_block(block).await?;
    // Outputs of their own, or the copies of a head would be one.
    let load = || LoadedBlock::load(ops, &mapped.block, &mapped, &Outputs::default());
    let twins = [load()?, load()?];
    mapped.tensors.values().for_each(MappedTensor::release_pages);
    Ok(twins)
}

/// Bytes of a block's weights as stored.
fn bytes(block: &Block) -> u64 {
    block.tensors.values().map(|tensor| payload_bytes(tensor.dtype, &tensor.shape).map_or(0, |bytes| bytes as u64)).sum()
}

impl Row {
    /// What reading the weights would take as a share of the time of the fewest rows. An embedding reads a row for each token only.
    fn share_of_bandwidth(&self, bandwidth: Option<f64>) -> Option<f64> {
        let seconds = self.profile.points.first()?.micros / 1e6;
        bandwidth.filter(|_| self.kind != "embed").map(|bandwidth| self.bytes as f64 / bandwidth / seconds)
    }

    fn json(&self, bandwidth: Option<f64>) -> Value {
        json!({
            "block": self.profile.block,
            "kind": self.kind,
            "bytes": self.bytes,
            "is_measured": self.is_measured,
            "share_of_bandwidth": self.share_of_bandwidth(bandwidth),
            "profile": self.profile,
        })
    }
}

/// A line for each block.
fn drawn(rows: &[Row], bandwidth: Option<f64>) -> String {
    let all: BTreeSet<u32> = rows.iter().flat_map(|row| &row.profile.points).map(|point| point.rows).collect();
    let head = ["BLOCK", "KIND", "SIZE"].map(str::to_owned).into_iter().chain(all.iter().map(u32::to_string));
    let mut lines = vec![head.chain(["OF BANDWIDTH", "RECORD"].map(str::to_owned)).collect::<Vec<_>>()];
    for row in rows {
        let micros: BTreeMap<u32, f64> = row.profile.points.iter().map(|point| (point.rows, point.micros)).collect();
        let start = [row.profile.block.short(), row.kind.to_owned(), human_bytes(row.bytes)];
        let times = all.iter().map(|rows| micros.get(rows).map_or_else(|| "-".to_owned(), |micros| shown(*micros)));
        let share = row.share_of_bandwidth(bandwidth).map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0));
        let record = if row.is_measured { "measured" } else { "known" };
        lines.push(start.into_iter().chain(times).chain([share, record.to_owned()]).collect());
    }
    table::columns(&lines, &(2..all.len() + 4).collect::<Vec<_>>())
}

/// Microseconds, with a digit behind the point where there are few.
fn shown(micros: f64) -> String {
    if micros < 100.0 { format!("{micros:.1}") } else { format!("{micros:.0}") }
}
