//! The nearest matrix of little rank to a given one: its largest singular values with their vectors, found by random projection (Halko,
//! Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1). Pure.

use nalgebra::DMatrix;

use super::low_rank::{Seeded, orthonormal};

/// Columns of the random projection above the rank that is sought.
pub(super) const OVERSAMPLE: usize = 8;
/// Applications of the matrix and its transpose that make small singular values smaller (Halko, section 4.5).
const POWER_STEPS: usize = 2;
/// Steps of the iteration for singular values; it needs some tens, and would not end for numbers that are none.
pub(super) const SVD_STEPS_MAX: usize = 10_000;

/// Factors of a matrix: nearly B A.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    pub(super) rank: usize,
    /// `[rank, K]`, row by row.
    pub(super) a: Vec<f32>,
    /// `[N, rank]`, row by row.
    pub(super) b: Vec<f32>,
}

/// Orthonormal columns that nearly span the `width` largest singular directions of a matrix.
pub(super) fn range(matrix: &DMatrix<f32>, width: usize, rng: &mut Seeded) -> DMatrix<f32> {
    let mut range = orthonormal(matrix * rng.matrix(matrix.ncols(), width));
    for _ in 0..POWER_STEPS {
        let back = orthonormal(matrix.tr_mul(&range));
        range = orthonormal(matrix * back);
    }
    range
}

/// The `rank` largest singular values of a matrix that is not zero, or as many as it has; both factors are of one size. The same matrix gives
/// the same factors.
pub(super) fn truncated(matrix: &DMatrix<f32>, rank: usize) -> Factors {
    let (rows, cols) = matrix.shape();
    // In units of the largest element, so that no product overflows or underflows.
    let unit = matrix.amax();
    let matrix = matrix / unit;
    let rank = rank.min(rows).min(cols);
    let mut rng = Seeded(0x57D ^ ((rows as u64) << 32) ^ cols as u64);
    let range = range(&matrix, (rank + OVERSAMPLE).min(rows).min(cols), &mut rng);
    let small = range.tr_mul(&matrix).try_svd(true, true, f32::EPSILON, SVD_STEPS_MAX);
    let small = small.expect("finite numbers within -1 and 1 have singular values, found in far fewer steps");
    let roots = small.singular_values.rows(0, rank).map(|value| (value * unit).sqrt());
    let (u, v) = (small.u.expect("asked for"), small.v_t.expect("asked for"));
    let b = range * u.columns(0, rank) * DMatrix::from_diagonal(&roots);
    let a = DMatrix::from_diagonal(&roots) * v.rows(0, rank);
    // Row by row is column by column of the transpose.
    Factors { rank, a: a.transpose().as_slice().to_vec(), b: b.transpose().as_slice().to_vec() }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rng;
    use super::*;

    /// Root of the sum of squares that factors leave, over the matrix's.
    fn left(matrix: &DMatrix<f32>, factors: &Factors) -> f32 {
        let (rows, cols) = matrix.shape();
        let b = DMatrix::from_row_slice(rows, factors.rank, &factors.b);
        let a = DMatrix::from_row_slice(factors.rank, cols, &factors.a);
        (matrix - b * a).norm() / matrix.norm()
    }

    #[test]
    fn what_is_left_is_no_more_than_the_smaller_singular_values() {
        let mut rng = Rng::new(7);
        // Tiny numbers: a difference may be of the size of rounding errors.
        let matrix = DMatrix::from_fn(70, 45, |_, _| 1e-20 * rng.normal());
        let singular = (&matrix * 1e20).singular_values();
        let whole = singular.norm_squared();
        for rank in [1, 5, 20, 45, 60] {
            let factors = truncated(&matrix, rank);
            assert_eq!(factors.rank, rank.min(45));
            let best = (singular.rows_range(factors.rank..).norm_squared() / whole).sqrt();
            let left = left(&(&matrix * 1e20), &Factors { b: factors.b.iter().map(|b| b * 1e20).collect(), ..factors.clone() });
            // Of noise, whose singular values fall slowly, the projection finds nearly the best.
            assert!(left >= best - 1e-4 && left < best * 1.02 + 1e-4, "rank {rank}: {left}, best {best}");
        }
    }

    #[test]
    fn a_product_comes_back() {
        let mut rng = Rng::new(9);
        let (b, a) = (DMatrix::from_fn(40, 3, |_, _| rng.normal()), DMatrix::from_fn(3, 300, |_, _| rng.normal()));
        let matrix = &b * &a;
        assert!(left(&matrix, &truncated(&matrix, 3)) < 1e-5);
        assert!(left(&matrix, &truncated(&matrix, 2)) > 0.1);
        assert_eq!(truncated(&matrix, 3), truncated(&matrix, 3));
    }
}
