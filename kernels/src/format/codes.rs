//! Reads one row of a quantised format as codes, scales and minima: `w = code * scale + minimum` in f32, each operation
//! rounded, which is bit for bit what GGUF's formulas give.
//!
//! K-quants carry two levels of scales; they are multiplied out here (`d * sub_scale`, `-dmin * sub_minimum`), the
//! same f32 products that GGUF's own dequantisation forms first (which subtracts `dmin * sub_minimum`), and handed out
//! beside the products for who keeps them apart.

use super::{Dtype, TensorView, read_f16};
use half::f16;

/// One row of quantised weights; the buffers are reused from row to row.
#[derive(Debug, Clone, Default)]
pub struct CodeRow {
    /// `cols` codes after the format's constant offset, within -128..=127.
    pub codes: Vec<i8>,
    /// A scale for each group.
    pub scales: Vec<f32>,
    /// A minimum for each group where the format has them, else empty.
    pub minima: Vec<f32>,
    /// For K-quants, whose scales have two levels, the factors of `scales` and `minima`; for formats with zero points those, negated, as
    /// `sub_minima`; else empty.
    pub two_level: TwoLevelScales,
}

/// `scales[g] = f32(super_scales[b]) * f32(sub_scales[g])`, where b is the block of 256 weights that group g lies in, and
/// likewise minima, empty for formats without.
#[derive(Debug, Clone, Default)]
pub struct TwoLevelScales {
    /// A factor for each block.
    pub super_scales: Vec<f16>,
    /// A factor for each group.
    pub sub_scales: Vec<i8>,
    /// A factor for each block: GGUF's `dmin` negated, since it is subtracted there.
    pub super_minima: Vec<f16>,
    /// A factor for each group; not negative in K-quants.
    pub sub_minima: Vec<i8>,
}

impl TwoLevelScales {
    fn clear(&mut self) {
        self.super_scales.clear();
        self.sub_scales.clear();
        self.super_minima.clear();
        self.sub_minima.clear();
    }
}

impl CodeRow {
    /// Reads row `row` of a view that passed [`TensorView::check`]. Panics on a float format.
    pub fn read(&mut self, view: &TensorView<'_>, row: usize) {
        assert!(view.dtype.group().is_some(), "{} has no codes", view.dtype);
        assert!(row < view.rows, "row {row} of {}", view.rows);
        self.codes.clear();
        self.scales.clear();
        self.minima.clear();
        self.two_level.clear();
        let cols = view.cols;
        match view.dtype {
            Dtype::Int8 { .. } | Dtype::Int8Minimum { .. } => {
                self.codes.extend(view.bytes[row * cols..][..cols].iter().map(|&byte| byte.cast_signed()));
                self.planar_scales(view, row);
            }
            Dtype::Int4 { .. } | Dtype::Int4Minimum { .. } | Dtype::Int4Zero { .. } => {
                let offset = if view.dtype.has_minimum() { 0 } else { 8 };
                let row_bytes = cols.div_ceil(2);
                let packed = &view.bytes[row * row_bytes..][..row_bytes];
                // Whole bytes and then a last nibble: a plain loop, which the compiler does many at a time.
                self.codes.resize(cols, 0);
                let (pairs, last) = self.codes.as_chunks_mut::<2>();
                for (pair, &byte) in pairs.iter_mut().zip(packed) {
                    *pair = [nibble(byte, 0) - offset, nibble(byte, 1) - offset];
                }
                if let [last] = last {
                    *last = nibble(packed[row_bytes - 1], 0) - offset;
                }
                self.planar_scales(view, row);
            }
            Dtype::Int1 { .. } => {
                let row_bytes = cols.div_ceil(8);
                let packed = &view.bytes[row * row_bytes..][..row_bytes];
                self.codes.extend((0..cols).map(|k| 2 * bit(packed, k) - 1));
                self.planar_scales(view, row);
            }
            dtype => {
                let block_bytes = dtype.block_bytes();
                let row_bytes = cols / dtype.block_columns() * block_bytes;
                for block in view.bytes[row * row_bytes..][..row_bytes].chunks_exact(block_bytes) {
                    self.block(dtype, block);
                }
            }
        }
    }

    /// Writes the weights: `code * scale`, plus the minimum where there is one.
    pub fn weights(&self, group: usize, out: &mut [f32]) {
        for (index, (codes, out)) in self.codes.chunks(group).zip(out.chunks_mut(group)).enumerate() {
            let scale = self.scales[index];
            for (&code, out) in codes.iter().zip(&mut *out) {
                *out = f32::from(code) * scale;
            }
            if let Some(minimum) = self.minima.get(index) {
                out.iter_mut().for_each(|w| *w += minimum);
            }
        }
    }

