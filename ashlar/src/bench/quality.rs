//! `ashlar bench quality`: what the stored forms of a model cost, on one text: perplexity, and the divergence of each next-token
//! distribution from the baseline's. The arithmetic is `ashlar_executor::model::quality`; here are text, table and JSON.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::quality::{Mean, Quality, Tally, Windows};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat, Ops};
use ashlar_router::text::tokenizer::Tokenizer;
use ashlar_zoo::inspect::Shown;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{Place, Zoo};
use serde_json::{Value, json};

use super::args::{report_file, threads};
use crate::config::{ZooConfig, zoo_of_environment};
use crate::output;

/// Tokens of a window: logits of half of them are held for two models at a time.
const WINDOW_TOKENS_MAX: usize = 8192;
/// Bytes of a text.
const TEXT_BYTES_MAX: u64 = 64 << 20;
/// Tokens of a KV page, as the executor has by default.
const PAGE_TOKENS: usize = 32;

/// Measures what stored forms of a model cost.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct QualityArgs {
    /// Directory of the zoo, or s3://BUCKET[/PREFIX] [env: ASHLAR_ZOO] [default: zoo-data]
    #[arg(long)]
    zoo: Option<Place>,
    /// TENANT/MODEL that the others are held against; its tokenizer cuts the text
    #[arg(long)]
    baseline: ModelId,
    /// TENANT/MODEL; several by repeating
    #[arg(long = "model", required = true)]
    models: Vec<ModelId>,
    /// Text to predict, UTF-8
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of the text at most, in whole windows [default: all]
    #[arg(long)]
    tokens: Option<usize>,
    /// Tokens of a window, of which the second half counts
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// How the models hold keys and values: f32, bf16 or int8. The baseline has f32
    #[arg(long, default_value = "f32")]
    kv_format: KvFormat,
    /// What the models' layers with bf16 weights are computed from: f32 or bf16. The baseline's are computed from f32
    #[arg(long, default_value = "f32")]
    bf16_compute: Bf16Compute,
    /// Threads [default: all cores]
    #[arg(long, default_value = "0", hide_default_value = true, allow_negative_numbers = true, value_parser = threads)]
    threads: usize,
    /// Write the table as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    json: Option<PathBuf>,
    /// Commit, for the JSON
    #[arg(long)]
    commit: Option<String>,
}

/// A model under measurement.
struct Candidate {
    shown: Shown,
    model: Alone<Cpu>,
    tally: Tally,
}

/// Loads the models and measures window by window. It keeps all cores busy, so it runs outside the async threads.
pub(crate) async fn run(args: QualityArgs) -> anyhow::Result<()> {
    ensure!((4..=WINDOW_TOKENS_MAX).contains(&args.window), "--window must be from 4 to {WINDOW_TOKENS_MAX}");
    let root = match &args.zoo {
        Some(root) => root.clone(),
        None => zoo_of_environment()?.unwrap_or_else(|| ZooConfig::default().root),
    };
    let zoo = Zoo::open_place(&root).await?;
    let text = read_text(&args.text)?;
    let baseline = zoo.show(&args.baseline).await?;
    let (tokens, windows) = tokenise(&zoo, &baseline, &text, args.window).await?;
    let mut cut = windows.cut(&tokens);
    cut.truncate(args.tokens.map_or(usize::MAX, |tokens| tokens / args.window));
    ensure!(!cut.is_empty(), "the text has {} tokens: less than a window of {}", tokens.len(), args.window);

    let options = CpuOptions { threads: args.threads, isa: None, bf16_compute: Bf16Compute::F32 };
    let (exact, ops) = (Arc::new(Cpu::new(options)), Arc::new(Cpu::new(CpuOptions { bf16_compute: args.bf16_compute, ..options })));
    let mut candidates = Vec::new();
    for id in std::iter::once(&args.baseline).chain(&args.models) {
        let shown = zoo.show(id).await?;
        ensure!(shown.chain.context_tokens as usize >= args.window, "{id} has a context of {} tokens", shown.chain.context_tokens);
        let (kv_format, ops) = if candidates.is_empty() { (KvFormat::F32, &exact) } else { (args.kv_format, &ops) };
        let model = Alone::load(Arc::clone(ops), &zoo, shown.name.chain, windows.limits(PAGE_TOKENS, kv_format))
            .await
            .with_context(|| format!("load {id}"))?;
        let vocab_of_baseline = candidates.first().map_or(model.vocab(), |baseline: &Candidate| baseline.model.vocab());
        ensure!(model.vocab() == vocab_of_baseline, "{id} has {} tokens, {} has {vocab_of_baseline}", model.vocab(), args.baseline);
        candidates.push(Candidate { shown, model, tally: Tally::default() });
    }
    let text_hash = blake3::hash(text.as_bytes()).to_hex().to_string();
    tokio::task::spawn_blocking(move || measure(&args, &ops, candidates, windows, &cut, &text_hash)).await?
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let read = || -> anyhow::Result<String> {
        let bytes = std::fs::metadata(path)?.len();
        ensure!(bytes <= TEXT_BYTES_MAX, "{bytes} bytes, at most {TEXT_BYTES_MAX}");
        Ok(std::fs::read_to_string(path)?)
    };
    read().with_context(|| format!("read {}", path.display()))
}

