//! A text that something is fitted on, in windows of tokens.

use std::path::Path;

use anyhow::{Context, ensure};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

use super::measure;

/// Tokens of a window, at most: as much context as GPTQ's own measurements need, not so much that few windows are left.
const WINDOW_TOKENS: usize = 512;
/// Least tokens for what takes one model's activations.
const ONE_TOKENS_MIN: usize = 128;
/// Most tokens that are used: their hidden states may be held, one row each.
pub(super) const TOKENS_MAX: u32 = 1 << 20;

/// The text and how it was cut.
pub(super) struct Calibration {
    /// BLAKE3 of the whole text.
    pub(super) digest: Digest,
    /// Equally long.
    pub(super) windows: Vec<Vec<u32>>,
}

/// How a text may be cut.
pub(super) struct Cut {
    /// Fewer tokens are refused.
    pub(super) tokens_min: usize,
    /// More are left.
    pub(super) tokens_max: usize,
    /// Windows at least: they are shorter where the text is.
    pub(super) windows_min: usize,
    /// Positions that whatever reads them takes.
    pub(super) context_tokens: u32,
}

impl Calibration {
    /// For what takes one model's activations, where a text is given: a window is enough.
    pub(super) async fn of_one(zoo: &Zoo, chain: &Chain, path: Option<&Path>, tokens_max: u32) -> anyhow::Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let cut = Cut { tokens_min: ONE_TOKENS_MIN, tokens_max: tokens_max as usize, windows_min: 1, context_tokens: chain.context_tokens };
        Self::read(zoo, chain, path, &cut).await.map(Some)
    }

    /// Reads a text and cuts it by a chain's tokenizer.
    pub(super) async fn read(zoo: &Zoo, chain: &Chain, path: &Path, cut: &Cut) -> anyhow::Result<Self> {
        let text = measure::text(Some(path)).context("read the calibration text")?;
        let (mut tokens, begin) = measure::tokens(zoo, chain, &text).await?;
        let least = cut.tokens_min;
        ensure!(tokens.len() >= least, "the calibration text {} has {} tokens, less than {least}", path.display(), tokens.len());
        tokens.truncate(cut.tokens_max);
        let window_tokens = WINDOW_TOKENS.min(cut.context_tokens as usize).min(tokens.len() / cut.windows_min);
        let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(window_tokens).map(<[u32]>::to_vec).collect();
        if let Some(begin) = begin {
            windows.iter_mut().for_each(|window| window[0] = begin);
        }
        Ok(Self { digest: Digest::of(text.as_bytes()), windows })
    }

    /// Which text, and how much of it.
    pub(super) fn json(&self) -> Value {
        json!({ "text_blake3": self.digest, "tokens": self.windows.iter().map(Vec::len).sum::<usize>() })
    }
}
