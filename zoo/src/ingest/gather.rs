//! Takes the planned rows out of a mapped source tensor: a slice of the map where nothing moves, a copy else. Somebody may write to the
//! mapped file meanwhile, so what is converted or stored is a copy that nobody else can change.

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row, first_non_finite};
use bytes::Bytes;

use super::IngestError;
use super::convert::convert;
use super::plan::TensorPlan;
use crate::digest::Digest;
use crate::family::names::Rows;
use crate::formats::{FileSlice, TensorFiles};
use crate::tensor_file;

/// The payload to store for a planned tensor.
///
/// # Errors
/// When it holds a value that is not finite, or that lies outside the range of the type to store.
pub(super) fn payload(files: &TensorFiles, plan: &TensorPlan) -> Result<Bytes, IngestError> {
    let gathered = taken(files, plan);
    // What is found to be finite is what is converted.
    finished(if plan.source == plan.target { gathered } else { Bytes::from(gathered.to_vec()) }, plan)
}

/// The same once more, to be written: bytes that nobody else can change, and that have the digest that was computed of them before.
///
/// # Errors
/// When the file was changed since.
pub(super) fn own_payload(files: &TensorFiles, plan: &TensorPlan, digest: Digest) -> Result<Bytes, IngestError> {
    let gathered = taken(files, plan);
    let payload = finished(Bytes::from(gathered.to_vec()), plan).ok();
    let same = payload.filter(|payload| tensor_file::digest(plan.target, &plan.shape, payload) == digest);
    same.ok_or_else(|| IngestError::TensorChanged { name: plan.piece.name.clone() })
}

/// The rows that the plan wants, as they are or as a quantised matrix is read.
fn taken(files: &TensorFiles, plan: &TensorPlan) -> Bytes {
    match &plan.matrix {
        Some(matrix) => matrix.rows(files, whole_rows(plan)),
        None => gather(files.bytes(&plan.piece.name).expect("planned from these files"), plan),
    }
}

/// Checked, and of the type that is stored.
fn finished(gathered: Bytes, plan: &TensorPlan) -> Result<Bytes, IngestError> {
    let (rows, cols) = tensor_file::rows_cols(&plan.shape).expect("checked by the plan");
    let view = TensorView { dtype: plan.source, rows, cols, bytes: &gathered };
    if let Some(index) = first_non_finite(&view) {
        return Err(IngestError::NotFinite { name: plan.piece.name.clone(), index, value: kind_of(&view, index) });
    }
    if plan.source == plan.target {
        return Ok(gathered);
    }
    let converted = convert(&view, plan.target);
    let (index, value) = largest(&view);
    let stored = element(&TensorView { dtype: plan.target, rows, cols, bytes: &converted }, index);
    if value.abs() > reach(plan.target) || !stored.is_finite() || (stored == 0.0 && value != 0.0) {
        return Err(IngestError::OutOfRange { name: plan.piece.name.clone(), index, value, dtype: plan.target, stored });
    }
    Ok(Bytes::from(converted))
}

