//! Fits the linear map of a stitch: ridge regression from the hidden rows of one chain at a cut to those of another chain at its cut, for the same
//! tokens (docs/stitch.md). Rows come window by window and are added up in f64, so memory holds one window and one matrix of sums.

use std::sync::Arc;

use ashlar_kernels::ops::{KvFormat, Ops};
use ashlar_zoo::stitch::{LinearMap, Seam, position_feature};
use ashlar_zoo::store::Zoo;

use super::alone::{Alone, AloneError, AloneLimits, load_beginning};
use super::gptq::cholesky;

/// Tokens of a KV page; no result depends on it.
const PAGE_TOKENS: usize = 32;
/// Of so many windows the last one is held out: it is not fitted on, and the map is judged by it.
pub const HELD_OUT_EACH: usize = 5;
/// Rows of the matrix of sums that are added to together: a hidden row is read once for all of them.
const ROWS_TOGETHER: usize = 8;

/// Why no map was fitted.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// A chain could not be read, loaded or run.
    #[error(transparent)]
    Chain(#[from] AloneError),
    /// Activations that are infinite or no numbers.
    #[error("the calibration text gives hidden rows that are not finite")]
    NotFinite,
    /// More unknowns than the rows tell of, and no ridge to choose among them.
    #[error(
        "{rows} rows of the calibration text do not determine a map of {inputs} inputs with a ridge of {lambda}: give a longer text, or a larger --lambda"
    )]
    Undetermined {
        /// Rows that were fitted on.
        rows: u64,
        /// Inputs of the map.
        inputs: usize,
        /// The ridge.
        lambda: f64,
    },
}

/// A map, and how well it does on rows that it was not fitted on.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The map.
    pub map: LinearMap,
    /// Rows that it was fitted on.
    pub row_count: u64,
    /// Rows that were held out.
    pub held_count: u64,
    /// Of the held-out rows: squared error over squared distance from the mean row; 0 is exact, 1 no better than one row for all.
    pub error: f64,
    /// The same without the first row of each window, which is of another kind than all others and may outweigh them.
    pub error_after_first: f64,
}

/// Fits the map of a seam on windows of tokens, all at positions from 0; of every [`HELD_OUT_EACH`] the last one is held out. `lambda` is the
/// ridge over the mean variance of an input. `passed` is called after each window.
///
/// # Errors
/// When a chain cannot be loaded or run, or its rows determine no map.
///
/// # Panics
/// When there are fewer than [`HELD_OUT_EACH`] windows, one is empty or has a token beyond a vocabulary, or `lambda` is negative or not finite.
pub async fn fit<B: Ops>(
    ops: &Arc<B>,
    zoo: &Zoo,
    seam: &Seam,
    windows: &[Vec<u32>],
    lambda: f64,
    mut passed: impl FnMut(),
) -> Result<Fitted, FitError> {
    assert!(windows.len() >= HELD_OUT_EACH, "a window to judge by");
    let window_tokens = windows.iter().map(Vec::len).max().expect("a window");
    let limits =
        AloneLimits { chunk_tokens_max: window_tokens, tokens_max: window_tokens, page_tokens: PAGE_TOKENS, kv_format: KvFormat::F32 };
    let [of_a, of_b] = seam.fitted();
    let mut a = Alone::new(Arc::clone(ops), load_beginning(&**ops, zoo, of_a).await?, limits).map_err(AloneError::from)?;
    let mut b = Alone::new(Arc::clone(ops), load_beginning(&**ops, zoo, of_b).await?, limits).map_err(AloneError::from)?;
    let [inputs, outputs] = seam.widths();
    let mut sums = Sums::new(inputs, outputs);
    let is_held_out = |index: usize| index % HELD_OUT_EACH == HELD_OUT_EACH - 1;
    for (_, window) in windows.iter().enumerate().filter(|(index, _)| !is_held_out(*index)) {
        sums.add(&a.hidden(window, window.len()), &b.hidden(window, window.len()));
        passed();
    }
    let map = sums.solve(lambda)?;
    let mut held = HeldOut::default();
    for (_, window) in windows.iter().enumerate().filter(|(index, _)| is_held_out(*index)) {
        held.add(&map, &sums.mean_output(), &a.hidden(window, window.len()), &b.hidden(window, window.len()));
        passed();
    }
    let [all, after_first] = [held.all, held.after_first].map(|(squares, whole)| squares / whole);
    Ok(Fitted { map, row_count: sums.row_count, held_count: held.row_count, error: all, error_after_first: after_first })
}

