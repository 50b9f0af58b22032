//! What each token id contributes to the text, as bytes: the decoder of a `tokenizer.json` applied once to the whole
//! vocabulary. It covers the two kinds that language models use, byte-level BPE and SentencePiece-like pieces with byte
//! fallback; any other decoder is refused when the tokenizer is loaded, not garbled when it is used.

use serde::Deserialize;

/// Largest token id that is believed.
const TOKEN_ID_MAX: u32 = 1 << 22;

/// Why a tokenizer has no usable pieces.
#[derive(Debug, thiserror::Error)]
pub enum PiecesError {
    /// The decoder is of a kind that cannot be streamed.
    #[error("the tokenizer's decoder is not supported: {0}")]
    UnsupportedDecoder(String),
    /// An id is absurd.
    #[error("the tokenizer has a token id over {TOKEN_ID_MAX}: {0}")]
    IdTooLarge(u32),
}

/// What kind of piece an id is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The id stands for nothing (a padded row of the vocabulary).
    Absent,
    /// Bytes that may be a part of a character.
    Bytes,
    /// Whole characters.
    Text,
    /// A special token: not shown.
    Special,
}

/// What becomes of bytes that are no UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replacement {
    /// One U+FFFD for each maximal malformed part, as in `String::from_utf8_lossy` (byte-level BPE).
    PerPart,
    /// One U+FFFD for each byte (byte fallback).
    PerByte,
}

/// What is dropped at the start of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lead {
    /// Nothing.
    Keep,
    /// At most this many of this character.
    Strip(char, usize),
    /// All spaces that the first token's markers stand for.
    StripFirstToken,
}

/// The table: piece `id` is `bytes[ends[id - 1]..ends[id]]`.
#[derive(Debug)]
pub struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    /// Treatment of malformed bytes.
    pub replacement: Replacement,
    /// Treatment of the text's start.
    pub lead: Lead,
}

impl Pieces {
    /// Applies the tokenizer's decoder to each token.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self, PiecesError> {
        let spec = match tokenizer.get_decoder() {
            None => return Err(PiecesError::UnsupportedDecoder("none".to_owned())),
            Some(decoder) => serde_json::to_value(decoder).map_err(|e| PiecesError::UnsupportedDecoder(e.to_string()))?,
        };
        let rule = Rule::of(serde_json::from_value(spec).map_err(|e| PiecesError::UnsupportedDecoder(e.to_string()))?)?;
        let special: std::collections::BTreeSet<u32> =
            tokenizer.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let mut tokens: Vec<(u32, String)> = tokenizer.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
        tokens.sort_unstable();

        let mut pieces =
            Self { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), replacement: rule.replacement(), lead: rule.lead() };
        for (id, text) in tokens {
            if id > TOKEN_ID_MAX {
                return Err(PiecesError::IdTooLarge(id));
            }
            if (id as usize) < pieces.kinds.len() {
                continue; // two spellings of one id: the first one counts
            }
            while pieces.kinds.len() < id as usize {
                pieces.push(Kind::Absent);
            }
            let kind = rule.append(&text, &mut pieces.bytes);
            pieces.push(if special.contains(&id) { Kind::Special } else { kind });
        }
        Ok(pieces)
    }

    fn push(&mut self, kind: Kind) {
        self.kinds.push(kind);
        self.ends.push(u32::try_from(self.bytes.len()).expect("a vocabulary's text is below 4 GiB"));
    }

    /// One more than the largest id.
    pub fn count(&self) -> u32 {
        self.kinds.len() as u32
    }

    /// The kind of an id; ids out of range are absent.
    pub fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Absent)
    }

    /// Bytes of the longest piece.
    pub fn longest_bytes(&self) -> usize {
        (0..self.count()).map(|id| self.bytes(id).len()).max().unwrap_or(0)
    }

    /// The bytes of an id: for special tokens their own text, for absent ones nothing.
    pub fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// The decoders of `tokenizer.json` that we know, as they are written there.
