//! Content addresses: BLAKE3 digests, their text form, and the lineage of a chain.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 32-byte BLAKE3 digest, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// The text is no digest.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a digest of 64 lower-case hex digits")]
pub struct ParseDigestError(String);

impl Digest {
    /// Digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first 12 hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !valid {
            return Err(ParseDigestError(text.chars().take(80).collect()));
        }
        let mut bytes = [0u8; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| ParseDigestError(text.to_owned()))?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// `lineage[i]`: the digest of blocks and adapters from the chain's start through block i (docs/block-format.md).
/// `adapters` pairs a block index with an adapter digest, in order of application.
pub fn lineages(blocks: &[Digest], adapters: &[(u32, Digest)]) -> Vec<Digest> {
    let mut lineages: Vec<Digest> = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let mut hasher = blake3::Hasher::new();
        match lineages.last() {
            None => hasher.update(b"ashlar-lineage-1"),
            Some(previous) => hasher.update(&previous.0),
        };
        hasher.update(&block.0);
        for (_, adapter) in adapters.iter().filter(|(at, _)| *at as usize == index) {
            hasher.update(&adapter.0);
        }
        lineages.push(Digest(*hasher.finalize().as_bytes()));
    }
    lineages
}
