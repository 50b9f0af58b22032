//! bf16 weights that meet activations rounded to bf16 (docs/numerics.md, rule 9): equal bits whether the processor has an instruction for
//! it or not, also where numbers vanish.

use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Bf16Compute, Ops};
use half::bf16;
use proptest::prelude::*;

use super::linear::{LinearCase, check_rows};
use super::values::{Random, Tensor};
use super::{Case, assert_same, backends, backends_of, check};

const ROWS: [usize; 16] = [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 31, 70, 97, 200];
const COLUMNS: [usize; 18] = [1, 2, 3, 15, 16, 17, 31, 64, 139, 511, 512, 513, 576, 1023, 1025, 2047, 2049, 2600];

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bf16_pairs_have_the_reference_bits(seed in any::<u64>()) {
        let mut random = Random(seed);
        let (row_count, cols) = (random.pick(&ROWS), random.pick(&COLUMNS));
        let rows_max = (1_500_000 / (row_count * cols)).clamp(4, 150);
        check_rows(&LinearCase::random(&mut random, &[Dtype::Bf16], row_count, cols, rows_max).paired(), &mut random);
    }

    #[test]
    fn bf16_pairs_are_added_and_gated_as_the_ops_would_one_after_the_other(seed in any::<u64>()) {
        let mut random = Random(seed);
        let (row_count, cols) = (random.pick(&ROWS), random.pick(&[32, 97, 544, 2081]));
        let rows_max = (1_500_000 / (row_count * cols)).clamp(4, 150);
        LinearCase::random(&mut random, &[Dtype::Bf16], row_count, cols, rows_max).paired().check_added_and_gated(&mut random);
    }

    /// Sums come about the smallest normal number, where they become zeros or do not.
    #[test]
    fn sums_that_vanish_have_the_reference_bits(seed in any::<u64>()) {
        let mut random = Random(seed);
        let (row_count, cols) = (random.pick(&ROWS[..14]), random.pick(&COLUMNS));
        // Exponents of products from here on, over some 30: rounding, cancelling and vanishing meet.
        let exponent = random.pick(&[-155, -148, -140, -135, -120, -112]);
        let share = random.pick(&[-100, -63, -30, 0]);
        let mut about = |exponent: i32| random.unit() * 2f32.powi(exponent + random.below(15) as i32);
        let x = (0..row_count * cols).map(|_| about(share)).collect();
        let bytes = (0..5 * cols).flat_map(|_| bf16::from_f32(about(exponent - share)).to_le_bytes()).collect();
        let parts = vec![Tensor { dtype: Dtype::Bf16, rows: 5, cols, bytes }];
        check_rows(&LinearCase::of(x, row_count, parts).paired(), &mut random);
    }
}

#[test]
fn vanishing_sums_are_met() {
    // 2^-63 squared is the smallest normal number, and a product of half a step below it takes it away or leaves it.
    let small = 2f32.powi(-63);
    let weights = |second: f32| [small, 0.0, second * 2f32.powi(-76)].into_iter().flat_map(|w| bf16::from_f32(w).to_le_bytes()).collect();
    for (second, expected) in [(0.4, f32::MIN_POSITIVE), (0.6, 0.0), (1.0, 0.0)] {
        let parts = vec![Tensor { dtype: Dtype::Bf16, rows: 1, cols: 3, bytes: weights(second) }];
        let case = LinearCase::of(vec![small, 0.0, -(2f32.powi(-74))], 1, parts).paired();
        assert_eq!(check(&case), [expected], "{second} of a step below the smallest normal number");
    }
}

#[test]
fn activations_are_rounded_and_subnormal_numbers_are_zeros() {
    let row = |w: &[f32]| w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect::<Vec<_>>();
    let one = |x: Vec<f32>, w: &[f32]| {
        let parts = vec![Tensor { dtype: Dtype::Bf16, rows: 1, cols: w.len(), bytes: row(w) }];
        check(&LinearCase::of(x, 1, parts).paired())[0]
    };
    // Halfway between 1 and the next bf16, and halfway to the one after: ties to even.
    assert_eq!(one(vec![1.0 + 1.0 / 256.0], &[1.0]), 1.0);
    assert_eq!(one(vec![1.0 + 3.0 / 256.0], &[1.0]), 1.0 + 4.0 / 256.0);
    assert_eq!(one(vec![f32::from_bits(0x007f_ffff), 0.0], &[2f32.powi(100), 1.0]), 0.0);
    assert_eq!(one(vec![2f32.powi(100), 0.0], &[2f32.powi(-127), 1.0]), 0.0);
    // The odd k comes first: then 2^24 + 1 is lost before 2^24 is taken away.
    assert_eq!(one(vec![-(2f32.powi(24)), 1.0, 0.0, 2f32.powi(24)], &[1.0; 4]), 1.0);
    assert_eq!(one(vec![1.0, 2f32.powi(24), 0.0, -(2f32.powi(24))], &[1.0; 4]), 0.0);
}

#[test]
fn only_bf16_weights_are_computed_otherwise() {
    let mut random = Random(21);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Int8 { group: 32 }, Dtype::Q4_1, Dtype::Bf16] {
        let case = LinearCase::of(random.tame(9 * 512), 9, vec![random.tensor(dtype, 70, 512)]);
        let (plain, paired) = (case.run(&backends()[0]), case.run(&backends_of(Bf16Compute::Bf16)[0]));
        if dtype == Dtype::Bf16 {
            assert_ne!(plain, paired);
        } else {
            assert_same(&format!("{dtype}"), &plain, &paired);
        }
    }
}

#[test]
fn paired_layers_keep_their_size() {
    let tensor = Random(9).tensor(Dtype::Bf16, 64, 512);
    let linear = backends_of(Bf16Compute::Bf16)[0].linear(&[tensor.view()]).unwrap();
    assert_eq!(backends_of(Bf16Compute::Bf16)[0].linear_bytes(&linear), 64 * 512 * 2 + 64 / 16 * 2);
}

#[test]
fn a_device_tells_that_it_computes_so() {
    assert!(backends_of(Bf16Compute::Bf16)[0].describe().ends_with(", bf16 products"));
    assert!(!backends()[0].describe().contains("bf16 products"));
}