/// Sums over rows of inputs (the D elements of x, and the position feature) and outputs (the D' elements of y), from which a map follows.
#[derive(Debug, Clone)]
pub struct Sums {
    /// D.
    inputs: usize,
    /// D'.
    outputs: usize,
    row_count: u64,
    /// Of each of the D + 1 inputs, then of the outputs.
    sums: Vec<f64>,
    /// `[D + 1, D + 1 + D']`: products of inputs with inputs, then with outputs. Left of the diagonal it is zero.
    products: Vec<f64>,
}

impl Sums {
    /// Of no rows.
    pub fn new(inputs: usize, outputs: usize) -> Self {
        let all = inputs + 1 + outputs;
        Self { inputs, outputs, row_count: 0, sums: vec![0.0; all], products: vec![0.0; (inputs + 1) * all] }
    }

    /// Adds rows x `[T, D]` and y `[T, D']` of the tokens at positions from 0.
    ///
    /// # Panics
    /// When there are not as many of both.
    pub fn add(&mut self, x: &[f32], y: &[f32]) {
        let (inputs, outputs, all) = (self.inputs, self.outputs, self.sums.len());
        let count = x.len() / inputs;
        assert_eq!((x.len(), y.len()), (count * inputs, count * outputs), "whole rows, as many of both");
        let mut rows: Vec<f64> = Vec::with_capacity(count * all);
        for (position, (x, y)) in (0u32..).zip(std::iter::zip(x.chunks_exact(inputs), y.chunks_exact(outputs))) {
            rows.extend(x.iter().map(|value| f64::from(*value)));
            rows.push(f64::from(position_feature(position)));
            rows.extend(y.iter().map(|value| f64::from(*value)));
        }
        for row in rows.chunks_exact(all) {
            self.sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        self.row_count += count as u64;
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // By turns, since the later rows of the matrix are shorter.
        let mut shares: Vec<Vec<(usize, &mut [f64])>> = (0..threads).map(|_| Vec::new()).collect();
        for (index, part) in self.products.chunks_mut(ROWS_TOGETHER * all).enumerate() {
            shares[index % threads].push((index * ROWS_TOGETHER, part));
        }
        std::thread::scope(|scope| {
            for share in shares {
                let rows = &rows;
                scope.spawn(move || share.into_iter().for_each(|(first, part)| add_products(part, first, rows, all)));
            }
        });
    }

    /// The map of least squared error plus ridge. Inputs and outputs are taken less their means, so the bias is free. The ridge is `lambda` times
    /// the mean variance of the elements of x for each of these, and `lambda` times its own variance for the position feature, which is of another
    /// size than they are.
    ///
    /// # Errors
    /// When the rows are not finite, or determine no map.
    pub fn solve(&self, lambda: f64) -> Result<LinearMap, FitError> {
        assert!(lambda.is_finite() && lambda >= 0.0, "a ridge is not negative");
        let (inputs, outputs, all) = (self.inputs, self.outputs, self.sums.len());
        let (unknowns, count) = (inputs + 1, self.row_count as f64);
        let (mut matrix, mut right) = (vec![0.0; unknowns * unknowns], vec![0.0; unknowns * outputs]);
        for (i, row) in self.products.chunks_exact(all).enumerate() {
            let centred = |j: usize| row[j] - self.sums[i] * self.sums[j] / count;
            (i..unknowns).for_each(|j| matrix[i * unknowns + j] = centred(j));
            (0..outputs).for_each(|n| right[i * outputs + n] = centred(unknowns + n));
        }
        if !matrix.iter().chain(&right).all(|value| value.is_finite()) {
            return Err(FitError::NotFinite);
        }
        let mean = (0..inputs).map(|k| matrix[k * unknowns + k]).sum::<f64>() / inputs as f64;
        (0..inputs).for_each(|k| matrix[k * unknowns + k] += lambda * mean);
        let own = &mut matrix[inputs * unknowns + inputs];
        *own += lambda * *own;
        let undetermined = FitError::Undetermined { rows: self.row_count, inputs, lambda };
        if !cholesky(&mut matrix, unknowns) {
            return Err(undetermined);
        }
        let solved = solve(&matrix, unknowns, right, outputs);
        let mut weight = vec![0.0f32; outputs * inputs];
        let mut position = vec![0.0f32; outputs];
        let mut bias: Vec<f64> = self.sums[unknowns..].iter().map(|sum| sum / count).collect();
        for (k, row) in solved.chunks_exact(outputs).enumerate() {
            for (n, value) in row.iter().enumerate() {
                bias[n] -= value * self.sums[k] / count;
                let place = if k < inputs { &mut weight[n * inputs + k] } else { &mut position[n] };
                *place = *value as f32;
            }
        }
        let bias: Vec<f32> = bias.into_iter().map(|value| value as f32).collect();
        // Nearly dependent inputs without a ridge pass the factorisation and give numbers without end.
        if !weight.iter().chain(&position).chain(&bias).all(|value| value.is_finite()) {
            return Err(undetermined);
        }
        Ok(LinearMap { inputs, outputs, weight, bias, position })
    }

    /// The mean of y.
    fn mean_output(&self) -> Vec<f64> {
        self.sums[self.inputs + 1..].iter().map(|sum| sum / self.row_count as f64).collect()
    }
}

/// Adds to rows `first..` of the matrix of products, right of its diagonal.
fn add_products(part: &mut [f64], first: usize, rows: &[f64], all: usize) {
    for row in rows.chunks_exact(all) {
        for (i, sums) in (first..).zip(part.chunks_exact_mut(all)) {
            let by = row[i];
            sums[i..].iter_mut().zip(&row[i..]).for_each(|(sum, value)| *sum += by * value);
        }
    }
}

/// X with R^T R X = B, for an upper R `[n, n]` and B `[n, columns]`; columns on all cores.
fn solve(upper: &[f64], n: usize, right: Vec<f64>, columns: usize) -> Vec<f64> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let each = columns.div_ceil(threads).max(1);
    let parts: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let right = &right;
        let starts = (0..columns).step_by(each);
        let running: Vec<_> = starts
            .map(|start| {
                let width = each.min(columns - start);
                let part: Vec<f64> = right.chunks_exact(columns).flat_map(|row| row[start..start + width].iter().copied()).collect();
                scope.spawn(move || solve_part(upper, n, part, width))
            })
            .collect();
        running.into_iter().map(|part| part.join().expect("arithmetic does not panic")).collect()
    });
    let mut solved = Vec::with_capacity(n * columns);
    for k in 0..n {
        parts.iter().for_each(|part| {
            let width = part.len() / n;
            solved.extend_from_slice(&part[k * width..(k + 1) * width]);
        });
    }
    solved
}

