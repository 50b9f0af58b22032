//! `out[T, N] = x[T, K] W^T + bias`: cuts the work in units, quantises activations once a call, and picks the tile code.
//!
//! A unit is a run of panels for a block of rows. The order of accumulation of an output is fixed by K alone
//! (docs/numerics.md), so units, tiles and threads are free to be whatever is fast. One row is limited by the bytes of
//! the weights; many rows by multiply-add throughput, with a tile's weights of one pass and 96 rows staying in L2.

use std::ops::Range;

use super::Cpu;
use super::activations::{Activations, QuantiseRows};
use super::lanes::{Lanes, load_some, store_some};
use super::linear_float::{Bf16, F16, F32, FloatTiles};
use super::linear_integer::IntegerTiles;
use super::memory::Shared;
use super::pack::{LANES, Linear, Part, Weights};

/// Where tiles put their sums.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub(super) values: Shared<'a, f32>,
    /// Elements of a row.
    pub(super) stride: usize,
    /// First column and number of the part's outputs.
    pub(super) first: usize,
    pub(super) outputs: usize,
    /// Of the whole row.
    pub(super) bias: Option<&'a [f32]>,
}

impl<'a> Output<'a> {
    /// What an earlier pass over K left for `row` and `panel`.
    ///
    /// # Safety
    /// No other thread works on this row and panel.
    #[inline(always)]
    pub(super) unsafe fn load<S: Lanes>(&self, s: S, row: usize, panel: usize) -> S::F {
        // SAFETY: the caller owns this row and panel.
        load_some(s, unsafe { self.place(row, panel) })
    }

    /// Asks for the cache lines that `store` will write: many rows lie far apart, and a store that misses holds up the next tile's.
    #[inline(always)]
    pub(super) fn prefetch<S: Lanes>(&self, s: S, row: usize, panel: usize) {
        s.prefetch_write(self.values.address(row * self.stride + self.first + panel * LANES).cast());
    }

    /// Stores sums; the bias comes after the last slice of K.
    ///
    /// # Safety
    /// No other thread works on this row and panel.
    #[inline(always)]
    pub(super) unsafe fn store<S: Lanes>(&self, s: S, sums: S::F, row: usize, panel: usize, is_last: bool) {
        // SAFETY: the caller owns this row and panel.
        let out = unsafe { self.place(row, panel) };
        let mut value = sums;
        if is_last && let Some(bias) = self.bias {
            value = s.add(value, load_some(s, &bias[self.first + panel * LANES..][..out.len()]));
        }
        store_some(s, value, out);
    }

    /// # Safety
    /// No other thread works on this row and panel.
    #[inline(always)]
    unsafe fn place(&self, row: usize, panel: usize) -> &'a mut [f32] {
        let start = row * self.stride + self.first + panel * LANES;
        // SAFETY: the caller owns this row and panel.
        unsafe { self.values.part(start..start + LANES.min(self.outputs - panel * LANES)) }
    }
}

/// Activations quantised for each way of grouping that a layer's parts have; reused from call to call.
pub(super) type Scratch = Vec<Activations>;

pub(super) fn apply(cpu: &Cpu, out: &mut [f32], x: &[f32], row_count: usize, linear: &Linear, bias: Option<&[f32]>) {
    let (inputs, outputs) = (linear.inputs, linear.outputs);
    let (out, x) = (&mut out[..row_count * outputs], &x[..row_count * inputs]);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), outputs, "a bias has an element for each output");
    }
    let work = row_count * inputs * outputs;
    cpu.with_scratch(|scratch| {
        quantise(cpu, scratch, x, row_count, linear);
        let scratch = &*scratch;
        let values = Shared::new(out);
        let row_blocks = row_count.div_ceil(ROW_BLOCK);
        let units_of = |part: &Part| part.panels().div_ceil(unit_panels(part, row_count, cpu.pool.threads())) * row_blocks;
        let unit_count = linear.parts.iter().map(units_of).sum();
        cpu.spread(unit_count, work, &|unit| {
            let mut unit = unit;
            for part in &linear.parts {
                let units = units_of(part);
                if unit < units {
                    let output = Output { values, stride: outputs, first: part.first_output, outputs: part.outputs, bias };
                    // Row blocks run within a column range, so that its weights are read from memory once.
                    let (columns, block) = (unit / row_blocks, unit % row_blocks);
                    let width = unit_panels(part, row_count, cpu.pool.threads());
                    let panels = columns * width..((columns + 1) * width).min(part.panels());
                    let rows = block * ROW_BLOCK..((block + 1) * ROW_BLOCK).min(row_count);
                    run_unit(cpu, part, output, x, scratch, rows, panels);
                    return;
                }
                unit -= units;
            }
        });
    });
}

