//! `y[T, N] = x[T, K] W^T + bias`: cuts the work in units, quantises activations once a call, picks the tile code, and
//! finishes a unit's sums while they are in cache: stores them, adds them to what is there, or gates them.
//!
//! A unit is a run of panels for a block of rows. The order of accumulation of an output is fixed by K alone
//! (docs/numerics.md), so units, tiles and threads are free to be whatever is fast. One row is limited by the bytes of
//! the weights; many rows by multiply-add throughput, with a tile's weights of one pass and 96 rows staying in L2.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::Cpu;
use super::activations::{Activations, QuantiseRows};
use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::linear_float::{Bf16, F16, F32, FloatTiles};
use super::linear_integer::IntegerTiles;
use super::math;
use super::memory::Shared;
use super::pack::{LANES, Linear, Part, Weights};
use crate::ops::Activation;

/// What becomes of `y`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Finish {
    /// `out = y`.
    Store,
    /// `out += y`.
    Add,
    /// `out = act(gate) * up`, where `y` is `[gate | up]`.
    Gate(Activation),
}

/// Panels that one call of the tile code goes through: at step k of `count` stream c is at panel `first + k + c * distance`.
/// For one row there are several streams, far apart: each runs on from unit to unit, so that what it reads next is known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) streams: usize,
    pub(super) distance: usize,
}

impl Panels {
    /// C panels, from the one at step `k` of the first stream, `step` panels apart.
    #[inline(always)]
    pub(super) fn at<const C: usize>(&self, k: usize, step: usize) -> [usize; C] {
        let mut at = [0; C];
        for c in 0..C {
            at[c] = self.first + k + c * step;
        }
        at
    }

    /// All of them, close together.
    fn packed(&self) -> Self {
        Self { first: 0, distance: self.count, ..*self }
    }
}

/// Where tiles put their sums.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub(super) values: Shared<'a, f32>,
    /// Elements of a row.
    pub(super) stride: usize,
    /// The row that lies at the start of `values`.
    pub(super) first_row: usize,
    /// Where place 0 is in a row, and how many columns there are from there on.
    pub(super) column: usize,
    pub(super) columns: usize,
    /// Of the part.
    pub(super) bias: Option<&'a [f32]>,
}

impl<'a> Output<'a> {
    /// What an earlier pass over K left for `row` and `place`.
    ///
    /// # Safety
    /// No other thread works on this row and place.
    #[inline(always)]
    pub(super) unsafe fn load<S: Lanes>(&self, s: S, row: usize, place: usize) -> S::F {
        // SAFETY: the caller owns this row and place.
        load_some(s, unsafe { self.at(row, place) })
    }

    /// Asks for the cache lines that `store` will write: many rows lie far apart, and a store that misses holds up the next tile's.
    #[inline(always)]
    pub(super) fn prefetch<S: Lanes>(&self, s: S, row: usize, place: usize) {
        s.prefetch_write(self.values.address((row - self.first_row) * self.stride + self.column + place * LANES).cast());
    }

    /// Stores sums of `panel` at `place`; the bias comes after the last slice of K.
    ///
    /// # Safety
    /// No other thread works on this row and place.
    #[inline(always)]
    pub(super) unsafe fn store<S: Lanes>(&self, s: S, sums: S::F, row: usize, panel: usize, place: usize, is_last: bool) {
        let mut value = sums;
        if is_last && let Some(bias) = self.bias {
            value = s.add(value, load_some(s, &bias[panel * LANES..((panel + 1) * LANES).min(bias.len())]));
        }
        // SAFETY: the caller owns this row and place.
        store_some(s, value, unsafe { self.at(row, place) });
    }

    /// # Safety
    /// No other thread works on this row and place.
    #[inline(always)]
    unsafe fn at(&self, row: usize, place: usize) -> &'a mut [f32] {
        let start = (row - self.first_row) * self.stride + self.column + place * LANES;
        // SAFETY: the caller owns this row and place.
        unsafe { self.values.part(start..start + LANES.min(self.columns - place * LANES)) }
    }
}

/// Activations quantised for each way of grouping that a layer's parts have; reused from call to call.
pub(super) type Scratch = Vec<Activations>;

/// One call: `out` has `[T, N]`, or `[T, N/2]` where it gates.
struct Call<'a> {
    cpu: &'a Cpu,
    x: &'a [f32],
    linear: &'a Linear,
    bias: Option<&'a [f32]>,
    finish: Finish,
    out: Shared<'a, f32>,
    /// Elements of a row of `out`.
    stride: usize,
    scratch: &'a Scratch,
}

