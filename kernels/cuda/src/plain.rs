//! Layers as `kernels/cuda/linear_exact.cu` takes them: floats of every kind, and the integers that no tensor core takes.

use std::sync::Arc;

use ashlar_kernels::SLICE;
use ashlar_kernels::format::{CodeRow, Dtype};
use ashlar_kernels::ops::PackError;

use crate::driver::{Driver, DriverError};
use crate::linear::Weights;
use crate::memory::Memory;
use crate::stacked::Stacked;

/// Warps of a cta, at most: they share the slices.
pub(crate) const WARPS_MAX: usize = 8;
/// Rows of a cta of the form for several.
const ROWS: usize = 8;
/// Slices whose sums meet at once, at most.
const MEET: usize = 16;
/// Words of shared memory in which a warp of floats has its rows.
const X_WORDS: usize = 512;

/// A form that takes weights of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plain {
    /// For one row, and for several.
    names: [&'static str; 2],
    /// Outputs of a warp.
    width: usize,
    /// They are integers: rows are quantised.
    pub(crate) is_integer: bool,
}

macro_rules! plain {
    ($kind:literal, $width:literal, $is_integer:literal) => {
        Plain { names: [concat!("linear_", $kind, "_rows1"), concat!("linear_", $kind, "_rows8")], width: $width, is_integer: $is_integer }
    };
}

const INTEGER: Plain = plain!("integer", 32, true);

/// What a launch has: kernel, ctas, threads and bytes of shared memory.
pub(crate) type Shape = (&'static str, [u32; 3], usize, usize);

impl Plain {
    /// Of a format, whatever it is.
    pub(crate) fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => plain!("f32", 64, false),
            Dtype::F16 => plain!("f16", 64, false),
            Dtype::Bf16 => plain!("bf16", 64, false),
            Dtype::Fp8 { .. } => plain!("fp8", 64, false),
            _ => INTEGER,
        }
    }

    /// What its kernels are told apart by.
    pub(crate) fn name(self) -> &'static str {
        self.names[0]
    }

    /// The two halves of so many outputs can be taken side by side: pairs of neighbours are read as one.
    pub(crate) fn gates(self, outputs: usize) -> bool {
        outputs.is_multiple_of(if self.is_integer { 2 } else { 4 })
    }

    /// How tasks are launched of which the largest has so many rows, outputs of a side and slices.
    pub(crate) fn shape(self, count: usize, rows: usize, width: usize, slices: usize, sides: usize) -> Shape {
        let (entry, each) = if rows == 1 { (0, 1) } else { (1, ROWS) };
        let warps = slices.min(WARPS_MAX / sides) * sides;
        let x_words = if self.is_integer { each * SLICE / 4 } else { X_WORDS };
        let sums = sides * (1 + slices.min(MEET)) * each * self.width;
        let grid = [width.div_ceil(self.width) as u32, rows.div_ceil(each) as u32, count as u32];
        (self.names[entry], grid, 32 * warps, (warps * x_words + sums) * size_of::<f32>())
    }

    /// Bytes of so many rows' codes, scales and sums.
    pub(crate) fn quantised_bytes(self, inputs: usize, group: usize, rows: usize) -> [usize; 3] {
        let of_groups = rows * inputs.div_ceil(group) * size_of::<f32>();
        [rows * inputs.next_multiple_of(4), of_groups, of_groups]
    }

    pub(crate) fn pack(self, driver: &Arc<dyn Driver>, stacked: &Stacked<'_>) -> Result<Weights, PackError> {
        if self.is_integer { integer(driver, stacked) } else { Ok(self.float(driver, stacked)?) }
    }

    fn float(self, driver: &Arc<dyn Driver>, stacked: &Stacked<'_>) -> Result<Weights, DriverError> {
        let (dtype, cols) = (stacked.views[0].dtype, stacked.cols);
        let (size, group) = match dtype {
            Dtype::F32 => (4, None),
            Dtype::Fp8 { group } => (1, Some(usize::from(group))),
            _ => (2, None),
        };
        let codes = Memory::holding(driver, &transposed(stacked, |_| 0, cols, size))?;
        let scales = match group {
            Some(group) => Some(Memory::holding(driver, &transposed(stacked, |rows| rows * cols, cols.div_ceil(group), 4))?),
            None => None,
        };
        Ok(Weights { codes, scales, minima: None, group: group.unwrap_or(1) })
    }
}

/// Outputs of a layer as they lie: an even number.
fn padded(outputs: usize) -> usize {
    outputs.next_multiple_of(2)
}

/// Elements of `size` bytes of all views, each's `[rows, cols]` from a byte on, as `[cols, padded rows]`; by tiles, so that neither side leaves the cache.
fn transposed(stacked: &Stacked<'_>, start: impl Fn(usize) -> usize, cols: usize, size: usize) -> Vec<u8> {
    const TILE: usize = 64;
    let stride = padded(stacked.rows);
    let (mut out, mut first) = (vec![0; cols * stride * size], 0);
    for view in stacked.views {
        let bytes = &view.bytes[start(view.rows)..];
        for row0 in (0..view.rows).step_by(TILE) {
            for col0 in (0..cols).step_by(TILE) {
                for row in row0..(row0 + TILE).min(view.rows) {
                    for col in col0..(col0 + TILE).min(cols) {
                        let to = (col * stride + first + row) * size;
                        out[to..][..size].copy_from_slice(&bytes[(row * cols + col) * size..][..size]);
                    }
                }
            }
        }
        first += view.rows;
    }
    out
}

fn integer(driver: &Arc<dyn Driver>, stacked: &Stacked<'_>) -> Result<Weights, PackError> {
    let dtype = stacked.views[0].dtype;
    let group = dtype.group().expect("integers have groups");
    let (stride, words, groups) = (padded(stacked.rows), stacked.cols.div_ceil(4), stacked.cols.div_ceil(group));
    let mut codes = vec![0u8; words * stride * 4];
    let (mut scales, mut minima) = (vec![0u8; groups * stride * 4], vec![0u8; groups * stride * 4]);
    let mut row = CodeRow::default();
    for n in 0..stacked.rows {
        stacked.read(&mut row, n);
        for (k4, four) in row.codes.chunks(4).enumerate() {
            let to = &mut codes[(k4 * stride + n) * 4..][..four.len()];
            std::iter::zip(to, four).for_each(|(to, code)| *to = code.cast_unsigned());
        }
        for (values, to) in [(&row.scales, &mut scales), (&row.minima, &mut minima)] {
            for (g, value) in values.iter().enumerate() {
                to[(g * stride + n) * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    let minima = dtype.has_minimum().then(|| Memory::holding(driver, &minima)).transpose()?;
    Ok(Weights { codes: Memory::holding(driver, &codes)?, scales: Some(Memory::holding(driver, &scales)?), minima, group })
}
