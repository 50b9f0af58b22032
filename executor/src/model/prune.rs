//! What the inputs of a matrix are worth, and the best matrix for some of them: importance by the energy of outputs that would be lost, and least
//! squares over calibration inputs for those that stay. It knows matrices and inputs, no blocks (docs/surrogate.md).
//!
//! With C = X^T X over inputs X, leaving out a unit's inputs u of `y = x W^T` takes `x_u W_u^T` away, whose squares sum up to `tr(W_u C_uu W_u^T)`. Of
//! a unit of one input that is `C_jj |w_j|^2`: the sum of the squares of Wanda's scores (Sun et al., arXiv 2306.11695, section 3) of its column.

use ashlar_kernels::format::{CodeRow, TensorView, dequantise_row};

use super::gptq::{Hessian, cholesky};

/// What pulls a refitted matrix to what it was, as a share of the mean of C's diagonal.
const RIDGE: f64 = 0.01;

/// What is known of a matrix's inputs.
pub(super) enum Moments {
    /// C of calibration inputs.
    Measured(Hessian),
    /// A guess of C's diagonal `[K]`, with no more known.
    Guessed(Vec<f64>),
}

/// The importance of each unit of `columns` inputs, one after the other.
///
/// # Panics
/// When the moments are of other inputs, or the inputs are not whole units.
pub(super) fn importance(view: &TensorView<'_>, columns: usize, moments: &Moments) -> Vec<f64> {
    let mut importance = vec![0.0f64; view.cols / columns];
    assert_eq!(importance.len() * columns, view.cols, "whole units");
    let (mut scratch, mut row) = (CodeRow::default(), vec![0.0f32; view.cols]);
    for index in 0..view.rows {
        dequantise_row(view, index, &mut scratch, &mut row);
        for (unit, (importance, weights)) in importance.iter_mut().zip(row.chunks_exact(columns)).enumerate() {
            let from = unit * columns;
            *importance += match moments {
                Moments::Guessed(diagonal) => {
                    weights.iter().zip(&diagonal[from..from + columns]).map(|(w, energy)| f64::from(*w).powi(2) * energy).sum::<f64>()
                }
                Moments::Measured(sums) => {
                    let with = |k: usize| -> f64 {
                        sums.row(from + k)[from..from + columns].iter().zip(weights).map(|(c, w)| c * f64::from(*w)).sum()
                    };
                    weights.iter().enumerate().map(|(k, w)| f64::from(*w) * with(k)).sum::<f64>()
                }
            };
        }
    }
    importance
}

/// The `count` most important units, ascending, and the share of all importance that the others have; of equals the first stay. `None` when an
/// importance is not finite.
pub(super) fn choose(importance: &[f64], count: usize) -> Option<(Vec<usize>, f64)> {
    if !importance.iter().all(|value| value.is_finite()) {
        return None;
    }
    let mut units: Vec<usize> = (0..importance.len()).collect();
    units.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]).then(a.cmp(b)));
    let sum = |units: &[usize]| units.iter().map(|unit| importance[*unit].max(0.0)).sum::<f64>();
    let (kept, gone) = units.split_at(count);
    let lost_share = sum(gone) / (sum(kept) + sum(gone)).max(f64::MIN_POSITIVE);
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    Some((kept, lost_share))
}

/// The matrix `[outputs, kept]` whose outputs on the kept inputs alone are nearest to the whole matrix's on all of them: W' with the least
/// `tr((W P - W') C_ss (W P - W')^T) + r |W' - W_s|^2`, in short `W' = W_s + W_g C_gs (C_ss + r)^-1` for inputs s that stay and g that go. That is the
/// reconstruction of "Channel Pruning" (He et al., arXiv 1707.06168, section 3.1) with a ridge: where nothing is known of the inputs, the weights
/// stay what they were. `None` when the sums are not finite.
///
/// # Panics
/// When the sums are of other inputs, or the kept ones not ascending ones of these.
pub(super) fn refit(view: &TensorView<'_>, sums: &Hessian, kept: &[usize]) -> Option<Vec<f32>> {
    let (n, gone) = (kept.len(), (0..view.cols).filter(|k| kept.binary_search(k).is_err()).collect::<Vec<_>>());
    let of_kept = |k: &usize| {
        let row = sums.row(*k);
        kept.iter().map(move |j| row[*j])
    };
    let mut factor: Vec<f64> = kept.iter().flat_map(of_kept).collect();
    let with_gone: Vec<f64> = gone.iter().flat_map(of_kept).collect();
    let mean = (0..n).map(|k| factor[k * n + k]).sum::<f64>() / n as f64;
    // Without any inputs nothing is to be made up for.
    let ridge = if mean == 0.0 { 1.0 } else { RIDGE * mean };
    (0..n).for_each(|k| factor[k * n + k] += ridge);
    if !factor.iter().chain(&with_gone).all(|value| value.is_finite()) || !cholesky(&mut factor, n) {
        return None;
    }
    let mut refitted = vec![0.0f32; view.rows * n];
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let rows_each = view.rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, out) in refitted.chunks_mut(rows_each * n).enumerate() {
            let (gone, factor, with_gone) = (&gone, &factor, &with_gone);
            scope.spawn(move || {
                let (mut scratch, mut weights) = (CodeRow::default(), vec![0.0f32; view.cols]);
                for (row, out) in out.chunks_exact_mut(n).enumerate() {
                    dequantise_row(view, part * rows_each + row, &mut scratch, &mut weights);
                    let mut made_up = vec![0.0f64; n];
                    for (k, with_gone) in gone.iter().zip(with_gone.chunks_exact(n)) {
                        add(&mut made_up, f64::from(weights[*k]), with_gone);
                    }
                    solve(factor, &mut made_up);
                    out.iter_mut().zip(kept).zip(&made_up).for_each(|((out, k), more)| *out = (f64::from(weights[*k]) + more) as f32);
                }
            });
        }
    });
    Some(refitted)
}

/// `x` becomes (L L^T)^-1 x; `upper` is L^T, row-major, as [`cholesky`] leaves it.
fn solve(upper: &[f64], x: &mut [f64]) {
    let n = x.len();
    for k in 0..n {
        let row = &upper[k * n + k..(k + 1) * n];
        let value = x[k] / row[0];
        x[k] = value;
        add(&mut x[k + 1..], -value, &row[1..]);
    }
    for k in (0..n).rev() {
        let row = &upper[k * n + k..(k + 1) * n];
        let later: f64 = row[1..].iter().zip(&x[k + 1..]).map(|(factor, x)| factor * x).sum();
        x[k] = (x[k] - later) / row[0];
    }
}

/// `sum += by * values`.
fn add(sum: &mut [f64], by: f64, values: &[f64]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += by * value);
}

#[cfg(test)]
mod tests;