pub(super) fn apply(cpu: &Cpu, out: &mut [f32], x: &[f32], row_count: usize, linear: &Linear, bias: Option<&[f32]>, finish: Finish) {
    let (inputs, outputs) = (linear.inputs, linear.outputs);
    let stride = if let Finish::Gate(_) = finish { outputs / 2 } else { outputs };
    let (out, x) = (&mut out[..row_count * stride], &x[..row_count * inputs]);
    if let Some(bias) = bias {
        assert_eq!(bias.len(), outputs, "a bias has an element for each output");
    }
    let mut parts = linear.parts.as_slice();
    if let Finish::Gate(_) = finish {
        assert!(parts.len() == 2 && parts[0].outputs == parts[1].outputs, "a gate and an up part of equal outputs");
        parts = &parts[..1];
    }
    cpu.with_scratch(|scratch| {
        quantise(cpu, scratch, x, row_count, linear);
        let call = Call { cpu, x, linear, bias, finish, out: Shared::new(out), stride, scratch };
        let threads = cpu.pool.threads();
        let unit_count = parts.iter().map(|part| Cut::new(part, row_count, threads).unit_count(row_count)).sum();
        cpu.spread(unit_count, row_count * inputs * outputs, &|unit| {
            let mut unit = unit;
            for part in parts {
                let cut = Cut::new(part, row_count, threads);
                let count = cut.unit_count(row_count);
                if unit < count {
                    let (panels, rows) = cut.unit(unit, row_count);
                    return call.run(part, panels, rows);
                }
                unit -= count;
            }
        });
    });
}

impl Call<'_> {
    fn run(&self, part: &Part, panels: Panels, rows: Range<usize>) {
        let columns = panels.count * panels.streams * LANES;
        let bias = |part: &Part| self.bias.map(|bias| &bias[part.first_output..][..part.outputs]);
        if self.finish == Finish::Store {
            let output = Output {
                values: self.out,
                stride: self.stride,
                first_row: 0,
                column: part.first_output,
                columns: part.outputs,
                bias: bias(part),
            };
            return self.tiles(part, rows, panels, panels, output);
        }
        let sources = match self.finish {
            Finish::Gate(_) => self.linear.parts.as_slice(),
            _ => std::slice::from_ref(part),
        };
        let stride = columns * sources.len();
        let mut memory = Sums([const { MaybeUninit::uninit() }; SUMS]);
        let sums = memory.zeroed(rows.len() * stride);
        let values = Shared::new(sums);
        for (index, part) in sources.iter().enumerate() {
            let output = Output { values, stride, first_row: rows.start, column: index * columns, columns, bias: bias(part) };
            self.tiles(part, rows.clone(), panels, panels.packed(), output);
        }
        let (out, finish, first_column) = (self.out, self.finish, part.first_output);
        let (out_stride, out_columns) = (self.stride, part.outputs);
        self.cpu.proven.run(FinishUnit { out, out_stride, first_column, out_columns, sums, stride, rows, panels, finish });
    }

    fn tiles(&self, part: &Part, rows: Range<usize>, panels: Panels, places: Panels, output: Output<'_>) {
        let (cpu, x, inputs) = (self.cpu, self.x, self.linear.inputs);
        match &part.weights {
            Weights::F32(weights) => cpu.proven.run(FloatTiles::<F32> { x, inputs, weights, rows, panels, places, output }),
            Weights::F16(weights) => cpu.proven.run(FloatTiles::<F16> { x, inputs, weights, rows, panels, places, output }),
            Weights::Bf16(weights) => cpu.proven.run(FloatTiles::<Bf16> { x, inputs, weights, rows, panels, places, output }),
            Weights::Integer(weights) => {
                let x = self.scratch.iter().find(|x| x.suits(weights)).expect("quantise has been here for every grouping");
                IntegerTiles { x, weights, rows, panels, places, output }.dispatch(cpu.proven);
            }
        }
    }
}

/// Sums of a unit on their way to the output.
#[repr(align(64))]
struct Sums([MaybeUninit<f32>; SUMS]);

impl Sums {
    fn zeroed(&mut self, len: usize) -> &mut [f32] {
        let values = &mut self.0[..len];
        values.fill(MaybeUninit::new(0.0));
        // SAFETY: all of them were just written.
        unsafe { values.assume_init_mut() }
    }
}

/// Takes a unit's sums to the output.
struct FinishUnit<'a> {
    out: Shared<'a, f32>,
    out_stride: usize,
    /// Where panel 0 is in a row of `out`, and how many columns there are from there on.
    first_column: usize,
    out_columns: usize,
    /// `[rows][streams][count][16]`, twice in a row (gate, up) where it gates.
    sums: &'a [f32],
    stride: usize,
    rows: Range<usize>,
    panels: Panels,
    finish: Finish,
}

