//! The names of the formats in configuration, block headers and logs: `f32`, `int4g128`, `int8mg32` (with minimum), `q4_k`, ...

use super::{Dtype, GROUP_MAX};
use std::fmt;
use std::str::FromStr;

/// The text names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown element format {0:?}")]
pub struct UnknownDtype(pub String);

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 { group } => write!(f, "int8g{group}"),
            Self::Int4 { group } => write!(f, "int4g{group}"),
            Self::Int8Minimum { group } => write!(f, "int8mg{group}"),
            Self::Int4Minimum { group } => write!(f, "int4mg{group}"),
            Self::Int4Zero { group } => write!(f, "int4zg{group}"),
            Self::Fp8 { group } => write!(f, "fp8g{group}"),
            Self::Int1 { group } => write!(f, "int1g{group}"),
            other => f.write_str(FIXED.iter().find(|(_, dtype)| dtype == other).map_or("?", |(name, _)| name)),
        }
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((_, dtype)) = FIXED.iter().find(|(name, _)| *name == text) {
            return Ok(*dtype);
        }
        let unknown = || UnknownDtype(text.to_owned());
        let (kind, group) = text.split_once('g').ok_or_else(unknown)?;
        let group: u16 = group.parse().map_err(|_| unknown())?;
        if group == 0 || !GROUP_MAX.is_multiple_of(usize::from(group)) {
            return Err(unknown());
        }
        let dtype = match kind {
            "int8" => Self::Int8 { group },
            "int4" => Self::Int4 { group },
            "int8m" => Self::Int8Minimum { group },
            "int4m" => Self::Int4Minimum { group },
            "int4z" => Self::Int4Zero { group },
            "fp8" => Self::Fp8 { group },
            "int1" => Self::Int1 { group },
            _ => return Err(unknown()),
        };
        // One spelling a format: "int8g032" would otherwise be a second name.
        if dtype.to_string() == text { Ok(dtype) } else { Err(unknown()) }
    }
}

impl serde::Serialize for Dtype {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Dtype {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

const FIXED: [(&str, Dtype); 11] = [
    ("f32", Dtype::F32),
    ("f16", Dtype::F16),
    ("bf16", Dtype::Bf16),
    ("q8_0", Dtype::Q8_0),
    ("q4_0", Dtype::Q4_0),
    ("q4_1", Dtype::Q4_1),
    ("q5_0", Dtype::Q5_0),
    ("q5_1", Dtype::Q5_1),
    ("q4_k", Dtype::Q4K),
    ("q5_k", Dtype::Q5K),
    ("q6_k", Dtype::Q6K),
];