fn solve_part(upper: &[f64], n: usize, mut b: Vec<f64>, columns: usize) -> Vec<f64> {
    // R^T Z = B from the first row down: row i of R says what Z_i takes from the rows below.
    for i in 0..n {
        let (done, rest) = b.split_at_mut((i + 1) * columns);
        let row = &mut done[i * columns..];
        let inverse = 1.0 / upper[i * n + i];
        row.iter_mut().for_each(|value| *value *= inverse);
        for (below, j) in rest.chunks_exact_mut(columns).zip(i + 1..) {
            let by = upper[i * n + j];
            below.iter_mut().zip(&*row).for_each(|(value, of_row)| *value -= by * of_row);
        }
    }
    // R X = Z from the last row up.
    for i in (0..n).rev() {
        let (done, rest) = b.split_at_mut((i + 1) * columns);
        let row = &mut done[i * columns..];
        for (below, j) in rest.chunks_exact(columns).zip(i + 1..) {
            let by = upper[i * n + j];
            row.iter_mut().zip(below).for_each(|(value, of_below)| *value -= by * of_below);
        }
        let inverse = 1.0 / upper[i * n + i];
        row.iter_mut().for_each(|value| *value *= inverse);
    }
    b
}

/// Squared errors of a map, and squared distances from a mean row, over rows that it was not fitted on.
#[derive(Debug, Default)]
struct HeldOut {
    row_count: u64,
    all: (f64, f64),
    after_first: (f64, f64),
}

