//! A model's tokenizer: text to ids by the `tokenizers` crate, ids to text by our own table of pieces. Built once from the
//! bytes of a `tokenizer.json` and shared; see `detokenizer` for streaming.

use crate::text::pieces::{Pieces, PiecesError};

/// A loaded tokenizer. Immutable.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    longest_bytes: usize,
}

/// Why a tokenizer cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The bytes are no tokenizer.
    #[error("parse the tokenizer: {0}")]
    Parse(String),
    /// Its decoder or ids are not what we can stream.
    #[error(transparent)]
    Pieces(#[from] PiecesError),
    /// The text cannot be encoded.
    #[error("encode the text: {0}")]
    Encode(String),
    /// The ids cannot be decoded.
    #[error("decode the tokens: {0}")]
    Decode(String),
}

impl Tokenizer {
    /// Loads the bytes of a `tokenizer.json`. Truncation and padding that it may ask for are turned off.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        // Before anything runs: a zoo may have been written by a version that did not look.
        ashlar_zoo::tokenizer::check_bounds(bytes).map_err(|e| TokenizerError::Parse(e.to_string()))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| TokenizerError::Parse(e.to_string()))?;
        inner.with_truncation(None).map_err(|e| TokenizerError::Parse(e.to_string()))?;
        inner.with_padding(None);
        let pieces = Pieces::of(&inner)?;
        Ok(Self { inner, longest_bytes: pieces.longest_bytes(), pieces })
    }

    /// Token ids of a text, with or without what the post-processor adds (such as a beginning-of-sequence token). Special
    /// tokens spelled out in the text become those tokens either way.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids as `tokenizers` decodes them: the truth that `Detokenizer` is tested against.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special_tokens).map_err(|e| TokenizerError::Decode(e.to_string()))
    }

    /// The vocabulary's own spelling of a token (`Ġthe`, `▁the`), if the id is one.
    pub fn spelling(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Bytes of the longest piece: a text of N tokens has at most N times as many, before a normaliser makes it shorter.
    pub fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }

    /// What each id contributes to the text.
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tokenizer_is_one_error() {
        for bytes in [&b"{}"[..], b"", b"\xff", b"{\"model\":{\"type\":\"BPE\"}}"] {
            assert!(matches!(Tokenizer::from_bytes(bytes), Err(TokenizerError::Parse(_))));
        }
    }
}
