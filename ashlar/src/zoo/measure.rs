//! What another form of a model says otherwise than the model that it stands for: the divergence of each next-token distribution, on a text. The
//! arithmetic is `ashlar_executor::model::quality`. Nothing is written: what is not stored yet is loaded from memory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use ashlar_executor::model::adapter::LoadedAdapter;
use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::outputs::Outputs;
use ashlar_executor::model::quality::{Quality, Tally, Windows};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_router::text::tokenizer::Tokenizer;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::measures::{Divergence, Measure};
use ashlar_zoo::relatives::Adapted;
use ashlar_zoo::store::{MappedBlock, StoreError, Zoo};
use clap::Args;
use serde_json::{Value, json};

/// What is predicted unless another text is given: prose, a question, instructions, a list, a line of code. Of our own words.
const TEXT: &str = include_str!("measure.txt");
/// Bytes of a text that is given; what comes after the windows that are measured is not read anyway.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Tokens of a window, of which the second half counts, unless told otherwise.
pub(super) const WINDOW_TOKENS: usize = 128;
/// Windows that are measured at most, unless told otherwise.
pub(super) const WINDOWS_MAX: usize = 32;
/// Tokens of a KV page, as the executor has by default.
const PAGE_TOKENS: usize = 32;

/// What a form of a model is measured on, as commands take it.
#[derive(Debug, Args)]
pub(super) struct MeasureArgs {
    /// Text to measure on, UTF-8, at most 1 MiB [default: half a page of English]
    #[arg(long, value_name = "FILE")]
    pub(super) text: Option<PathBuf>,
    /// Tokens of a measured window, of which the second half counts
    #[arg(long, default_value_t = WINDOW_TOKENS as u32, value_parser = clap::value_parser!(u32).range(4..=8192))]
    pub(super) window: u32,
    /// Windows that are measured, at most
    #[arg(long, default_value_t = WINDOWS_MAX as u32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(super) windows: u32,
}

/// Divergences from the source, the model that base and adapters stand for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// Of base and adapters.
    pub(super) adapted: Quality,
    /// Of the base alone, for comparison: what would be lost without the adapters. None where it has another vocabulary.
    pub(super) base: Option<Quality>,
}

/// A record of a measurement of a chain made by `method`, against the chain `source`.
///
/// # Errors
/// When the numbers are none that can be kept: a model that says nonsense may have an infinite perplexity.
pub(super) fn record(method: String, source: Digest, text: &str, quality: &Quality, created_ms: u64) -> anyhow::Result<Measure> {
    let measure = Measure {
        method,
        against: source,
        text: Digest::of(text.as_bytes()),
        rows: quality.row_count as u64,
        kl: divergence(quality),
        same_top_share: quality.same_top_share,
        perplexity: quality.perplexity,
        perplexity_of_source: quality.perplexity / quality.excess.mean.exp(),
        created_ms,
    };
    measure.check().context("record what was measured")?;
    Ok(measure)
}

/// The divergence of a measurement, as records have it.
pub(super) fn divergence(quality: &Quality) -> Divergence {
    Divergence { mean: quality.divergence.mean, p99: quality.divergence_p99, max: quality.divergence_max }
}

/// A measurement as JSON.
pub(super) fn json(quality: &Quality) -> Value {
    json!({
        "rows": quality.row_count,
        "kl": quality.divergence.mean,
        "kl_p99": quality.divergence_p99,
        "kl_max": quality.divergence_max,
        "same_top_share": quality.same_top_share,
        "perplexity": quality.perplexity,
        "perplexity_of_source": quality.perplexity / quality.excess.mean.exp(),
    })
}

/// Unix time in milliseconds.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Text to measure on.
pub(super) fn text(path: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = path else { return Ok(TEXT.to_owned()) };
    let read = || -> anyhow::Result<String> {
        // A pipe is welcome, and has no length that could be asked for.
        let mut bytes = Vec::new();
        File::open(path)?.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 <= TEXT_BYTES_MAX, "more than {TEXT_BYTES_MAX} bytes");
        Ok(String::from_utf8(bytes)?)
    };
    read().with_context(|| format!("read {}", path.display()))
}

/// What one window takes, keys and values in f32.
pub(super) fn limits(windows: Windows) -> AloneLimits {
    windows.limits(PAGE_TOKENS, KvFormat::F32)
}

