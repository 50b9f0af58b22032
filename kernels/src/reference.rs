//! The specification: docs/numerics.md as scalar code, one plain function an op. It is never optimised; the CPU backend
//! must equal it bit for bit (tests/ops). Start with `linear` and `attention`; the rest is short.

mod attention;
mod differences;
mod linear;
/// Scalar exp, tanh, erf and the activations, with the coefficients that every backend uses.
pub mod math;
mod norm;
mod symbols;

use std::ops::Range;
use std::sync::Arc;

pub use crate::table::Table;

use crate::format::{CodeRow, TensorView, dequantise};
use crate::ops::{
    Activation, AttentionShape, Bf16Compute, Columns, Finish, KvPlace, KvShape, LinearRun, NormKind, Ops, PackError, PlacedPart, Query,
};
pub use attention::Kv;
pub use differences::{BOUNDS_MAX, add_differences, exponent_classes, of_ordinal, of_zigzag, ordinal, zigzag};
#[cfg(test)]
pub(crate) use linear::round_to_bf16;
pub use linear::{Activations, Linear, check_parts, check_placed, quantise_activations};
pub use symbols::{SYMBOL_STATES, SymbolCode, decode_symbols};

/// The scalar backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference {
    /// What layers with bf16 weights are computed from.
    pub bf16_compute: Bf16Compute,
}

impl Ops for Reference {
    type Buffer = Vec<f32>;
    type Linear = Linear;
    type Vector = Vec<f32>;
    type Table = Table;
    type Kv = Kv;

    fn describe(&self) -> String {
        "scalar reference, 1 thread".to_owned()
    }

    fn buffer(&self, element_count: usize) -> Result<Vec<f32>, PackError> {
        Ok(vec![0.0; element_count])
    }

