//! The op set on a card: each op checks what the seam promises, stages its indices and launches. A card that fails ends the process by a panic: what it
//! holds is lost, and the executor's lease ends (`executor/src/io/device.rs`).

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use crate::Cuda;
use crate::arguments::or_null;
use crate::driver::{Address, Argument, DriverError, Launch};
use crate::kv::Kv;
use crate::linear::Linear;
use crate::memory::Memory;
use crate::rope::row_into;
use crate::runs::{Run, activation_number};
use crate::scratch::Scratch;
use ashlar_kernels::format::{CodeRow, Dtype, TensorView};
use ashlar_kernels::ops::{
    Activation, AttentionShape, Columns, Finish, KvPlace, KvShape, LinearRun, NormKind, Ops, PackError, PlacedPart, Query,
};
use ashlar_kernels::reference::concatenate;
use ashlar_kernels::table::Table;

/// Threads of a cta that works on elements.
const THREADS: usize = 256;
/// Rows of a cta that norms: sixteen lanes each.
const NORM_ROWS: usize = 8;

/// f32 on the card.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
}

impl Buffer {
    /// A place, so many elements from its beginning, with so many from there on.
    fn at(&self, element: usize, count: usize) -> Address {
        self.memory.at(element * size_of::<f32>(), count * size_of::<f32>())
    }

    fn elements(&self) -> usize {
        self.memory.bytes() / size_of::<f32>()
    }
}

/// Values that ops read: on the card, and here too, as some are what the host computes with.
#[derive(Debug)]
pub struct Vector {
    buffer: Buffer,
    values: Vec<f32>,
}

impl Vector {
    fn at(&self, element: usize, count: usize) -> Address {
        self.buffer.at(element, count)
    }
}

/// A card that fails cannot be served from.
#[track_caller]
fn sound<T>(outcome: Result<T, DriverError>) -> T {
    match outcome {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl Cuda {
    pub(crate) fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        threads: usize,
        shared_bytes: usize,
        arguments: &[Argument],
    ) -> Result<(), DriverError> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.driver.launch(&Launch { kernel, grid, threads: threads as u32, shared_bytes: shared_bytes as u32, arguments })
    }

    /// Lists of indices on the card, and room for `more` bytes: the guard is held until all launches that use them were asked for.
    pub(crate) fn stage<const N: usize>(
        &self,
        lists: [&[u32]; N],
        more: usize,
    ) -> Result<([Address; N], MutexGuard<'_, Scratch>), DriverError> {
        let mut scratch = self.scratch();
        scratch.begin(&self.driver, more)?;
        Ok((self.queue.stage(lists.map(bytemuck::cast_slice))?, scratch))
    }

    /// Copies from the card, and all lists are free again, which no other op uses as the caller has the scratch.
    pub(crate) fn fetch(&self, _scratch: &MutexGuard<'_, Scratch>, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.driver.fetch(from, bytes)?;
        self.queue.begin()
    }

    /// Rows of a table, times `scale`, into rows or onto them.
    fn embed_rows(&self, out: Address, table: &Table, rows: &[u32], scale: f32, adds: bool) -> Result<(), DriverError> {
        let Some(first) = rows.first() else { return Ok(()) };
        let float = table.float_row(*first).map(|(dtype, bytes)| (dtype, bytes.len()));
        let (format, row_bytes) = match float {
            Some((Dtype::F16, bytes)) => (1, bytes),
            Some((Dtype::Bf16, bytes)) => (2, bytes),
            _ => (0, table.width() * size_of::<f32>()),
        };
        let mut bytes = Vec::with_capacity(row_bytes * rows.len());
        let (mut codes, mut values) = (CodeRow::default(), vec![0.0; table.width()]);
        for row in rows {
            if let Some((_, row)) = table.float_row(*row) {
                bytes.extend_from_slice(row);
            } else {
                table.read(*row, &mut codes, &mut values);
                bytes.extend_from_slice(bytemuck::cast_slice(&values));
            }
        }
        let _scratch = self.scratch();
        let [first] = self.queue.stage([&bytes])?;
        let sources: Vec<u64> = (0..rows.len()).map(|row| first.plus(row * row_bytes).0).collect();
        self.rows_from(out, &sources, table.width(), format, scale, adds)
    }

    /// Rows from places of their own; the caller has the scratch.
    fn rows_from(&self, out: Address, sources: &[u64], width: usize, format: i32, scale: f32, adds: bool) -> Result<(), DriverError> {
        let [places] = self.queue.stage([bytemuck::cast_slice(sources)])?;
        let arguments = [out.into(), places.into(), width.into(), Argument::Int(format), scale.into(), Argument::Int(adds.into())];
        self.launch("rows_from", [sources.len() as u32, 1, 1], THREADS, 0, &arguments)
    }

    /// One thread for each element.
    fn each_element(&self, kernel: &'static str, count: usize, arguments: &[Argument]) {
        let ctas = u32::try_from(count.div_ceil(THREADS)).expect("a buffer of less than 2^40 elements");
        sound(self.launch(kernel, [ctas, 1, 1], THREADS, 0, arguments));
    }
}

