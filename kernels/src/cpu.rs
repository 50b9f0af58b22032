//! The CPU backend: the op set by SIMD over a thread pool, bit for bit equal to `reference` on every instruction set and
//! for any number of threads. Each op here checks its shapes and cuts its work in units; the leaves are kernels over
//! `lanes`. `unsafe` lives in this folder only: intrinsics, disjoint writes by threads, and memory.

mod activations;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blend;
mod differences;
mod elementwise;
mod isa;
mod kv;
mod lanes;
mod largest;
mod linear;
mod linear_float;
mod linear_integer;
mod linear_pairs;
mod math;
mod memory;
mod norm;
mod pack;
mod pairs;
mod pool;
pub mod probe;
mod rounded;
mod scalar;
mod scales;
mod scores;
mod segments;
mod symbols;
mod table;
mod tiles;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

pub use differences::{add_differences, exponent_classes};
pub use isa::{Isa, UnknownIsa};
pub use kv::Kv;
pub use pack::Linear;
pub use symbols::decode_symbols;
pub use table::Table;

use crate::format::{CodeRow, TensorView};
use crate::ops::{
    Activation, AttentionShape, Bf16Compute, Columns, Finish, KvFormat, KvPlace, KvShape, LinearRun, NormKind, Ops, PackError, PlacedPart,
    Query,
};
use crate::reference::concatenate;
use attention::{Attend, Attention, TILE};
use elementwise::{Gate, Map, MapElements, Rope};
use isa::Proven;
use kv::{Stored, Write};
use largest::Largest;
use linear::Scratch;
use memory::{Aligned, Shared};
use norm::{Norm, NormHeads, NormRows};
use pool::Pool;
use segments::{Merge, Parts};
use tiles::Tiles;

/// How the backend is set up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the calling one included; 0 means one for each core that this process may use.
    pub threads: usize,
    /// Instruction set; the best that the machine has if `None`.
    pub isa: Option<Isa>,
    /// What layers with bf16 weights are computed from.
    pub bf16_compute: Bf16Compute,
}

/// The CPU as a device.
pub struct Cpu {
    proven: Proven,
    bf16_compute: Bf16Compute,
    pool: Pool,
    /// Activation memory that no call uses right now.
    scratch: Mutex<Vec<Scratch>>,
}

/// f32 activations, 64-byte aligned.
#[derive(Debug)]
pub struct Buffer(Aligned<f32>);

impl Cpu {
    /// Starts the threads. Panics if the instruction set was chosen and the machine lacks it ([`Isa::available`] tells).
    pub fn new(options: CpuOptions) -> Self {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let proven = Proven::new(options.isa.unwrap_or_else(Isa::detect));
        Self { proven, bf16_compute: options.bf16_compute, pool: Pool::new(threads), scratch: Mutex::new(Vec::new()) }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.proven.isa()
    }

