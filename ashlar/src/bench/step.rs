//! `ashlar bench step`: whole steps of a model of the zoo on this process's own device, without engine and server: how long a step
//! takes, what share of the read bandwidth that is, how many barriers it has, and which ops the time goes to. With `--adapter-rank` decode steps
//! alternate with steps whose rows all have adapters of their own.

mod adapters;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ashlar_cuda::Cuda;
use ashlar_executor::model::alone::{AloneLimits, load_chain};
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::steps::Steps;
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa, probe};
use ashlar_kernels::ops::{Bf16Compute, KvFormat, Ops};
use ashlar_kernels::timed::{OpTime, Timed};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Block;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{Place, Zoo};
use serde_json::json;

use super::args::{report_file, threads, whole};
use crate::config::{ZooConfig, zoo_of_environment};
use crate::device::{Wanted, open_card};
use crate::devices::check_isa;
use crate::output;

/// Rows of a step at most.
const ROWS_MAX: usize = 8192;
/// Tokens before a decode step.
const CONTEXT_MAX: usize = 1 << 20;
/// Bytes that the bandwidth probe reads.
const PROBE_BYTES: usize = 1 << 30;
/// Tokens of a KV page, as the executor has by default.
const PAGE_TOKENS: usize = 32;

/// Measures whole steps.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StepArgs {
    /// Directory of the zoo, or s3://BUCKET[/PREFIX] [env: ASHLAR_ZOO] [default: zoo-data]
    #[arg(long)]
    zoo: Option<Place>,
    /// TENANT/MODEL
    #[arg(long)]
    model: ModelId,
    /// Measure on this device: cpu or cuda:N
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Wanted,
    /// Threads [default: all cores]
    #[arg(long, default_value = "0", hide_default_value = true, allow_negative_numbers = true, value_parser = threads)]
    threads: usize,
    /// Instruction set: avx512-bf16, avx512, avx-vnni, avx2 or scalar [default: the best that the machine has]
    #[arg(long)]
    isa: Option<Isa>,
    /// Tokens that each sequence has before a decode step
    #[arg(long, default_value = "128", allow_negative_numbers = true, value_parser = whole(0, CONTEXT_MAX))]
    context: usize,
    /// How keys and values are held: f32, bf16 or int8
    #[arg(long, default_value = "f32")]
    kv_format: KvFormat,
    /// What layers with bf16 weights are computed from: f32 or bf16
    #[arg(long, default_value = "f32")]
    bf16_compute: Bf16Compute,
    /// Sequences of a decode step, comma-separated
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1,16,32", allow_negative_numbers = true, value_parser = whole(1, ROWS_MAX))]
    decode: Vec<usize>,
    /// Tokens of a prompt computed in one step, comma-separated
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "128,512", allow_negative_numbers = true, value_parser = whole(1, ROWS_MAX))]
    prefill: Vec<usize>,
    /// Also time decode steps whose sequences each have an adapter of their own, of this rank
    #[arg(long, value_name = "RANK", allow_negative_numbers = true, value_parser = whole(1, adapters::RANK))]
    adapter_rank: Option<usize>,
    /// Matrices that the adapters change, comma-separated
    #[arg(long, value_name = "MATRICES", value_delimiter = ',', default_value = "q,k,v,o,gate,up,down", value_parser = adapters::matrix)]
    adapter_matrices: Vec<String>,
    /// Seconds for each cell
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Show the time of each op
    #[arg(long)]
    ops: bool,
    /// Write the table as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    json: Option<PathBuf>,
    /// Commit, for the JSON
    #[arg(long)]
    commit: Option<String>,
}

/// What a step does.
#[derive(Debug, Clone, Copy)]
enum Cell {
    /// One more token of each of so many sequences.
    Decode(usize),
    /// The first so many tokens of one.
    Prefill(usize),
}

/// Loads the model and measures cell by cell. It keeps all cores busy, so it runs outside the async threads.
pub(crate) async fn run(args: StepArgs) -> anyhow::Result<()> {
    ensure!((0.05..=600.0).contains(&args.seconds), "--seconds must be from 0.05 to 600");
    check_isa("--isa", args.isa)?;
    let root = match &args.zoo {
        Some(root) => root.clone(),
        None => zoo_of_environment()?.unwrap_or_else(|| ZooConfig::default().root),
    };
    let zoo = Zoo::open_place(&root).await?;
    let name = zoo.read_model(&args.model).await?;
    match args.device {
        Wanted::Cuda(ordinal) => {
            let (card, _) = open_card(ordinal).with_context(|| format!("use --device cuda:{ordinal}"))?;
            measure_on(args, card, &zoo, name.chain).await
        }
        Wanted::Auto | Wanted::Cpu => {
            let cpu = Cpu::new(CpuOptions { threads: args.threads, isa: args.isa, bf16_compute: args.bf16_compute });
            measure_on(args, Arc::new(Timed::new(cpu)), &zoo, name.chain).await
        }
    }
}

