//! `y[T, N] = x[T, K] W^T + bias`, runs of rows each by a layer of its own: cuts the work in units, quantises activations once a call, picks the tile code, and
//! finishes a unit's sums while they are in cache: stores them, adds them to what is there, or gates them.
//!
//! A unit is a run of panels for a block of rows. The order of accumulation of an output is fixed by K alone
//! (docs/numerics.md), so units, tiles and threads are free to be whatever is fast. One row is limited by the bytes of
//! the weights; many rows by multiply-add throughput, with a tile's weights of one pass and 96 rows staying in L2.

use std::cell::Cell;
use std::ops::Range;

use super::activations::{Activations, QUANTISE_ROWS, QuantiseRows};
use super::elementwise::{Map, MapElements};
use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::linear_float::{Bf16, ElementScales, F16, F32, FloatTiles, Fp8};
use super::linear_integer::IntegerTiles;
use super::linear_pairs::PairTiles;
use super::math;
use super::memory::{Aligned, Shared};
use super::pack::{Fp8Weights, LANES, Linear, Part, Weights};
use super::rounded::{ROUND_ROWS, RoundRows, Rounded};
use super::segments::Attended;
use super::{Buffer, Cpu};
use crate::ops::{Activation, Columns, Finish, LinearRun};

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

/// What tiles do with finished sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Onto<'a> {
    /// `out = sums`; the sums of an earlier pass over K may lie there.
    Nothing,
    /// `out += sums`, of a whole row in one pass.
    Sum,
    /// `out *= sums`, of a whole row in one pass.
    Product,
    /// `out = factors * sums`, of a whole row in one pass; factors are `[rows][stride]` of the unit, from its first panel on.
    ProductOf { factors: &'a [f32], stride: usize, first_row: usize, first_place: usize },
}

/// Where tiles put their sums.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    pub(super) values: Shared<'a, f32>,
    pub(super) onto: Onto<'a>,
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
        let out = unsafe { self.at(row, place) };
        match self.onto {
            Onto::Nothing => {}
            Onto::Sum => value = s.add(load_some(s, out), value),
            Onto::Product => value = s.mul(load_some(s, out), value),
            Onto::ProductOf { factors, stride, first_row, first_place } => {
                let from = (row - first_row) * stride + (place - first_place) * LANES;
                value = s.mul(load_some(s, &factors[from..][..LANES]), value);
            }
        }
        store_some(s, value, out);
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
    /// The rows, rounded to bf16 for each length that the layers have.
    rounded: Vec<Rounded>,
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
            self.quantise(cpu, &mut scratch.activations);
            self.round(cpu, &mut scratch.rounded);
            self.cut(cpu.pool.threads(), &mut scratch.spans);
            let (spans, out) = (scratch.spans.as_slice(), Shared::new(out));
            let running = Running { call: self, cpu, out, activations: &scratch.activations, rounded: &scratch.rounded };
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
    fn quantise(&self, cpu: &Cpu, scratch: &mut Vec<Activations>) {
        let mut count = 0;
        for part in self.runs.iter().flat_map(|run| &run.linear.parts) {
            let Weights::Integer(weights) = &part.weights else { continue };
            if scratch[..count].iter().any(|done| done.suits(weights, part.first_input)) {
                continue;
            }
            if scratch.len() == count {
                scratch.push(Activations::empty());
            }
            let activations = &mut scratch[count];
            count += 1;
            activations.prepare(self.rows_end(), weights, part.first_input).expect("memory for one batch's activations");
            let (groups, offset, stride) = (activations.groups, activations.offset, activations.stride);
            let codes = Shared::new(&mut activations.codes);
            let scales = Shared::new(&mut activations.scales);
            let sums = Shared::new(&mut activations.sums);
            let corrections = Shared::new(&mut activations.corrections);
            let (x, x_at) = (self.x, part.inputs_in(self.inputs));
            self.spread_rows::<QUANTISE_ROWS>(cpu, groups.inputs, |rows| {
                cpu.proven.run(QuantiseRows { x, x_at, rows, groups, offset, stride, codes, scales, sums, corrections });
            });
        }
        // What an earlier call left behind must not be taken for this call's.
        for stale in &mut scratch[count..] {
            stale.groups.inputs = usize::MAX;
        }
    }

    /// Rounds the rows once for each distinct run of columns among the layers that take them as bf16.
    fn round(&self, cpu: &Cpu, scratch: &mut Vec<Rounded>) {
        let mut count = 0;
        for part in self.runs.iter().flat_map(|run| &run.linear.parts) {
            let Weights::Pairs(weights) = &part.weights else { continue };
            if scratch[..count].iter().any(|done| (done.first_input, done.inputs) == (part.first_input, weights.inputs)) {
                continue;
            }
            if scratch.len() == count {
                scratch.push(Rounded::empty());
            }
            let rounded = &mut scratch[count];
            count += 1;
            rounded.prepare(self.rows_end(), weights.inputs, part.first_input).expect("memory for one batch's activations");
            let inputs = rounded.inputs;
            let (pairs, exponents) = (Shared::new(&mut rounded.pairs), Shared::new(&mut rounded.exponents));
            let (x, x_at) = (self.x, part.inputs_in(self.inputs));
            self.spread_rows::<ROUND_ROWS>(cpu, inputs, |rows| {
                cpu.proven.run(RoundRows { x, x_at, rows, inputs, pairs, exponents });
            });
        }
        // As in `quantise`.
        for stale in &mut scratch[count..] {
            stale.inputs = usize::MAX;
        }
    }

    fn rows_end(&self) -> usize {
        self.runs.last().map_or(0, |run| run.rows.end)
    }

    /// Works on the rows of all runs, cut in blocks of ROWS from each run's first on; a row has so many inputs.
    fn spread_rows<const ROWS: usize>(&self, cpu: &Cpu, inputs: usize, block: impl Fn(Range<usize>) + Sync) {
        let block_count = |run: &LinearRun<'_, Linear, Buffer>| run.rows.len().div_ceil(ROWS);
        let work = (self.rows_end() - self.runs[0].rows.start) * inputs;
        cpu.spread(self.runs.iter().map(block_count).sum(), work, &|unit| {
            let (mut run, mut unit) = (0, unit);
            while unit >= block_count(&self.runs[run]) {
                unit -= block_count(&self.runs[run]);
                run += 1;
            }
            let rows = &self.runs[run].rows;
            let start = rows.start + unit * ROWS;
            block(start..(start + ROWS).min(rows.end));
        });
    }
}

