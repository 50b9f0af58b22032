//! The nearest among few and among thousands.

use std::convert::Infallible;

use half::bf16;

use super::*;
use crate::manifest::Assets;
use crate::relatives::testing::{Rng, blocks, digest_of};
use crate::relatives::{SAMPLE_COUNT, Samples};

/// A model of so many layers: samples by matrix, all else by number.
fn sketch(layers: usize, tensors: u64, sample: &mut impl FnMut() -> [f32; SAMPLE_COUNT]) -> Sketch {
    let blocks = blocks(layers, tensors);
    let blocks: Vec<_> = blocks.iter().map(|block| (crate::canonical::digest(block), block)).collect();
    let samples = |_: usize, _: &str| Ok::<_, Infallible>(Samples(sample().map(|value| bf16::from_f32(value).to_bits())));
    Sketch::new(&blocks, &[], &Assets::default(), samples).unwrap()
}

/// Samples of a base, of its number.
fn base(number: u64) -> impl FnMut() -> [f32; SAMPLE_COUNT] {
    let mut rng = Rng::new(number);
    move || std::array::from_fn(|_| 0.02 * rng.normal())
}

/// A fine-tune of it: each weight moved by about `by` of the usual size.
fn tuned(number: u64, by: f32, seed: u64) -> impl FnMut() -> [f32; SAMPLE_COUNT] {
    let (mut from, mut rng) = (base(number), Rng::new(seed));
    move || from().map(|value| value + 0.02 * by * rng.normal())
}

#[test]
fn the_one_relative_is_found_among_ten_thousand() {
    // Of a hundred bases of one shape, a hundred fine-tunes each.
    let wanted = sketch(1, 1, &mut tuned(37, 0.02, 999_999));
    let mut search = Search::new(&wanted);
    for number in 0..10_000u64 {
        let (of, by) = (number % 100, if number == 4_137 { 0.01 } else { 0.2 });
        search.see(number, &sketch(1, 100 + 50 * number, &mut tuned(of, by, number)));
    }
    let (nearest, known) = search.finish();
    let (rank, number) = nearest.unwrap();
    assert_eq!(number, 4_137, "{rank:?}");
    assert!(rank.distance < 0.03 && rank.shared_tensors == 0, "{rank:?}");
    assert!(!known.has(digest_of(1)));
}

#[test]
fn unrelated_models_of_one_shape_are_no_relatives() {
    let wanted = sketch(4, 1, &mut base(1));
    let mut search = Search::new(&wanted);
    for number in 2..200 {
        search.see(number, &sketch(4, 1000 * number, &mut base(number)));
    }
    assert_eq!(search.finish().0, None);
}

#[test]
fn ties_go_to_the_one_with_more_in_common_and_what_others_have_is_known() {
    let wanted = sketch(2, 1, &mut base(1));
    let mut search = Search::new(&wanted);
    search.see("other digests", &sketch(2, 5000, &mut base(1)));
    search.see("the same", &sketch(2, 1, &mut base(1)));
    search.see("again", &sketch(2, 1, &mut base(1)));
    search.know(&sketch(2, 5000, &mut base(2)));
    let (nearest, known) = search.finish();
    let (rank, key) = nearest.unwrap();
    assert_eq!((key, rank.distance), ("the same", 0.0));
    assert!(rank.shared_tensors > 0 && known.has(digest_of(1)) && !known.has(digest_of(5000)));
}