    /// What layers with bf16 weights are computed from.
    pub fn bf16_compute(&self) -> Bf16Compute {
        self.bf16_compute
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Barriers of the thread pool so far: jobs that all threads were called to.
    pub fn barriers(&self) -> u64 {
        self.pool.barriers()
    }

    /// Runs units on the pool, or on the caller alone where `work` (about the elements or products touched) is too small
    /// to be worth waking anybody.
    fn spread(&self, units: usize, work: usize, unit: &(dyn Fn(usize) + Sync)) {
        if work < ALONE_WORK {
            (0..units).for_each(unit);
        } else {
            self.pool.run(units, unit);
        }
    }

    /// As [`Cpu::spread`] over blocks of `0..rows`.
    fn spread_rows(&self, rows: usize, work: usize, block: impl Fn(Range<usize>) + Sync) {
        let height = if work < ALONE_WORK { rows.max(1) } else { rows.div_ceil(4 * self.pool.threads()).max(1) };
        self.spread(rows.div_ceil(height), work, &|unit| block(unit * height..((unit + 1) * height).min(rows)));
    }

    fn map(&self, x: &mut Buffer, element_count: usize, map: Map<'_>) {
        let x = Shared::new(&mut x.0[..element_count]);
        self.spread(element_count.div_ceil(MAP_ELEMENTS), element_count, &|unit| {
            let range = unit * MAP_ELEMENTS..((unit + 1) * MAP_ELEMENTS).min(element_count);
            self.proven.run(MapElements { map, x, range });
        });
    }

    /// Cuts the rows and heads of a call into tiles, tiles of few rows into runs of segments, and computes them.
    fn attend_stored<T: Stored>(&self, attention: &Attention<'_>) {
        let &Attention { shape, queries, .. } = attention;
        let (threads, kv_heads) = (self.threads(), shape.kv.kv_heads);
        let group = shape.heads / kv_heads;
        let (heads_count, units_wanted) = (group.min(TILE), UNITS_PER_THREAD * threads);
        let rows_max = if threads == 1 { TILE } else { (queries.len() * kv_heads).div_ceil(units_wanted) };
        let tiles = Tiles::new(queries, attention.tables, shape.kv.page_tokens, shape.window, rows_max.clamp(1, TILE / heads_count));
        let parts_count = group.div_ceil(heads_count);
        // Rows that share nothing take all heads of a page, which lie one after another, before the next page.
        let whole_rows = tiles.count() == queries.len() && tiles.count() >= units_wanted && shape.heads <= TILE;
        let stretches = if whole_rows { tiles.count() } else { tiles.count() * kv_heads * parts_count };
        // What a tile's rows see together.
        let seen_by =
            |rows: &[u32]| union(rows.iter().map(|&row| attention::segments(attention::seen(queries[row as usize], shape.window))));
        // The last rows of a chunk have most to read, so they come first.
        let stretch = |stretch: usize| {
            let (tile, part) = (tiles.count() - 1 - stretch % tiles.count(), stretch / tiles.count());
            if whole_rows {
                return (tiles.rows(tile), 0, 0..shape.heads);
            }
            let (kv_head, part) = (part / parts_count, part % parts_count);
            let first_head = kv_head * group + part * heads_count;
            (tiles.rows(tile), kv_head, first_head..(first_head + heads_count).min((kv_head + 1) * group))
        };
        let work = queries.iter().map(|query| query.position as usize + 1).sum::<usize>() * shape.heads * shape.kv.head_dim;

        if threads == 1 || stretches >= units_wanted || work < ALONE_WORK {
            self.spread(stretches, work, &|unit| {
                let (rows, _, heads) = stretch(unit);
                let next = (unit + 1 < stretches).then(|| stretch(unit + 1));
                let next = next.map(|(rows, kv_head, _)| (rows[0], kv_head, seen_by(rows).start));
                let segments = seen_by(rows);
                self.proven.run(Attend::<T> { attention, rows, heads, segments, parts: None, next, stored: PhantomData });
            });
            return;
        }
        let all = union((0..tiles.count()).map(|tile| seen_by(tiles.rows(tile))));
        let runs = (2 * units_wanted).div_ceil(stretches.max(1)).min(all.len());
        self.with_scratch(|scratch| {
            let size = queries.len() * shape.heads * all.len() * Parts::stride(shape.kv.head_dim);
            let (values, left) = scratch.attended().room(size, stretches, runs);
            let parts = Parts { values: Shared::new(values), first: all.start, count: all.len() };
            let run = |unit: usize| {
                let (rows, kv_head, heads) = stretch(unit / runs);
                let (segments, run) = (seen_by(rows), unit % runs);
                let first = segments.start;
                (rows, kv_head, heads, first + segments.len() * run / runs..first + segments.len() * (run + 1) / runs)
            };
            self.spread(stretches * runs, work, &|unit| {
                let (rows, _, heads, segments) = run(unit);
                let next = (unit + 1 < stretches * runs).then(|| run(unit + 1));
                let next = next.map(|(rows, kv_head, _, segments)| (rows[0], kv_head, segments.start));
                self.proven.run(Attend::<T> {
                    attention,
                    rows,
                    heads: heads.clone(),
                    segments,
                    parts: Some(parts),
                    next,
                    stored: PhantomData,
                });
                // Who is last sees what the others wrote.
                if left[unit / runs].fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.proven.run(Merge { attention, rows, heads, parts });
                }
            });
        });
    }

