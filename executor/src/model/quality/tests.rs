use std::sync::Arc;

use ashlar_kernels::format::Dtype;
use ashlar_kernels::reference::Reference;
use proptest::prelude::*;

use super::super::testing::{Memory, VOCAB};
use super::*;

const WINDOWS: Windows = Windows { window_tokens: 16, begin: None };

fn one_row(baseline: &[f32], model: &[f32], next: u32) -> Quality {
    let mut tally = Tally::default();
    tally.add(baseline, model, next);
    tally.sum_up().expect("a row")
}

#[track_caller]
fn assert_close(actual: f64, expected: f64) {
    assert!((actual - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{actual}, expected {expected}");
}

#[test]
fn a_small_example_by_hand() {
    // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
    let ln = |x: f64| x.ln() as f32;
    let quality = one_row(&[ln(0.5), ln(0.25), ln(0.25)], &[ln(0.25), ln(0.5), ln(0.25)], 0);
    let near = |actual: f64, expected: f64| assert!((actual - expected).abs() < 1e-6, "{actual}, expected {expected}");
    near(quality.divergence.mean, 0.25 * 2f64.ln());
    near(quality.perplexity, 4.0);
    near(quality.excess.mean, 2f64.ln());
    near(quality.same_top_share, 0.0);
    assert_eq!(quality.divergence_p50, quality.divergence_max);
}

#[test]
fn even_logits_are_as_perplexing_as_the_vocabulary_is_large() {
    let quality = one_row(&[3.0; 50], &[-7.0; 50], 20);
    assert_close(quality.perplexity, 50.0);
    assert_eq!((quality.divergence.mean, quality.same_top_share), (0.0, 1.0));
}

#[test]
fn errors_and_percentiles_are_those_of_the_rows() {
    let mut tally = Tally::default();
    assert_eq!(tally.sum_up(), None);
    for logit in [0.0, 1.0, 2.0, 3.0] {
        tally.add(&[0.0, 0.0], &[logit, 0.0], 1);
    }
    let quality = tally.sum_up().expect("rows");
    let surprise: Vec<f64> = [0f64, 1.0, 2.0, 3.0].iter().map(|logit| (1.0 + logit.exp()).ln()).collect();
    let mean = surprise.iter().sum::<f64>() / 4.0;
    let variance = surprise.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / 3.0;
    assert_close(quality.perplexity, mean.exp());
    assert_close(quality.perplexity_error, mean.exp() * (variance / 4.0).sqrt());
    assert_close(quality.excess.mean, mean - 2f64.ln());
    // KL from (1/2, 1/2) = ln cosh(logit / 2).
    let divergence = |logit: f64| (logit / 2.0).cosh().ln();
    assert_close(quality.divergence_p50, divergence(1.0));
    assert_close(quality.divergence_p99, divergence(3.0));
    assert_eq!(quality.same_top_share, 1.0); // The first of equals is the top.
}

#[test]
fn tokens_that_the_baseline_rules_out_cost_nothing_and_those_that_the_model_does_cost_all() {
    let ruled_out = [0.0, f32::NEG_INFINITY];
    assert_close(one_row(&ruled_out, &[0.0, 0.0], 0).divergence.mean, 2f64.ln());
    assert_eq!(one_row(&ruled_out, &ruled_out, 0).divergence.mean, 0.0);
    assert_eq!(one_row(&[0.0, 0.0], &ruled_out, 0).divergence.mean, f64::INFINITY);
    assert!(one_row(&[0.0, 0.0], &[0.0, f32::NAN], 0).divergence.mean.is_nan());
}

#[test]
fn windows_follow_each_other_and_count_their_second_half() {
    let text: Vec<u32> = (0..11).collect();
    let windows = Windows { window_tokens: 5, begin: None };
    assert_eq!(windows.cut(&text), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]);
    assert_eq!(windows.counted(), 2..4);
    assert_eq!(Windows { begin: Some(77), ..windows }.cut(&text), [[77, 1, 2, 3, 4], [77, 6, 7, 8, 9]]);
    assert_eq!(Windows { window_tokens: 512, begin: None }.counted().len(), 255);
}

#[test]
fn the_logits_of_a_window_are_those_that_predict_its_second_half() {
    for window_tokens in [7, 16] {
        let windows = Windows { window_tokens, begin: None };
        let window: Vec<u32> = (0..window_tokens as u32).map(|i| i * 7 % VOCAB as u32).collect();
        let mut model = tiny(None);
        let rows = windows.logits(&mut model, &window);
        // A second window must not see the first.
        assert!(windows.logits(&mut model, &window) == rows);
        model.restart();
        assert!(model.feed(&window, 1, window_tokens)[windows.counted()] == rows);
    }
}

#[test]
fn int8_costs_a_little_and_the_same_weights_nothing() {
    let against_f32 = |dtype: Option<Dtype>| {
        let text: Vec<u32> = (0..64).map(|i: u32| i * i * 11 % VOCAB as u32).collect();
        let (mut baseline, mut model, mut tally) = (tiny(None), tiny(dtype), Tally::default());
        for window in WINDOWS.cut(&text) {
            let rows = WINDOWS.logits(&mut baseline, &window);
            tally.add_window(WINDOWS, &window, &rows, &WINDOWS.logits(&mut model, &window));
        }
        tally.sum_up().expect("rows")
    };
    let same = against_f32(Some(Dtype::F32));
    assert_eq!((same.row_count, same.divergence_max, same.excess.mean, same.same_top_share), (28, 0.0, 0.0, 1.0));
    let int8 = against_f32(Some(Dtype::Int8 { group: 32 }));
    let int4 = against_f32(Some(Dtype::Int4 { group: 32 }));
    assert!((1e-9..1e-2).contains(&int8.divergence.mean), "{int8:?}");
    assert!(int4.divergence.mean > 10.0 * int8.divergence.mean, "{int4:?}, {int8:?}");
}

/// The test chain, its matrices stored as `dtype`.
fn tiny(dtype: Option<Dtype>) -> Alone<Reference> {
    let mut memory = Memory::default();
    let blocks = memory.chain_as(&Reference::default(), dtype);
    Alone::new(Arc::new(Reference::default()), blocks, WINDOWS.limits(4, KvFormat::F32)).expect("memory")
}

fn row(len: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-30f32..30.0, len)
}