/// A call while threads work on it.
struct Running<'a> {
    call: &'a Call<'a>,
    cpu: &'a Cpu,
    out: Shared<'a, f32>,
    activations: &'a [Activations],
    rounded: &'a [Rounded],
}

impl Running<'_> {
    fn unit(&self, span: &Span, unit: usize) {
        let Call { runs, outputs, finish, .. } = *self.call;
        let run = &runs[span.run];
        let part = &run.linear.parts[span.part];
        let (panels, rows) = span.cut.unit(unit, &run.rows);
        let bias = |part: &Part| run.bias.map(|bias| &bias.0[part.first_output..][..part.outputs]);
        let column = outputs.offset + part.first_output;
        let direct =
            |onto, bias| Output { values: self.out, onto, stride: outputs.stride, first_row: 0, column, columns: part.outputs, bias };
        // `out` holds partial sums between passes over K, so only sums of a single pass may go onto something.
        let one_pass = part.inputs <= PASS;
        let (last, onto) = match finish {
            Finish::Store => (part, Onto::Nothing),
            Finish::Add => (part, Onto::Sum),
            Finish::Gate(activation) if one_pass && panels.streams == 1 => {
                // Between the two, a unit's gates lie close together: columns of many rows share few sets of the first cache.
                let [gate, up] = run.linear.parts.as_slice() else { unreachable!("checked in apply") };
                let (stride, first_row) = (panels.count * LANES, rows.start);
                return with_sums(rows.len() * stride, |gates| {
                    let values = Shared::new(gates);
                    let (onto, bias_of_gate) = (Onto::Nothing, bias(gate));
                    let output = Output { values, onto, stride, first_row, column: 0, columns: stride, bias: bias_of_gate };
                    self.tiles(run, gate, rows.clone(), panels, panels.packed(), output);
                    let range = 0..rows.len() * stride;
                    self.cpu.proven.run(MapElements { map: Map::Activate(activation), x: values, range });
                    let onto = Onto::ProductOf { factors: gates, stride, first_row, first_place: panels.first };
                    self.tiles(run, up, rows, panels, panels, Output { onto, ..direct(Onto::Nothing, bias(up)) });
                });
            }
            Finish::Gate(activation) => {
                let [gate, up] = run.linear.parts.as_slice() else { unreachable!("checked in apply") };
                self.tiles(run, gate, rows.clone(), panels, panels, direct(Onto::Nothing, bias(gate)));
                let stage = Stage::Activate(activation);
                self.finish(FinishUnit { out: direct(Onto::Nothing, None), rows: rows.clone(), panels, stage });
                (up, Onto::Product)
            }
        };
        if onto == Onto::Nothing || one_pass {
            return self.tiles(run, last, rows, panels, panels, direct(onto, bias(last)));
        }
        let stride = panels.count * panels.streams * LANES;
        with_sums(rows.len() * stride, |sums| {
            let values = Shared::new(sums);
            let (first_row, bias) = (rows.start, bias(last));
            let output = Output { values, onto: Onto::Nothing, stride, first_row, column: 0, columns: stride, bias };
            self.tiles(run, last, rows.clone(), panels, panels.packed(), output);
            self.finish(FinishUnit { out: direct(onto, None), rows, panels, stage: Stage::Join { sums, stride } });
        });
    }

    fn finish(&self, unit: FinishUnit<'_>) {
        self.cpu.proven.run(unit);
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
        let Call { x, inputs: all, .. } = *self.call;
        let (proven, x_at, inputs, first_row) = (self.cpu.proven, part.inputs_in(all), part.inputs, run.rows.start);
        let scales = ElementScales::NONE;
        match &part.weights {
            Weights::F32(weights) => {
                proven.run(FloatTiles::<F32> { x, x_at, inputs, weights, scales, first_row, rows, panels, places, output })
            }
            Weights::F16(weights) => {
                proven.run(FloatTiles::<F16> { x, x_at, inputs, weights, scales, first_row, rows, panels, places, output })
            }
            Weights::Bf16(weights) => {
                proven.run(FloatTiles::<Bf16> { x, x_at, inputs, weights, scales, first_row, rows, panels, places, output })
            }
            Weights::Fp8(Fp8Weights { codes: weights, scales, group }) => {
                let scales = ElementScales { all: scales.as_chunks().0, group: *group };
                proven.run(FloatTiles::<Fp8> { x, x_at, inputs, weights, scales, first_row, rows, panels, places, output });
            }
            Weights::Pairs(weights) => {
                let x = self.rounded.iter().find(|x| (x.first_input, x.inputs) == (part.first_input, inputs));
                let x = x.expect("round has been here for every run of columns");
                proven.run_pairs(PairTiles { x, weights, first_row, rows, panels, places, output });
            }
            Weights::Integer(weights) => {
                let x = self
                    .activations
                    .iter()
                    .find(|x| x.suits(weights, part.first_input))
                    .expect("quantise has been here for every grouping");
                IntegerTiles { x, weights, first_row, rows, panels, places, output }.dispatch(proven);
            }
        }
    }
}

