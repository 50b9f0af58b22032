//! What is left of a difference is as much as each method promises, and weights that did not change add up to nothing.

use super::super::testing::Rng;
use super::*;

fn normal(rng: &mut Rng, count: usize, size: f32) -> Vec<f32> {
    (0..count).map(|_| size * rng.normal()).collect()
}

fn off(difference: &[f32], made: &[f32]) -> f64 {
    let off: Vec<f32> = difference.iter().zip(made).map(|(d, made)| d - made).collect();
    (squares(&off) / squares(difference)).sqrt()
}

#[test]
fn methods_are_read_as_they_are_written() {
    for text in ["svd:1", "svd:1024", "bitdelta"] {
        assert_eq!(text.parse::<Method>().unwrap().to_string(), text);
    }
    for text in ["svd", "svd:", "svd:0", "svd:1025", "svd:-1", "bitdelta:2", "bit", ""] {
        let error = text.parse::<Method>().unwrap_err().to_string();
        assert_eq!(error, format!("`{text}` is neither svd:R, R being a rank of 1 to 1024, nor bitdelta"));
    }
}

#[test]
fn one_bit_keeps_the_share_that_signs_of_normal_numbers_hold() {
    let (rows, cols) = (24, 1100);
    let mut rng = Rng::new(3);
    // Small enough for scales to be subnormal f16.
    for size in [1e-2, 2e-5] {
        let difference = normal(&mut rng, rows * cols, size);
        let (change, tensors, made) = one_bit(rows, cols, &difference, &[24, 1100]);
        let Change::OneBit { signs } = &change else { panic!("{change:?}") };
        assert_eq!((signs, signs.dtype.to_string().as_str()), (&tensors[0].0, "int1g512"));
        // A bit a weight, and three scales of two bytes a row.
        assert_eq!(tensors[0].1.len(), rows * (cols.div_ceil(8) + 3 * 2));
        // A sign and the mean size leave 1 - 2 / pi of a normal number's square.
        let expected = (1.0 - std::f64::consts::FRAC_2_PI).sqrt();
        assert!((off(&difference, &made) - expected).abs() < 0.01, "{size}: {}", off(&difference, &made));
        assert!(difference.iter().zip(&made).all(|(d, made)| d.signum() == made.signum()));
    }
}

#[test]
fn weights_that_did_not_change_get_signs_that_cancel() {
    let (rows, cols) = (16, 4096);
    let mut difference = vec![0.0; rows * cols];
    difference.iter_mut().step_by(10).for_each(|d| *d = -1e-3);
    let (_, _, made) = one_bit(rows, cols, &difference, &[16, 4096]);
    let scale = f64::from(made[0].abs());
    // The first group has 52 changed weights of 512.
    assert!((scale - 52e-3 / 512.0).abs() < 1e-6, "the mean size of all of a group: {scale}");
    for (row, made) in made.chunks(cols).enumerate() {
        // Of 3,686 signs by chance the sum has a deviation of 61; all of one sign would be 3,686.
        let sum: f64 = made.iter().enumerate().filter(|(k, _)| (row * cols + k) % 10 != 0).map(|(_, d)| f64::from(*d) / scale).sum();
        assert!(sum.abs() < 6.0 * 61.0, "{sum}");
    }
    assert_eq!(one_bit(rows, cols, &difference, &[16, 4096]).1, one_bit(rows, cols, &difference, &[16, 4096]).1, "the same each time");
}

#[test]
fn factors_in_bf16_are_nearly_a_product() {
    let (rows, cols, rank) = (40, 96, 4);
    let mut rng = Rng::new(5);
    let (b, a) = (normal(&mut rng, rows * rank, 1e-3), normal(&mut rng, rank * cols, 1.0));
    let difference: Vec<f32> =
        (0..rows * cols).map(|at| (0..rank).map(|r| b[at / cols * rank + r] * a[r * cols + at % cols]).sum()).collect();
    let (change, tensors, made) = svd(rows, cols, &difference, &[40, 96], rank);
    let Change::LowRank { scale: 1.0, a, b } = change else { panic!("{change:?}") };
    assert_eq!((a.shape, b.shape), (vec![4, 96], vec![40, 4]));
    assert_eq!(tensors.iter().map(|tensor| tensor.1.len()).sum::<usize>(), 2 * 4 * (40 + 96));
    assert!(off(&difference, &made) < 5e-3, "two roundings to 8 bits: {}", off(&difference, &made));
    // More than the matrix has.
    let (change, ..) = svd(rows, cols, &difference, &[40, 96], 1024);
    assert!(matches!(change, Change::LowRank { a, .. } if a.shape == [40, 96]));
}