/// The largest magnitude that the codes of a format reach with the largest f16 as their scale.
fn reach(target: Dtype) -> f32 {
    match target {
        Dtype::Int8 { .. } => 127.0 * half::f16::MAX.to_f32(),
        Dtype::Int4 { .. } => 8.0 * half::f16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Index and value of the element of the largest magnitude: the first that a format's range is too narrow for.
fn largest(view: &TensorView<'_>) -> (usize, f32) {
    let (mut codes, mut row, mut best) = (CodeRow::default(), vec![0.0f32; view.cols], (0, 0.0f32));
    for index in 0..view.rows {
        dequantise_row(view, index, &mut codes, &mut row);
        let most = row.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        if most > best.1.abs() {
            let col = row.iter().position(|value| value.abs() == most).expect("the most is one of them");
            best = (index * view.cols + col, row[col]);
        }
    }
    best
}

fn element(view: &TensorView<'_>, index: usize) -> f32 {
    let mut row = vec![0.0; view.cols];
    dequantise_row(view, index / view.cols, &mut CodeRow::default(), &mut row);
    row[index % view.cols]
}

/// The rows of a quantised matrix that the plan wants.
fn whole_rows(plan: &TensorPlan) -> std::ops::Range<usize> {
    let as_usize = |value: u64| usize::try_from(value).expect("within a tensor in memory");
    match plan.piece.rows {
        Rows::Range { from, to, .. } => as_usize(from)..as_usize(to),
        Rows::All => 0..as_usize(plan.shape[0]),
        Rows::Unpermuted { .. } => unreachable!("GGUF has no such matrices"),
    }
}

fn gather(slice: FileSlice, plan: &TensorPlan) -> Bytes {
    if plan.piece.rows == Rows::All && !plan.piece.transposed {
        return Bytes::from_owner(slice);
    }
    let (source_rows, source_cols) = tensor_file::rows_cols(&plan.source_shape).expect("checked by the plan");
    let as_usize = |value: u64| usize::try_from(value).expect("within a tensor in memory");
    if plan.piece.transposed {
        let all = transposed(slice.as_ref(), source_rows, source_cols, element_bytes(plan.source));
        // Rows are now the source's columns.
        return selected(Bytes::from(all), source_cols, plan.piece.rows, as_usize);
    }
    let rows = if plan.source_shape.len() == 1 { source_cols } else { source_rows };
    selected(Bytes::from_owner(slice), rows, plan.piece.rows, as_usize)
}

/// Rows (all of one length) in the order that the plan wants.
fn selected(all: Bytes, rows: usize, selection: Rows, as_usize: impl Fn(u64) -> usize) -> Bytes {
    let row_bytes = all.len() / rows;
    match selection {
        Rows::All => all,
        Rows::Range { from, to, .. } => all.slice(as_usize(from) * row_bytes..as_usize(to) * row_bytes),
        Rows::Unpermuted { head_dim } => {
            let head_dim = as_usize(head_dim);
            let mut out = Vec::with_capacity(all.len());
            for row in 0..rows {
                let source = row - row % head_dim + unpermuted(row % head_dim, head_dim);
                out.extend_from_slice(&all[source * row_bytes..][..row_bytes]);
            }
            Bytes::from(out)
        }
    }
}

/// llama.cpp stores row j of the first half at 2j and row j of the second at 2j + 1.
fn unpermuted(row: usize, head_dim: usize) -> usize {
    let half = head_dim / 2;
    if row < half { 2 * row } else { 2 * (row - half) + 1 }
}

/// Elements of a matrix of so many rows and columns, column by column.
pub(crate) fn transposed(source: &[u8], rows: usize, cols: usize, element: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(source.len());
    for col in 0..cols {
        for row in 0..rows {
            out.extend_from_slice(&source[(row * cols + col) * element..][..element]);
        }
    }
    out
}

/// Bytes of an element of f32, f16 or bf16.
pub(crate) fn element_bytes(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

fn kind_of(view: &TensorView<'_>, index: usize) -> &'static str {
    if view.dtype.group().is_some() {
        return "a scale that is not finite";
    }
    if element(view, index).is_nan() { "NaN" } else { "an infinity" }
}

#[cfg(test)]
mod tests {
    #[test]
    fn llama_cpp_order_is_undone() {
        // Its converter: reshape(heads, 2, d/2).swapaxes(1, 2), so stored row 2j + h is row h * d/2 + j.
        let d = 8;
        let stored: Vec<usize> = (0..d / 2).flat_map(|j| (0..2).map(move |h| h * (d / 2) + j)).collect();
        let undone: Vec<usize> = (0..d).map(|row| stored[super::unpermuted(row, d)]).collect();
        assert_eq!(undone, (0..d).collect::<Vec<_>>());
    }

    #[test]
    fn transposing_moves_whole_elements() {
        let source: Vec<u8> = (0..12).collect(); // [2, 3] of two bytes
        assert_eq!(super::transposed(&source, 2, 3, 2), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    }
}
