//! `y[T, N] = x[T, K] W^T + bias`, runs of rows each by a layer of its own: cuts the work in units, quantises activations once a call, picks the tile code, and
//! finishes a unit's sums while they are in cache: stores them, adds them to what is there, or gates them.
//!
//! A unit is a run of panels for a block of rows. The order of accumulation of an output is fixed by K alone
//! (docs/numerics.md), so units, tiles and threads are free to be whatever is fast. One row is limited by the bytes of
//! the weights; many rows by multiply-add throughput, with a tile's weights of one pass and 96 rows staying in L2.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::activations::{Activations, QUANTISE_ROWS, QuantiseRows};
use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::linear_float::{Bf16, F16, F32, FloatTiles};
use super::linear_integer::IntegerTiles;
use super::math;
use super::memory::Shared;
use super::pack::{LANES, Linear, Part, Weights};
use super::segments::Attended;
use super::{Buffer, Cpu};
use crate::ops::{Activation, Columns, LinearRun};

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

/// What calls keep for the next one.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The rows, quantised for each way of grouping that the layers have.
    activations: Vec<Activations>,
    spans: Vec<Span>,
    attended: Attended,
}

impl Scratch {
    /// For attention whose rows several threads share.
    pub(super) fn attended(&mut self) -> &mut Attended {
        &mut self.attended
    }
}

/// The units of one part of one run.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// Units of all spans up to and with this one.
    end: usize,
    run: usize,
    part: usize,
    cut: Cut,
}

/// Rows through the layers of their runs.
pub(super) struct Call<'a> {
    pub(super) x: &'a [f32],
    /// Where a row's inputs are.
    pub(super) inputs: Columns,
    /// Where a row's results go.
    pub(super) outputs: Columns,
    /// Disjoint, ascending rows.
    pub(super) runs: &'a [LinearRun<'a, Linear, Buffer>],
    pub(super) finish: Finish,
}

impl Call<'_> {
    pub(super) fn apply(&self, cpu: &Cpu, out: &mut [f32]) {
        let Some(last) = self.runs.last() else { return };
        let row_count = last.rows.end;
        let mut work = 0;
        for (index, run) in self.runs.iter().enumerate() {
            let LinearRun { linear, bias, rows } = run;
            assert!(index == 0 || self.runs[index - 1].rows.end <= rows.start, "runs have disjoint, ascending rows");
            let columns = if let Finish::Gate(_) = self.finish { linear.outputs / 2 } else { linear.outputs };
            assert!(linear.inputs <= self.inputs.width && columns <= self.outputs.width, "a layer's columns are within a row's");
            assert!(bias.is_none_or(|bias| bias.0.len() == linear.outputs), "a bias has an element for each output");
            if let Finish::Gate(_) = self.finish {
                assert!(linear.parts.len() == 2 && linear.parts[0].outputs == columns, "a gate and an up part of equal outputs");
            }
            work += rows.len() * linear.inputs * linear.outputs;
        }
        assert!(self.x.len() >= row_count * self.inputs.stride, "rows of inputs");
        let out = &mut out[..row_count * self.outputs.stride];
        cpu.with_scratch(|scratch| {
            self.quantise(cpu, scratch);
            self.cut(cpu.pool.threads(), &mut scratch.spans);
            let (spans, out) = (scratch.spans.as_slice(), Shared::new(out));
            let running = Running { call: self, cpu, out, activations: &scratch.activations };
            cpu.spread(spans.last().map_or(0, |span| span.end), work, &|unit| {
                let index = spans.partition_point(|span| span.end <= unit);
                let first = index.checked_sub(1).map_or(0, |before| spans[before].end);
                running.unit(&spans[index], unit - first);
            });
        });
    }

    /// The units that there are.
    fn cut(&self, threads: usize, spans: &mut Vec<Span>) {
        spans.clear();
        let mut end = 0;
        for (run, LinearRun { linear, rows, .. }) in self.runs.iter().enumerate() {
            // The parts that are gated go together.
            let parts = if let Finish::Gate(_) = self.finish { &linear.parts[..1] } else { &linear.parts };
            for (part, weights) in parts.iter().enumerate() {
                let cut = Cut::new(weights, rows.len(), threads);
                end += cut.unit_count(rows.len());
                spans.push(Span { end, run, part, cut });
            }
        }
    }

    /// Quantises the rows once for each distinct grouping among the layers' parts.
    fn quantise(&self, cpu: &Cpu, scratch: &mut Scratch) {
        let scratch = &mut scratch.activations;
        let rows = self.runs[0].rows.start..self.runs[self.runs.len() - 1].rows.end;
        let mut count = 0;
        for part in self.runs.iter().flat_map(|run| &run.linear.parts) {
            let Weights::Integer(weights) = &part.weights else { continue };
            if scratch[..count].iter().any(|done| done.suits(weights)) {
                continue;
            }
            if scratch.len() == count {
                scratch.push(Activations::empty());
            }
            let activations = &mut scratch[count];
            count += 1;
            activations.prepare(rows.end, weights).expect("memory for one batch's activations");
            let (groups, offset, stride) = (activations.groups, activations.offset, activations.stride);
            let codes = Shared::new(&mut activations.codes);
            let scales = Shared::new(&mut activations.scales);
            let sums = Shared::new(&mut activations.sums);
            let corrections = Shared::new(&mut activations.corrections);
            let (x, x_at) = (self.x, self.inputs);
            let unit_count = |run: &LinearRun<'_, Linear, Buffer>| run.rows.len().div_ceil(QUANTISE_ROWS);
            cpu.spread(self.runs.iter().map(unit_count).sum(), rows.len() * groups.inputs, &|unit| {
                let (mut run, mut unit) = (0, unit);
                while unit >= unit_count(&self.runs[run]) {
                    unit -= unit_count(&self.runs[run]);
                    run += 1;
                }
                let rows = &self.runs[run].rows;
                let start = rows.start + unit * QUANTISE_ROWS;
                let rows = start..(start + QUANTISE_ROWS).min(rows.end);
                cpu.proven.run(QuantiseRows { x, x_at, rows, groups, offset, stride, codes, scales, sums, corrections });
            });
        }
        // What an earlier call left behind must not be taken for this call's.
        for stale in &mut scratch[count..] {
            stale.groups.inputs = usize::MAX;
        }
    }
}

