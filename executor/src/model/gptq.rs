//! GPTQ (Frantar et al., arXiv 2210.17323): a matrix in few bits so that its outputs on given inputs change least. Columns are rounded one after
//! the other, and each one's error is spread over those that are still to come. It knows matrices and inputs, no models.
//!
//! With H = X^T X (section 3, its factor 2 cancels) and U the upper Cholesky factor of H^-1, rounding column k of a row w to q costs
//! `((w_k - q) / U_kk)^2`, and `w_j -= (w_k - q) / U_kk * U_kj` for j > k is the best answer of the rest (step 3, the "Cholesky reformulation").
//! Rows do not depend on each other, so instead of the paper's lazy batches of columns some rows are taken through all columns together.

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row};
use ashlar_kernels::ops::{Finish, Ops, PackError};
use ashlar_zoo::quantise::{Grid, Levels, PlanarRows};

/// Added to the diagonal of H, as a share of its mean (section 3.3).
const DAMPING: f64 = 0.01;
/// Rows of a matrix that are taken through the columns together: a row of U is read once for all of them.
const ROWS_TOGETHER: usize = 16;

/// The sum of X^T X over rows of inputs.
#[derive(Debug, Clone)]
pub struct Hessian {
    cols: usize,
    /// `[K, K]`.
    sum: Vec<f64>,
}

impl Hessian {
    /// Of no rows, for inputs of `cols` elements.
    pub fn new(cols: usize) -> Self {
        Self { cols, sum: vec![0.0; cols * cols] }
    }

    /// Adds dense rows `[T, K]`. The device multiplies, in f32 and in its own fixed order; the sum of calls is f64.
    ///
    /// # Errors
    /// When the device has no room.
    ///
    /// # Panics
    /// When there are not whole rows.
    pub fn add<B: Ops>(&mut self, ops: &B, rows: &[f32]) -> Result<(), PackError> {
        let (cols, count) = (self.cols, rows.len() / self.cols);
        assert_eq!(rows.len(), count * cols, "whole rows");
        // X^T as a layer of K outputs over T inputs, applied to the rows of X^T.
        let mut turned = vec![0.0f32; rows.len()];
        for (t, row) in rows.chunks_exact(cols).enumerate() {
            row.iter().enumerate().for_each(|(k, value)| turned[k * count + t] = *value);
        }
        let bytes: Vec<u8> = turned.iter().flat_map(|value| value.to_le_bytes()).collect();
        let layer = ops.linear(&[TensorView { dtype: Dtype::F32, rows: cols, cols: count, bytes: &bytes }])?;
        let (mut input, mut output) = (ops.buffer(turned.len())?, ops.buffer(cols * cols)?);
        ops.upload(&mut input, 0, &turned);
        ops.linear_apply(&mut output, &input, cols, &layer, None, Finish::Store);
        let mut product = vec![0.0f32; cols * cols];
        ops.download(&output, 0, &mut product);
        self.sum.iter_mut().zip(product).for_each(|(sum, product)| *sum += f64::from(product));
        Ok(())
    }

    /// `[K]`: the sums of products with one element of the inputs.
    pub(super) fn row(&self, k: usize) -> &[f64] {
        &self.sum[k * self.cols..(k + 1) * self.cols]
    }

    /// What [`quantise`] needs of it; `None` when the inputs were not finite.
    pub fn factor(&self) -> Option<Factor> {
        let cols = self.cols;
        let mean = (0..cols).map(|k| self.sum[k * cols + k]).sum::<f64>() / cols as f64;
        // Without any inputs all columns are alike, and nothing is spread.
        let damping = if mean == 0.0 { 1.0 } else { DAMPING * mean };
        // H reversed along both axes: its lower factor, reversed again, is R with H = R R^T and R upper, and U = R^-1.
        let mut matrix: Vec<f64> = self.sum.iter().rev().copied().collect();
        (0..cols).for_each(|k| matrix[k * cols + k] += damping);
        if !matrix.iter().all(|value| value.is_finite()) || !cholesky(&mut matrix, cols) {
            return None;
        }
        // L^T reversed along both axes is R^T.
        matrix.reverse();
        Some(Factor { cols, upper: inverse_of_transposed(&matrix, cols).iter().map(|value| *value as f32).collect() })
    }
}

/// The upper Cholesky factor U of the inverse of a damped [`Hessian`].
#[derive(Debug, Clone)]
pub struct Factor {
    cols: usize,
    /// `[K, K]`, row-major; zero below the diagonal.
    upper: Vec<f32>,
}

