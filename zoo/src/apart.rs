//! How far two tensors of equal columns lie apart, as f32 makes them of what is stored. One pass over both, a row at a time; sums in f64.

use ashlar_kernels::format::{CodeRow, TensorView, dequantise_row};

/// Sums over the elements of two tensors `a` and `b`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Apart {
    /// Elements.
    pub(crate) count: u64,
    /// Elements that are equal.
    pub(crate) equal_count: u64,
    /// Of the squares of `a`.
    pub(crate) a: f64,
    /// Of the squares of `b`.
    pub(crate) b: f64,
    /// Of the squares of the difference.
    pub(crate) difference: f64,
    /// Of the products.
    pub(crate) product: f64,
}

impl Apart {
    /// Over the first `rows` rows, which both have.
    pub(crate) fn of(a: &TensorView<'_>, b: &TensorView<'_>, rows: usize) -> Self {
        let mut sums = Self::default();
        let (mut codes, mut row_a, mut row_b) = (CodeRow::default(), vec![0.0; a.cols], vec![0.0; b.cols]);
        for row in 0..rows {
            dequantise_row(a, row, &mut codes, &mut row_a);
            dequantise_row(b, row, &mut codes, &mut row_b);
            for (a, b) in std::iter::zip(&row_a, &row_b) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                sums.a += a * a;
                sums.b += b * b;
                sums.difference += (a - b) * (a - b);
                sums.product += a * b;
                sums.equal_count += u64::from(a == b);
            }
            sums.count += a.cols as u64;
        }
        sums
    }

    /// Share of the elements that are equal, 0 to 1.
    pub(crate) fn equal_share(&self) -> f64 {
        self.equal_count as f64 / self.count.max(1) as f64
    }
}
