//! Tensor element formats as they are stored (byte-exact layouts: docs/block-format.md) and views of them.
//! Owns sizes, quantising and dequantising; it does not know packed device layouts. Start with [`Dtype`]; `codes` is the
//! one place that reads quantised bytes, everything else (dequantise, packing, the reference) goes through it.

mod codes;
mod finite;
pub(crate) mod fp8;
mod name;
mod quantise;
mod row;

pub use codes::{CodeRow, TwoLevelScales};
pub use finite::first_non_finite;
pub use fp8::{fp8_is_nan, fp8_to_f32};
pub use name::UnknownDtype;
pub use quantise::quantise;
pub use row::{dequantise, dequantise_row};

use crate::ops::PackError;

/// The largest group of weights that may share a scale, and what every group divides: a slice is whole groups.
pub const GROUP_MAX: usize = crate::SLICE;

/// How a tensor's elements are stored. Matrices are row-major `[rows N, cols K]`; groups lie along K.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Ours: all codes (i8), row by row, then all scales (f16), `ceil(K / group)` a row; the last group may be short. `w = code * scale`.
    Int8 {
        /// Weights that share a scale.
        group: u16,
    },
    /// Ours: codes 0..=15 with offset 8, two a byte (even k in the low nibble, a row padded to a whole byte), then scales (f16). `w = (code - 8) * scale`.
    Int4 {
        /// Weights that share a scale.
        group: u16,
    },
    /// As `Int8` with all minima (f16) after all scales: `w = code * scale + minimum`, the minimum being the weight of code 0,
    /// which lies in the middle of -128..=127.
    Int8Minimum {
        /// Weights that share a scale and a minimum.
        group: u16,
    },
    /// As `Int4` without an offset, with all minima (f16) after all scales: `w = code * scale + minimum`.
    Int4Minimum {
        /// Weights that share a scale and a minimum.
        group: u16,
    },
    /// As `Int4Minimum` with all zero points (a byte each, 0..=16) after all scales in place of minima: `w = (code - zero) * scale`, which is
    /// `code * scale + minimum` with the minimum `-zero * scale`, exact in f32. What AWQ and GPTQ checkpoints hold.
    Int4Zero {
        /// Weights that share a scale and a zero point.
        group: u16,
    },
    /// Eight-bit floats (e4m3fn: sign, 4 bits of exponent, 3 of mantissa, NaN but no infinity), a byte each, row by row, then all scales
    /// (f32), `ceil(K / group)` a row; the last group may be short. `w = code * scale` in f32, rounded once. Computed as floats are.
    Fp8 {
        /// Weights that share a scale.
        group: u16,
    },
    /// Ours, for one-bit deltas: a bit a weight (k = 0 is the lowest bit, a row padded to a whole byte), then scales (f16).
    /// `w = +scale` where the bit is set, `-scale` where it is clear; codes read as +1 and -1.
    Int1 {
        /// Weights that share a scale.
        group: u16,
    },
    /// GGUF's 32-weight blocks: f16 scale, 32 i8.
    Q8_0,
    /// GGUF: f16 scale, 16 bytes of nibbles, offset 8.
    Q4_0,
    /// GGUF: f16 scale, f16 minimum, nibbles.
    Q4_1,
    /// GGUF: f16 scale, 32 high bits, nibbles, offset 16.
    Q5_0,
    /// GGUF: f16 scale, f16 minimum, 32 high bits, nibbles.
    Q5_1,
    /// GGUF K-quant, 256 weights: 8 sub-groups with 6-bit scales and minima.
    Q4K,
    /// GGUF K-quant, 256 weights, 5 bits.
    Q5K,
    /// GGUF K-quant, 256 weights, 6 bits, 16 sub-groups with 8-bit scales.
    Q6K,
}

