//! GGUF version 2 and 3, little-endian: metadata, tensor infos, aligned data. Start with [`parse`]. Types that the zoo does
//! not store are kept by name, so that the error can say which tensor has which.

mod value;

use std::collections::{BTreeMap, BTreeSet};

use ashlar_kernels::format::Dtype;

pub use value::Value;

use super::cursor::{Cursor, Ended};
use super::{ElementType, TENSORS_MAX, TensorEntry};

/// Most metadata entries.
pub const METADATA_MAX: u64 = 65_536;
/// Longest string.
pub const STRING_BYTES_MAX: u64 = 16 << 20;
/// Most elements of one array.
pub const ARRAY_ELEMENTS_MAX: u64 = 16 << 20;
/// Most dimensions of a tensor.
const DIMENSIONS_MAX: u32 = 4;
/// Largest alignment that is believed.
const ALIGNMENT_MAX: u64 = 1 << 20;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum GgufError {
    /// No magic.
    #[error("it does not begin with GGUF")]
    Magic,
    /// A version that is not read.
    #[error("version {0} is not supported, only 2 and 3")]
    Version(u32),
    /// Byte order.
    #[error("it is big-endian")]
    BigEndian,
    /// Ends early.
    #[error("it ends within {0}")]
    Truncated(String),
    /// A count over the limit.
    #[error("{what} is {actual}, more than {max}")]
    Limit {
        /// What is counted.
        what: String,
        /// Claimed.
        actual: u64,
        /// Limit.
        max: u64,
    },
    /// Text that is none.
    #[error("{0} is not UTF-8")]
    Utf8(String),
    /// A metadata type that does not exist, or an array of arrays.
    #[error("metadata `{key}` has the unsupported type {kind}")]
    ValueType {
        /// Key.
        key: String,
        /// Type number.
        kind: u32,
    },
    /// A key or tensor name twice.
    #[error("`{0}` is there twice")]
    Duplicate(String),
    /// An alignment that is no power of two.
    #[error("alignment {0} is not a power of two of at least 8")]
    Alignment(u64),
    /// Dimensions that cannot be.
    #[error("tensor `{name}` has the dimensions {shape:?}, which its type {element} cannot have")]
    Shape {
        /// Tensor.
        name: String,
        /// Its dimensions.
        shape: Vec<u64>,
        /// Its type.
        element: String,
    },
    /// Data that is not where it should be.
    #[error("tensor `{name}` {reason}")]
    Data {
        /// Tensor.
        name: String,
        /// How.
        reason: &'static str,
    },
}

/// A parsed file.
#[derive(Debug, Default, PartialEq)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors with their place in the file. Shapes are `[rows, cols]`: outermost first, unlike in the file.
    pub tensors: Vec<(String, TensorEntry)>,
}

struct TensorInfo {
    name: String,
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// Parses a whole file.
///
/// # Errors
/// The first rule that the file breaks.
pub fn parse(file: &[u8]) -> Result<Gguf, GgufError> {
    let mut cursor = Cursor::new(file);
    let ended = |_: Ended| GgufError::Truncated("its header".to_owned());
    if cursor.array::<4>().map_err(|_| GgufError::Magic)? != *b"GGUF" {
        return Err(GgufError::Magic);
    }
    match cursor.u32().map_err(ended)? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
        version => return Err(GgufError::Version(version)),
    }
    let tensor_count = limited("the number of tensors", cursor.u64().map_err(ended)?, TENSORS_MAX as u64)?;
    let metadata_count = limited("the number of metadata entries", cursor.u64().map_err(ended)?, METADATA_MAX)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = string(&mut cursor, "a metadata key")?;
        let value = value::read(&mut cursor, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(GgufError::Duplicate(key));
        }
    }
    let mut infos = Vec::new();
    for _ in 0..tensor_count {
        infos.push(tensor_info(&mut cursor)?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => value.as_u64().ok_or(GgufError::Alignment(0))?,
    };
    if !alignment.is_power_of_two() || !(8..=ALIGNMENT_MAX).contains(&alignment) {
        return Err(GgufError::Alignment(alignment));
    }
    let data_start = (cursor.position() as u64).next_multiple_of(alignment);
    let tensors = lay_out(infos, data_start, alignment, file.len() as u64)?;
    Ok(Gguf { metadata, tensors })
}

