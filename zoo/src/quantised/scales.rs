//! Scales of a quantised matrix, of any float type and any of the shapes in which checkpoints hold them.

use ashlar_kernels::format::Dtype;
use half::{bf16, f16};

use super::{Part, QuantisedError};
use crate::formats::{ElementType, FileSlice, TensorFiles};

/// Where the scale of a row and a group along K lies: at `row / rows * row_stride + group * group_stride`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scales {
    pub(super) name: String,
    float: Dtype,
    /// Rows that share a scale.
    rows: usize,
    row_stride: usize,
    group_stride: usize,
}

/// Scales, to be read.
pub(super) struct ScaleReader<'a> {
    scales: &'a Scales,
    bytes: FileSlice,
}

impl Scales {
    /// Takes scales of `[groups, N]` (GPTQ, AWQ).
    pub(super) fn by_group(part: &Part, [groups, outputs]: [u64; 2], why: &str) -> Result<Self, QuantisedError> {
        part.has_shape(&[groups, outputs], why)?;
        Self::new(part, 1, 1, to_usize(outputs))
    }

    /// Takes scales of `[N, groups]`, or `[N]` for one group, or one for all.
    pub(super) fn by_row(part: &Part, [outputs, groups]: [u64; 2], why: &str) -> Result<Self, QuantisedError> {
        match *part.entry.shape {
            [] | [1] | [1, 1] => Self::new(part, 1, 0, 0),
            [rows] if rows == outputs && groups == 1 => Self::new(part, 1, 1, 0),
            _ => {
                part.has_shape(&[outputs, groups], why)?;
                Self::new(part, 1, to_usize(groups), 1)
            }
        }
    }

    /// Takes scales of blocks, `[ceil(N / rows), groups]`.
    pub(super) fn by_block(part: &Part, rows: u64, [outputs, groups]: [u64; 2], why: &str) -> Result<Self, QuantisedError> {
        part.has_shape(&[outputs.div_ceil(rows), groups], why)?;
        Self::new(part, to_usize(rows), to_usize(groups), 1)
    }

    fn new(part: &Part, rows: usize, row_stride: usize, group_stride: usize) -> Result<Self, QuantisedError> {
        let float = match part.entry.element {
            ElementType::Stored(float @ (Dtype::F32 | Dtype::F16 | Dtype::Bf16)) => float,
            _ => {
                let element = part.entry.element.to_string();
                return Err(QuantisedError::Type { name: part.name.clone(), element, expected: "f32, f16 or bf16" });
            }
        };
        Ok(Self { name: part.name.clone(), float, rows, row_stride, group_stride })
    }

    /// Checks that every scale times `largest` is finite; whether f16 holds all of them.
    pub(super) fn check(&self, part: &Part, largest: f32) -> Result<bool, QuantisedError> {
        let reader = ScaleReader { scales: self, bytes: part.bytes.clone() };
        let count = part.bytes.as_ref().len() / if self.float == Dtype::F32 { 4 } else { 2 };
        let mut halves = true;
        for index in 0..count {
            let scale = reader.element(index);
            if !(scale * largest).is_finite() {
                let (name, expected) = (self.name.clone(), "scales that leave the weights finite".to_owned());
                return Err(QuantisedError::Value { name, value: scale.to_string(), index, expected });
            }
            halves &= f16::from_f32(scale).to_f32() == scale;
        }
        Ok(halves)
    }

    pub(super) fn reader(&self, files: &TensorFiles) -> ScaleReader<'_> {
        ScaleReader { scales: self, bytes: files.bytes(&self.name).expect("found in these files") }
    }
}

impl ScaleReader<'_> {
    /// The scale of a row and a group.
    pub(super) fn get(&self, row: usize, group: usize) -> f32 {
        self.element(row / self.scales.rows * self.scales.row_stride + group * self.scales.group_stride)
    }

    fn element(&self, index: usize) -> f32 {
        let bytes = self.bytes.as_ref();
        let half = || [bytes[index * 2], bytes[index * 2 + 1]];
        match self.scales.float {
            Dtype::F16 => f16::from_le_bytes(half()).to_f32(),
            Dtype::Bf16 => bf16::from_le_bytes(half()).to_f32(),
            _ => f32::from_le_bytes(std::array::from_fn(|i| bytes[index * 4 + i])),
        }
    }
}

/// A dimension of a tensor that is in memory.
pub(super) fn to_usize(dim: u64) -> usize {
    usize::try_from(dim).expect("within a tensor in memory")
}