fn run_unit(cpu: &Cpu, part: &Part, output: Output<'_>, x: &[f32], scratch: &Scratch, rows: Range<usize>, panels: Range<usize>) {
    let inputs = x.len() / (output.values.len() / output.stride);
    match &part.weights {
        Weights::F32(weights) => cpu.proven.run(FloatTiles::<F32> { x, inputs, weights, rows, panels, output }),
        Weights::F16(weights) => cpu.proven.run(FloatTiles::<F16> { x, inputs, weights, rows, panels, output }),
        Weights::Bf16(weights) => cpu.proven.run(FloatTiles::<Bf16> { x, inputs, weights, rows, panels, output }),
        Weights::Integer(weights) => {
            let x = scratch.iter().find(|x| x.suits(weights)).expect("quantise has been here for every grouping");
            IntegerTiles { x, weights, rows, panels, output }.dispatch(cpu.proven);
        }
    }
}

/// Quantises the rows once for each distinct grouping among the parts.
fn quantise(cpu: &Cpu, scratch: &mut Scratch, x: &[f32], row_count: usize, linear: &Linear) {
    let mut count = 0;
    for part in &linear.parts {
        let Weights::Integer(weights) = &part.weights else { continue };
        if scratch[..count].iter().any(|done| done.suits(weights)) {
            continue;
        }
        if scratch.len() == count {
            scratch.push(Activations::empty());
        }
        let activations = &mut scratch[count];
        count += 1;
        activations.prepare(row_count, weights).expect("memory for one batch's activations");
        let (groups, offset, stride) = (activations.groups, activations.offset, activations.stride);
        let codes = Shared::new(&mut activations.codes);
        let scales = Shared::new(&mut activations.scales);
        let sums = Shared::new(&mut activations.sums);
        let corrections = Shared::new(&mut activations.corrections);
        cpu.spread(row_count.div_ceil(QUANTISE_ROWS), x.len(), &|unit| {
            let rows = unit * QUANTISE_ROWS..((unit + 1) * QUANTISE_ROWS).min(row_count);
            cpu.proven.run(QuantiseRows { x, rows, groups, offset, stride, codes, scales, sums, corrections });
        });
    }
    // What an earlier call left behind must not be taken for this call's.
    for stale in &mut scratch[count..] {
        stale.groups.inputs = usize::MAX;
    }
}

/// Panels of a unit. One row: about 64 KiB of weights. Several rows: two tiles' width. Smaller where threads would idle.
fn unit_panels(part: &Part, row_count: usize, threads: usize) -> usize {
    if row_count > 1 {
        return MANY_ROWS_PANELS;
    }
    let by_bytes = ONE_ROW_BYTES / part.panel_bytes().max(1);
    let by_share = part.panels() / (2 * threads);
    (by_bytes.min(by_share) / ONE_ROW_PANELS * ONE_ROW_PANELS).max(ONE_ROW_PANELS)
}

/// Elements of K that a tile goes through before the next rows: its weights of a pass are to stay in L2.
pub(super) const PASS: usize = 4 * crate::SLICE;
/// Rows of a unit: they stay in L2 beside the weights of a pass. A multiple of all tile heights.
const ROW_BLOCK: usize = 96;
/// A multiple of all tile widths but the one-row one.
const MANY_ROWS_PANELS: usize = 6;
/// Width of the one-row tile.
pub(super) const ONE_ROW_PANELS: usize = 4;
/// How far ahead a one-row tile asks for weights: a few hundred cycles of one stream.
pub(super) const PREFETCH_BYTES: usize = 2048;
const ONE_ROW_BYTES: usize = 64 << 10;
const QUANTISE_ROWS: usize = 8;