impl Dtype {
    /// Bytes of a matrix `[rows, cols]`; `None` if the columns do not fit the block size, the group is not one that the
    /// numeric contract allows (a divisor of [`GROUP_MAX`]), or the size overflows.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        if self.planar().is_some() {
            return self.sections(rows, cols)?.into_iter().try_fold(0usize, usize::checked_add);
        }
        let row = match self {
            Self::F32 => cols.checked_mul(4)?,
            Self::F16 | Self::Bf16 => cols.checked_mul(2)?,
            _ => {
                if !cols.is_multiple_of(self.block_columns()) {
                    return None;
                }
                (cols / self.block_columns()).checked_mul(self.block_bytes())?
            }
        };
        rows.checked_mul(row)
    }

    /// Bytes of the three sections of a planar matrix `[rows, cols]`, in the order in which they lie: codes, scales, minima or zero points
    /// (0 for formats without). `None` for other formats, for a bad group, or on overflow.
    pub fn sections(self, rows: usize, cols: usize) -> Option<[usize; 3]> {
        let (codes_per_byte, group) = self.planar()?;
        if group == 0 || !GROUP_MAX.is_multiple_of(group) {
            return None;
        }
        let groups = cols.div_ceil(group).checked_mul(rows)?;
        let (scale_bytes, minimum_bytes) = match self {
            Self::Fp8 { .. } => (4, 0),
            Self::Int4Zero { .. } => (2, 1),
            _ => (2, if self.has_minimum() { 2 } else { 0 }),
        };
        Some([cols.div_ceil(codes_per_byte).checked_mul(rows)?, groups.checked_mul(scale_bytes)?, groups.checked_mul(minimum_bytes)?])
    }

    /// Codes of a byte and weights of a group, for the planar formats.
    fn planar(self) -> Option<(usize, usize)> {
        let (codes_per_byte, group) = match self {
            Self::Int8 { group } | Self::Int8Minimum { group } | Self::Fp8 { group } => (1, group),
            Self::Int4 { group } | Self::Int4Minimum { group } | Self::Int4Zero { group } => (2, group),
            Self::Int1 { group } => (8, group),
            _ => return None,
        };
        Some((codes_per_byte, usize::from(group)))
    }

    /// Columns of one stored block: a row's columns are a multiple of it. 1 for the float and planar formats.
    pub fn block_columns(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            _ => 1,
        }
    }

    /// Weights that share a scale (and a minimum) and are integers; `None` for floats, fp8 too. Activations are quantised in the same groups.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::Fp8 { .. } => None,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q4K | Self::Q5K => Some(32),
            Self::Q6K => Some(16),
            _ => self.planar().map(|(_, group)| group),
        }
    }

    /// Whether weights are `code * scale + minimum`.
    pub fn has_minimum(self) -> bool {
        matches!(
            self,
            Self::Int8Minimum { .. } | Self::Int4Minimum { .. } | Self::Int4Zero { .. } | Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K
        )
    }

    /// Bytes of one GGUF block, or of a float. The planar formats have no blocks.
    fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 2 + 32,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q4K => 4 + 12 + 128,
            Self::Q5K => 4 + 12 + 32 + 128,
            Self::Q6K => 128 + 64 + 16 + 2,
            _ => unreachable!("{self} is not stored in blocks"),
        }
    }
}

/// A borrowed tensor: a matrix `[rows, cols]`, or a vector with `rows == 1`.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Element format.
    pub dtype: Dtype,
    /// Rows (N).
    pub rows: usize,
    /// Columns (K).
    pub cols: usize,
    /// Exactly `dtype.bytes(rows, cols)` bytes.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// Whether dtype, shape and byte length agree. Everything else in this module assumes that they do.
    pub fn check(&self) -> Result<(), PackError> {
        match self.dtype.bytes(self.rows, self.cols) {
            Some(expected) if expected == self.bytes.len() => Ok(()),
            Some(expected_bytes) => Err(PackError::Length {
                dtype: self.dtype.to_string(),
                rows: self.rows,
                cols: self.cols,
                expected_bytes,
                actual_bytes: self.bytes.len(),
            }),
            None => Err(PackError::Shape { dtype: self.dtype.to_string(), rows: self.rows, cols: self.cols }),
        }
    }

    /// Groups of one row; the last may be short. 0 for float formats.
    pub fn row_groups(&self) -> usize {
        self.dtype.group().map_or(0, |group| self.cols.div_ceil(group))
    }
}

/// Little-endian f16 at byte `at`.
fn read_f16(bytes: &[u8], at: usize) -> half::f16 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests;
