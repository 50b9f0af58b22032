//! The sampler against a slow truth, its edge cases, and the property that a sampler built again continues equally.

use proptest::prelude::*;

use super::*;

fn params() -> SamplerParams {
    SamplerParams { temperature: 1.0, ..SamplerParams::default() }
}

fn token(params: &SamplerParams, logits: &[f32], position: u32) -> u32 {
    Sampler::new(params.clone(), &[], &[]).sample(&mut logits.to_vec(), position).unwrap().token
}

/// Tokens that can be drawn, by vLLM's definitions written down plainly, with probabilities.
fn slow_truth(logits: &[f32], params: &SamplerParams) -> Vec<(u32, f64)> {
    let mut sorted: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|x| f64::from(*x) / f64::from(params.temperature))).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = sorted[0].1;
    let mut sorted: Vec<(u32, f64)> = sorted.into_iter().map(|(token, x)| (token, (x - max).exp())).collect();
    sorted.retain(|(_, w)| *w >= f64::from(params.min_p));
    if params.top_k > 0 && (params.top_k as usize) < sorted.len() {
        let border = sorted[params.top_k as usize - 1].1;
        sorted.retain(|(_, w)| *w >= border);
    }
    let total: f64 = sorted.iter().map(|(_, w)| w).sum();
    let mut before = 0.0;
    sorted.retain(|(_, w)| {
        let keep = before < f64::from(params.top_p) * total;
        before += w;
        keep
    });
    let kept: f64 = sorted.iter().map(|(_, w)| w).sum();
    sorted.into_iter().map(|(token, w)| (token, w / kept)).collect()
}

#[test]
fn draws_follow_the_truncated_distribution() {
    let logits: Vec<f32> = (0..50).map(|i| ((i * 37 % 50) as f32) * 0.13 - 2.0).collect();
    let cases = [
        params(),
        SamplerParams { temperature: 0.5, ..params() },
        SamplerParams { top_k: 5, ..params() },
        SamplerParams { top_p: 0.7, ..params() },
        SamplerParams { min_p: 0.2, ..params() },
        SamplerParams { temperature: 1.7, top_k: 30, top_p: 0.9, min_p: 0.05, ..params() },
    ];
    for params in cases {
        let truth = slow_truth(&logits, &params);
        let mut drawn = vec![0u32; logits.len()];
        let count = 20_000;
        (0..count).for_each(|position| drawn[token(&params, &logits, position) as usize] += 1);
        for (token, probability) in &truth {
            let share = f64::from(drawn[*token as usize]) / f64::from(count);
            let sigma = (probability * (1.0 - probability) / f64::from(count)).sqrt();
            assert!((share - probability).abs() < 5.0 * sigma + 1e-9, "{params:?}: token {token}: {share} for {probability}");
            drawn[*token as usize] = 0;
        }
        assert!(drawn.iter().all(|count| *count == 0), "{params:?} drew a token that was cut");
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    let greedy = SamplerParams::default();
    assert_eq!(token(&greedy, &[0.0, 3.0, 3.0, -1.0], 0), 1);
    assert_eq!(token(&greedy, &[f32::NAN, 1.0, f32::NAN, 2.0], 0), 3);
    assert_eq!(token(&greedy, &[1.0, f32::INFINITY, 2.0], 0), 1);
    assert_eq!(token(&SamplerParams { temperature: 1e-6, ..greedy }, &[0.0, 3.0, 1.0], 0), 1);
}

#[test]
fn only_what_changes_nothing_and_reports_nothing_takes_the_largest_as_it_is() {
    let greedy = SamplerParams::default();
    let plain = Sampler::new(SamplerParams { temperature: 1e-6, top_k: 5, top_p: 0.5, ..greedy.clone() }, &[1, 2], &[3]);
    assert!(plain.takes_largest());
    for (logits, largest) in [([0.0, 3.0, 3.0], Some(1)), ([f32::NAN; 3], None)] {
        assert_eq!(plain.sample_largest(largest, 3), plain.sample(&mut logits.clone(), 7));
    }
    let others = [
        SamplerParams { temperature: 0.5, ..greedy.clone() },
        SamplerParams { presence_penalty: 0.1, ..greedy.clone() },
        SamplerParams { frequency_penalty: -0.1, ..greedy.clone() },
        SamplerParams { repetition_penalty: 1.1, ..greedy.clone() },
        SamplerParams { logit_bias: vec![(0, 1.0)], ..greedy.clone() },
        SamplerParams { logprobs: true, ..greedy },
    ];
    for params in others {
        assert!(!Sampler::new(params.clone(), &[1], &[2]).takes_largest(), "{params:?}");
    }
}

#[test]
fn broken_logits_are_an_error_and_no_panic() {
    let all = SamplerParams { top_k: 2, top_p: 0.5, min_p: 0.1, logprobs: true, top_logprobs: 3, ..params() };
    for params in [SamplerParams::default(), params(), all] {
        let sampler = Sampler::new(params.clone(), &[], &[]);
        for value in [f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(sampler.sample(&mut [value; 4], 0), Err(SampleError::NoCandidate { vocab: 4 }));
        }
        assert_eq!(sampler.sample(&mut [], 0), Err(SampleError::NoCandidate { vocab: 0 }));
        assert_eq!(sampler.sample(&mut [f32::NAN, f32::INFINITY, 1.0, f32::NEG_INFINITY], 0).unwrap().token, 1);
        assert_eq!(sampler.sample(&mut [f32::NAN, f32::NAN, 1.0], 0).unwrap().token, 2);
    }
}

#[test]
fn ties_at_the_border_are_settled() {
    let flat = [1.0f32; 8];
    // Equal to the k-th largest: all stay. The mass of 0.5 is reached by the four lowest ids.
    let top_k = SamplerParams { top_k: 3, ..params() };
    assert!((0..200).any(|position| token(&top_k, &flat, position) > 3));
    let top_p = SamplerParams { top_p: 0.5, ..params() };
    assert!((0..200).all(|position| token(&top_p, &flat, position) < 4));
    let least = SamplerParams { top_p: 1e-9, ..params() };
    assert!((0..200).all(|position| token(&least, &flat, position) == 0));
}

#[test]
fn bias_and_penalties_follow_their_rules_in_order() {
    let adjusted = |params: SamplerParams, prompt: &[u32], generated: &[u32]| {
        let mut logits = [2.0f32, -2.0, 1.0, 0.5];
        Sampler::new(params, prompt, generated).adjust(&mut logits);
        logits
    };
    let repetition = SamplerParams { repetition_penalty: 2.0, ..params() };
    assert_eq!(adjusted(repetition.clone(), &[0, 1], &[2]), [1.0, -4.0, 0.5, 0.5]);
    let openai = SamplerParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..params() };
    assert_eq!(adjusted(openai, &[0, 1], &[2, 2, 3]), [2.0, -2.0, 0.0, -0.25]);
    // The bias comes first, so the penalty sees what it made.
    let both = SamplerParams { logit_bias: vec![(1, 6.0), (99, 1.0)], ..repetition };
    assert_eq!(adjusted(both, &[1, 77], &[]), [2.0, 2.0, 1.0, 0.5]);
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let logits = [1.0f32, 3.0, 2.0, 3.0];
    let params = SamplerParams { logprobs: true, top_logprobs: 3, logit_bias: vec![(0, 100.0)], temperature: 0.7, ..params() };
    let sampled = Sampler::new(params, &[], &[]).sample(&mut logits.clone(), 5).unwrap();
    let log_sum = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
    assert_eq!(sampled.token, 0);
    assert!((f64::from(sampled.logprob) - (1.0 - log_sum)).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2]);
    assert!((f64::from(sampled.top[2].1) - (2.0 - log_sum)).abs() < 1e-6);
}

