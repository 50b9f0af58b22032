//! Tokenizers as Hugging Face's tokenizer.json: taken as they are, or built from GGUF metadata (`tokenizer/gguf.rs`), and
//! checked against the embedding by loading them.

mod bounds;
mod gguf;
mod pre;
mod spm;

use bytes::Bytes;
use serde_json::Value;
use tokenizers::Tokenizer;

pub use bounds::check as check_bounds;
pub use gguf::{end_tokens, from_gguf};

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is none.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The tokenizers library cannot load it.
    #[error("tokenizer.json cannot be loaded: {0}")]
    Load(String),
    /// A step that may make a text too long, or panics.
    #[error("its {part} is not taken: {reason}")]
    Step {
        /// Key of tokenizer.json.
        part: String,
        /// Why.
        reason: String,
    },
    /// Ids that the embedding has no row for.
    #[error("its token `{token}` has id {id}, but the embedding has {rows} rows")]
    Rows {
        /// Text of the token.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        rows: u32,
    },
    /// GGUF metadata that is missing.
    #[error("metadata `{0}` is missing")]
    Key(&'static str),
    /// GGUF metadata of another type or length.
    #[error("metadata `{key}` is not {expected}")]
    Value {
        /// Key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A kind that is not built.
    #[error("tokenizer model `{0}` is not supported (supported: gpt2, llama)")]
    Model(String),
    /// A way to cut words that is not known.
    #[error("pre-tokenizer `{0}` is not supported (supported: default, gpt-2, smollm, llama-bpe, qwen2 and their aliases)")]
    Pre(String),
    /// The same text twice in the vocabulary.
    #[error("token `{0}` is in the vocabulary twice")]
    Duplicate(String),
    /// A merge of pieces that are no tokens.
    #[error("merge `{0}` is not of two tokens")]
    Merge(String),
}

/// A tokenizer that fits its embedding.
pub struct Fitted {
    /// tokenizer.json as it is stored.
    pub json: Bytes,
    /// Loaded.
    pub tokenizer: Tokenizer,
    /// What had to be changed.
    pub notes: Vec<String>,
}

/// Loads a tokenizer.json and checks that each id has one of `rows` embedding rows. Added tokens behind the last row
/// (Gemma 3's image token in its text models) are taken out: no text may give an id that cannot be looked up.
///
/// # Errors
/// When it cannot be loaded, or tokens of its vocabulary have no row.
pub fn fit(json: Vec<u8>, rows: u32) -> Result<Fitted, TokenizerError> {
    let tokenizer = load(&json)?;
    if excess(&tokenizer, rows).is_none() {
        return Ok(Fitted { json: json.into(), tokenizer, notes: Vec::new() });
    }
    let (json, removed) = without_added(&json, rows)?;
    let tokenizer = load(&json)?;
    if let Some((token, id)) = excess(&tokenizer, rows) {
        return Err(TokenizerError::Rows { token, id, rows });
    }
    let notes = vec![format!("added tokens behind the embedding's {rows} rows were left out of the tokenizer: {}", removed.join(", "))];
    Ok(Fitted { json: json.into(), tokenizer, notes })
}

/// Loads it where its steps are bounded, and tries it: a step that panics is told now and not when somebody asks.
fn load(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
    check_bounds(json)?;
    let tokenizer = Tokenizer::from_bytes(json).map_err(|e| TokenizerError::Load(e.to_string()))?;
    let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // What it says of the text is its own affair.
        let _ = tokenizer.encode_fast(TRIED, true).map(|encoding| tokenizer.decode(encoding.get_ids(), false));
    }));
    match tried {
        Ok(()) => Ok(tokenizer),
        Err(_) => Err(TokenizerError::Load(format!("it panics at {TRIED:?}"))),
    }
}

/// Letters, a digit, blanks, another script and what normalisers widen.
const TRIED: &str = "Ab a\n 1é ﷺ";

/// The token with the largest id, if that has no row.
fn excess(tokenizer: &Tokenizer, rows: u32) -> Option<(String, u32)> {
    tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id).filter(|(_, id)| *id >= rows)
}

fn without_added(json: &[u8], rows: u32) -> Result<(Vec<u8>, Vec<String>), TokenizerError> {
    let mut value: Value = serde_json::from_slice(json).map_err(|e| TokenizerError::Load(e.to_string()))?;
    let mut removed = Vec::new();
    if let Some(Value::Array(added)) = value.get_mut("added_tokens") {
        added.retain(|token| {
            let keep = token.get("id").and_then(Value::as_u64).is_none_or(|id| id < u64::from(rows));
            if !keep {
                removed.push(token.get("content").and_then(Value::as_str).unwrap_or_default().to_owned());
            }
            keep
        });
    }
    let json = serde_json::to_vec(&value).expect("a Value is always JSON");
    Ok((json, removed))
}

#[cfg(test)]
mod tests;
