//! How alike two blocks' parameters are, as one vector each: a sieve before their outputs are measured, which says nothing about these by itself.

use ashlar_kernels::format::{CodeRow, dequantise_row};

use crate::store::MappedBlock;

/// The cosine of two blocks' parameters, all tensors together, in f64; 0 where one of them is all zeros. The blocks have the same roles and shapes.
pub fn cosine(a: &MappedBlock, b: &MappedBlock) -> f64 {
    let (mut dot, mut a_squares, mut b_squares) = (0f64, 0f64, 0f64);
    for (role, a) in &a.tensors {
        let Some(b) = b.tensors.get(role) else { continue };
        let (a, b) = (a.view(), b.view());
        let (mut codes, mut a_row, mut b_row) = (CodeRow::default(), vec![0f32; a.cols], vec![0f32; b.cols]);
        for row in 0..a.rows.min(b.rows) {
            dequantise_row(&a, row, &mut codes, &mut a_row);
            dequantise_row(&b, row, &mut codes, &mut b_row);
            for (x, y) in std::iter::zip(&a_row, &b_row) {
                let (x, y) = (f64::from(*x), f64::from(*y));
                dot += x * y;
                a_squares += x * x;
                b_squares += y * y;
            }
        }
    }
    let norm = (a_squares * b_squares).sqrt();
    if norm > 0.0 { dot / norm } else { 0.0 }
}
