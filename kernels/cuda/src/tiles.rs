//! Integer layers on tensor cores, with the bits of docs/numerics.md's rule 3: layers of 4 and 8 bits in groups of 32, 64 and 128, packed as
//! `kernels/cuda/linear_integer.cu` says, whose forms for few rows and for many are chosen here. All forms give the same bits.

use std::sync::Arc;

use ashlar_kernels::SLICE;
use ashlar_kernels::format::{CodeRow, Dtype};
use ashlar_kernels::ops::PackError;
use half::f16;

use crate::driver::Driver;
use crate::linear::{Most, Weights};
use crate::memory::Memory;
use crate::plain::Shape;
use crate::stacked::Stacked;

/// Outputs of a tile: an MMA's rows.
pub(crate) const TILE: usize = 16;
/// Inputs that a row's codes are padded to.
const CHUNK: usize = 64;
/// Rows of an MMA's other side, and those that the form for few rows takes at most.
const ROW_TILE: usize = 8;
pub(crate) const FEW_ROWS_MAX: usize = 16;
/// Rows and outputs of a cta of the form for many rows, its threads, and the stages that it loads ahead.
const BLOCK: usize = 128;
const MANY_THREADS: usize = 256;
const STAGES: usize = 4;
/// Layers of more outputs than this have two tiles a warp: enough ctas are left to keep a card busy.
const TWO_TILES_FROM: usize = 8192;
/// Warps of a cta of the form for few rows, at most: they share the slices.
const FEW_WARPS_MAX: usize = 8;

/// What the kernels of a layer's format are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernels {
    /// What is defined for the unit that has them.
    define: &'static str,
    quantise: &'static str,
    /// For eight rows and sixteen: any K; K a multiple of a slice with one tile a warp, and with two.
    few: [[&'static str; 2]; 3],
    many: &'static str,
}

macro_rules! kernels {
    ($kind:literal, $group:literal) => {
        Kernels {
            define: concat!("GROUP=", $group),
            quantise: concat!("quantise_g", $group, "_rows"),
            few: [
                [concat!("linear_", $kind, "_g", $group, "_rows1_any"), concat!("linear_", $kind, "_g", $group, "_rows2_any")],
                [concat!("linear_", $kind, "_g", $group, "_rows1_t1"), concat!("linear_", $kind, "_g", $group, "_rows2_t1")],
                [concat!("linear_", $kind, "_g", $group, "_rows1_t2"), concat!("linear_", $kind, "_g", $group, "_rows2_t2")],
            ],
            many: concat!("linear_", $kind, "_g", $group, "_many"),
        }
    };
}

const KERNELS: [(u32, bool, usize, Kernels); 9] = [
    (4, false, 32, kernels!("4s", "32")),
    (4, false, 64, kernels!("4s", "64")),
    (4, false, 128, kernels!("4s", "128")),
    (4, true, 32, kernels!("4m", "32")),
    (4, true, 64, kernels!("4m", "64")),
    (4, true, 128, kernels!("4m", "128")),
    (8, false, 32, kernels!("8s", "32")),
    (8, false, 64, kernels!("8s", "64")),
    (8, false, 128, kernels!("8s", "128")),
];

/// All entries that may be launched, each with what is defined for its unit.
pub(crate) fn entries() -> impl Iterator<Item = (&'static str, &'static str)> {
    let of = |kernels: &Kernels| {
        let names = [kernels.quantise, kernels.many].into_iter().chain(kernels.few.into_iter().flatten());
        names.map(|name| (kernels.define, name)).collect::<Vec<_>>()
    };
    let mut names: Vec<_> = KERNELS.iter().flat_map(|(.., kernels)| of(kernels)).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter()
}

/// A form that takes weights of one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tiles {
    bits: u32,
    has_minimum: bool,
    group: usize,
    kernels: Kernels,
}