    fn with_scratch(&self, call: impl FnOnce(&mut Scratch)) {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        call(&mut scratch);
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Ops for Cpu {
    type Buffer = Buffer;
    type Linear = Linear;
    type Vector = Buffer;
    type Table = Table;
    type Kv = Kv;

    fn describe(&self) -> String {
        let (isa, threads) = (self.isa().name(), self.threads());
        let products = if self.bf16_compute == Bf16Compute::Bf16 { ", bf16 products" } else { "" };
        format!("cpu, {isa}, {threads} thread{}{products}", if threads == 1 { "" } else { "s" })
    }

    fn rest(&self) {
        memory::release_freed();
    }

    fn buffer(&self, element_count: usize) -> Result<Buffer, PackError> {
        Aligned::new(element_count).map(Buffer)
    }

    fn linear(&self, parts: &[TensorView<'_>]) -> Result<Linear, PackError> {
        Linear::new(&self.pool, parts, self.bf16_compute)
    }

    fn linear_placed(&self, parts: &[PlacedPart<'_>]) -> Result<Linear, PackError> {
        Linear::placed(&self.pool, parts, self.bf16_compute)
    }

    fn vector(&self, parts: &[TensorView<'_>]) -> Result<Buffer, PackError> {
        self.vector_f32(&concatenate(parts)?)
    }

    fn vector_f32(&self, values: &[f32]) -> Result<Buffer, PackError> {
        Aligned::from_slice(values).map(Buffer)
    }

    fn table(&self, view: TensorView<'_>, keep: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Table, PackError> {
        crate::table::Table::new(view, keep).map(Table::stored)
    }

    fn table_of(&self, linear: &Arc<Linear>) -> Option<Table> {
        Table::packed(linear)
    }

    fn kv(&self, shape: KvShape, slot_count: usize) -> Result<Kv, PackError> {
        Kv::new(shape, slot_count)
    }

    fn touch_kv(&self, kv: &mut Kv, slots: Range<usize>) {
        kv.touch(slots);
    }

    fn linear_bytes(&self, linear: &Linear) -> usize {
        linear.bytes()
    }

    fn upload(&self, buffer: &mut Buffer, at: usize, values: &[f32]) {
        buffer.0[at..][..values.len()].copy_from_slice(values);
    }

    fn download(&self, buffer: &Buffer, at: usize, out: &mut [f32]) {
        out.copy_from_slice(&buffer.0[at..][..out.len()]);
    }

    fn gather_rows(&self, dst: &mut Buffer, src: &Buffer, index: &[u32], width: usize) {
        for (i, &row) in index.iter().enumerate() {
            dst.0[i * width..][..width].copy_from_slice(&src.0[row as usize * width..][..width]);
        }
    }

    fn scatter_rows(&self, dst: &mut Buffer, index: &[u32], src: &Buffer, width: usize) {
        for (i, &row) in index.iter().enumerate() {
            dst.0[row as usize * width..][..width].copy_from_slice(&src.0[i * width..][..width]);
        }
    }

    fn embed(&self, out: &mut Buffer, first: usize, table: &Table, rows: &[u32], scale: f32) {
        let width = table.width();
        let out = Shared::new(&mut out.0[first * width..][..rows.len() * width]);
        self.spread_rows(rows.len(), rows.len() * width, |block| {
            let mut scratch = CodeRow::default();
            for i in block {
                // SAFETY: blocks have disjoint rows.
                let out = unsafe { out.part(i * width..(i + 1) * width) };
                table.read(rows[i], &mut scratch, out);
                out.iter_mut().for_each(|x| *x *= scale);
            }
        });
    }

    fn embed_add(&self, out: &mut Buffer, first: usize, table: &Table, rows: &[u32]) {
        let width = table.width();
        let out = Shared::new(&mut out.0[first * width..][..rows.len() * width]);
        self.spread_rows(rows.len(), rows.len() * width, |block| {
            let (mut scratch, mut values) = (CodeRow::default(), vec![0.0; width]);
            for i in block {
                table.read(rows[i], &mut scratch, &mut values);
                // SAFETY: blocks have disjoint rows.
                let out = unsafe { out.part(i * width..(i + 1) * width) };
                out.iter_mut().zip(&values).for_each(|(x, v)| *x += v);
            }
        });
    }

    fn norm(
        &self,
        dst: &mut Buffer,
        src: &Buffer,
        rows: Range<usize>,
        width: usize,
        kind: NormKind,
        eps: f32,
        weight: &Buffer,
        bias: Option<&Buffer>,
    ) {
        assert_eq!(weight.0.len(), width, "a norm weight for each element");
        let norm = Norm { kind, eps, weight: &weight.0, bias: bias.map(|bias| &bias.0[..width]) };
        let elements = rows.start * width..rows.end * width;
        let (dst, src, row_count) = (Shared::new(&mut dst.0[elements.clone()]), &src.0[elements], rows.len());
        self.spread_rows(row_count, row_count * width, |rows| self.proven.run(NormRows { norm, src, dst, width, rows }));
    }

    fn norm_heads(
        &self,
        buffer: &mut Buffer,
        rows: Range<usize>,
        columns: Columns,
        head_dim: usize,
        weight_offset: f32,
        eps: f32,
        weight: &Buffer,
    ) {
        assert_eq!(weight.0.len(), head_dim, "a norm weight for each element");
        check_columns(columns, head_dim);
        let norm = Norm { kind: NormKind::Rms { weight_offset }, eps, weight: &weight.0, bias: None };
        let buffer = Shared::new(&mut buffer.0[rows.start * columns.stride..]);
        self.spread_rows(rows.len(), rows.len() * columns.width, |rows| {
            self.proven.run(NormHeads { norm, buffer, columns, head_dim, rows });
        });
    }

    fn linear_apply(&self, out: &mut Buffer, x: &Buffer, row_count: usize, linear: &Linear, bias: Option<&Buffer>, finish: Finish) {
        let columns = if let Finish::Gate(_) = finish { linear.outputs / 2 } else { linear.outputs };
        let (inputs, outputs) = (Columns::dense(linear.inputs), Columns::dense(columns));
        self.linear_runs(out, outputs, x, inputs, &[LinearRun { linear, bias, rows: 0..row_count }], finish);
    }

    fn linear_runs(
        &self,
        out: &mut Buffer,
        outputs: Columns,
        x: &Buffer,
        inputs: Columns,
        runs: &[LinearRun<'_, Linear, Buffer>],
        finish: Finish,
    ) {
        linear::Call { x: &x.0, inputs, outputs, runs, finish }.apply(self, &mut out.0);
    }

    fn rope_rows(&self, out: &mut Buffer, positions: &[u32], inverse_frequencies: &Buffer, attention_factor: f32) {
        let half = inverse_frequencies.0.len();
        let out = Shared::new(&mut out.0[..positions.len() * 2 * half]);
        // A pair of cosine and sine costs about as much as 64 elements of a norm.
        self.spread_rows(positions.len(), positions.len() * half * 64, |rows| {
            for row in rows {
                // SAFETY: blocks have disjoint rows.
                let (cos, sin) = unsafe { out.part(row * 2 * half..(row + 1) * 2 * half) }.split_at_mut(half);
                for (i, &frequency) in inverse_frequencies.0.iter().enumerate() {
                    let angle = f64::from(positions[row] as f32 * frequency);
                    cos[i] = libm::cos(angle) as f32 * attention_factor;
                    sin[i] = libm::sin(angle) as f32 * attention_factor;
                }
            }
        });
    }

    fn rope(&self, buffer: &mut Buffer, row_count: usize, columns: Columns, head_dim: usize, half: usize, rope_rows: &Buffer) {
        assert!(2 * half <= head_dim, "rotated part {} of a head of {head_dim}", 2 * half);
        check_columns(columns, head_dim);
        let (buffer, rope_rows) = (Shared::new(&mut buffer.0), &rope_rows.0[..row_count * 2 * half]);
        self.spread_rows(row_count, row_count * columns.width, |rows| {
            self.proven.run(Rope { buffer, columns, head_dim, half, rope_rows, rows });
        });
    }

    fn kv_write(&self, kv: &mut Kv, qkv: &Buffer, shape: &AttentionShape, places: &[KvPlace]) {
        assert_eq!(kv.shape, shape.kv, "one slot class");
        let (qkv, pages) = (&qkv.0[..places.len() * shape.qkv_width()], kv.pages());
        // A key's elements are stores to as many cache lines: some tens of a norm's elements each.
        let work = places.len() * shape.kv.kv_heads * shape.kv.head_dim * 16;
        self.spread_rows(places.len(), work, |rows| self.proven.run(Write { pages, qkv, shape, places, rows }));
    }

    fn attend(&self, out: &mut Buffer, qkv: &Buffer, kv: &Kv, shape: &AttentionShape, queries: &[Query], tables: &[u32]) {
        assert_eq!(kv.shape, shape.kv, "one slot class");
        assert!(shape.heads.is_multiple_of(shape.kv.kv_heads), "{} heads over {} kv heads", shape.heads, shape.kv.kv_heads);
        assert!(shape.window != Some(0), "a window sees at least the query's own position");
        let d = shape.kv.head_dim;
        let out = Shared::new(&mut out.0[..queries.len() * shape.heads * d]);
        let qkv = &qkv.0[..queries.len() * shape.qkv_width()];
        let attention = Attention { out, qkv, kv, shape, queries, tables };
        match kv.shape.format {
            KvFormat::F32 => self.attend_stored::<f32>(&attention),
            KvFormat::Bf16 => self.attend_stored::<u16>(&attention),
            KvFormat::Int8 => self.attend_stored::<i8>(&attention),
        }
    }

    fn gate(&self, out: &mut Buffer, gate_up: &Buffer, row_count: usize, width: usize, activation: Activation) {
        let (out, gate_up) = (Shared::new(&mut out.0[..row_count * width]), &gate_up.0[..row_count * 2 * width]);
        self.spread_rows(row_count, 4 * row_count * width, |rows| self.proven.run(Gate { out, gate_up, width, activation, rows }));
    }

    fn activate(&self, x: &mut Buffer, element_count: usize, activation: Activation) {
        self.map(x, element_count, Map::Activate(activation));
    }

    fn add(&self, acc: &mut Buffer, x: &Buffer, element_count: usize) {
        self.map(acc, element_count, Map::Add(&x.0[..element_count]));
    }

    fn softcap(&self, x: &mut Buffer, element_count: usize, cap: f32) {
        self.map(x, element_count, Map::Softcap(cap));
    }

    fn largest(&self, x: &Buffer, width: usize, out: &mut [Option<u32>]) {
        let (x, row_count) = (&x.0[..out.len() * width], out.len());
        let out = Shared::new(out);
        self.spread_rows(row_count, row_count * width, |rows| self.proven.run(Largest { x, width, out, rows }));
    }
}

fn check_columns(columns: Columns, head_dim: usize) {
    assert!(columns.offset + columns.width <= columns.stride, "columns {columns:?} lie within a row");
    assert!(columns.width.is_multiple_of(head_dim), "{} columns are whole heads of {head_dim}", columns.width);
}

/// From the first of some ranges to the end of the last.
fn union(ranges: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    ranges.reduce(|all, one| all.start.min(one.start)..all.end.max(one.end)).unwrap_or_default()
}

/// Units of attention that each thread gets at least, where there are enough: the last to finish is not waited for long.
const UNITS_PER_THREAD: usize = 4;
/// Less work than this (a few microseconds) is done by the caller alone.
const ALONE_WORK: usize = 32 << 10;
/// Elements of a unit of an element-wise op.
const MAP_ELEMENTS: usize = 4096;