proptest! {
    #[test]
    fn equal_rows_do_not_diverge(row in row(40), next in 0u32..40) {
        let quality = one_row(&row, &row, next);
        prop_assert_eq!((quality.divergence.mean, quality.excess.mean, quality.same_top_share), (0.0, 0.0, 1.0));
    }

    #[test]
    fn divergence_is_never_negative(p in row(40), q in row(40), next in 0u32..40) {
        let quality = one_row(&p, &q, next);
        prop_assert!(quality.divergence.mean >= 0.0 && quality.perplexity >= 1.0 - 1e-12);
    }

    /// Quarters, so that the shift itself rounds nothing.
    #[test]
    fn a_shift_of_all_logits_changes_nothing(p in prop::collection::vec(-100i16..100, 40), shift in -400i16..400, next in 0u32..40) {
        let quarters = |by: i16| -> Vec<f32> { p.iter().map(|logit| f32::from(logit + by) / 4.0).collect() };
        let reversed: Vec<f32> = quarters(0).into_iter().rev().collect();
        let (plain, shifted) = (one_row(&reversed, &quarters(0), next), one_row(&reversed, &quarters(shift), next));
        prop_assert!((plain.divergence.mean - shifted.divergence.mean).abs() < 1e-9);
        prop_assert!((plain.excess.mean - shifted.excess.mean).abs() < 1e-9);
        prop_assert_eq!(plain.same_top_share, shifted.same_top_share);
    }
}
