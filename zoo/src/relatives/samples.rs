//! A few elements of a matrix that stand for all of it: taken at places that follow from its shape alone, so that matrices of one
//! shape are sampled at the same places, and kept as bf16, so that one matrix in f32, f16 and bf16 gives nearly the same. No IO.

use ashlar_kernels::format::{CodeRow, Dtype, TensorView, dequantise_row};
use half::{bf16, f16};

/// Elements of one matrix.
pub const SAMPLE_COUNT: usize = 32;

/// Sampled elements of one matrix, as the bits of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Samples(pub [u16; SAMPLE_COUNT]);

impl Samples {
    /// Takes the samples of a tensor; what is quantised is dequantised in the rows of the samples.
    pub fn of(view: &TensorView<'_>) -> Self {
        let (mut row, mut codes) = (Vec::new(), CodeRow::default());
        let mut element = |at_row: usize, col: usize| {
            let at = at_row * view.cols + col;
            match view.dtype {
                Dtype::F32 => f32::from_le_bytes(view.bytes[4 * at..][..4].try_into().expect("four bytes")),
                Dtype::F16 => f16::from_le_bytes([view.bytes[2 * at], view.bytes[2 * at + 1]]).to_f32(),
                Dtype::Bf16 => bf16::from_le_bytes([view.bytes[2 * at], view.bytes[2 * at + 1]]).to_f32(),
                _ => {
                    row.resize(view.cols, 0.0);
                    dequantise_row(view, at_row, &mut codes, &mut row);
                    row[col]
                }
            }
        };
        Self(places(view.rows, view.cols).map(|(row, col)| bf16::from_f32(element(row, col)).to_bits()))
    }

    /// The elements.
    pub fn values(&self) -> [f32; SAMPLE_COUNT] {
        self.0.map(|bits| bf16::from_bits(bits).to_f32())
    }

    /// `sum |a - b| / sum (|a| + |b|)`: 0 for the same elements, near 0.7 for independent ones of one normal distribution, 1 at most. It is
    /// the same for both orders, and no single large element rules it as it would rule squares.
    pub fn distance(&self, other: &Self) -> f32 {
        let (mut apart, mut size) = (0.0f32, 0.0f32);
        for (a, b) in std::iter::zip(self.values(), other.values()) {
            apart += (a - b).abs();
            size += a.abs() + b.abs();
        }
        if size > 0.0 { (apart / size).min(1.0) } else { 0.0 }
    }
}

/// Rows and columns of the samples of a matrix `[rows, cols]`; some may coincide.
pub fn places(rows: usize, cols: usize) -> [(usize, usize); SAMPLE_COUNT] {
    let shape = mix(mix(rows as u64) ^ cols as u64);
    let within = |hash: u64, size: usize| usize::try_from(hash % size as u64).expect("less than a usize");
    std::array::from_fn(|index| {
        let hash = mix(shape.wrapping_add(index as u64));
        (within(hash, rows), within(mix(hash), cols))
    })
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::format::quantise;

    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| (mix(i as u64) >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn sampled(dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> Samples {
        let bytes = quantise(dtype, rows, cols, values).unwrap();
        Samples::of(&TensorView { dtype, rows, cols, bytes: &bytes })
    }

    #[test]
    fn places_are_within_the_shape_and_spread_over_it() {
        for (rows, cols) in [(1, 1), (1, 7), (64, 128), (49_152, 576)] {
            let places = places(rows, cols);
            assert!(places.iter().all(|(row, col)| *row < rows && *col < cols), "{rows} {cols}");
            let distinct: std::collections::BTreeSet<_> = places.iter().collect();
            assert!(rows * cols < 1000 || distinct.len() >= SAMPLE_COUNT - 2, "{rows} {cols}: {}", distinct.len());
        }
    }

    #[test]
    fn formats_of_one_matrix_are_near_and_other_matrices_are_far() {
        let (rows, cols) = (96, 64);
        let all = values(2 * rows * cols);
        let (one, other) = all.split_at(rows * cols);
        let bf16 = sampled(Dtype::Bf16, rows, cols, one);
        for (dtype, most) in [(Dtype::F32, 0.0), (Dtype::F16, 0.002), (Dtype::Int8 { group: 32 }, 0.01), (Dtype::Int4 { group: 32 }, 0.1)] {
            let distance = bf16.distance(&sampled(dtype, rows, cols, one));
            assert!(distance <= most, "{dtype}: {distance}");
        }
        assert!(bf16.distance(&sampled(Dtype::Bf16, rows, cols, other)) > 0.5);
        let zero = Samples([0; SAMPLE_COUNT]);
        assert_eq!((zero.distance(&zero), zero.distance(&bf16)), (0.0, 1.0));
    }
}
