//! Merged LoRA is told from full fine-tunes, and its factors give it back.

use ashlar_kernels::format::quantise;
use proptest::prelude::*;

use super::*;

/// Row by row, of deviation `scale`.
fn normal(rng: &mut Seeded, count: usize, scale: f32) -> Vec<f32> {
    let mut uniform = || (rng.next() >> 40) as f32 / (1u64 << 24) as f32;
    (0..count).map(|_| scale * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

/// A base and what a merge of rank `rank` makes of it, whose change has `by` of the base's size, both as stored.
fn merged(dtype: Dtype, [rows, cols]: [usize; 2], rank: usize, by: f32, seed: u64) -> [Vec<u8>; 2] {
    let mut rng = Seeded(seed);
    let stored = |values: &[f32]| quantise(dtype, rows, cols, values).unwrap();
    let base_bytes = stored(&normal(&mut rng, rows * cols, 0.05));
    let base = dequantise(&TensorView { dtype, rows, cols, bytes: &base_bytes });
    let (a, b) = (normal(&mut rng, rank * cols, 1.0), normal(&mut rng, rows * rank, 0.05 * by / (rank as f32).sqrt()));
    let tuned: Vec<f32> =
        (0..rows * cols).map(|at| base[at] + (0..rank).map(|r| b[at / cols * rank + r] * a[r * cols + at % cols]).sum::<f32>()).collect();
    [base_bytes, stored(&tuned)]
}

fn views(dtype: Dtype, [rows, cols]: [usize; 2], pair: &[Vec<u8>; 2]) -> [TensorView<'_>; 2] {
    [0, 1].map(|index| TensorView { dtype, rows, cols, bytes: &pair[index] })
}

#[test]
fn a_merged_lora_is_found_with_its_rank_and_gives_the_tuned_matrix_back() {
    for (dtype, shape, rank, by) in [
        (Dtype::Bf16, [128, 128], 8, 0.1),
        (Dtype::Bf16, [64, 128], 8, 0.02),
        (Dtype::Bf16, [192, 96], 1, 0.01),
        (Dtype::F16, [96, 160], 4, 0.005),
        (Dtype::F32, [96, 160], 12, 0.01),
        (Dtype::Bf16, [300, 280], 16, 0.03), // Larger than the part that is tried first.
    ] {
        let pair = merged(dtype, shape, rank, by, 7);
        let [base, tuned] = views(dtype, shape, &pair);
        let found = low_rank(&base, &tuned, 32).unwrap_or_else(|| panic!("{dtype} {shape:?} rank {rank} by {by}"));
        assert_eq!(found.rank, rank, "{dtype} {shape:?} by {by}: {:?}", found.proof);
        assert_eq!((found.a.len(), found.b.len()), (rank * shape[1], rank * shape[0]));
        assert!(
            found.proof.exact_share() > 0.99 && found.proof.far_count * 1000 <= found.proof.element_count,
            "{dtype} {shape:?}: {:?}",
            found.proof
        );
        // What the caller gets, multiplied by hand: row by row.
        let [rows, cols] = shape;
        let (from, to) = (dequantise(&base), dequantise(&tuned));
        let largest = from.iter().zip(&to).map(|(from, to)| (to - from).abs()).fold(0.0, f32::max);
        let exact = (0..rows * cols).filter(|at| {
            let change: f32 = (0..rank).map(|r| found.b[at / cols * rank + r] * found.a[r * cols + at % cols]).sum();
            units_apart(dtype, from[*at] + change, to[*at], largest) == 0
        });
        assert!(exact.count() as f64 >= 0.99 * (rows * cols) as f64, "{dtype} {shape:?}");
    }
}

#[test]
fn a_full_fine_tune_is_of_no_low_rank_however_small_it_is() {
    let (dtype, shape) = (Dtype::Bf16, [128usize, 160usize]);
    for by in [0.3, 0.02, 0.004, 0.001, 0.0003] {
        let mut rng = Seeded(11);
        let base = normal(&mut rng, shape[0] * shape[1], 0.05);
        let base = quantise(dtype, shape[0], shape[1], &base).unwrap();
        let values = dequantise(&TensorView { dtype, rows: shape[0], cols: shape[1], bytes: &base });
        let moves = normal(&mut rng, values.len(), 0.05 * by);
        let tuned: Vec<f32> = values.iter().zip(moves).map(|(value, by)| value + by).collect();
        let pair = [base, quantise(dtype, shape[0], shape[1], &tuned).unwrap()];
        let [base, tuned] = views(dtype, shape, &pair);
        assert_eq!(low_rank(&base, &tuned, 32).map(|found| found.rank), None, "by {by}");
    }
}

#[test]
fn equal_other_and_quantised_matrices_have_no_factors() {
    let shape = [64, 64];
    let pair = merged(Dtype::Bf16, shape, 4, 0.1, 3);
    let [base, tuned] = views(Dtype::Bf16, shape, &pair);
    assert_eq!(low_rank(&base, &base, 16), None);
    assert_eq!(low_rank(&base, &TensorView { rows: 32, cols: 128, ..tuned }, 16), None);
    assert_eq!(low_rank(&base, &TensorView { dtype: Dtype::F16, ..tuned }, 16), None);
    assert_eq!(low_rank(&base, &tuned, 3), None, "less than its rank");
    assert_eq!(low_rank(&base, &tuned, 0), None);
    let int8 = merged(Dtype::Int8 { group: 32 }, shape, 4, 0.1, 3);
    let [base, tuned] = views(Dtype::Int8 { group: 32 }, shape, &int8);
    assert_eq!(low_rank(&base, &tuned, 16), None);
    let vector = TensorView { dtype: Dtype::Bf16, rows: 1, cols: 64, bytes: &pair[0][..128] };
    assert_eq!(low_rank(&vector, &TensorView { bytes: &pair[1][..128], ..vector }, 16), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bits_make_it_panic_and_what_it_finds_is_proven(base in proptest::collection::vec(any::<u16>(), 96), tuned in proptest::collection::vec(any::<u16>(), 96)) {
        let bytes = |bits: &[u16]| bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>();
        // Infinities and NaN are refused by ingest.
        let finite = |bits: Vec<u16>| bits.into_iter().map(|bits| if bits & 0x7F80 == 0x7F80 { bits & 0xBFFF } else { bits }).collect::<Vec<_>>();
        let pair = [bytes(&finite(base)), bytes(&finite(tuned))];
        let [base, tuned] = views(Dtype::Bf16, [8, 12], &pair);
        if let Some(found) = low_rank(&base, &tuned, 4) {
            prop_assert!(found.proof.holds(found.a.len() + found.b.len()));
        }
    }
}