/// Of a format whose scales are f16 as they lie; `None` of others.
fn form(dtype: Dtype) -> Option<Tiles> {
    let (bits, has_minimum, group) = match dtype {
        Dtype::Int4 { group } => (4, false, usize::from(group)),
        Dtype::Int4Minimum { group } => (4, true, usize::from(group)),
        Dtype::Int8 { group } => (8, false, usize::from(group)),
        Dtype::Q4_0 => (4, false, 32),
        Dtype::Q4_1 => (4, true, 32),
        Dtype::Q8_0 => (8, false, 32),
        _ => return None,
    };
    let (.., kernels) =
        KERNELS.into_iter().find(|(of_bits, of_minimum, of_group, _)| (*of_bits, *of_minimum, *of_group) == (bits, has_minimum, group))?;
    Some(Tiles { bits, has_minimum, group, kernels })
}

/// One layer's packed bytes: codes, scales, minima.
struct Packed {
    weights: Vec<u8>,
    scales: Vec<u8>,
    minima: Vec<u8>,
}

fn pack(stacked: &Stacked<'_>, bits: u32, group: usize) -> Packed {
    let (tiles, padded, slices, per_slice) =
        (stacked.rows.div_ceil(TILE), stacked.cols.next_multiple_of(CHUNK), stacked.cols.div_ceil(SLICE), SLICE / group);
    let mut packed = Packed {
        weights: Vec::with_capacity(tiles * TILE * padded * bits as usize / 8),
        scales: vec![0; tiles * slices * TILE * per_slice * 2],
        minima: vec![0; tiles * slices * TILE * per_slice * 2],
    };
    let mut rows: Vec<CodeRow> = (0..TILE).map(|_| CodeRow::default()).collect();
    for tile in 0..tiles {
        let there = TILE.min(stacked.rows - tile * TILE);
        for (row, codes) in rows.iter_mut().enumerate().take(there) {
            stacked.read(codes, tile * TILE + row);
            for (values, to) in [(&codes.scales, &mut packed.scales), (&codes.minima, &mut packed.minima)] {
                for (index, value) in values.iter().enumerate() {
                    let at = ((tile * slices + index / per_slice) * TILE + row) * per_slice + index % per_slice;
                    to[at * 2..][..2].copy_from_slice(&f16::from_f32(*value).to_le_bytes());
                }
            }
        }
        let code = |row: usize, k: usize| if row < there && k < stacked.cols { rows[row].codes[k].cast_unsigned() } else { 0 };
        pack_codes(&mut packed.weights, padded, bits, code);
    }
    packed
}

/// The words of one tile, lane by lane, in the order in which MMAs take them.
fn pack_codes(out: &mut Vec<u8>, padded: usize, bits: u32, code: impl Fn(usize, usize) -> u8) {
    let chunk = if bits == 4 { 64 } else { 32 };
    for first in (0..padded).step_by(chunk) {
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            for word in 0..4 {
                let row = g + word % 2 * 8;
                let value = if bits == 4 {
                    let nibble = |j: usize| u32::from(code(row, first + word / 2 * 32 + 8 * t + j) & 15) << (j % 4 * 8 + j / 4 * 4);
                    (0..8).map(nibble).sum::<u32>()
                } else {
                    let byte = |j: usize| u32::from(code(row, first + 8 * t + word / 2 * 4 + j)) << (8 * j);
                    (0..4).map(byte).sum()
                };
                out.extend(value.to_le_bytes());
            }
        }
    }
}