    fn planar_scales(&mut self, view: &TensorView<'_>, row: usize) {
        let [codes, scales, minima] = view.dtype.sections(view.rows, view.cols).expect("the view was checked");
        let groups = view.row_groups();
        let halves = |start| (0..groups).map(move |group| read_f16(view.bytes, start + (row * groups + group) * 2).to_f32());
        self.scales.extend(halves(codes));
        if let Dtype::Int4Zero { .. } = view.dtype {
            let zeros = &view.bytes[codes + scales..][row * groups..][..groups];
            // A byte that is no zero point is taken as one modulo 256, as it would be packed.
            self.two_level.sub_minima.extend(zeros.iter().map(|zero| zero.cast_signed().wrapping_neg()));
            self.minima.extend(self.scales.iter().zip(&self.two_level.sub_minima).map(|(scale, zero)| scale * f32::from(*zero)));
        } else if minima > 0 {
            self.minima.extend(halves(codes + scales));
        }
    }

    fn block(&mut self, dtype: Dtype, block: &[u8]) {
        match dtype {
            Dtype::Q8_0 => {
                self.scales.push(read_f16(block, 0).to_f32());
                self.codes.extend(block[2..].iter().map(|&byte| byte.cast_signed()));
            }
            Dtype::Q4_0 => {
                self.scales.push(read_f16(block, 0).to_f32());
                self.codes.extend((0..32).map(|j| nibble(block[2 + j % 16], j / 16) - 8));
            }
            Dtype::Q4_1 => {
                self.scales.push(read_f16(block, 0).to_f32());
                self.minima.push(read_f16(block, 2).to_f32());
                self.codes.extend((0..32).map(|j| nibble(block[4 + j % 16], j / 16)));
            }
            Dtype::Q5_0 => {
                self.scales.push(read_f16(block, 0).to_f32());
                self.codes.extend((0..32).map(|j| nibble(block[6 + j % 16], j / 16) + (bit(&block[2..6], j) << 4) - 16));
            }
            Dtype::Q5_1 => {
                self.scales.push(read_f16(block, 0).to_f32());
                self.minima.push(read_f16(block, 2).to_f32());
                self.codes.extend((0..32).map(|j| nibble(block[8 + j % 16], j / 16) + (bit(&block[4..8], j) << 4)));
            }
            Dtype::Q4K => {
                self.k_scales(block);
                // Each 32 bytes hold sub-groups 2i (low nibbles) and 2i + 1 (high nibbles).
                self.codes.extend((0..256).map(|j| nibble(block[16 + j / 64 * 32 + j % 32], j / 32 % 2)));
            }
            Dtype::Q5K => {
                self.k_scales(block);
                let (high, low) = (&block[16..48], &block[48..]);
                // Bit i of high byte l is the fifth bit of element l of sub-group i.
                self.codes.extend(
                    (0..256).map(|j| nibble(low[j / 64 * 32 + j % 32], j / 32 % 2) + (((high[j % 32] >> (j / 32)) & 1) << 4).cast_signed()),
                );
            }
            Dtype::Q6K => {
                let d = read_f16(block, 208);
                self.two_level.super_scales.push(d);
                for scale in block[192..208].iter().map(|scale| scale.cast_signed()) {
                    self.two_level.sub_scales.push(scale);
                    self.scales.push(d.to_f32() * f32::from(scale));
                }
                // Each half of 128: quarters of 32 take low nibbles of bytes 0..32 and 32..64, then the high nibbles;
                // the two high bits of quarter q are bits 2q, 2q + 1 of the half's 32 high bytes.
                self.codes.extend((0..256).map(|j| {
                    let (half, quarter, l) = (j / 128, j / 32 % 4, j % 32);
                    let low = nibble(block[half * 64 + quarter % 2 * 32 + l], quarter / 2);
                    let high = (block[128 + half * 32 + l] >> (2 * quarter)) & 3;
                    low + (high << 4).cast_signed() - 32
                }));
            }
            _ => unreachable!("{dtype} is not stored in blocks"),
        }
    }

    /// Scales and minima of Q4_K and Q5_K: 8 pairs of 6 bits in 12 bytes.
    fn k_scales(&mut self, block: &[u8]) {
        let (d, d_minimum) = (read_f16(block, 0), -read_f16(block, 2));
        self.two_level.super_scales.push(d);
        self.two_level.super_minima.push(d_minimum);
        let packed = &block[4..16];
        for j in 0..8 {
            let (scale, minimum) = if j < 4 {
                (packed[j] & 63, packed[j + 4] & 63)
            } else {
                ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
            };
            self.two_level.sub_scales.push(scale.cast_signed());
            self.two_level.sub_minima.push(minimum.cast_signed());
            self.scales.push(d.to_f32() * f32::from(scale));
            self.minima.push(d_minimum.to_f32() * f32::from(minimum));
        }
    }
}

/// The low (`which` = 0) or high nibble.
fn nibble(byte: u8, which: usize) -> i8 {
    ((byte >> (4 * which)) & 15).cast_signed()
}

fn bit(bytes: &[u8], index: usize) -> i8 {
    ((bytes[index / 8] >> (index % 8)) & 1).cast_signed()
}