fn tensor_info(cursor: &mut Cursor<'_>) -> Result<TensorInfo, GgufError> {
    let name = string(cursor, "a tensor name")?;
    let ended = |_: Ended| GgufError::Truncated(format!("the description of tensor `{name}`"));
    let count = cursor.u32().map_err(ended)?;
    limited(&format!("the number of dimensions of tensor `{name}`"), u64::from(count), u64::from(DIMENSIONS_MAX))?;
    let mut shape = Vec::new();
    for _ in 0..count {
        shape.push(cursor.u64().map_err(ended)?);
    }
    shape.reverse();
    let kind = cursor.u32().map_err(ended)?;
    let offset = cursor.u64().map_err(ended)?;
    Ok(TensorInfo { name, shape, kind, offset })
}

fn lay_out(mut infos: Vec<TensorInfo>, data_start: u64, alignment: u64, file_bytes: u64) -> Result<Vec<(String, TensorEntry)>, GgufError> {
    infos.sort_by_key(|info| info.offset);
    let mut seen = BTreeSet::new();
    let mut end = 0;
    let mut tensors = Vec::with_capacity(infos.len());
    for TensorInfo { name, shape, kind, offset } in infos {
        if !seen.insert(name.clone()) {
            return Err(GgufError::Duplicate(name));
        }
        let element = element_type(kind);
        let data = |name, reason| Err(GgufError::Data { name, reason });
        if !offset.is_multiple_of(alignment) {
            return data(name, "is not aligned");
        }
        if offset < end {
            return data(name, "overlaps the one before");
        }
        // A type that is not stored has no size that we know: it may not be used, so its length does not matter.
        let len = match &element {
            ElementType::Other(_) => 0,
            ElementType::Stored(dtype) => match bytes_of(*dtype, &shape) {
                Some(len) => len,
                None => return Err(GgufError::Shape { name, shape, element: element.to_string() }),
            },
        };
        let start = data_start.checked_add(offset).filter(|start| start.checked_add(len).is_some_and(|end| end <= file_bytes));
        let Some(start) = start else { return data(name, "lies outside the file") };
        end = offset + len;
        let start = usize::try_from(start).expect("within a file in memory");
        let len = usize::try_from(len).expect("within a file in memory");
        tensors.push((name, TensorEntry { element, shape, start, len }));
    }
    Ok(tensors)
}

fn bytes_of(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let (cols, rows) = shape.split_last()?;
    let rows = rows.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim))?;
    let bytes = dtype.bytes(usize::try_from(rows).ok()?, usize::try_from(*cols).ok()?)?;
    u64::try_from(bytes).ok()
}

/// The type by its number in ggml.h.
fn element_type(kind: u32) -> ElementType {
    let stored = match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        30 => Dtype::Bf16,
        _ => {
            let known = OTHER_TYPES.iter().find(|(number, _)| *number == kind);
            return ElementType::Other(known.map_or_else(|| format!("type {kind}"), |(_, name)| (*name).to_owned()));
        }
    };
    ElementType::Stored(stored)
}

const OTHER_TYPES: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

fn limited(what: &str, actual: u64, max: u64) -> Result<u64, GgufError> {
    if actual <= max { Ok(actual) } else { Err(GgufError::Limit { what: what.to_owned(), actual, max }) }
}

fn string(cursor: &mut Cursor<'_>, what: &str) -> Result<String, GgufError> {
    let ended = |_: Ended| GgufError::Truncated(what.to_owned());
    let len = limited(&format!("the length of {what}"), cursor.u64().map_err(ended)?, STRING_BYTES_MAX)?;
    let bytes = cursor.take(usize::try_from(len).expect("at most 16 MiB")).map_err(ended)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| GgufError::Utf8(what.to_owned()))
}

#[cfg(test)]
mod tests;