#[test]
fn messages_without_fields_are_greedy_with_everything_off() {
    let params = SamplerParams::from(&ashlar_wire::v1::Sampling::default()).seeded(3, 1);
    assert_eq!((params.temperature, params.top_p, params.repetition_penalty), (0.0, 1.0, 1.0));
    assert_eq!((params.seed, params.choice_index), (3, 1));
    let odd = ashlar_wire::v1::Sampling {
        temperature: f32::NAN,
        top_p: -1.0,
        min_p: f32::INFINITY,
        repetition_penalty: 0.0,
        ..Default::default()
    };
    assert_eq!(SamplerParams::from(&odd).seeded(3, 1), params);
}

proptest! {
    #[test]
    fn sampler_built_again_midway_continues_equally(
        prompt in prop::collection::vec(0u32..40, 0..20),
        seed: u64,
        temperature in 0f32..2.0,
        top_p in 0.05f32..1.0,
        top_k in 0u32..20,
        min_p in 0f32..0.3,
        penalties in (-1f32..1.0, -1f32..1.0, 0.5f32..2.0),
        cut in 0usize..16,
    ) {
        let params = SamplerParams {
            temperature, top_p, top_k, min_p, seed,
            presence_penalty: penalties.0, frequency_penalty: penalties.1, repetition_penalty: penalties.2,
            logit_bias: vec![(3, 0.5)], logprobs: true, top_logprobs: 2, ..SamplerParams::default()
        };
        // Logits that depend on position alone, so that only the sampler's state can make a difference.
        let logits = |position: usize| -> Vec<f32> {
            (0..40).map(|i| philox::uniform(seed ^ 0xABCD, i, position as u32) as f32 * 6.0 - 3.0).collect()
        };
        let mut whole = Sampler::new(params.clone(), &prompt, &[]);
        let mut generated = Vec::new();
        let mut expected = Vec::new();
        for step in 0..16 {
            let position = prompt.len() + step;
            let sampled = whole.sample(&mut logits(position), position as u32).unwrap();
            whole.accept(sampled.token);
            generated.push(sampled.token);
            expected.push(sampled);
        }
        let mut resumed = Sampler::new(params, &prompt, &generated[..cut]);
        for step in cut..16 {
            let position = prompt.len() + step;
            let sampled = resumed.sample(&mut logits(position), position as u32).unwrap();
            resumed.accept(sampled.token);
            prop_assert_eq!(&sampled, &expected[step]);
        }
    }

    #[test]
    fn only_tokens_of_the_slow_truth_are_drawn(
        logits in prop::collection::vec(-4f32..4.0, 1..200),
        temperature in 0.3f32..2.0, top_p in 0.01f32..1.0, top_k in 0u32..60, min_p in 0f32..0.5, seed: u64,
    ) {
        let params = SamplerParams { temperature, top_p, top_k, min_p, seed, ..params() };
        let truth = slow_truth(&logits, &params);
        // One more token than the truth's last is allowed: its border is rounded in f64, ours in f32.
        let loose = slow_truth(&logits, &SamplerParams { top_p: (top_p * 1.0001).min(1.0), min_p: min_p * 0.9999, ..params.clone() });
        for position in 0..20 {
            let token = token(&params, &logits, position);
            prop_assert!(loose.iter().any(|(kept, _)| *kept == token), "{token} is not among {truth:?}");
        }
    }
}