    fn linear(&self, parts: &[TensorView<'_>]) -> Result<Linear, PackError> {
        Linear::new(parts, self.bf16_compute)
    }

    fn linear_placed(&self, parts: &[PlacedPart<'_>]) -> Result<Linear, PackError> {
        Linear::placed(parts, self.bf16_compute)
    }

    fn vector(&self, parts: &[TensorView<'_>]) -> Result<Vec<f32>, PackError> {
        concatenate(parts)
    }

    fn vector_f32(&self, values: &[f32]) -> Result<Vec<f32>, PackError> {
        Ok(values.to_vec())
    }

    fn table(&self, view: TensorView<'_>, keep: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Table, PackError> {
        Table::new(view, keep)
    }

    fn kv(&self, shape: KvShape, slot_count: usize) -> Result<Kv, PackError> {
        Ok(Kv::new(shape, slot_count))
    }

    fn linear_bytes(&self, linear: &Linear) -> usize {
        linear.bytes()
    }

    fn upload(&self, buffer: &mut Vec<f32>, at: usize, values: &[f32]) {
        buffer[at..][..values.len()].copy_from_slice(values);
    }

    fn download(&self, buffer: &Vec<f32>, at: usize, out: &mut [f32]) {
        out.copy_from_slice(&buffer[at..][..out.len()]);
    }

    fn gather_rows(&self, dst: &mut Vec<f32>, src: &Vec<f32>, index: &[u32], width: usize) {
        for (i, &row) in index.iter().enumerate() {
            dst[i * width..][..width].copy_from_slice(&src[row as usize * width..][..width]);
        }
    }

    fn scatter_rows(&self, dst: &mut Vec<f32>, index: &[u32], src: &Vec<f32>, width: usize) {
        for (i, &row) in index.iter().enumerate() {
            dst[row as usize * width..][..width].copy_from_slice(&src[i * width..][..width]);
        }
    }

    fn embed(&self, out: &mut Vec<f32>, first: usize, table: &Table, rows: &[u32], scale: f32) {
        let width = table.width();
        let mut scratch = CodeRow::default();
        for (i, &row) in rows.iter().enumerate() {
            let out = &mut out[(first + i) * width..][..width];
            table.read(row, &mut scratch, out);
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }

    fn embed_add(&self, out: &mut Vec<f32>, first: usize, table: &Table, rows: &[u32]) {
        let width = table.width();
        let mut scratch = CodeRow::default();
        let mut values = vec![0.0; width];
        for (i, &row) in rows.iter().enumerate() {
            table.read(row, &mut scratch, &mut values);
            out[(first + i) * width..][..width].iter_mut().zip(&values).for_each(|(x, v)| *x += v);
        }
    }

    fn norm(
        &self,
        dst: &mut Vec<f32>,
        src: &Vec<f32>,
        rows: Range<usize>,
        width: usize,
        kind: NormKind,
        eps: f32,
        weight: &Vec<f32>,
        bias: Option<&Vec<f32>>,
    ) {
        for row in rows {
            let (dst, src) = (&mut dst[row * width..][..width], &src[row * width..][..width]);
            norm::norm_row(dst, src, kind, eps, weight, bias.map(Vec::as_slice));
        }
    }

    fn norm_heads(
        &self,
        buffer: &mut Vec<f32>,
        rows: Range<usize>,
        columns: Columns,
        head_dim: usize,
        weight_offset: f32,
        eps: f32,
        weight: &Vec<f32>,
    ) {
        for row in rows {
            let row = &mut buffer[row * columns.stride + columns.offset..][..columns.width];
            for head in row.chunks_exact_mut(head_dim) {
                let src = head.to_vec();
                norm::norm_row(head, &src, NormKind::Rms { weight_offset }, eps, weight, None);
            }
        }
    }

    fn linear_apply(&self, out: &mut Vec<f32>, x: &Vec<f32>, row_count: usize, linear: &Linear, bias: Option<&Vec<f32>>, finish: Finish) {
        let outputs = if let Finish::Gate(_) = finish { linear.outputs() / 2 } else { linear.outputs() };
        let runs = [LinearRun { linear, bias, rows: 0..row_count }];
        self.linear_runs(out, Columns::dense(outputs), x, Columns::dense(linear.inputs()), &runs, finish);
    }

    fn linear_runs(
        &self,
        out: &mut Vec<f32>,
        outputs: Columns,
        x: &Vec<f32>,
        inputs: Columns,
        runs: &[LinearRun<'_, Linear, Vec<f32>>],
        finish: Finish,
    ) {
        for LinearRun { linear, bias, rows } in runs {
            for row in rows.clone() {
                let mut y = vec![0.0; linear.outputs()];
                linear.row(&mut y, &x[row * inputs.stride + inputs.offset..][..linear.inputs()], bias.map(Vec::as_slice));
                let out = &mut out[row * outputs.stride + outputs.offset..];
                if let Finish::Gate(activation) = finish {
                    let (gate, up) = y.split_at(y.len() / 2);
                    let pairs = gate.iter().zip(up);
                    out.iter_mut().zip(pairs).for_each(|(out, (gate, up))| *out = math::activate(*gate, activation) * up);
                    continue;
                }
                // Outputs of no part stay.
                for columns in linear.columns() {
                    for (out, y) in out[columns.clone()].iter_mut().zip(&y[columns]) {
                        *out = if finish == Finish::Add { *out + y } else { *y };
                    }
                }
            }
        }
    }

    fn rope_rows(&self, out: &mut Vec<f32>, positions: &[u32], inverse_frequencies: &Vec<f32>, attention_factor: f32) {
        let half = inverse_frequencies.len();
        for (t, &position) in positions.iter().enumerate() {
            let out = &mut out[t * 2 * half..][..2 * half];
            for (i, &frequency) in inverse_frequencies.iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                out[i] = libm::cos(angle) as f32 * attention_factor;
                out[half + i] = libm::sin(angle) as f32 * attention_factor;
            }
        }
    }

    fn rope(&self, buffer: &mut Vec<f32>, row_count: usize, columns: Columns, head_dim: usize, half: usize, rope_rows: &Vec<f32>) {
        assert!(2 * half <= head_dim, "rotated part {} of a head of {head_dim}", 2 * half);
        for t in 0..row_count {
            let (cos, sin) = rope_rows[t * 2 * half..][..2 * half].split_at(half);
            let row = &mut buffer[t * columns.stride + columns.offset..][..columns.width];
            for head in row.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (a, b) = (head[i], head[half + i]);
                    head[i] = a * cos[i] - b * sin[i];
                    head[half + i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }

    fn kv_write(&self, kv: &mut Kv, qkv: &Vec<f32>, shape: &AttentionShape, places: &[KvPlace]) {
        for (row, &place) in qkv.chunks_exact(shape.qkv_width()).zip(places) {
            kv.write(row, shape, place);
        }
        assert!(qkv.len() >= shape.qkv_width() * places.len(), "a row of q, k, v for each place");
    }

    fn attend(&self, out: &mut Vec<f32>, qkv: &Vec<f32>, kv: &Kv, shape: &AttentionShape, queries: &[Query], tables: &[u32]) {
        let (d, width) = (shape.kv.head_dim, shape.heads * shape.kv.head_dim);
        for (t, query) in queries.iter().enumerate() {
            for head in 0..shape.heads {
                let q = &qkv[t * shape.qkv_width() + head * d..][..d];
                attention::attend(&mut out[t * width + head * d..][..d], q, kv, shape, head, *query, &tables[query.table_start as usize..]);
            }
        }
    }

    fn gate(&self, out: &mut Vec<f32>, gate_up: &Vec<f32>, row_count: usize, width: usize, activation: Activation) {
        for row in 0..row_count {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            for j in 0..width {
                out[row * width + j] = math::activate(gate[j], activation) * up[j];
            }
        }
    }

    fn activate(&self, x: &mut Vec<f32>, element_count: usize, activation: Activation) {
        x[..element_count].iter_mut().for_each(|x| *x = math::activate(*x, activation));
    }

    fn add(&self, acc: &mut Vec<f32>, x: &Vec<f32>, element_count: usize) {
        acc[..element_count].iter_mut().zip(&x[..element_count]).for_each(|(acc, x)| *acc += x);
    }

    fn softcap(&self, x: &mut Vec<f32>, element_count: usize, cap: f32) {
        x[..element_count].iter_mut().for_each(|x| *x = math::softcap(*x, cap));
    }

    fn largest(&self, x: &Vec<f32>, width: usize, out: &mut [Option<u32>]) {
        for (row, out) in out.iter_mut().enumerate() {
            let (mut best, mut value) = (None, f32::NEG_INFINITY);
            for (index, x) in x[row * width..][..width].iter().enumerate() {
                if *x > value {
                    (best, value) = (Some(index as u32), *x);
                }
            }
            *out = best;
        }
    }
}

/// Parts as one f32 vector.
///
/// # Errors
/// The part whose bytes do not have the length that dtype and shape imply.
pub fn concatenate(parts: &[TensorView<'_>]) -> Result<Vec<f32>, PackError> {
    let mut values = Vec::new();
    for part in parts {
        part.check()?;
        values.extend(dequantise(part));
    }
    Ok(values)
}