#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum Spec {
    ByteLevel {},
    Metaspace { replacement: char, prepend_scheme: String },
    Sequence { decoders: Vec<Spec> },
    Replace { pattern: Pattern, content: String },
    ByteFallback {},
    Fuse {},
    Strip { content: char, start: usize, stop: usize },
}

#[derive(Debug, Deserialize)]
enum Pattern {
    String(String),
}

/// A decoder in the form in which it is applied to one token.
enum Rule {
    ByteLevel,
    Pieces { replaced: Vec<(String, String)>, byte_fallback: bool, lead: Lead },
}

impl Rule {
    fn of(spec: Spec) -> Result<Self, PiecesError> {
        let stages = match spec {
            Spec::Sequence { decoders } => decoders,
            single => vec![single],
        };
        let (mut replaced, mut byte_fallback, mut fused, mut lead) = (Vec::new(), false, false, Lead::Keep);
        let single = stages.len() == 1;
        for stage in stages {
            match stage {
                Spec::ByteLevel {} if single => return Ok(Rule::ByteLevel),
                Spec::Metaspace { replacement, prepend_scheme } if single => {
                    replaced.push((replacement.to_string(), " ".to_owned()));
                    lead = if prepend_scheme == "never" { Lead::Keep } else { Lead::StripFirstToken };
                }
                Spec::Replace { pattern: Pattern::String(from), content } if !byte_fallback && !fused => replaced.push((from, content)),
                Spec::ByteFallback {} if !fused => byte_fallback = true,
                Spec::Fuse {} => fused = true,
                Spec::Strip { content, start, stop: 0 } if fused && lead == Lead::Keep => lead = Lead::Strip(content, start),
                other => return Err(PiecesError::UnsupportedDecoder(format!("{other:?}"))),
            }
        }
        Ok(Rule::Pieces { replaced, byte_fallback, lead })
    }

    fn replacement(&self) -> Replacement {
        match self {
            Rule::ByteLevel => Replacement::PerPart,
            Rule::Pieces { .. } => Replacement::PerByte,
        }
    }

    fn lead(&self) -> Lead {
        match self {
            Rule::ByteLevel => Lead::Keep,
            Rule::Pieces { lead, .. } => *lead,
        }
    }

    /// Appends what `token` stands for.
    fn append(&self, token: &str, out: &mut Vec<u8>) -> Kind {
        match self {
            Rule::ByteLevel => {
                let start = out.len();
                for c in token.chars() {
                    let Some(byte) = byte_of(c) else {
                        out.truncate(start);
                        out.extend_from_slice(token.as_bytes());
                        break;
                    };
                    out.push(byte);
                }
                Kind::Bytes
            }
            Rule::Pieces { replaced, byte_fallback, .. } => {
                let mut text = token.to_owned();
                for (from, to) in replaced {
                    text = text.replace(from.as_str(), to);
                }
                if *byte_fallback && let Some(byte) = fallback_byte(&text) {
                    out.push(byte);
                    return Kind::Bytes;
                }
                out.extend_from_slice(text.as_bytes());
                Kind::Text
            }
        }
    }
}

/// `<0x41>` is the byte 0x41.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),        // 0x00 to 0x20
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8), // 0x7f to 0xa0
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_covers_each_byte_once() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let bytes: std::collections::BTreeSet<u8> = alphabet.iter().map(|c| byte_of(*c).unwrap()).collect();
        assert_eq!((alphabet.len(), bytes.len()), (256, 256));
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of(' ')), (Some(b' '), Some(b'\n'), None));
    }

    #[test]
    fn foreign_decoders_are_refused() {
        for spec in [
            r#"{"type":"Sequence","decoders":[{"type":"Strip","content":" ","start":1,"stop":0}]}"#,
            r#"{"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":1}]}"#,
            r#"{"type":"Sequence","decoders":[{"type":"ByteLevel"},{"type":"Fuse"}]}"#,
        ] {
            let spec: Spec = serde_json::from_str(spec).unwrap();
            assert!(matches!(Rule::of(spec), Err(PiecesError::UnsupportedDecoder(_))));
        }
        assert!(serde_json::from_str::<Spec>(r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###).is_err());
    }
}
