//! A lookup table as the CPU holds it: the stored bytes of a map, or the packed layer that was made of the same tensor, so
//! that a tied table is in memory once. Reading a row out of panels is packing (`pack`) backwards: codes, scales and minima
//! come back as they were stored, and are multiplied out by `format` as those of a map are, so the bits are the same.
//!
//! A packed row lies in a word of each of K/4 lines of 64 bytes (int8; one after another in memory), so it reads 16 times the bytes.

use std::sync::Arc;

use half::{bf16, f16};

use super::memory::Element;
use super::pack::{CodeWidth, IntegerWeights, LANES, Linear, Part, Scales, Weights};
use crate::format::CodeRow;
use crate::format::fp8::as_half;
use crate::table::Table as Stored;

/// Rows `[rows, width]` that are read where they lie.
#[derive(Debug)]
pub struct Table(Rows);

#[derive(Debug)]
enum Rows {
    Stored(Stored),
    /// Of one part, which is not of [`Weights::Pairs`].
    Packed(Arc<Linear>),
}

impl Table {
    pub(super) fn stored(table: Stored) -> Self {
        Self(Rows::Stored(table))
    }

    /// The rows of the tensor that `linear` was packed from; `None` if there were several, or if packing has lost bits.
    pub(super) fn packed(linear: &Arc<Linear>) -> Option<Self> {
        match linear.parts.as_slice() {
            // Subnormal weights are zeros there.
            [Part { weights: Weights::Pairs(_), .. }] => None,
            [_] => Some(Self(Rows::Packed(Arc::clone(linear)))),
            _ => None,
        }
    }

    pub(super) fn width(&self) -> usize {
        match &self.0 {
            Rows::Stored(table) => table.width(),
            Rows::Packed(linear) => linear.inputs,
        }
    }

    /// Writes row `row` as f32.
    pub(super) fn read(&self, row: u32, scratch: &mut CodeRow, out: &mut [f32]) {
        match &self.0 {
            Rows::Stored(table) => table.read(row, scratch, out),
            Rows::Packed(linear) => read_packed(&linear.parts[0], row as usize, scratch, out),
        }
    }
}

fn read_packed(part: &Part, row: usize, scratch: &mut CodeRow, out: &mut [f32]) {
    assert!(row < part.outputs, "row {row} of a table of {}", part.outputs);
    let (panel, lane) = (row / LANES, row % LANES);
    match &part.weights {
        Weights::F32(elements) => read_elements(elements, panel, lane, out, |element| element),
        Weights::F16(elements) => read_elements(elements, panel, lane, out, |element| f16::from_bits(element).to_f32()),
        Weights::Bf16(elements) => read_elements(elements, panel, lane, out, |element| bf16::from_bits(element).to_f32()),
        Weights::Fp8(weights) => {
            let (inputs, groups) = (out.len(), out.len().div_ceil(weights.group));
            let (lines, _) = weights.codes[panel * inputs * LANES..][..inputs * LANES].as_chunks::<LANES>();
            let (scales, _) = weights.scales[panel * groups * LANES..][..groups * LANES].as_chunks::<LANES>();
            for ((out, lines), scales) in out.chunks_mut(weights.group).zip(lines.chunks(weights.group)).zip(scales) {
                out.iter_mut().zip(lines).for_each(|(out, line)| *out = f16::from_bits(as_half(line[lane])).to_f32() * scales[lane]);
            }
        }
        Weights::Pairs(_) => unreachable!("no table is made of pairs"),
        Weights::Integer(weights) => {
            assert_eq!(out.len(), weights.groups.inputs, "a row has K elements");
            read_codes(weights, panel, lane, &mut scratch.codes);
            read_scales(&weights.scales, weights.groups.count, panel, lane, &mut scratch.scales);
            match &weights.minima {
                Some(Scales::Zeros(zeros)) => {
                    scratch.minima.clear();
                    let zeros = lane_of(zeros, panel, weights.groups.count, lane);
                    scratch.minima.extend(scratch.scales.iter().zip(zeros).map(|(scale, zero)| scale * f32::from(zero)));
                }
                Some(minima) => read_scales(minima, weights.groups.count, panel, lane, &mut scratch.minima),
                None => scratch.minima.clear(),
            }
            scratch.weights(weights.groups.group, out);
        }
    }
}

