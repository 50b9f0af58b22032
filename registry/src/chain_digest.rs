//! The identity of a chain as the registry's records name it. The zoo has the digest it is made from; the registry must not
//! know the zoo, so this is a type of its own with the same 32 bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A chain's digest, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainDigest(pub [u8; 32]);

/// The text is no digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a digest of 64 lower-case hex digits")]
pub struct ParseChainDigestError(String);

impl ChainDigest {
    /// The first 12 hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for ChainDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChainDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

impl FromStr for ChainDigest {
    type Err = ParseChainDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseChainDigestError(text.chars().take(80).collect());
        let valid = text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !valid {
            return Err(error());
        }
        let mut bytes = [0u8; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| error())?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<&[u8]> for ChainDigest {
    type Error = ParseChainDigestError;

    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        bytes.try_into().map(Self).map_err(|_| ParseChainDigestError(format!("{} bytes", bytes.len())))
    }
}

impl Serialize for ChainDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChainDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_agree() {
        let digest = ChainDigest([0xab; 32]);
        assert_eq!(digest.to_string().parse::<ChainDigest>(), Ok(digest));
        assert_eq!(ChainDigest::try_from(&digest.0[..]), Ok(digest));
        for bad in ["", "ab", &"AB".repeat(32), &"zz".repeat(32), &"ab".repeat(33)] {
            assert!(bad.parse::<ChainDigest>().is_err(), "{bad}");
        }
    }
}
