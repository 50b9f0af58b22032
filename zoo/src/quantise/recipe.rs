//! What each tensor of a quantised model is stored as: the form of the linear weights, and that of the token table and head.

use std::fmt;
use std::str::FromStr;

use ashlar_kernels::format::{Dtype, GROUP_MAX, TensorView};

use super::fp8;
use super::grid::Levels;
use super::planar::round;

/// A format of matrices that is written, with a hyphen before the group: `int4-g32` is dtype `int4g32`. `fp8` without a group is eight-bit floats
/// with a scale for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Form {
    dtype: Dtype,
    /// Whether all groups of a row have the same scale.
    by_row: bool,
}

/// No such form.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is none of int8, int4, int8m and int4m (with minimum) or fp8 with -g and a group that divides 512, as in int4-g32, and not fp8 (a scale for each row)"
)]
pub struct UnknownForm(String);

impl Form {
    /// int8 in groups of 32: what a token table gets unless told otherwise.
    pub const TABLE: Self = Self { dtype: Dtype::Int8 { group: 32 }, by_row: false };
    /// Eight-bit floats with a scale for each row, stored with each of its longest groups.
    const FP8_ROWS: Self = Self { dtype: Dtype::Fp8 { group: GROUP_MAX as u16 }, by_row: true };

    /// The form that keeps a dtype; `None` for dtypes that are only read, and for plain floats, which need no rounding.
    pub fn of(dtype: Dtype) -> Option<Self> {
        (Levels::of(dtype).is_some() || matches!(dtype, Dtype::Fp8 { .. })).then_some(Self { dtype, by_row: false })
    }

    /// How its tensors are stored.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }

    /// A matrix in this form: the grid, or the scale, of each group by least squared error, and each weight as the nearest code.
    pub fn round(self, view: &TensorView<'_>) -> Vec<u8> {
        match self.dtype {
            Dtype::Fp8 { group } => fp8::round(view, group, self.by_row),
            dtype => round(view, dtype),
        }
    }
}

impl FromStr for Form {
    type Err = UnknownForm;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownForm(text.chars().take(40).collect());
        if text == "fp8" {
            return Ok(Self::FP8_ROWS);
        }
        let (kind, group) = text.split_once("-g").ok_or_else(unknown)?;
        let dtype: Dtype = format!("{kind}g{group}").parse().map_err(|_| unknown())?;
        Self::of(dtype).ok_or_else(unknown)
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self == Self::FP8_ROWS {
            true => f.write_str("fp8"),
            false => f.write_str(&self.dtype.to_string().replacen('g', "-g", 1)),
        }
    }
}

/// What a model's matrices become. Vectors, position tables and the maps of stitches stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// Linear weights of attention and feed-forward blocks.
    pub linear: Form,
    /// Token table and output projection, tied or not.
    pub table: Form,
}

impl Recipe {
    /// The form of a tensor in a role; `None` where it stays as it is.
    pub fn target(self, role: &str, shape: &[u64]) -> Option<Form> {
        match role {
            "token.weight" | "output.weight" => Some(self.table),
            "position.weight" | "map.weight" => None,
            _ => (shape.len() == 2).then_some(self.linear),
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.table == Form::TABLE {
            true => write!(f, "{}", self.linear),
            false => write!(f, "{}, head {}", self.linear, self.table),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_reads_as_it_is_written_and_others_are_refused() {
        for text in ["int8-g32", "int8-g64", "int4-g32", "int4-g128", "int4m-g32", "int8m-g16", "fp8", "fp8-g128", "fp8-g512"] {
            assert_eq!(text.parse::<Form>().unwrap().to_string(), text);
        }
        for text in [
            "fp8g128",
            "fp8-g96",
            "fp9",
            "int4",
            "int4g32",
            "int4-g",
            "int4-g0",
            "int4-g48",
            "int4-g032",
            "int1-g32",
            "q4_0",
            "-g32",
            "int4-g32-g32",
            "é-g32",
        ] {
            assert!(text.parse::<Form>().is_err(), "{text}");
        }
    }
}
