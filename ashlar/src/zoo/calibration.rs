//! A text that a model's activations are measured on while another form of it is made, in windows of tokens.

use std::path::Path;

use anyhow::{Context, ensure};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

use super::measure;

/// Tokens of a window: as much context as GPTQ's own measurements need, not so much that few windows are left.
const WINDOW_TOKENS: usize = 512;
/// Least tokens of a text.
const TOKENS_MIN: usize = 128;
/// Most tokens of a text: their hidden states are held, one row each.
pub(super) const TOKENS_MAX: u32 = 1 << 20;

/// A text that a model is calibrated on.
pub(super) struct Calibration {
    /// BLAKE3 of the whole text.
    pub(super) digest: Digest,
    /// Its first tokens, in windows of equal length.
    pub(super) windows: Vec<Vec<u32>>,
}

impl Calibration {
    /// At most `tokens_max` tokens of a file, by a chain's tokenizer.
    ///
    /// # Errors
    /// When it cannot be read, or is too long or too short.
    pub(super) async fn read(zoo: &Zoo, chain: &Chain, path: &Path, tokens_max: usize) -> anyhow::Result<Self> {
        let text = measure::text(Some(path)).context("read the calibration text")?;
        let (mut tokens, begin) = measure::tokens(zoo, chain, &text).await?;
        ensure!(tokens.len() >= TOKENS_MIN, "the calibration text {} has {} tokens, less than {TOKENS_MIN}", path.display(), tokens.len());
        tokens.truncate(tokens_max);
        let window_tokens = WINDOW_TOKENS.min(chain.context_tokens as usize).min(tokens.len());
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