/// `matrix`, symmetric, becomes L^T, row-major and upper, with matrix = L L^T; what lies below the diagonal is left as it is. False where it is not
/// positive definite.
pub(super) fn cholesky(matrix: &mut [f64], n: usize) -> bool {
    for k in 0..n {
        let (done, rest) = matrix.split_at_mut((k + 1) * n);
        let row = &mut done[k * n..];
        if row[k].is_nan() || row[k] <= 0.0 {
            return false;
        }
        let inverse = 1.0 / row[k].sqrt();
        row[k..].iter_mut().for_each(|value| *value *= inverse);
        for (below, i) in rest.chunks_exact_mut(n).zip(k + 1..) {
            let by = row[i];
            below[i..].iter_mut().zip(&row[i..]).for_each(|(value, of_row)| *value -= by * of_row);
        }
    }
    true
}

/// R^-1 of an upper R, given as R^T, whose part above the diagonal is not read.
fn inverse_of_transposed(lower: &[f64], n: usize) -> Vec<f64> {
    // R U = 1 from the last row up: U_i = (e_i - sum over j > i of R_ij U_j) / R_ii, and R_ij is element i of row j of R^T.
    let mut upper = vec![0.0f64; n * n];
    for i in (0..n).rev() {
        let (head, tail) = upper.split_at_mut((i + 1) * n);
        let row = &mut head[i * n..];
        row[i] = 1.0;
        for (below, j) in tail.chunks_exact(n).zip(i + 1..) {
            let by = lower[j * n + i];
            row[j..].iter_mut().zip(&below[j..]).for_each(|(value, of_below)| *value -= by * of_below);
        }
        let inverse = 1.0 / lower[i * n + i];
        row[i..].iter_mut().for_each(|value| *value *= inverse);
    }
    upper
}

/// A matrix in an int8 or int4 format. The grid of a group is chosen when its first column comes, for the weights as the errors before have left them,
/// each weighed by what its error would cost.
///
/// # Panics
/// When the format has no [`Levels`], or the factor is of other columns.
pub fn quantise(view: &TensorView<'_>, dtype: Dtype, factor: &Factor) -> Vec<u8> {
    assert_eq!(view.cols, factor.cols, "a factor of the matrix's inputs");
    PlanarRows::in_parts(dtype, [view.rows, view.cols], ROWS_TOGETHER, |range| rows(view, range, dtype, factor))
}

fn rows(view: &TensorView<'_>, range: std::ops::Range<usize>, dtype: Dtype, factor: &Factor) -> PlanarRows {
    let (cols, levels) = (view.cols, Levels::of(dtype).expect("an int8 or int4 format"));
    let group = dtype.group().expect("it has groups");
    let importance: Vec<f32> = (0..cols).map(|k| factor.upper[k * cols + k].powi(-2)).collect();
    let mut written = PlanarRows::new(dtype, range.len(), cols);
    let (mut source, mut weights) = (CodeRow::default(), vec![0.0f32; ROWS_TOGETHER * cols]);
    let mut codes = vec![0i8; ROWS_TOGETHER * cols];
    let mut grids = vec![Vec::new(); ROWS_TOGETHER];
    for start in range.clone().step_by(ROWS_TOGETHER) {
        let count = ROWS_TOGETHER.min(range.end - start);
        for (row, weights) in weights.chunks_exact_mut(cols).take(count).enumerate() {
            dequantise_row(view, start + row, &mut source, weights);
            grids[row].clear();
        }
        for k in 0..cols {
            let upper = &factor.upper[k * cols + k..(k + 1) * cols];
            let inverse = 1.0 / upper[0];
            for (row, weights) in weights.chunks_exact_mut(cols).take(count).enumerate() {
                if k % group == 0 {
                    let end = cols.min(k + group);
                    grids[row].push(Grid::fit(levels, &weights[k..end], &importance[k..end], None));
                }
                let grid: Grid = grids[row][k / group];
                let code = grid.code(levels, weights[k]);
                codes[row * cols + k] = code as i8;
                let error = (weights[k] - grid.weight(code)) * inverse;
                weights[k + 1..].iter_mut().zip(&upper[1..]).for_each(|(weight, upper)| *weight -= error * upper);
            }
        }
        codes.chunks_exact(cols).zip(&grids).take(count).for_each(|(codes, grids)| written.push(codes, grids));
    }
    written
}

#[cfg(test)]
mod tests;
