//! A device that times each op of another: `ashlar bench step` shows with it where a step's time goes. Calls are synchronous
//! on the CPU, so the time of a call is the time of its work, waiting for other threads included.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::format::TensorView;
use crate::ops::{Activation, AttentionShape, Columns, Finish, KvPlace, KvShape, LinearRun, NormKind, Ops, PackError, PlacedPart, Query};

/// Calls of one op and their time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpTime {
    /// Calls.
    pub calls: u64,
    /// Time of all calls.
    pub time: Duration,
}

/// Times the ops of `B`.
#[derive(Debug)]
pub struct Timed<B> {
    inner: B,
    times: Mutex<BTreeMap<&'static str, OpTime>>,
}

impl<B: Ops> Timed<B> {
    /// Nothing is timed yet.
    pub fn new(inner: B) -> Self {
        Self { inner, times: Mutex::default() }
    }

    /// The device underneath.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// What was timed since the last call, by op.
    pub fn take(&self) -> BTreeMap<&'static str, OpTime> {
        std::mem::take(&mut self.times.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
    fn time<T>(&self, op: &'static str, call: impl FnOnce(&B) -> T) -> T {
        let begin = Instant::now();
        let result = call(&self.inner);
        let time = begin.elapsed();
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = times.entry(op).or_default();
        entry.calls += 1;
        entry.time += time;
        result
    }
}

/// The name by what becomes of the outputs: stored, added, gated.
fn named(finish: Finish, [store, add, gate]: [&'static str; 3]) -> &'static str {
    match finish {
        Finish::Store => store,
        Finish::Add => add,
        Finish::Gate(_) => gate,
    }
}

impl<B: Ops> Ops for Timed<B> {
    type Buffer = B::Buffer;
    type Linear = B::Linear;
    type Vector = B::Vector;
    type Table = B::Table;
    type Kv = B::Kv;

    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn submit(&self) {
        self.inner.submit();
    }

    fn rest(&self) {
        self.inner.rest();
    }
    fn buffer(&self, element_count: usize) -> Result<B::Buffer, PackError> {
        self.inner.buffer(element_count)
    }
    fn linear(&self, parts: &[TensorView<'_>]) -> Result<B::Linear, PackError> {
        self.inner.linear(parts)
    }
    fn linear_placed(&self, parts: &[PlacedPart<'_>]) -> Result<B::Linear, PackError> {
        self.inner.linear_placed(parts)
    }
    fn vector(&self, parts: &[TensorView<'_>]) -> Result<B::Vector, PackError> {
        self.inner.vector(parts)
    }
    fn vector_f32(&self, values: &[f32]) -> Result<B::Vector, PackError> {
        self.inner.vector_f32(values)
    }
    fn table(&self, view: TensorView<'_>, keep: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<B::Table, PackError> {
        self.inner.table(view, keep)
    }
    fn table_of(&self, linear: &Arc<B::Linear>) -> Option<B::Table> {
        self.inner.table_of(linear)
    }
    fn kv(&self, shape: KvShape, slot_count: usize) -> Result<B::Kv, PackError> {
        self.inner.kv(shape, slot_count)
    }
    fn linear_bytes(&self, linear: &B::Linear) -> usize {
        self.inner.linear_bytes(linear)
    }
    fn upload(&self, buffer: &mut B::Buffer, at: usize, values: &[f32]) {
        self.time("upload", |b| b.upload(buffer, at, values));
    }
    fn download(&self, buffer: &B::Buffer, at: usize, out: &mut [f32]) {
        self.time("download", |b| b.download(buffer, at, out));
    }
    fn gather_rows(&self, dst: &mut B::Buffer, src: &B::Buffer, index: &[u32], width: usize) {
        self.time("gather_rows", |b| b.gather_rows(dst, src, index, width));
    }
    fn scatter_rows(&self, dst: &mut B::Buffer, index: &[u32], src: &B::Buffer, width: usize) {
        self.time("scatter_rows", |b| b.scatter_rows(dst, index, src, width));
    }
    fn embed(&self, out: &mut B::Buffer, first: usize, table: &B::Table, rows: &[u32], scale: f32) {
        self.time("embed", |b| b.embed(out, first, table, rows, scale));
    }
    fn embed_add(&self, out: &mut B::Buffer, first: usize, table: &B::Table, rows: &[u32]) {
        self.time("embed_add", |b| b.embed_add(out, first, table, rows));
    }
    fn norm(
        &self,
        dst: &mut B::Buffer,
        src: &B::Buffer,
        rows: Range<usize>,
        width: usize,
        kind: NormKind,
        eps: f32,
        weight: &B::Vector,
        bias: Option<&B::Vector>,
    ) {
        self.time("norm", |b| b.norm(dst, src, rows, width, kind, eps, weight, bias));
    }
    fn norm_heads(
        &self,
        buffer: &mut B::Buffer,
        rows: Range<usize>,
        columns: Columns,
        head_dim: usize,
        weight_offset: f32,
        eps: f32,
        weight: &B::Vector,
    ) {
        self.time("norm_heads", |b| b.norm_heads(buffer, rows, columns, head_dim, weight_offset, eps, weight));
    }
    fn linear_apply(
        &self,
        out: &mut B::Buffer,
        x: &B::Buffer,
        row_count: usize,
        linear: &B::Linear,
        bias: Option<&B::Vector>,
        finish: Finish,
    ) {
        let name = named(finish, ["linear", "linear_add", "linear_gate"]);
        self.time(name, |b| b.linear_apply(out, x, row_count, linear, bias, finish));
    }
    fn linear_runs(
        &self,
        out: &mut B::Buffer,
        outputs: Columns,
        x: &B::Buffer,
        inputs: Columns,
        runs: &[LinearRun<'_, B::Linear, B::Vector>],
        finish: Finish,
    ) {
        let name = named(finish, ["linear_runs", "linear_runs_add", "linear_runs_gate"]);
        self.time(name, |b| b.linear_runs(out, outputs, x, inputs, runs, finish));
    }
    fn rope_rows(&self, out: &mut B::Buffer, positions: &[u32], inverse_frequencies: &B::Vector, attention_factor: f32) {
        self.time("rope_rows", |b| b.rope_rows(out, positions, inverse_frequencies, attention_factor));
    }
    fn rope(&self, buffer: &mut B::Buffer, row_count: usize, columns: Columns, head_dim: usize, half: usize, rope_rows: &B::Buffer) {
        self.time("rope", |b| b.rope(buffer, row_count, columns, head_dim, half, rope_rows));
    }
    fn kv_write(&self, kv: &mut B::Kv, qkv: &B::Buffer, shape: &AttentionShape, places: &[KvPlace]) {
        self.time("kv_write", |b| b.kv_write(kv, qkv, shape, places));
    }
    fn attend(&self, out: &mut B::Buffer, qkv: &B::Buffer, kv: &B::Kv, shape: &AttentionShape, queries: &[Query], tables: &[u32]) {
        self.time("attend", |b| b.attend(out, qkv, kv, shape, queries, tables));
    }
    fn gate(&self, out: &mut B::Buffer, gate_up: &B::Buffer, row_count: usize, width: usize, activation: Activation) {
        self.time("gate", |b| b.gate(out, gate_up, row_count, width, activation));
    }
    fn activate(&self, x: &mut B::Buffer, element_count: usize, activation: Activation) {
        self.time("activate", |b| b.activate(x, element_count, activation));
    }
    fn add(&self, acc: &mut B::Buffer, x: &B::Buffer, element_count: usize) {
        self.time("add", |b| b.add(acc, x, element_count));
    }
    fn softcap(&self, x: &mut B::Buffer, element_count: usize, cap: f32) {
        self.time("softcap", |b| b.softcap(x, element_count, cap));
    }
    fn largest(&self, x: &B::Buffer, width: usize, out: &mut [Option<u32>]) {
        self.time("largest", |b| b.largest(x, width, out));
    }
}