/// A call while threads work on it.
struct Running<'a> {
    call: &'a Call<'a>,
    cpu: &'a Cpu,
    out: Shared<'a, f32>,
    activations: &'a [Activations],
}

impl Running<'_> {
    fn unit(&self, span: &Span, unit: usize) {
        let Call { runs, outputs, finish, .. } = *self.call;
        let run = &runs[span.run];
        let part = &run.linear.parts[span.part];
        let (panels, rows) = span.cut.unit(unit, &run.rows);
        let columns = panels.count * panels.streams * LANES;
        let bias = |part: &Part| run.bias.map(|bias| &bias.0[part.first_output..][..part.outputs]);
        if finish == Finish::Store {
            let output = Output {
                values: self.out,
                stride: outputs.stride,
                first_row: 0,
                column: outputs.offset + part.first_output,
                columns: part.outputs,
                bias: bias(part),
            };
            return self.tiles(run, part, rows, panels, panels, output);
        }
        let sources = match finish {
            Finish::Gate(_) => run.linear.parts.as_slice(),
            _ => std::slice::from_ref(part),
        };
        let stride = columns * sources.len();
        let mut memory = Sums([const { MaybeUninit::uninit() }; SUMS]);
        let sums = memory.zeroed(rows.len() * stride);
        let values = Shared::new(sums);
        for (index, part) in sources.iter().enumerate() {
            let output = Output { values, stride, first_row: rows.start, column: index * columns, columns, bias: bias(part) };
            self.tiles(run, part, rows.clone(), panels, panels.packed(), output);
        }
        let (out, first_column) = (self.out, outputs.offset + part.first_output);
        let (out_stride, out_columns) = (outputs.stride, part.outputs);
        self.cpu.proven.run(FinishUnit { out, out_stride, first_column, out_columns, sums, stride, rows, panels, finish });
    }

    fn tiles(
        &self,
        run: &LinearRun<'_, Linear, Buffer>,
        part: &Part,
        rows: Range<usize>,
        panels: Panels,
        places: Panels,
        output: Output<'_>,
    ) {
        let Call { x, inputs: x_at, .. } = *self.call;
        let (proven, inputs, first_row) = (self.cpu.proven, run.linear.inputs, run.rows.start);
        match &part.weights {
            Weights::F32(weights) => proven.run(FloatTiles::<F32> { x, x_at, inputs, weights, first_row, rows, panels, places, output }),
            Weights::F16(weights) => proven.run(FloatTiles::<F16> { x, x_at, inputs, weights, first_row, rows, panels, places, output }),
            Weights::Bf16(weights) => proven.run(FloatTiles::<Bf16> { x, x_at, inputs, weights, first_row, rows, panels, places, output }),
            Weights::Integer(weights) => {
                let x = self.activations.iter().find(|x| x.suits(weights)).expect("quantise has been here for every grouping");
                IntegerTiles { x, weights, first_row, rows, panels, places, output }.dispatch(proven);
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

    /// Unit `unit` of a run's rows.
    fn unit(&self, unit: usize, rows: &Range<usize>) -> (Panels, Range<usize>) {
        // Row blocks run within a column range, so that its weights are read from memory once.
        let row_blocks = rows.len().div_ceil(ROW_BLOCK);
        let (columns, block) = (unit / row_blocks, unit % row_blocks);
        let start = rows.start + block * ROW_BLOCK;
        let rows = start..(start + ROW_BLOCK).min(rows.end);
        let first = columns * self.unit_steps;
        if first >= self.steps {
            let first = self.streams * self.steps;
            return (Panels { first, count: self.leftover(), streams: 1, distance: 0 }, rows);
        }
        let count = self.unit_steps.min(self.steps - first);
        (Panels { first, count, streams: self.streams, distance: self.steps }, rows)
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
/// Sums of a unit at most: of 96 rows and 3 panels, gate and up; of one row and 4 streams they are fewer.
const SUMS: usize = ROW_BLOCK * 3 * 2 * LANES;