impl Kernel for FinishUnit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Panels { first, count, streams, distance } = self.panels;
        for row in self.rows.clone() {
            let sums = &self.sums[(row - self.rows.start) * self.stride..][..self.stride];
            for stream in 0..streams {
                let begin = (first + stream * distance) * LANES;
                let end = (begin + count * LANES).min(self.out_columns);
                let start = row * self.out_stride + self.first_column;
                // SAFETY: units have disjoint rows and panels, and this one is ours.
                let out = unsafe { self.out.part(start + begin..start + end) };
                let (gate, up) = sums.split_at(self.stride / 2);
                let from = stream * count * LANES;
                match self.finish {
                    Finish::Gate(activation) => {
                        let (gate, up) = (&gate[from..][..out.len()], &up[from..][..out.len()]);
                        for ((out, gate), up) in out.chunks_mut(16).zip(gate.chunks(16)).zip(up.chunks(16)) {
                            let value = math::activate(s, load_some(s, gate), activation);
                            store_some(s, s.mul(value, load_some(s, up)), out);
                        }
                    }
                    _ => {
                        for (out, sums) in out.chunks_mut(16).zip(sums[from..][..end - begin].chunks(16)) {
                            store_some(s, s.add(load_some(s, out), load_some(s, sums)), out);
                        }
                    }
                }
            }
        }
    }
}

/// How a part's panels are cut in units.
#[derive(Debug, Clone, Copy)]
struct Cut {
    panels: usize,
    /// Streams of a unit, and steps of the part: `streams * steps` panels, and less than `streams` are left over.
    streams: usize,
    steps: usize,
    /// Steps of a unit.
    unit_steps: usize,
}

impl Cut {
    fn new(part: &Part, row_count: usize, threads: usize) -> Self {
        let panels = part.panels();
        if row_count > 1 {
            let unit_steps = if let Weights::Integer(_) = part.weights { 2 } else { 3 };
            return Self { panels, streams: 1, steps: panels, unit_steps };
        }
        // As many streams as keep the memory busy, or fewer where threads then get more equal shares.
        let cost = |streams: usize| (panels / streams).div_ceil(threads) * streams + panels % streams;
        let streams = ONE_ROW_STREAMS.into_iter().filter(|streams| *streams <= panels).min_by_key(|streams| cost(*streams)).unwrap_or(1);
        let steps = panels / streams;
        let step_bytes = (streams * part.panel_bytes()).max(1);
        let units_each = (steps * step_bytes).div_ceil(threads * ONE_ROW_BYTES).max(1);
        let unit_steps = steps.div_ceil(units_each * threads).clamp(1, ONE_ROW_STEPS);
        Self { panels, streams, steps, unit_steps }
    }

    fn leftover(&self) -> usize {
        self.panels - self.streams * self.steps
    }

    fn unit_count(&self, row_count: usize) -> usize {
        (self.steps.div_ceil(self.unit_steps) + usize::from(self.leftover() > 0)) * row_count.div_ceil(ROW_BLOCK)
    }

    fn unit(&self, unit: usize, row_count: usize) -> (Panels, Range<usize>) {
        // Row blocks run within a column range, so that its weights are read from memory once.
        let row_blocks = row_count.div_ceil(ROW_BLOCK);
        let (columns, block) = (unit / row_blocks, unit % row_blocks);
        let rows = block * ROW_BLOCK..((block + 1) * ROW_BLOCK).min(row_count);
        let first = columns * self.unit_steps;
        if first >= self.steps {
            let first = self.streams * self.steps;
            return (Panels { first, count: self.leftover(), streams: 1, distance: 0 }, rows);
        }
        let count = self.unit_steps.min(self.steps - first);
        (Panels { first, count, streams: self.streams, distance: self.steps }, rows)
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

/// Elements of K that a tile goes through before the next rows: its weights of a pass are to stay in L2.
pub(super) const PASS: usize = 4 * crate::SLICE;
/// Rows of a unit: they stay in L2 beside the weights of a pass. A multiple of all tile heights.
const ROW_BLOCK: usize = 96;
/// Streams that a one-row unit may have, the better first; where there are fewer panels, it has one.
const ONE_ROW_STREAMS: [usize; 2] = [4, 3];
/// How far ahead a one-row tile asks for weights: a few hundred cycles of one stream.
pub(super) const PREFETCH_BYTES: usize = 2048;
/// Bytes of weights of a one-row unit, about: long against taking a unit, short against a core that falls behind.
const ONE_ROW_BYTES: usize = 64 << 10;
/// Steps of a one-row unit at most.
const ONE_ROW_STEPS: usize = 32;
const QUANTISE_ROWS: usize = 8;
/// Sums of a unit at most: of 96 rows and 3 panels, gate and up; of one row and 4 streams they are fewer.
const SUMS: usize = ROW_BLOCK * 3 * 2 * LANES;