/// One lane of a panel `[K][16]`.
fn read_elements<T: Element>(all: &[T], panel: usize, lane: usize, out: &mut [f32], convert: impl Fn(T) -> f32) {
    let panel = &all[panel * out.len() * LANES..][..out.len() * LANES];
    let (lines, _) = panel.as_chunks::<LANES>();
    out.iter_mut().zip(lines).for_each(|(out, line)| *out = convert(line[lane]));
}

/// The codes of one lane, with the offset taken off and without the padding of groups.
fn read_codes(weights: &IntegerWeights, panel: usize, lane: usize, out: &mut Vec<i8>) {
    let (groups, offset) = (weights.groups, weights.offset as u8);
    let panel_bytes = groups.padded_inputs() * LANES * weights.width.bits() / 8;
    let panel = &weights.codes[panel * panel_bytes..][..panel_bytes];
    out.clear();
    out.resize(groups.padded_inputs(), 0);
    let (words, _) = out.as_chunks_mut::<4>();
    let code = |unsigned: u8| unsigned.wrapping_sub(offset).cast_signed();
    match weights.width {
        CodeWidth::Byte | CodeWidth::WholeByte => {
            let (lines, _) = panel.as_chunks::<4>().0.as_chunks::<LANES>();
            words.iter_mut().zip(lines).for_each(|(out, line)| *out = line[lane].map(code));
        }
        CodeWidth::Nibble => {
            let (lines, _) = panel.as_chunks::<4>().0.as_chunks::<LANES>();
            for ([low, high], line) in words.as_chunks_mut::<2>().0.iter_mut().zip(lines) {
                *low = line[lane].map(|byte| code(byte & 15));
                *high = line[lane].map(|byte| code(byte >> 4));
            }
        }
        CodeWidth::Bit => {
            let (lines, _) = panel.as_chunks::<{ LANES / 2 }>();
            for (out, line) in words.iter_mut().zip(lines) {
                let bits = line[lane / 2] >> (lane % 2 * 4);
                *out = std::array::from_fn(|i| code((bits >> i & 1) * 2));
            }
        }
    }
    if groups.padded_group() != groups.group {
        for g in 1..groups.count {
            let members = groups.members(g);
            let padded = g * groups.padded_group();
            out.copy_within(padded..padded + members.len(), members.start);
        }
    }
    out.truncate(groups.inputs);
}

/// Scales or minima of one lane, multiplied out where there are two levels.
fn read_scales(scales: &Scales, groups: usize, panel: usize, lane: usize, out: &mut Vec<f32>) {
    out.clear();
    match scales {
        Scales::F16(scales) => out.extend(lane_of(scales, panel, groups, lane).map(|scale| f16::from_bits(scale).to_f32())),
        Scales::Zeros(_) => unreachable!("zero points have no value without scales"),
        Scales::TwoLevel { subs, supers, block_groups } => {
            let supers = lane_of(supers, panel, groups / block_groups, lane).flat_map(|factor| std::iter::repeat_n(factor, *block_groups));
            let subs = lane_of(subs, panel, groups, lane);
            out.extend(supers.zip(subs).map(|(factor, sub)| f16::from_bits(factor).to_f32() * f32::from(sub)));
        }
    }
}

/// One lane of a panel of `count` lines.
fn lane_of<T: Element>(all: &[T], panel: usize, count: usize, lane: usize) -> impl Iterator<Item = T> {
    let (lines, _) = all[panel * count * LANES..][..count * LANES].as_chunks::<LANES>();
    lines.iter().map(move |line| line[lane])
}