/// The text's tokens, and how they are cut: each window begins as the tokenizer has every text begin.
async fn tokenise(zoo: &Zoo, model: &Shown, text: &str, window_tokens: usize) -> anyhow::Result<(Vec<u32>, Windows)> {
    let digest = model.chain.assets.tokenizer.with_context(|| format!("{} has no tokenizer", model.model))?;
    let tokenizer = Tokenizer::from_bytes(&zoo.read_asset(digest).await?)?;
    let tokens = tokenizer.encode(text, true)?;
    let begin = model.chain.tokens.bos.filter(|bos| tokens.first() == Some(bos));
    Ok((tokens, Windows { window_tokens, begin }))
}

fn measure(
    args: &QualityArgs,
    ops: &Cpu,
    mut candidates: Vec<Candidate>,
    windows: Windows,
    cut: &[Vec<u32>],
    text_hash: &str,
) -> anyhow::Result<()> {
    let (count, tokens) = (cut.len(), windows.window_tokens);
    output::line(format_args!("{count} windows of {tokens} tokens of {}, {}", args.text.display(), ops.describe()))?;
    for window in cut {
        let (baseline, others) = candidates.split_first_mut().expect("a baseline");
        let rows = windows.logits(&mut baseline.model, window);
        baseline.tally.add_window(windows, window, &rows, &rows);
        for other in others {
            other.tally.add_window(windows, window, &rows, &windows.logits(&mut other.model, window));
        }
    }
    let width = candidates.iter().map(|candidate| candidate.shown.model.len()).max().unwrap_or(0).max(5);
    output::line(format_args!(
        "{:<width$}  {:>8}  {:<14}  {:>18}  {:>22}  {:>9}  {:>9}  {:>9}  {:>8}",
        "model", "MB", "matrices", "perplexity", "ln of ratio", "mean KL", "median KL", "99% KL", "same top"
    ))?;
    let mut reported = Vec::new();
    for candidate in &candidates {
        let quality = candidate.tally.sum_up().expect("a row of each window");
        output::line(format_args!("{:<width$}  {}", candidate.shown.model, line(&candidate.shown, &quality)))?;
        reported.push(report(&candidate.shown, &quality));
    }
    let Some(path) = &args.json else { return Ok(()) };
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": args.commit,
        "machine": super::process::machine(),
        "device": ops.describe(),
        "text_blake3": text_hash,
        "windows": cut.len(),
        "window_tokens": windows.window_tokens,
        "begin_token": windows.begin,
        "baseline": args.baseline.to_string(),
        "kv_format": args.kv_format.name(),
        "bf16_compute": args.bf16_compute.name(),
        "models": reported,
    });
    std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("write {}", path.display()))
}

fn line(model: &Shown, quality: &Quality) -> String {
    format!(
        "{:>8.1}  {:<14}  {:>18}  {:>22}  {:>9.6}  {:>9.6}  {:>9.6}  {:>7.2}%",
        model.bytes as f64 / 1e6,
        matrix_dtypes(model).join("+"),
        format!("{:.4} ± {:.4}", quality.perplexity, quality.perplexity_error),
        format!("{:.6} ± {:.6}", quality.excess.mean, quality.excess.error),
        quality.divergence.mean,
        quality.divergence_p50,
        quality.divergence_p99,
        quality.same_top_share * 100.0,
    )
}

fn report(model: &Shown, quality: &Quality) -> Value {
    let mean = |mean: Mean| json!({ "mean": mean.mean, "standard_error": mean.error });
    json!({
        "model": model.model,
        "bytes": model.bytes,
        "matrices": matrix_dtypes(model),
        "rows": quality.row_count,
        "perplexity": quality.perplexity,
        "perplexity_standard_error": quality.perplexity_error,
        "ln_perplexity_ratio": mean(quality.excess),
        "kl": mean(quality.divergence),
        "kl_p50": quality.divergence_p50,
        "kl_p99": quality.divergence_p99,
        "kl_max": quality.divergence_max,
        "same_top_share": quality.same_top_share,
    })
}

/// Dtypes of the matrices, each once, in the order of the chain.
fn matrix_dtypes(model: &Shown) -> Vec<&str> {
    let mut dtypes: Vec<&str> = Vec::new();
    for dtype in model.blocks.iter().flat_map(|block| &block.dtypes) {
        if !dtypes.contains(&dtype.as_str()) {
            dtypes.push(dtype);
        }
    }
    dtypes
}
