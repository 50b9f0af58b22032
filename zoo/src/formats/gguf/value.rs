//! Metadata values of a GGUF file. Numbers are widened, as readers differ in the width they write.

use super::{ARRAY_ELEMENTS_MAX, Cursor, Ended, GgufError, limited, string};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// Values of one type; no arrays of arrays.
    Array(Vec<Value>),
}

impl Value {
    /// A non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// Text.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Text(value) = self { Some(value) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Self::Array(values) = self { Some(values) } else { None }
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Reads type and value.
pub(super) fn read(cursor: &mut Cursor<'_>, key: &str) -> Result<Value, GgufError> {
    let ended = |_: Ended| GgufError::Truncated(format!("metadata `{key}`"));
    let kind = cursor.u32().map_err(ended)?;
    if kind != ARRAY {
        return read_one(cursor, key, kind);
    }
    let kind = cursor.u32().map_err(ended)?;
    let count = limited(&format!("the length of metadata `{key}`"), cursor.u64().map_err(ended)?, ARRAY_ELEMENTS_MAX)?;
    // The smallest element has one byte, so no more room is made than the file could fill.
    let room = usize::try_from(count).expect("at most 16 Mi").min(cursor.remaining());
    let mut values = Vec::with_capacity(room.min(1 << 16));
    for _ in 0..count {
        values.push(read_one(cursor, key, kind)?);
    }
    Ok(Value::Array(values))
}

fn read_one(cursor: &mut Cursor<'_>, key: &str, kind: u32) -> Result<Value, GgufError> {
    let ended = |_: Ended| GgufError::Truncated(format!("metadata `{key}`"));
    Ok(match kind {
        0 => Value::Unsigned(cursor.array::<1>().map_err(ended)?[0].into()),
        1 => Value::Signed(cursor.array().map(i8::from_le_bytes).map_err(ended)?.into()),
        2 => Value::Unsigned(cursor.array().map(u16::from_le_bytes).map_err(ended)?.into()),
        3 => Value::Signed(cursor.array().map(i16::from_le_bytes).map_err(ended)?.into()),
        4 => Value::Unsigned(cursor.u32().map_err(ended)?.into()),
        5 => Value::Signed(cursor.array().map(i32::from_le_bytes).map_err(ended)?.into()),
        6 => Value::Float(cursor.array().map(f32::from_le_bytes).map_err(ended)?.into()),
        7 => Value::Bool(cursor.array::<1>().map_err(ended)?[0] != 0),
        TEXT => Value::Text(string(cursor, &format!("metadata `{key}`"))?),
        10 => Value::Unsigned(cursor.u64().map_err(ended)?),
        11 => Value::Signed(cursor.array().map(i64::from_le_bytes).map_err(ended)?),
        12 => Value::Float(cursor.array().map(f64::from_le_bytes).map_err(ended)?),
        _ => return Err(GgufError::ValueType { key: key.to_owned(), kind }),
    })
}