impl HeldOut {
    fn add(&mut self, map: &LinearMap, mean: &[f64], x: &[f32], y: &[f32]) {
        for (position, (x, y)) in (0u32..).zip(std::iter::zip(x.chunks_exact(map.inputs), y.chunks_exact(map.outputs))) {
            let square = |of: &[f64]| std::iter::zip(y, of).map(|(y, of)| (f64::from(*y) - of).powi(2)).sum::<f64>();
            let (error, whole) = (square(&map.apply(x, position)), square(mean));
            self.row_count += 1;
            self.all = (self.all.0 + error, self.all.1 + whole);
            if position > 0 {
                self.after_first = (self.after_first.0 + error, self.after_first.1 + whole);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::philox;

    fn values(seed: u64, count: usize) -> Vec<f32> {
        (0..count).map(|i| (philox::uniform(seed, 0, i as u32) - 0.5) as f32).collect()
    }

    /// Windows of inputs with large means and unequal sizes, and what a planted map makes of them.
    fn planted(windows: usize) -> (LinearMap, Vec<(Vec<f32>, Vec<f32>)>) {
        let (inputs, outputs, count) = (12, 20, 30);
        let map =
            LinearMap { inputs, outputs, weight: values(1, outputs * inputs), bias: values(2, outputs), position: values(3, outputs) };
        let window = |seed: u64| {
            let x: Vec<f32> =
                values(10 + seed, count * inputs).iter().enumerate().map(|(i, x)| x * (1 + i % inputs) as f32 + 3.0).collect();
            let rows = (0u32..).zip(x.chunks_exact(inputs));
            let y = rows.flat_map(|(position, x)| map.apply(x, position)).map(|value| value as f32).collect();
            (x, y)
        };
        (map.clone(), (0..windows as u64).map(window).collect())
    }

    #[test]
    fn a_planted_map_is_found_with_its_bias_and_its_part_of_the_position() {
        let (map, windows) = planted(6);
        let mut sums = Sums::new(map.inputs, map.outputs);
        windows[..5].iter().for_each(|(x, y)| sums.add(x, y));
        let found = sums.solve(1e-12).unwrap();
        for (found, planted) in [(&found.weight, &map.weight), (&found.bias, &map.bias), (&found.position, &map.position)] {
            let farthest = std::iter::zip(found, planted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(farthest < 1e-4, "{farthest}");
        }
        let mut held = HeldOut::default();
        held.add(&found, &sums.mean_output(), &windows[5].0, &windows[5].1);
        assert!(held.row_count == 30 && held.all.0 < 1e-8 * held.all.1 && held.after_first.1 < held.all.1, "{held:?}");
        // A ridge draws it towards the mean row, and a large one all the way.
        let error = |lambda: f64| {
            let mut held = HeldOut::default();
            held.add(&sums.solve(lambda).unwrap(), &sums.mean_output(), &windows[5].0, &windows[5].1);
            held.all.0 / held.all.1
        };
        let errors = [1e-12, 1e-2, 1.0, 1e9].map(error);
        assert!(errors.is_sorted() && errors[0] < 1e-8 && errors[1] > 1e-6 && (errors[3] - 1.0).abs() < 1e-3, "{errors:?}");
    }

    #[test]
    fn too_few_rows_need_a_ridge_and_rows_that_are_not_finite_are_refused() {
        let (inputs, outputs) = (12, 3);
        let mut sums = Sums::new(inputs, outputs);
        sums.add(&vec![1.0; 4 * inputs], &values(2, 4 * outputs));
        let refused = sums.solve(0.0).unwrap_err();
        assert!(matches!(refused, FitError::Undetermined { rows: 4, inputs: 12, .. }), "{refused}");
        let mut few = Sums::new(inputs, outputs);
        few.add(&values(1, 4 * inputs), &values(2, 4 * outputs));
        assert!(few.solve(0.1).is_ok());
        few.add(&vec![f32::INFINITY; inputs], &[0.0; 3]);
        assert!(matches!(few.solve(0.1), Err(FitError::NotFinite)));
    }
}
