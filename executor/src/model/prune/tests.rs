use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Bf16Compute;

use super::*;
use crate::model::philox;

fn random(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (philox::uniform(seed, 0, i) + philox::uniform(seed, 1, i) - 1.0) as f32).collect()
}

/// Inputs `[rows, cols]` of few directions, and a little of everything.
fn inputs(seed: u64, rows: usize, cols: usize) -> Vec<f32> {
    let (rank, noise) = (cols / 3, random(seed, rows * cols));
    let (left, right) = (random(seed + 1, rows * rank), random(seed + 2, rank * cols));
    let product = |t: usize, k: usize| (0..rank).map(|r| left[t * rank + r] * right[r * cols + k]).sum::<f32>();
    (0..rows * cols).map(|at| product(at / cols, at % cols) + 0.05 * noise[at]).collect()
}

fn sums(x: &[f32], cols: usize) -> Hessian {
    let mut sums = Hessian::new(cols);
    sums.add(&Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::F32 }), x).unwrap();
    sums
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// `x W^T`, `[rows, outputs]`.
fn outputs(x: &[f32], w: &[f32], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
    x.chunks_exact(cols).flat_map(|x| w.chunks_exact(cols).map(|w| dot(x, w)).collect::<Vec<_>>()).collect()
}

fn squares(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// Only some columns of a matrix.
fn only(w: &[f32], cols: usize, kept: &[usize]) -> Vec<f32> {
    w.chunks_exact(cols).flat_map(|row| kept.iter().map(|k| row[*k]).collect::<Vec<_>>()).collect()
}

#[test]
fn importance_is_the_energy_of_the_outputs_that_go_with_a_unit() {
    let (rows, cols, out) = (50, 24, 9);
    let (x, w) = (inputs(3, rows, cols), random(8, out * cols));
    let view_bytes = bytes(&w);
    let view = TensorView { dtype: Dtype::F32, rows: out, cols, bytes: &view_bytes };
    let whole = outputs(&x, &w, cols);
    let moments = Moments::Measured(sums(&x, cols));
    for columns in [1, 4, 8] {
        for (unit, importance) in importance(&view, columns, &moments).into_iter().enumerate() {
            let mut without = w.clone();
            without.chunks_exact_mut(cols).for_each(|row| row[unit * columns..(unit + 1) * columns].fill(0.0));
            let lost = squares(&whole, &outputs(&x, &without, cols));
            assert!((importance / lost - 1.0).abs() < 1e-4, "{columns} {unit}: {importance} {lost}");
        }
    }
    let guessed = importance(&view, 4, &Moments::Guessed(vec![2.0; cols]));
    let norm = |unit: usize| w.chunks_exact(cols).flat_map(|row| &row[unit * 4..][..4]).map(|w| 2.0 * f64::from(*w).powi(2)).sum::<f64>();
    assert!((0..6).all(|unit| (guessed[unit] / norm(unit) - 1.0).abs() < 1e-9));
}

#[test]
fn the_most_important_stay_in_order_and_of_equals_the_first() {
    assert_eq!(choose(&[1.0, 5.0, 0.0, 4.0], 2), Some((vec![1, 3], 0.1)));
    assert_eq!(choose(&[2.0, 2.0, 2.0, 2.0], 2), Some((vec![0, 1], 0.5)));
    assert_eq!(choose(&[0.0, 0.0], 1), Some((vec![0], 0.0)));
    assert_eq!(choose(&[1.0, f64::NAN], 1), None);
}

#[test]
fn a_refitted_matrix_makes_up_for_inputs_that_hang_together_with_those_that_stay() {
    let (rows, cols, out) = (400, 48, 37);
    let (x, w) = (inputs(11, rows, cols), random(5, out * cols));
    let view_bytes = bytes(&w);
    let view = TensorView { dtype: Dtype::F32, rows: out, cols, bytes: &view_bytes };
    let kept: Vec<usize> = (0..cols).filter(|k| k % 3 != 1).collect();
    let (whole, of_kept) = (outputs(&x, &w, cols), only(&x, cols, &kept));
    let error = |w: &[f32]| squares(&whole, &outputs(&of_kept, w, kept.len()));
    let (cut, refitted) = (only(&w, cols, &kept), refit(&view, &sums(&x, cols), &kept).unwrap());
    assert!(error(&refitted) < 0.1 * error(&cut), "{} {}", error(&refitted), error(&cut));
    // A step in any direction makes the error and the ridge together larger: it is the least.
    let of_kept_sums = sums(&of_kept, kept.len());
    let ridge = RIDGE * (0..kept.len()).map(|k| of_kept_sums.row(k)[k]).sum::<f64>() / kept.len() as f64;
    let penalty = |w: &[f32]| ridge * w.iter().zip(&cut).map(|(w, cut)| f64::from(w - cut).powi(2)).sum::<f64>();
    let least = error(&refitted) + penalty(&refitted);
    for seed in 0..8 {
        let steps = random(100 + seed, refitted.len());
        let moved: Vec<f32> = refitted.iter().zip(&steps).map(|(w, step)| w + 0.01 * step).collect();
        assert!(error(&moved) + penalty(&moved) > least, "{seed}");
    }
}

#[test]
fn inputs_that_are_always_zero_leave_the_rest_as_it_was() {
    let (rows, cols, out) = (60, 20, 7);
    let (mut x, w) = (inputs(2, rows, cols), random(4, out * cols));
    x.chunks_exact_mut(cols).for_each(|row| [3, 4, 11].into_iter().for_each(|k| row[k] = 0.0));
    let view_bytes = bytes(&w);
    let view = TensorView { dtype: Dtype::F32, rows: out, cols, bytes: &view_bytes };
    let moments = Moments::Measured(sums(&x, cols));
    let (kept, lost_share) = choose(&importance(&view, 1, &moments), cols - 3).unwrap();
    assert_eq!((kept.clone(), lost_share), ((0..cols).filter(|k| ![3, 4, 11].contains(k)).collect::<Vec<_>>(), 0.0));
    let Moments::Measured(sums) = moments else { unreachable!() };
    assert_eq!(refit(&view, &sums, &kept).unwrap(), only(&w, cols, &kept), "bit for bit");
    assert_eq!(refit(&view, &Hessian::new(cols), &kept).unwrap(), only(&w, cols, &kept), "without any inputs");
}

#[test]
fn inputs_that_are_not_numbers_choose_nothing_and_fit_nothing() {
    let (rows, cols) = (9, 8);
    let mut x = inputs(1, rows, cols);
    x[13] = f32::INFINITY;
    let w = bytes(&random(1, 3 * cols));
    let view = TensorView { dtype: Dtype::F32, rows: 3, cols, bytes: &w };
    let sums = sums(&x, cols);
    assert_eq!(refit(&view, &sums, &[0, 5, 6]), None);
    assert_eq!(choose(&importance(&view, 1, &Moments::Measured(sums)), 4), None);
}
