use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::dequantise;
use ashlar_kernels::ops::Bf16Compute;
use ashlar_zoo::quantise::round;

use super::*;
use crate::model::philox;

fn cpu() -> Cpu {
    Cpu::new(CpuOptions { threads: 1, isa: None, bf16_compute: Bf16Compute::F32 })
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (philox::uniform(seed, 0, i) + philox::uniform(seed, 1, i) - 1.0) as f32).collect()
}

/// Inputs whose elements hang together: few directions, and a little of everything.
fn inputs(seed: u64, rows: usize, cols: usize) -> Vec<f32> {
    let (rank, noise) = (cols / 4, random(seed, rows * cols));
    let (left, right) = (random(seed + 1, rows * rank), random(seed + 2, rank * cols));
    let product = |t: usize, k: usize| (0..rank).map(|r| left[t * rank + r] * right[r * cols + k]).sum::<f32>();
    (0..rows * cols).map(|at| product(at / cols, at % cols) + 0.1 * noise[at]).collect()
}

fn hessian(rows: &[f32], cols: usize) -> Hessian {
    let mut hessian = Hessian::new(cols);
    // In calls of different sizes.
    let (one, two) = rows.split_at(rows.len() / cols / 3 * cols);
    hessian.add(&cpu(), one).unwrap();
    hessian.add(&cpu(), two).unwrap();
    hessian
}

/// Squared error of the outputs.
fn output_error(x: &[f32], w: &[f32], q: &[f32], cols: usize) -> f64 {
    let difference: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
    let outputs = |x: &[f32]| -> f64 {
        difference.chunks_exact(cols).map(|row| row.iter().zip(x).map(|(d, x)| d * f64::from(*x)).sum::<f64>().powi(2)).sum()
    };
    x.chunks_exact(cols).map(outputs).sum()
}

#[test]
fn the_factor_is_that_of_the_damped_inverse() {
    let (rows, cols) = (90, 24);
    let x = inputs(3, rows, cols);
    let hessian = hessian(&x, cols);
    let of = |i: usize, j: usize| (0..rows).map(|t| f64::from(x[t * cols + i]) * f64::from(x[t * cols + j])).sum::<f64>();
    let mean = (0..cols).map(|k| of(k, k)).sum::<f64>() / cols as f64;
    let upper = hessian.factor().unwrap().upper;
    let damped = |i: usize, j: usize| of(i, j) + if i == j { 0.01 * mean } else { 0.0 };
    let inverse = |i: usize, j: usize| (0..cols).map(|k| f64::from(upper[k * cols + i]) * f64::from(upper[k * cols + j])).sum::<f64>();
    for (i, j) in (0..cols).flat_map(|i| (0..cols).map(move |j| (i, j))) {
        assert!(j >= i || upper[i * cols + j] == 0.0, "{i} {j}");
        let product: f64 = (0..cols).map(|k| damped(i, k) * inverse(k, j)).sum();
        let expected = f64::from(u8::from(i == j));
        assert!((product - expected).abs() < 1e-3, "{i} {j}: {product}");
    }
}

#[test]
fn outputs_on_the_inputs_change_less_than_by_rounding() {
    let (outputs, cols, rows) = (37, 128, 300);
    let (x, w) = (inputs(11, rows, cols), random(5, outputs * cols));
    let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
    let view = TensorView { dtype: Dtype::F32, rows: outputs, cols, bytes: &bytes };
    let factor = hessian(&x, cols).factor().unwrap();
    let error = |dtype, bytes: &[u8]| output_error(&x, &w, &dequantise(&TensorView { dtype, rows: outputs, cols, bytes }), cols);
    for dtype in [Dtype::Int4 { group: 32 }, Dtype::Int4Minimum { group: 64 }, Dtype::Int8 { group: 32 }, Dtype::Int4 { group: 128 }] {
        let (rounded, spread) = (error(dtype, &round(&view, dtype)), error(dtype, &quantise(&view, dtype, &factor)));
        assert!(spread < 0.5 * rounded, "{dtype}: {spread} of {rounded}");
    }
}

#[test]
fn without_inputs_each_weight_is_rounded_where_it_is() {
    let (outputs, cols) = (5, 70); // A short last group.
    let bytes: Vec<u8> = random(8, outputs * cols).iter().flat_map(|w| w.to_le_bytes()).collect();
    let view = TensorView { dtype: Dtype::F32, rows: outputs, cols, bytes: &bytes };
    let factor = Hessian::new(cols).factor().unwrap();
    for dtype in [Dtype::Int4Minimum { group: 32 }, Dtype::Int4 { group: 16 }] {
        let (plain, spread) = (round(&view, dtype), quantise(&view, dtype, &factor));
        let error = |bytes: &[u8]| {
            let back = dequantise(&TensorView { dtype, rows: outputs, cols, bytes });
            back.iter().zip(dequantise(&view)).map(|(b, w)| f64::from(b - w).powi(2)).sum::<f64>()
        };
        // `round` has one candidate more.
        assert!(error(&spread) >= error(&plain) * 0.9999 && error(&spread) < error(&plain) * 1.02, "{dtype}");
    }
}

#[test]
fn inputs_that_are_not_numbers_have_no_factor() {
    let mut x = inputs(1, 9, 16);
    x[17] = f32::NAN;
    assert!(hessian(&x, 16).factor().is_none());
}
