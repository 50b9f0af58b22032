//! What each tensor of a quantised model is stored as: the form of the linear weights, and that of the token table and head.

use std::fmt;
use std::str::FromStr;

use ashlar_kernels::format::Dtype;

/// A planar integer format, written with a hyphen before the group: `int4-g32` is dtype `int4g32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form(Dtype);

/// No such form.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of int8, int4, int8m and int4m (with minimum) with -g and a group that divides 512, as in int4-g32")]
pub struct UnknownForm(String);

impl Form {
    /// int8 in groups of 32: what a token table gets unless told otherwise.
    pub const TABLE: Self = Self(Dtype::Int8 { group: 32 });

    /// How its tensors are stored.
    pub fn dtype(self) -> Dtype {
        self.0
    }
}

impl FromStr for Form {
    type Err = UnknownForm;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownForm(text.chars().take(40).collect());
        let (kind, group) = text.split_once("-g").ok_or_else(unknown)?;
        let dtype: Dtype = format!("{kind}g{group}").parse().map_err(|_| unknown())?;
        match dtype {
            Dtype::Int8 { .. } | Dtype::Int4 { .. } | Dtype::Int8Minimum { .. } | Dtype::Int4Minimum { .. } => Ok(Self(dtype)),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_string().replacen('g', "-g", 1))
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
    /// The dtype of a tensor in a role; `None` where it stays as it is.
    pub fn target(self, role: &str, shape: &[u64]) -> Option<Dtype> {
        match role {
            "token.weight" | "output.weight" => Some(self.table.dtype()),
            "position.weight" | "map.weight" => None,
            _ => (shape.len() == 2).then_some(self.linear.dtype()),
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
        for text in ["int8-g32", "int8-g64", "int4-g32", "int4-g128", "int4m-g32", "int8m-g16"] {
            assert_eq!(text.parse::<Form>().unwrap().to_string(), text);
        }
        for text in
            ["fp8", "int4", "int4g32", "int4-g", "int4-g0", "int4-g48", "int4-g032", "int1-g32", "q4_0", "-g32", "int4-g32-g32", "é-g32"]
        {
            assert!(text.parse::<Form>().is_err(), "{text}");
        }
    }
}