impl Tiles {
    /// Of a format; `None` where it has no such kernels.
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        form(dtype)
    }

    /// What its kernels are told apart by.
    pub(crate) fn name(&self) -> &'static str {
        self.kernels.many
    }

    /// The kernel that quantises rows for it.
    pub(crate) fn quantise(&self) -> &'static str {
        self.kernels.quantise
    }

    /// The two halves of so many outputs can be taken side by side.
    pub(crate) fn gates(outputs: usize) -> bool {
        outputs.is_multiple_of(2 * TILE)
    }

    pub(crate) fn pack(&self, driver: &Arc<dyn Driver>, stacked: &Stacked<'_>) -> Result<Weights, PackError> {
        driver.prepare(self.kernels.quantise)?;
        let packed = pack(stacked, self.bits, self.group);
        Ok(Weights {
            codes: Memory::holding(driver, &packed.weights)?,
            scales: Some(Memory::holding(driver, &packed.scales)?),
            minima: self.has_minimum.then(|| Memory::holding(driver, &packed.minima)).transpose()?,
            group: self.group,
        })
    }

    /// Bytes of so many rows quantised: codes, scales, sums.
    pub(crate) fn quantised_bytes(&self, inputs: usize, rows: usize) -> [usize; 3] {
        let (rows, groups) = (padded_rows(rows), inputs.div_ceil(self.group));
        [rows * inputs.next_multiple_of(CHUNK), rows * groups * 4, rows * groups * 4]
    }

    /// Ctas along x that quantise rows of so many inputs, and their threads.
    pub(crate) fn quantise_shape(&self, inputs: usize) -> (usize, usize) {
        (inputs.next_multiple_of(CHUNK).div_ceil(self.group).div_ceil(8), 256)
    }

    /// How tasks are launched: any number of up to [`FEW_ROWS_MAX`] rows each, or one of more.
    pub(crate) fn shape(&self, most: &Most, sides: usize, shared_bytes_max: usize) -> Shape {
        if most.rows > FEW_ROWS_MAX {
            let grid = [(sides * most.width).div_ceil(BLOCK) as u32, most.rows.div_ceil(BLOCK) as u32, 1];
            return (self.kernels.many, grid, MANY_THREADS, self.many_shared_bytes());
        }
        let row_tiles = most.rows.div_ceil(ROW_TILE);
        let shared = |tiles: usize| sides * most.slices * row_tiles * ROW_TILE * tiles * TILE * size_of::<f32>();
        let (form, tiles) = match most.is_whole {
            false => (0, 1),
            true if sides * most.widths >= TWO_TILES_FROM && shared(2) <= shared_bytes_max => (2, 2),
            true => (1, 1),
        };
        let grid = [most.width.div_ceil(tiles * TILE) as u32, most.count as u32, 1];
        let warps = most.slices.min(FEW_WARPS_MAX / sides) * sides;
        (self.kernels.few[form][row_tiles - 1], grid, 32 * warps, shared(tiles))
    }

    /// `integer_many_shared_bytes` of linear_integer.cu.
    fn many_shared_bytes(&self) -> usize {
        let kinds = if self.has_minimum { 2 } else { 1 };
        let row_tiles = BLOCK / 16;
        let stage = 2 * row_tiles * 512 + kinds * 2 * row_tiles * (CHUNK / self.group).max(1) * 32 + 512 * self.bits as usize * 2;
        STAGES * stage + kinds * 2 * 8 * 32 * (SLICE / self.group) + 8 * row_tiles * 1024
    }
}

fn padded_rows(rows: usize) -> usize {
    rows.next_multiple_of(if rows > FEW_ROWS_MAX { BLOCK } else { ROW_TILE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_tensor_cores_take_have_their_kernels() {
        for (dtype, name) in [
            (Dtype::Int4 { group: 128 }, "linear_4s_g128_many"),
            (Dtype::Int4Minimum { group: 64 }, "linear_4m_g64_many"),
            (Dtype::Int8 { group: 32 }, "linear_8s_g32_many"),
            (Dtype::Q8_0, "linear_8s_g32_many"),
            (Dtype::Q4_1, "linear_4m_g32_many"),
        ] {
            assert_eq!(form(dtype).unwrap().name(), name, "{dtype}");
        }
        for dtype in [
            Dtype::Int4 { group: 16 },
            Dtype::Int8 { group: 256 },
            Dtype::Int8Minimum { group: 32 },
            Dtype::Int4Zero { group: 32 },
            Dtype::Q4K,
        ] {
            assert!(form(dtype).is_none(), "{dtype}");
        }
        assert_eq!(entries().count(), 9 * 7 + 3);
    }

    #[test]
    fn a_lane_has_the_rows_and_inputs_of_its_fragment() {
        let mut words = Vec::new();
        // Code (row + k) & 15: lane 5 has g = 1 and t = 1, so word 1 is of row 9, inputs 8 to 15.
        pack_codes(&mut words, 64, 4, |row, k| ((row + k) & 15) as u8);
        let word = u32::from_le_bytes(words[(5 * 4 + 1) * 4..][..4].try_into().unwrap());
        let nibbles: Vec<u32> = (0..8).map(|j| word >> (j % 4 * 8 + j / 4 * 4) & 15).collect();
        assert_eq!(nibbles, (8..16).map(|k| (9 + k) & 15).collect::<Vec<u32>>());
    }
}
