//! Tokens to text as they come. A character is never split: bytes of an unfinished one wait for the next token. What
//! comes out, joined, equals `Tokenizer::decode` of all tokens without special ones, with one exception: where bytes of
//! byte fallback are no UTF-8, whole characters of the same run have already been shown and stay; `decode` replaces the run.

use std::sync::Arc;

use crate::text::pieces::{Kind, Lead, Replacement};
use crate::text::tokenizer::Tokenizer;

/// The state of one sequence's text.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Bytes of an unfinished character, at most 3 between calls.
    pending: Vec<u8>,
    /// What is still to be dropped at the start.
    lead: Lead,
}

impl Detokenizer {
    /// For text that continues a prompt: the start of the text is where the prompt's is, so a first space stays.
    pub fn after(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Self {
        let visible = |id: &u32| matches!(tokenizer.pieces().kind(*id), Kind::Text | Kind::Bytes);
        let lead = if prompt.iter().rev().any(visible) { Lead::Keep } else { tokenizer.pieces().lead };
        Self { tokenizer, pending: Vec::with_capacity(16), lead }
    }

    /// Appends to `out` the characters that `token` completes.
    pub fn push(&mut self, token: u32, out: &mut String) {
        let tokenizer = Arc::clone(&self.tokenizer);
        let bytes = tokenizer.pieces().bytes(token);
        match tokenizer.pieces().kind(token) {
            Kind::Absent | Kind::Special => {}
            Kind::Bytes => {
                self.pending.extend_from_slice(bytes);
                self.drain(out);
            }
            Kind::Text => {
                self.finish(out);
                let text = std::str::from_utf8(bytes).expect("pieces of this kind are made of str");
                self.append(text, out);
                if self.lead == Lead::StripFirstToken {
                    self.lead = Lead::Keep;
                }
            }
        }
    }

    /// Whether a character is unfinished.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Appends what waits, replaced where it is no character. Call it when no token will follow.
    pub fn finish(&mut self, out: &mut String) {
        if self.pending.is_empty() {
            return;
        }
        let count = match self.tokenizer.pieces().replacement {
            Replacement::PerPart => 1,
            Replacement::PerByte => self.pending.len(),
        };
        self.lead = Lead::Keep;
        out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
        self.pending.clear();
    }

    /// Moves whole characters out of `pending`.
    fn drain(&mut self, out: &mut String) {
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while !rest.is_empty() {
            let (valid, bad) = match std::str::from_utf8(rest) {
                Ok(text) => (text, 0),
                Err(error) => {
                    let valid = std::str::from_utf8(&rest[..error.valid_up_to()]).expect("valid_up_to says so");
                    (valid, error.error_len().unwrap_or(usize::MAX))
                }
            };
            self.append(valid, out);
            rest = &rest[valid.len()..];
            match bad {
                0 => {}
                usize::MAX => break,
                bad => {
                    self.pending.clear();
                    self.pending.extend_from_slice(&rest[..bad]);
                    self.finish(out);
                    rest = &rest[bad..];
                }
            }
        }
        let unfinished = rest.len();
        let start = pending.len() - unfinished;
        self.pending = pending;
        self.pending.drain(..start);
    }

    fn append(&mut self, mut text: &str, out: &mut String) {
        match self.lead {
            Lead::Keep => {}
            Lead::StripFirstToken => {
                out.extend(text.chars().filter(|c| *c != ' '));
                return;
            }
            Lead::Strip(c, mut left) => {
                while left > 0
                    && let Some(rest) = text.strip_prefix(c)
                {
                    text = rest;
                    left -= 1;
                }
                self.lead = if text.is_empty() && left > 0 { Lead::Strip(c, left) } else { Lead::Keep };
            }
        }
        out.push_str(text);
    }
}