/// Runs the source, base and adapters, and the base alone over `text`, in f32.
pub(super) async fn measure(zoo: &Zoo, adapted: &Adapted, text: &str) -> anyhow::Result<Measured> {
    let (windows, cut) = cut(zoo, &adapted.chain, text, WINDOW_TOKENS, WINDOWS_MAX).await?;
    let ops = device();
    let limits = limits(windows);
    let source = Alone::load(Arc::clone(&ops), zoo, adapted.source, limits).await.context("load the model")?;
    let base = zoo.read_model(&adapted.base).await?.chain;
    let base = Alone::load(Arc::clone(&ops), zoo, base, limits).await.with_context(|| format!("load {}", adapted.base))?;
    let blocks = load(&ops, adapted.blocks().len(), async |index| adapted.map_block(zoo, index).await).await?;
    let mut adapters = Vec::new();
    for (index, mapped) in adapted.adapters() {
        let loaded = LoadedAdapter::load(&*ops, &adapted.blocks()[index], &mapped.adapter, &mapped);
        adapters.push((index, loaded.with_context(|| format!("load the adapter of block {index}"))?));
    }
    let mut others = vec![Alone::new(ops, blocks, limits)?.adapted(adapters)?];
    others.extend((base.vocab() == source.vocab()).then_some(base));
    let qualities = tokio::task::spawn_blocking(move || compare(windows, &cut, &mut { source }, &mut others)).await?;
    Ok(Measured { adapted: qualities[0], base: qualities.get(1).copied() })
}

/// So many blocks of a chain that may not be stored yet, in order; `map` gives each by its place.
pub(super) async fn load(
    ops: &Cpu,
    count: usize,
    map: impl AsyncFn(usize) -> Result<MappedBlock, StoreError>,
) -> anyhow::Result<Vec<LoadedBlock<Cpu>>> {
    let (outputs, mut blocks) = (Outputs::default(), Vec::new());
    // The head first: a token table of the same tensor is read out of it.
    for index in (0..count).rev() {
        let mapped = map(index).await?;
        blocks.push(LoadedBlock::load(ops, &mapped.block, &mapped, &outputs).with_context(|| format!("load block {index}"))?);
    }
    blocks.reverse();
    Ok(blocks)
}

/// What computes: all cores, in f32 but for integer weights.
pub(super) fn device() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: 0, isa: None, bf16_compute: Bf16Compute::F32 }))
}

/// Tokens of a text by a chain's tokenizer, and the token that it puts in front, if any.
pub(super) async fn tokens(zoo: &Zoo, chain: &Chain, text: &str) -> anyhow::Result<(Vec<u32>, Option<u32>)> {
    let tokenizer = Tokenizer::from_bytes(&zoo.read_asset(chain.assets.tokenizer.context("it has no tokenizer")?).await?)?;
    let tokens = tokenizer.encode(text, true)?;
    let begin = chain.tokens.bos.filter(|bos| tokens.first() == Some(bos));
    Ok((tokens, begin))
}

/// At most so many windows of a text, and how they were cut.
pub(super) async fn cut(
    zoo: &Zoo,
    chain: &Chain,
    text: &str,
    window_tokens: usize,
    windows_max: usize,
) -> anyhow::Result<(Windows, Vec<Vec<u32>>)> {
    let (tokens, begin) = tokens(zoo, chain, text).await?;
    let windows = Windows { window_tokens: window_tokens.min(chain.context_tokens as usize), begin };
    ensure!(windows.window_tokens >= 4, "its context is {} tokens", chain.context_tokens);
    let mut cut = windows.cut(&tokens);
    cut.truncate(windows_max);
    ensure!(!cut.is_empty(), "the text has {} tokens: less than a window of {}", tokens.len(), windows.window_tokens);
    Ok((windows, cut))
}

/// Each of the others against the model, window by window.
pub(super) fn compare(windows: Windows, cut: &[Vec<u32>], model: &mut Alone<Cpu>, others: &mut [Alone<Cpu>]) -> Vec<Quality> {
    let mut tallies = vec![Tally::default(); others.len()];
    for window in cut {
        let rows = windows.logits(model, window);
        for (tally, other) in std::iter::zip(&mut tallies, &mut *others) {
            tally.add_window(windows, window, &rows, &windows.logits(other, window));
        }
    }
    tallies.iter().map(|tally| tally.sum_up().expect("a row of each window")).collect()
}
