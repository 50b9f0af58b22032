//! The header of a safetensors file: 8 bytes of length, JSON of names, then data without holes or overlaps.
//! Stricter than needed to read it: whatever could make two readers disagree about a file is refused.

use std::collections::BTreeSet;
use std::fmt;

use ashlar_kernels::format::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::{ElementType, TENSORS_MAX, TensorEntry};

/// Longest header, as the format says.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SafetensorsError {
    /// Shorter than its own header.
    #[error("it ends within its header (header of {header_bytes} bytes in a file of {file_bytes})")]
    Truncated {
        /// Length that the file states.
        header_bytes: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// A header longer than the format allows.
    #[error("its header claims {0} bytes, more than the format's 100,000,000")]
    HeaderTooLong(u64),
    /// Header that is no such JSON.
    #[error("its header is not the JSON that it should be: {0}")]
    Json(String),
    /// A name twice.
    #[error("tensor `{0}` is there twice")]
    Duplicate(String),
    /// More tensors than are taken.
    #[error("it has more than {TENSORS_MAX} tensors")]
    TooMany,
    /// An element type the format does not have.
    #[error("tensor `{name}` has the unknown dtype `{dtype}`")]
    Dtype {
        /// Tensor.
        name: String,
        /// What it claims.
        dtype: String,
    },
    /// Offsets that do not fit dtype and shape.
    #[error("tensor `{name}` has {actual} bytes, its dtype and shape imply {expected}")]
    Size {
        /// Tensor.
        name: String,
        /// Bytes between its offsets.
        actual: u64,
        /// Bytes that belong there.
        expected: u64,
    },
    /// Offsets that run backwards, outside the file, or a size that overflows.
    #[error("tensor `{0}` lies outside the file")]
    Outside(String),
    /// Data of a tensor does not begin where the one before ends.
    #[error("tensor `{name}` begins at {start}, but the data before it ends at {expected}: tensors overlap or leave a hole")]
    Gap {
        /// Tensor.
        name: String,
        /// Its first byte.
        start: u64,
        /// Where it should begin.
        expected: u64,
    },
    /// Bytes behind the last tensor, or missing ones.
    #[error("its data has {actual} bytes, its header describes {expected}")]
    DataLength {
        /// Bytes behind the header.
        actual: u64,
        /// Bytes described.
        expected: u64,
    },
}

/// Tensors of a whole file, in order of their offsets.
///
/// # Errors
/// The first rule that the file breaks.
pub fn parse(file: &[u8]) -> Result<Vec<(String, TensorEntry)>, SafetensorsError> {
    let file_bytes = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(SafetensorsError::Truncated { header_bytes: 8, file_bytes });
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(SafetensorsError::HeaderTooLong(header_bytes));
    }
    let header_len = usize::try_from(header_bytes).expect("at most 100 MB");
    let header = rest.get(..header_len).ok_or(SafetensorsError::Truncated { header_bytes, file_bytes })?;
    let data_start = 8 + header_len;
    let header: Header = serde_json::from_slice(header).map_err(|e| SafetensorsError::Json(e.to_string()))?;
    let mut entries = check_names(header)?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    lay_out(entries, data_start, file.len())
}

fn check_names(header: Header) -> Result<Vec<(String, HeaderEntry)>, SafetensorsError> {
    if header.entries.len() > TENSORS_MAX {
        return Err(SafetensorsError::TooMany);
    }
    let mut seen = BTreeSet::new();
    for (name, _) in &header.entries {
        if !seen.insert(name.as_str()) {
            return Err(SafetensorsError::Duplicate(name.clone()));
        }
    }
    Ok(header.entries)
}

fn lay_out(
    entries: Vec<(String, HeaderEntry)>,
    data_start: usize,
    file_len: usize,
) -> Result<Vec<(String, TensorEntry)>, SafetensorsError> {
    let data_len = (file_len - data_start) as u64;
    let mut end = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let [from, to] = entry.data_offsets;
        if from > to || to > data_len {
            return Err(SafetensorsError::Outside(name));
        }
        if from != end {
            return Err(SafetensorsError::Gap { name, start: from, expected: end });
        }
        let Some((element, bits)) = element_type(&entry.dtype) else {
            return Err(SafetensorsError::Dtype { name, dtype: entry.dtype });
        };
        let count = entry.shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
        let Some(expected) = count.and_then(|count| count.checked_mul(bits)).map(|bits| bits.div_ceil(8)) else {
            return Err(SafetensorsError::Outside(name));
        };
        if to - from != expected {
            return Err(SafetensorsError::Size { name, actual: to - from, expected });
        }
        end = to;
        let start = data_start + usize::try_from(from).expect("within a file in memory");
        let len = usize::try_from(to - from).expect("within a file in memory");
        tensors.push((name, TensorEntry { element, shape: entry.shape, start, len }));
    }
    if end != data_len {
        return Err(SafetensorsError::DataLength { actual: data_len, expected: end });
    }
    Ok(tensors)
}

/// Our type for it and its bits.
fn element_type(name: &str) -> Option<(ElementType, u64)> {
    let stored = |dtype, bits| Some((ElementType::Stored(dtype), bits));
    let bits = match name {
        "F32" => return stored(Dtype::F32, 32),
        "F16" => return stored(Dtype::F16, 16),
        "BF16" => return stored(Dtype::Bf16, 16),
        "F64" | "I64" | "U64" | "C64" => 64,
        "I32" | "U32" => 32,
        "I16" | "U16" => 16,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    };
    Some((ElementType::Other(name.to_owned()), bits))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All entries as written, so that a name that is there twice is seen.
struct Header {
    entries: Vec<(String, HeaderEntry)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Header { entries })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests;
