//! Tensor element formats as they are stored (byte-exact layouts: docs/block-format.md) and views of them.
//! Owns sizes, quantising and dequantising; it does not know packed device layouts.

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
