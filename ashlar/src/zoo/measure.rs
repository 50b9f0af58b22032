//! What another form of a model changes in what the model says: the divergence of each next-token distribution from the model's own, on a
//! text. The arithmetic is `ashlar_executor::model::quality`. Nothing is written: proposals and drafts are loaded from memory.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use ashlar_executor::model::adapter::LoadedAdapter;
use ashlar_executor::model::alone::Alone;
use ashlar_executor::model::block::LoadedBlock;
use ashlar_executor::model::outputs::Outputs;
use ashlar_executor::model::quality::{Quality, Tally, Windows};
use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat};
use ashlar_router::text::tokenizer::Tokenizer;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::relatives::Proposal;
use ashlar_zoo::store::Zoo;

/// What is predicted unless another text is given: prose, a question, instructions, a list, a line of code. Of our own words.
const TEXT: &str = include_str!("measure.txt");
/// Bytes of a text that is given; what comes after the windows that are measured is not read anyway.
const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Tokens of a window, of which the second half counts, unless told otherwise.
pub(super) const WINDOW_TOKENS: usize = 128;
/// Windows that are measured at most, unless told otherwise.
pub(super) const WINDOWS_MAX: usize = 32;
/// Tokens of a KV page, as the executor has by default.
pub(super) const PAGE_TOKENS: usize = 32;

/// Divergences from the merged model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// Of base and adapters.
    pub(super) unmerged: Quality,
    /// Of the base alone, for comparison: what would be lost without the adapters.
    pub(super) base: Quality,
}

/// Text to measure on.
pub(super) fn text(path: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = path else { return Ok(TEXT.to_owned()) };
    let read = || -> anyhow::Result<String> {
        let bytes = std::fs::metadata(path)?.len();
        ensure!(bytes <= TEXT_BYTES_MAX, "{bytes} bytes, at most {TEXT_BYTES_MAX}");
        Ok(std::fs::read_to_string(path)?)
    };
    read().with_context(|| format!("read {}", path.display()))
}

/// Runs the merged model, the proposal and the base over `text`, in f32.
pub(super) async fn measure(zoo: &Zoo, merged: Digest, proposal: &Proposal, text: &str) -> anyhow::Result<Measured> {
    let (windows, cut) = cut(zoo, &proposal.chain, text, WINDOW_TOKENS, WINDOWS_MAX).await?;
    let ops = device();
    let limits = windows.limits(PAGE_TOKENS, KvFormat::F32);
    let merged = Alone::load(Arc::clone(&ops), zoo, merged, limits).await.context("load the model")?;
    let base = zoo.read_model(&proposal.base).await?.chain;
    let base = Alone::load(Arc::clone(&ops), zoo, base, limits).await.with_context(|| format!("load {}", proposal.base))?;
    let (outputs, mut blocks) = (Outputs::default(), Vec::new());
    // The head first: a token table of the same tensor is read out of it.
    for index in (0..proposal.blocks().len()).rev() {
        let mapped = proposal.map_block(zoo, index).await?;
        blocks.push(LoadedBlock::load(&*ops, &mapped.block, &mapped, &outputs).with_context(|| format!("load block {index}"))?);
    }
    blocks.reverse();
    let mut adapters = Vec::new();
    for (index, mapped) in proposal.adapters() {
        let loaded = LoadedAdapter::load(&*ops, &proposal.blocks()[index], &mapped.adapter, &mapped);
        adapters.push((index, loaded.with_context(|| format!("load the adapter of block {index}"))?));
    }
    let unmerged = Alone::new(ops, blocks, limits)?.adapted(adapters)?;
    ensure!(base.vocab() == merged.vocab(), "{} has {} tokens, the model {}", proposal.base, base.vocab(), merged.vocab());
    let compared = tokio::task::spawn_blocking(move || compare(windows, &cut, &mut { merged }, &mut [unmerged, base])).await?;
    let [unmerged, base] = compared.try_into().expect("a quality of each");
    Ok(Measured { unmerged, base })
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
