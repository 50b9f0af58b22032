//! `ashlar bench storage`: what the tensors of a zoo take on disk, by the form that each is stored in, and how fast they come back: read, decoded
//! and verified, on one core and on all, beside a copy of as many bytes in memory. Files are read once before, so that disks are not measured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ashlar_zoo::ingest::human_bytes;
use ashlar_zoo::manifest::TensorRef;
use ashlar_zoo::store::{Form, Place, Zoo};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

use super::args::{report_file, whole};
use crate::config::{ZooConfig, zoo_of_environment};
use crate::output;

/// Rounds over all tensors at most.
const ROUNDS_MAX: usize = 1000;
/// Bytes that a thread copies at a time: beyond any cache.
const COPY_BYTES: usize = 256 << 20;

/// Measures how a zoo's tensors are stored and read back.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StorageArgs {
    /// Directory of the zoo, or s3://BUCKET[/PREFIX] [env: ASHLAR_ZOO] [default: zoo-data]
    #[arg(long)]
    zoo: Option<Place>,
    /// Rounds over all tensors; the median counts
    #[arg(long, default_value = "5", allow_negative_numbers = true, value_parser = whole(1, ROUNDS_MAX))]
    rounds: usize,
    /// Write the table as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    json: Option<PathBuf>,
    /// Commit, for the JSON
    #[arg(long)]
    commit: Option<String>,
}

/// Tensors of one form.
#[derive(Debug, Default)]
struct Kind {
    tensors: Vec<TensorRef>,
    raw_bytes: u64,
    stored_bytes: u64,
}

/// Measures form by form.
pub(crate) async fn run(args: StorageArgs) -> anyhow::Result<()> {
    let root = match &args.zoo {
        Some(root) => root.clone(),
        None => zoo_of_environment()?.unwrap_or_else(|| ZooConfig::default().root),
    };
    let zoo = Zoo::open_place(&root).await?;
    let kinds = kinds(&zoo).await?;
    ensure!(!kinds.is_empty(), "the zoo in {root} has no tensors");
    let all = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores: Vec<usize> = if all > 1 { vec![1, all] } else { vec![1] };
    let mut copied = BTreeMap::new();
    for cores in &cores {
        let cores = *cores;
        let copy = tokio::task::spawn_blocking(move || copy_speed(cores)).await.context("copy in memory")?;
        output::line(format_args!("copy in memory, {cores} cores: {:.2} GB/s", copy / 1e9))?;
        copied.insert(cores, copy);
    }
    let [form, tensors, raw, stored, saved] = ["form", "tensors", "raw", "stored", "saved"];
    let speeds: Vec<String> = cores.iter().map(|cores| format!("GB/s, {cores} cores")).collect();
    output::line(format_args!("{form:>6}  {tensors:>8}  {raw:>9}  {stored:>9}  {saved:>7}  {}", speeds.join("  ")))?;
    let mut rows = Vec::new();
    for (form, kind) in &kinds {
        let mut restored = BTreeMap::new();
        for cores in &cores {
            restored.insert(*cores, restore_speed(&zoo, kind, *cores, args.rounds).await?);
        }
        let saved = 100.0 * (1.0 - kind.stored_bytes as f64 / kind.raw_bytes as f64);
        let (raw, stored) = (human_bytes(kind.raw_bytes), human_bytes(kind.stored_bytes));
        let speeds: Vec<String> =
            restored.iter().map(|(cores, speed)| format!("{:>w$.2}", speed / 1e9, w = format!("GB/s, {cores} cores").len())).collect();
        output::line(format_args!("{form:>6}  {:>8}  {raw:>9}  {stored:>9}  {saved:>5.1} %  {}", kind.tensors.len(), speeds.join("  ")))?;
        rows.push(json!({
            "form": form,
            "tensor_count": kind.tensors.len(),
            "raw_bytes": kind.raw_bytes,
            "stored_bytes": kind.stored_bytes,
            "restored_bytes_per_second_by_cores": restored,
        }));
    }
    let Some(path) = &args.json else { return Ok(()) };
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": args.commit,
        "machine": super::process::machine(),
        "rounds": args.rounds,
        "copied_bytes_per_second_by_cores": copied,
        "forms": rows,
    });
    std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("write {}", path.display()))
}

/// The distinct tensors of all models by form.
async fn kinds(zoo: &Zoo) -> anyhow::Result<BTreeMap<&'static str, Kind>> {
    let mut tensors: BTreeMap<_, TensorRef> = BTreeMap::new();
    for (id, name) in zoo.list_models().await? {
        name.with_context(|| format!("read {id}"))?;
        let model = zoo.resolve(&id).await.with_context(|| format!("resolve {id}"))?;
        let of_blocks = model.blocks.iter().flat_map(|block| block.tensors.values());
        tensors.extend(of_blocks.map(|tensor| (tensor.digest, tensor.clone())));
        tensors.extend(model.adapters.values().flat_map(|adapter| adapter.tensors()).map(|(_, tensor)| (tensor.digest, tensor.clone())));
    }
    let mut kinds: BTreeMap<&'static str, Kind> = BTreeMap::new();
    for tensor in tensors.into_values() {
        let stored = zoo.stored_as(tensor.digest).await?;
        let form = match stored.form {
            Form::Raw => "raw",
            Form::Alone => "alone",
            Form::Over(_) => "delta",
        };
        let kind = kinds.entry(form).or_default();
        kind.raw_bytes += zoo.map_tensor(&tensor).await?.as_ref().len() as u64;
        kind.stored_bytes += stored.bytes;
        kind.tensors.push(tensor);
    }
    Ok(kinds)
}

/// Raw bytes a second of loading all tensors, `cores` at a time: read, decoded (a delta's base as well) and verified.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
async fn restore_speed(zoo: &Zoo, kind: &Kind, cores: usize, rounds: usize) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let began = Instant::now();
        let loads = stream::iter(&kind.tensors).map(|tensor| async move { zoo.map_tensor(tensor).await.map(drop) });
        loads.buffer_unordered(cores).try_for_each(|()| async { Ok(()) }).await?;
        times.push(began.elapsed());
    }
    Ok(kind.raw_bytes as f64 / median(times).as_secs_f64())
}

/// Bytes a second that so many threads copy from memory to memory.
#[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
fn copy_speed(cores: usize) -> f64 {
    let times = (0..5).map(|_| {
        let buffers: Vec<(Vec<u8>, Vec<u8>)> = (0..cores).map(|_| (vec![1; COPY_BYTES], vec![2; COPY_BYTES])).collect();
        let began = Instant::now();
        std::thread::scope(|scope| {
            for (from, mut to) in buffers {
                scope.spawn(move || {
                    to.copy_from_slice(&from);
                    std::hint::black_box(&to);
                });
            }
        });
        began.elapsed()
    });
    (cores * COPY_BYTES) as f64 / median(times.collect()).as_secs_f64()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