/// A name of one device: which is best is not asked here.
fn device(text: &str) -> Result<Wanted, String> {
    let wanted = text.parse().ok().filter(|wanted| *wanted != Wanted::Auto);
    wanted.ok_or_else(|| "it must be cpu or cuda:N".to_owned())
}

/// What is asked of a device beside its ops.
trait Measured: Ops {
    /// Bytes a second that it reads at best.
    fn read_bandwidth(&self) -> anyhow::Result<f64>;
    /// Barriers that its threads met at so far.
    fn barriers(&self) -> u64 {
        0
    }
    /// Waits until all is done that was asked of it.
    fn wait(&self) {}
    /// Times of ops since the last call, where it takes them.
    fn take(&self) -> BTreeMap<&'static str, OpTime> {
        BTreeMap::new()
    }
}

impl Measured for Timed<Cpu> {
    fn read_bandwidth(&self) -> anyhow::Result<f64> {
        Ok(probe::read_bandwidth(self.inner(), PROBE_BYTES)?)
    }

    fn barriers(&self) -> u64 {
        self.inner().barriers()
    }

    fn take(&self) -> BTreeMap<&'static str, OpTime> {
        Timed::take(self)
    }
}

/// A card's ops return before they are done, so that their times are not known one by one.
impl Measured for Cuda {
    fn read_bandwidth(&self) -> anyhow::Result<f64> {
        Ok(Cuda::read_bandwidth(self, PROBE_BYTES, Duration::from_millis(200))?)
    }

    fn wait(&self) {
        Cuda::wait(self).expect("a card that fails measures nothing");
    }
}

async fn measure_on<B: Measured>(args: StepArgs, ops: Arc<B>, zoo: &Zoo, chain: Digest) -> anyhow::Result<()> {
    let blocks = load_chain(&*ops, zoo, chain).await?;
    let mut descriptors = Vec::new();
    for block in zoo.read_chain(chain).await?.blocks {
        descriptors.push(zoo.read_block(block).await?);
    }
    tokio::task::spawn_blocking(move || measure(&args, ops, blocks, &descriptors)).await?
}

fn measure<B: Measured>(args: &StepArgs, ops: Arc<B>, blocks: Vec<LoadedBlock<B>>, descriptors: &[Block]) -> anyhow::Result<()> {
    output::line(format_args!("{}, {}", args.model, ops.describe()))?;
    let cells: Vec<Cell> = args.decode.iter().map(|n| Cell::Decode(*n)).chain(args.prefill.iter().map(|n| Cell::Prefill(*n))).collect();
    let rows_max = args.decode.iter().chain(&args.prefill).max().copied().unwrap_or(1);
    let tokens_max = args.prefill.iter().max().copied().unwrap_or(1).max(args.context + 1);
    let limits = AloneLimits { chunk_tokens_max: rows_max, tokens_max, page_tokens: PAGE_TOKENS, kv_format: args.kv_format };
    let sequences = args.decode.iter().max().copied().unwrap_or(1);
    let mut steps = Steps::new(Arc::clone(&ops), blocks, limits, sequences).context("make room for the sequences")?;
    if let Some(rank) = args.adapter_rank {
        steps
            .take_adapters(adapters::noise(&*ops, descriptors, &args.adapter_matrices, rank, sequences)?)
            .context("make room for adapters")?;
    }
    let bandwidth = ops.read_bandwidth().context("probe the device")?;
    output::line(format_args!(
        "read bandwidth {:.1} GB/s; a decode step reads {:.1} MB of weights, so {:.0} steps/s at most",
        bandwidth / 1e9,
        steps.read_bytes() as f64 / 1e6,
        bandwidth / steps.read_bytes() as f64
    ))?;
    let [step, best, median, rate, share, barriers] = ["step", "best ms", "median ms", "tokens/s", "of bandwidth", "barriers"];
    output::line(format_args!("{step:>18}  {best:>9}  {median:>9}  {rate:>9}  {share:>12}  {barriers:>8}"))?;
    let mut reported = Vec::new();
    for cell in cells {
        reported.extend(measure_cell(args, &*ops, &mut steps, bandwidth, cell)?);
    }
    let Some(path) = &args.json else { return Ok(()) };
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": args.commit,
        "machine": super::process::machine(),
        "device": ops.describe(),
        "model": args.model.to_string(),
        "context": args.context,
        "kv_format": args.kv_format.to_string(),
        "bf16_compute": args.bf16_compute.to_string(),
        "adapter_rank": args.adapter_rank,
        "read_bytes_per_second": bandwidth,
        "weight_bytes_of_a_step": steps.read_bytes(),
        "cells": reported,
    });
    std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("write {}", path.display()))
}