impl Ops for Cuda {
    type Buffer = Buffer;
    type Linear = Linear;
    type Vector = Vector;
    type Table = Table;
    type Kv = Kv;

    fn describe(&self) -> String {
        self.driver.describe()
    }

    /// Waits too: from the time that a batch took the engine learns how long such batches take.
    fn submit(&self) {
        sound(self.wait());
    }

    fn buffer(&self, element_count: usize) -> Result<Buffer, PackError> {
        let memory = Memory::new(&self.driver, element_count * size_of::<f32>())?;
        self.driver.zero(memory.address(), memory.bytes())?;
        Ok(Buffer { memory })
    }

    fn linear(&self, parts: &[TensorView<'_>]) -> Result<Linear, PackError> {
        Linear::new(&self.driver, parts)
    }

    fn linear_placed(&self, parts: &[PlacedPart<'_>]) -> Result<Linear, PackError> {
        Linear::placed(&self.driver, parts)
    }

    fn vector(&self, parts: &[TensorView<'_>]) -> Result<Vector, PackError> {
        self.vector_f32(&concatenate(parts)?)
    }

    fn vector_f32(&self, values: &[f32]) -> Result<Vector, PackError> {
        let buffer = Buffer { memory: Memory::holding(&self.driver, &bytes_of(values))? };
        Ok(Vector { buffer, values: values.to_vec() })
    }

    /// Stays in the host's memory: a batch asks for few of its rows, which are sent as f32 whatever their format.
    fn table(&self, view: TensorView<'_>, keep: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Table, PackError> {
        Table::new(view, keep)
    }

    fn kv(&self, shape: KvShape, slot_count: usize) -> Result<Kv, PackError> {
        Kv::new(&self.driver, shape, slot_count)
    }

    fn linear_bytes(&self, linear: &Linear) -> usize {
        linear.bytes()
    }

    fn upload(&self, buffer: &mut Buffer, at: usize, values: &[f32]) {
        sound(self.driver.send(buffer.at(at, values.len()), &bytes_of(values)));
    }

    fn download(&self, buffer: &Buffer, at: usize, out: &mut [f32]) {
        let mut bytes = vec![0; size_of_val(out)];
        sound(self.fetch(&self.scratch(), buffer.at(at, out.len()), &mut bytes));
        for (out, bytes) in std::iter::zip(out, bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
    }

    fn gather_rows(&self, dst: &mut Buffer, src: &Buffer, index: &[u32], width: usize) {
        assert!(index.iter().all(|row| (*row as usize + 1) * width <= src.elements()), "rows that are there");
        let to = dst.at(0, index.len() * width);
        let ([rows], _scratch) = sound(self.stage([index], 0));
        let arguments = [to.into(), src.at(0, 0).into(), rows.into(), width.into()];
        sound(self.launch("gather_rows", [index.len() as u32, 1, 1], THREADS, 0, &arguments));
    }

    fn scatter_rows(&self, dst: &mut Buffer, index: &[u32], src: &Buffer, width: usize) {
        assert!(index.iter().all(|row| (*row as usize + 1) * width <= dst.elements()), "rows that are there");
        let from = src.at(0, index.len() * width);
        let ([rows], _scratch) = sound(self.stage([index], 0));
        let arguments = [dst.at(0, 0).into(), rows.into(), from.into(), width.into()];
        sound(self.launch("scatter_rows", [index.len() as u32, 1, 1], THREADS, 0, &arguments));
    }

    fn embed(&self, out: &mut Buffer, first: usize, table: &Table, rows: &[u32], scale: f32) {
        let width = table.width();
        sound(self.embed_rows(out.at(first * width, rows.len() * width), table, rows, scale, false));
    }

    fn embed_add(&self, out: &mut Buffer, first: usize, table: &Table, rows: &[u32]) {
        let width = table.width();
        sound(self.embed_rows(out.at(first * width, rows.len() * width), table, rows, 1.0, true));
    }

    fn norm(
        &self,
        dst: &mut Buffer,
        src: &Buffer,
        rows: Range<usize>,
        width: usize,
        kind: NormKind,
        eps: f32,
        weight: &Vector,
        bias: Option<&Vector>,
    ) {
        let (to, from) = (dst.at(rows.start * width, rows.len() * width), src.at(rows.start * width, rows.len() * width));
        let (layer, weight_offset) = match kind {
            NormKind::Rms { weight_offset } => (0, weight_offset),
            NormKind::Layer => (1, 0.0),
        };
        let arguments = [
            to.into(),
            from.into(),
            weight.at(0, width).into(),
            or_null(bias.map(|bias| bias.at(0, width))),
            rows.len().into(),
            width.into(),
            Argument::Int(layer),
            weight_offset.into(),
            eps.into(),
        ];
        sound(self.launch("norm_rows", [rows.len().div_ceil(NORM_ROWS) as u32, 1, 1], 16 * NORM_ROWS, 0, &arguments));
    }

    fn norm_heads(
        &self,
        buffer: &mut Buffer,
        rows: Range<usize>,
        columns: Columns,
        head_dim: usize,
        weight_offset: f32,
        eps: f32,
        weight: &Vector,
    ) {
        let Some(first) = strided(buffer, rows.start, rows.len(), columns) else { return };
        let heads = columns.width / head_dim;
        let arguments = [
            first.into(),
            weight.at(0, head_dim).into(),
            rows.len().into(),
            heads.into(),
            columns.stride.into(),
            head_dim.into(),
            weight_offset.into(),
            eps.into(),
        ];
        sound(self.launch("norm_heads", [(rows.len() * heads).div_ceil(NORM_ROWS) as u32, 1, 1], 16 * NORM_ROWS, 0, &arguments));
    }

    fn linear_apply(&self, out: &mut Buffer, x: &Buffer, row_count: usize, linear: &Linear, bias: Option<&Vector>, finish: Finish) {
        let outputs = if let Finish::Gate(_) = finish { linear.outputs() / 2 } else { linear.outputs() };
        let runs = [LinearRun { linear, bias, rows: 0..row_count }];
        self.linear_runs(out, Columns::dense(outputs), x, Columns::dense(linear.inputs()), &runs, finish);
    }

    fn linear_runs(
        &self,
        out: &mut Buffer,
        outputs: Columns,
        x: &Buffer,
        inputs: Columns,
        runs: &[LinearRun<'_, Linear, Vector>],
        finish: Finish,
    ) {
        let in_order = runs.windows(2).all(|pair| pair[0].rows.end <= pair[1].rows.start);
        assert!(in_order, "runs have disjoint, ascending rows");
        let halves = if let Finish::Gate(_) = finish { 2 } else { 1 };
        let mut placed = Vec::with_capacity(runs.len());
        for LinearRun { linear, bias, rows } in runs {
            let width = linear.outputs() / halves;
            let from = strided(x, rows.start, rows.len(), Columns { width: linear.inputs(), ..inputs });
            let to = strided(out, rows.start, rows.len(), Columns { width, ..outputs });
            let (Some(x), Some(out)) = (from, to) else { continue };
            placed.push(Run { linear, x, out, rows: rows.len(), bias: bias.map(|bias| bias.at(0, linear.outputs())) });
        }
        sound(self.run_linears(&placed, inputs.stride, outputs.stride, finish));
    }

    fn rope_rows(&self, out: &mut Buffer, positions: &[u32], inverse_frequencies: &Vector, attention_factor: f32) {
        let (frequencies, row_bytes) = (&inverse_frequencies.values, 2 * inverse_frequencies.values.len() * size_of::<f32>());
        let to = out.at(0, positions.len() * 2 * frequencies.len());
        let kept = {
            let mut ropes = self.ropes.lock().unwrap_or_else(PoisonError::into_inner);
            ropes.rows(&self.driver, positions, frequencies, attention_factor)
        };
        let _scratch = self.scratch();
        let sources: Vec<u64> = match kept {
            Ok(rows) => rows.into_iter().map(|row| row.0).collect(),
            Err(DriverError::Memory { .. }) => {
                // A card that is full is sent the rows with each step.
                let mut rows = Vec::with_capacity(positions.len() * row_bytes);
                positions.iter().for_each(|position| row_into(&mut rows, *position, frequencies, attention_factor));
                let [first] = sound(self.queue.stage([&rows]));
                (0..positions.len()).map(|row| first.plus(row * row_bytes).0).collect()
            }
            failed @ Err(DriverError::Failed { .. }) => sound(failed).into_iter().map(|row| row.0).collect(),
        };
        sound(self.rows_from(to, &sources, 2 * frequencies.len(), 0, 1.0, false));
    }

    fn rope(&self, buffer: &mut Buffer, row_count: usize, columns: Columns, head_dim: usize, half: usize, rope_rows: &Buffer) {
        assert!(2 * half <= head_dim, "rotated part {} of a head of {head_dim}", 2 * half);
        let Some(first) = strided(buffer, 0, row_count, columns) else { return };
        let arguments = [
            first.into(),
            rope_rows.at(0, row_count * 2 * half).into(),
            (columns.width / head_dim).into(),
            columns.stride.into(),
            head_dim.into(),
            half.into(),
        ];
        sound(self.launch("rope_heads", [row_count as u32, 1, 1], THREADS, 0, &arguments));
    }

    fn kv_write(&self, kv: &mut Kv, qkv: &Buffer, shape: &AttentionShape, places: &[KvPlace]) {
        assert_eq!(shape.kv, kv.shape(), "one slot class");
        let KvShape { kv_heads, head_dim, page_tokens, .. } = shape.kv;
        let inside = |place: &KvPlace| (place.slot as usize) < kv.slot_count() && (place.offset as usize) < page_tokens;
        assert!(places.iter().all(inside), "places that are there");
        qkv.at(0, shape.qkv_width() * places.len());
        let first_key = qkv.at(shape.heads * head_dim, 0);
        let flat: Vec<u32> = places.iter().flat_map(|place| [place.slot, place.offset]).collect();
        let ([places_at], _scratch) = sound(self.stage([&flat], 0));
        let [keys, values, key_scales, value_scales] = kv.sections().map(Argument::Address);
        let arguments = [
            keys,
            values,
            key_scales,
            value_scales,
            first_key.into(),
            places_at.into(),
            kv_heads.into(),
            head_dim.into(),
            page_tokens.into(),
            shape.qkv_width().into(),
        ];
        sound(self.launch(kv.entries()[0], [places.len() as u32, 2 * kv_heads as u32, 1], 32, 0, &arguments));
    }

    fn attend(&self, out: &mut Buffer, qkv: &Buffer, kv: &Kv, shape: &AttentionShape, queries: &[Query], tables: &[u32]) {
        assert_eq!(shape.kv, kv.shape(), "one slot class");
        assert!(shape.window != Some(0), "a window sees at least the query's own position");
        let KvShape { head_dim, page_tokens, .. } = shape.kv;
        for query in queries {
            let first = shape.window.map_or(0, |window| (query.position + 1).saturating_sub(window)) as usize;
            let pages =
                query.table_start as usize + first / page_tokens..=query.table_start as usize + query.position as usize / page_tokens;
            assert!(tables[pages].iter().all(|slot| (*slot as usize) < kv.slot_count()), "pages that are there");
        }
        let to = out.at(0, queries.len() * shape.heads * head_dim);
        let rows = qkv.at(0, queries.len() * shape.qkv_width());
        sound(self.attend_rows((to, rows, kv), shape, queries, tables));
    }

    fn gate(&self, out: &mut Buffer, gate_up: &Buffer, row_count: usize, width: usize, activation: Activation) {
        let arguments = [
            out.at(0, row_count * width).into(),
            gate_up.at(0, 2 * row_count * width).into(),
            width.into(),
            width.into(),
            activation_number(activation),
        ];
        sound(self.launch("gate_rows", [row_count as u32, 1, 1], THREADS, 0, &arguments));
    }

    fn activate(&self, x: &mut Buffer, element_count: usize, activation: Activation) {
        let arguments = [x.at(0, element_count).into(), Argument::Long(element_count as u64), activation_number(activation)];
        self.each_element("activate_elements", element_count, &arguments);
    }

    fn add(&self, acc: &mut Buffer, x: &Buffer, element_count: usize) {
        let arguments = [acc.at(0, element_count).into(), x.at(0, element_count).into(), Argument::Long(element_count as u64)];
        self.each_element("add_elements", element_count, &arguments);
    }

    fn softcap(&self, x: &mut Buffer, element_count: usize, cap: f32) {
        let arguments = [x.at(0, element_count).into(), Argument::Long(element_count as u64), cap.into()];
        self.each_element("softcap_elements", element_count, &arguments);
    }

    fn largest(&self, x: &Buffer, width: usize, out: &mut [Option<u32>]) {
        let from = x.at(0, out.len() * width);
        let mut bytes = vec![0; out.len() * size_of::<u32>()];
        let mut scratch = self.scratch();
        sound(scratch.begin(&self.driver, bytes.len()));
        let to = scratch.take(bytes.len());
        let arguments = [from.into(), to.into(), width.into()];
        sound(self.launch("largest_of_rows", [out.len() as u32, 1, 1], THREADS, 2 * THREADS * size_of::<f32>(), &arguments));
        sound(self.fetch(&scratch, to, &mut bytes));
        for (out, bytes) in std::iter::zip(out, bytes.as_chunks::<4>().0) {
            *out = Some(u32::from_le_bytes(*bytes)).filter(|index| *index != u32::MAX);
        }
    }
}

/// The first element of columns of rows; `None` of no rows.
fn strided(buffer: &Buffer, first_row: usize, rows: usize, columns: Columns) -> Option<Address> {
    let last = rows.checked_sub(1)?;
    let first = first_row * columns.stride + columns.offset;
    Some(buffer.at(first, last * columns.stride + columns.width))
}