/// Memory of this thread for the sums of a unit, of any value.
fn with_sums(len: usize, call: impl FnOnce(&mut [f32])) {
    thread_local! {
        static MEMORY: Cell<Option<Aligned<f32>>> = const { Cell::new(None) };
    }
    let mut memory = MEMORY.take().unwrap_or_else(|| Aligned::new(SUMS).expect("memory for one unit's sums"));
    call(&mut memory[..len]);
    MEMORY.set(Some(memory));
}

/// What is done to a unit's outputs between or after its tiles.
#[derive(Clone, Copy)]
enum Stage<'a> {
    /// `out = act(out)`.
    Activate(Activation),
    /// Takes sums `[rows][streams][count][16]` onto the output.
    Join { sums: &'a [f32], stride: usize },
}

/// One stage of a unit.
struct FinishUnit<'a> {
    out: Output<'a>,
    rows: Range<usize>,
    panels: Panels,
    stage: Stage<'a>,
}

impl Kernel for FinishUnit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let Panels { count, streams, .. } = self.panels;
        for row in self.rows.clone() {
            for stream in 0..streams {
                for step in 0..count {
                    let panel = self.panels.first + stream * self.panels.distance + step;
                    match self.stage {
                        // SAFETY: units have disjoint rows and panels, and this one is ours.
                        Stage::Activate(activation) => unsafe {
                            let value = math::activate(s, self.out.load(s, row, panel), activation);
                            self.out.store(s, value, row, panel, panel, false);
                        },
                        Stage::Join { sums, stride } => {
                            let from = (row - self.rows.start) * stride + (stream * count + step) * LANES;
                            let sums = load_some(s, &sums[from..][..LANES]);
                            // SAFETY: as above.
                            unsafe { self.out.store(s, sums, row, panel, panel, false) };
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
/// Sums of a unit at most: of 96 rows and 3 panels; of one row and 4 streams they are fewer.
const SUMS: usize = ROW_BLOCK * 3 * LANES;