/// What steps of one kind took.
#[derive(Debug, Default)]
struct Timing {
    times: Vec<Duration>,
    barriers: u64,
    ops: BTreeMap<&'static str, OpTime>,
}

/// Measures one cell, and with adapters the same in turns with it.
fn measure_cell<B: Measured>(
    args: &StepArgs,
    ops: &B,
    steps: &mut Steps<B>,
    bandwidth: f64,
    cell: Cell,
) -> anyhow::Result<Vec<serde_json::Value>> {
    let (name, tokens, kinds) = match cell {
        Cell::Decode(sequences) => (format!("decode {sequences}"), sequences, if args.adapter_rank.is_some() { 2 } else { 1 }),
        Cell::Prefill(rows) => (format!("prefill {rows}"), rows, 1),
    };
    let timings = take_turns(args, ops, steps, cell, kinds);
    let read_bytes = [steps.read_bytes(), steps.read_bytes() + steps.adapter_bytes(tokens)];
    let mut reported = Vec::new();
    for (kind, timing) in timings.into_iter().enumerate() {
        let name = if kind == 0 { name.clone() } else { format!("{name} adapted") };
        reported.push(report(args, name, tokens, timing, read_bytes[kind] as f64 / bandwidth)?);
    }
    Ok(reported)
}

/// Steps in turns: the first kind without adapters, the second with them.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
fn take_turns<B: Measured>(args: &StepArgs, ops: &B, steps: &mut Steps<B>, cell: Cell, kinds: usize) -> Vec<Timing> {
    let mut step = |kind| {
        steps.adapt(kind == 1);
        match cell {
            Cell::Decode(sequences) => steps.step(sequences, args.context, 1),
            Cell::Prefill(rows) => steps.step(1, 0, rows),
        }
        ops.wait();
    };
    (0..kinds).for_each(&mut step);
    ops.take();
    let mut timings: Vec<Timing> = (0..kinds).map(|_| Timing::default()).collect();
    let begin = Instant::now();
    while timings[0].times.len() < 3 || begin.elapsed() < Duration::from_secs_f64(args.seconds) {
        for (kind, timing) in timings.iter_mut().enumerate() {
            let (barriers, start) = (ops.barriers(), Instant::now());
            step(kind);
            timing.times.push(start.elapsed());
            timing.barriers += ops.barriers() - barriers;
            for (name, op) in ops.take() {
                let sum = timing.ops.entry(name).or_default();
                (sum.calls, sum.time) = (sum.calls + op.calls, sum.time + op.time);
            }
        }
    }
    timings
}

/// Prints what steps of one kind took, of which reading their weights alone would take so many seconds.
fn report(args: &StepArgs, name: String, tokens: usize, timing: Timing, read_seconds: f64) -> anyhow::Result<serde_json::Value> {
    let Timing { mut times, barriers, ops } = timing;
    times.sort_unstable();
    let (best, median) = (times[0].as_secs_f64(), times[times.len() / 2].as_secs_f64());
    let barriers = barriers as f64 / times.len() as f64;
    let share = read_seconds / median;
    let of_bandwidth = if name.starts_with("decode 1 ") || name == "decode 1" { format!("{:.0}%", share * 100.0) } else { "-".to_owned() };
    output::line(format_args!(
        "{name:>18}  {:>9.3}  {:>9.3}  {:>9.0}  {of_bandwidth:>12}  {barriers:>8.0}",
        best * 1e3,
        median * 1e3,
        tokens as f64 / median
    ))?;
    let total: Duration = times.iter().sum();
    let mut of_ops: Vec<_> = ops.into_iter().collect();
    of_ops.sort_by_key(|(_, op)| std::cmp::Reverse(op.time));
    if args.ops {
        for (name, op) in &of_ops {
            output::line(format_args!(
                "{:>32}  {:>5.1}%  {:>9.1} us a step  {:>4} calls",
                name,
                op.time.as_secs_f64() / total.as_secs_f64() * 100.0,
                op.time.as_secs_f64() * 1e6 / times.len() as f64,
                op.calls / times.len() as u64
            ))?;
        }
    }
    let of_ops: serde_json::Map<String, serde_json::Value> = of_ops
        .into_iter()
        .map(|(name, op)| {
            let seconds = op.time.as_secs_f64() / times.len() as f64;
            (name.to_owned(), json!({ "seconds": seconds, "calls": op.calls / times.len() as u64 }))
        })
        .collect();
    Ok(json!({
        "step": name,
        "tokens": tokens,
        "best_seconds": best,
        "median_seconds": median,
        "share_of_bandwidth": share,
        "barriers": barriers,
        "ops": of_ops,
    }))
}
