//! Tenants that share an executor.

use ashlar_wire::code::{Code, Retry};

use super::device::{host, oracle};
use super::node::{Node, admit, limits};
use super::time::{one_model_us, percentile, run_until};
use crate::state::Now;
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};

const BLOCKS: [u32; 4] = [2000, 1, 1001, 2001];

fn node(limits: Limits) -> (Node, SpanIndex) {
    let mut node = Node::new(Limits { prefix_cache: false, ..limits });
    let span = node.engine.handle_host(host(&BLOCKS, 0, BLOCKS.len()));
    (node, span)
}

fn of(tenant: &str, weight: u32, admit: Admit) -> Admit {
    Admit { tenant: tenant.to_owned(), weight, ..admit }
}

/// Service of sequences `[from, to)` so far: prompt tokens of those that started, and twice the tokens generated.
fn service(node: &Node, sequences: std::ops::Range<u64>, prompt_tokens: u64) -> u64 {
    let started = node.started_us.range(sequences.clone()).count() as u64 * prompt_tokens;
    started + 2 * node.tokens.range(sequences).map(|(_, tokens)| tokens.len() as u64).sum::<u64>()
}

/// Two tenants with all they want waiting; one has long prompts and short answers, the other the reverse. Returns the largest difference
/// of their service over weight while both have sequences waiting.
fn backlogged(weights: [u32; 2]) -> (f64, f64) {
    let (mut node, span) = node(Limits { waiting_max: 2000, ..limits(4000, 64, 64) });
    for i in 0..300 {
        node.admit(of("a", weights[0], admit(i, span, &[3; 120], 5, 0)));
        node.admit(of("b", weights[1], admit(1000 + i, span, &[4; 10], 40, 0)));
    }
    let (mut most, mut sent, mut last) = (0f64, Vec::new(), [0.0; 2]);
    while node.started_us.range(..300).count() < 290 && node.started_us.range(1000..).count() < 290 {
        node.step(&mut sent);
        last = [service(&node, 0..300, 120) as f64 / f64::from(weights[0]), service(&node, 1000..1300, 10) as f64 / f64::from(weights[1])];
        most = most.max((last[0] - last[1]).abs());
    }
    (most, last[0].max(last[1]))
}

#[test]
fn backlogged_tenants_of_equal_weight_have_equal_service() {
    let (most, total) = backlogged([1, 1]);
    // Twice the larger of the longest prompt and what the running batch may hold: eight sequences of up to 125 tokens, each twice.
    let bound = 2.0 * (8 * 125 * 2) as f64;
    assert!(most <= bound, "service differs by {most}, {bound} is allowed");
    assert!(total > 3.0 * bound, "of {total} in all");
}

#[test]
fn service_goes_with_weight() {
    let (most, _) = backlogged([3, 1]);
    assert!(most <= 2.0 * (8 * 125 * 2) as f64, "service over weight differs by {most}");
}

#[test]
fn a_newcomer_does_not_wait_for_a_flooders_sequence_to_end() {
    let (mut node, span) = node(limits(4000, 64, 64));
    for i in 0..12 {
        node.admit(of("flood", 1, admit(i, span, &[i as u32; 20], 500, 0)));
    }
    let mut sent = Vec::new();
    for _ in 0..40 {
        node.step(&mut sent);
    }
    assert_eq!(node.engine.gauges().running_count, 8, "the flooder has every place while nobody else wants one");
    node.admit(of("new", 1, admit(100, span, &[9; 20], 5, 0)));
    for _ in 0..12 {
        node.step(&mut sent);
    }
    assert_eq!(node.tokens[&100].len(), 5, "the newcomer has its answer");
    assert!(node.finished.keys().all(|number| *number == 100), "and nobody had to end for it");
    node.run_dry();
    assert_eq!(node.engine.counters().preemption_count, 1, "one gave way, once");
    for i in 0..12 {
        assert_eq!(node.tokens[&i], oracle(&BLOCKS, &[i as u32; 20], 500), "sequence {i}");
    }
}

#[test]
fn a_newcomer_gets_pages_that_a_flooder_holds() {
    // Forty pages: eight sequences of the flooder grow to hold them all.
    let (mut node, span) = node(limits(40, 64, 64));
    for i in 0..8 {
        node.admit(of("flood", 1, admit(i, span, &[i as u32; 60], 30, 0)));
    }
    let mut sent = Vec::new();
    for _ in 0..20 {
        node.step(&mut sent);
    }
    node.admit(of("new", 1, admit(100, span, &[9; 60], 5, 0)));
    for _ in 0..16 {
        node.step(&mut sent);
    }
    assert_eq!(node.tokens.get(&100).map_or(0, Vec::len), 5, "the newcomer has its answer");
    node.run_dry();
    for i in 0..8 {
        assert_eq!(node.tokens[&i], oracle(&BLOCKS, &[i as u32; 60], 30), "sequence {i}");
    }
}

#[test]
fn a_tenant_that_returns_has_no_credit_for_the_time_that_it_was_away() {
    let (mut node, span) = node(limits(4000, 64, 64));
    for i in 0..40 {
        node.admit(of("a", 1, admit(i, span, &[3; 20], 10, 0)));
    }
    node.run_dry();
    // Both come after an idle time; only one of them was ever here.
    for i in 0..20 {
        node.admit(of("a", 1, admit(100 + i, span, &[3; 20], 10, 0)));
        node.admit(of("b", 1, admit(200 + i, span, &[3; 20], 10, 0)));
    }
    let mut sent = Vec::new();
    while node.started_us.len() < 40 + 16 {
        node.step(&mut sent);
    }
    let started = [100..200, 200..300].map(|numbers: std::ops::Range<u64>| node.started_us.range(numbers).count());
    assert!(started[0].abs_diff(started[1]) <= 2, "{started:?} of each started");
}

#[test]
fn higher_priority_goes_before_fairness() {
    let (mut node, span) = node(limits(4000, 64, 64));
    for i in 0..20 {
        node.admit(of("a", 1, admit(i, span, &[3; 20], 10, 1)));
    }
    for i in 20..30 {
        node.admit(of("a", 1, admit(i, span, &[3; 20], 10, 0)));
    }
    node.admit(of("b", 1, admit(30, span, &[3; 20], 10, 1)));
    node.run_dry();
    let last_urgent = (20..30).map(|i| node.started_us[&i]).max();
    let first_other = (0..20).chain([30]).map(|i| node.started_us[&i]).min();
    assert!(last_urgent <= first_other);
}

/// Requests of the other tenant for each of the modest one's that take half of the device: 100 prompt tokens are 40 ms of it.
const FAIR_SHARE: u64 = 2;

/// Time to the first token of a modest tenant's prompts, at the 99th percentile, beside one that asks `times` its fair share.
fn modest_beside(times: u64) -> u64 {
    let (mut node, span) = node(Limits { gap_ms: 100, batch_ms_max: 50, sequences_max: 16, waiting_max: 8000, ..limits(4000, 256, 256) });
    node.cost_us = Some(one_model_us);
    let mut arrivals = Vec::new();
    // Four seconds. A modest request a fifth of a second.
    let (count, asked) = (20u64, FAIR_SHARE * times);
    for i in 0..count {
        let at = 7_000 + i * 200_000;
        arrivals.push((at, of("modest", 1, admit(i, span, &[i as u32; 100], 10, 0))));
        let flood = |n| of("flood", 1, admit(1000 + i * asked + n, span, &[n as u32; 100], 10, 0));
        arrivals.extend((0..asked).map(|n| (at + n * (200_000 / asked), flood(n))));
    }
    arrivals.sort_by_key(|(at, _)| *at);
    run_until(&mut node, arrivals, |node| (0..count).all(|i| node.finished.contains_key(&i)));
    let first = |i: u64| node.emitted_us[&i][0] - (7_000 + i * 200_000);
    percentile((0..count).map(first).collect(), 0.99)
}

#[test]
fn a_flood_does_not_make_others_wait() {
    let (fair, flooded) = (modest_beside(1), modest_beside(100));
    assert!(flooded as f64 <= 1.2 * fair as f64, "the modest tenant's p99 is {flooded} us beside a flood, {fair} beside its fair share");
}

/// A tenant has all places and as many more waiting; with batches this short most of its sequences are prompts that have started and are not computed.
/// Returns the microseconds to the first tokens of a newcomer's prompts, one after another.
fn beside_a_backlog_of_prompts() -> Vec<u64> {
    let (mut node, span) = node(Limits { batch_ms_max: 50, sequences_max: 64, waiting_max: 8000, ..limits(8000, 512, 512) });
    node.cost_us = Some(one_model_us);
    let (mut sent, mut flooded) = (Vec::new(), 0);
    let mut flood = |node: &mut Node| {
        while node.engine.gauges().waiting_count < 36 {
            node.admit(of("flood", 1, admit(1000 + flooded, span, &[flooded as u32; 64], 24 + (flooded * 37 % 177) as u32, 0)));
            flooded += 1;
        }
        node.step(&mut sent);
    };
    while node.now_us < 10_000_000 {
        flood(&mut node);
    }
    let mut firsts = Vec::new();
    for i in 0..6 {
        let came = node.now_us;
        node.admit(of("new", 1, admit(i, span, &[i as u32; 64], 24, 0)));
        while !node.finished.contains_key(&i) {
            flood(&mut node);
        }
        firsts.push(node.emitted_us[&i][0] - came);
    }
    firsts
}

#[test]
fn a_newcomers_prompt_is_behind_nobodys_backlog() {
    // Alone it takes two batches; beside a flood eight of the tiles that batches have room for, each of 50 ms, and the batches in flight.
    let firsts = beside_a_backlog_of_prompts();
    assert!(firsts.iter().all(|first| *first <= 1_000_000), "first tokens after {firsts:?} us");
}

/// Tokens of prompts that two tenants with a backlog of started prompts have had computed go with their weights.
#[test]
fn started_prompts_of_tenants_take_turns_by_weight() {
    let (mut node, span) = node(Limits { sequences_max: 64, waiting_max: 8000, ..limits(8000, 64, 64) });
    for i in 0..24 {
        node.admit(of("early", 1, admit(i, span, &[3; 64], 1, 0)));
    }
    let mut sent = Vec::new();
    node.step(&mut sent);
    for i in 0..24 {
        node.admit(of("heavy", 3, admit(100 + i, span, &[4; 64], 1, 0)));
    }
    while node.finished.range(100..).count() < 18 {
        node.step(&mut sent);
    }
    let early = node.finished.range(..100).count();
    assert!((5..=8).contains(&early), "{early} prompts of one while 18 of another with three times the weight");
}

#[test]
fn a_flooder_does_not_keep_others_from_waiting() {
    let (mut node, span) = node(Limits { waiting_max: 40, ..limits(4000, 64, 64) });
    let now = |node: &Node| Now::from_micros(node.now_us);
    for i in 0..48 {
        node.admit(of("flood", 1, admit(i, span, &[i as u32; 20], 20, 0)));
        if i == 7 {
            let mut sent = Vec::new();
            (0..3).for_each(|_| {
                node.step(&mut sent);
            });
        }
    }
    let refused = node.engine.handle_admit(now(&node), of("flood", 1, admit(48, span, &[1; 20], 20, 0))).unwrap_err();
    assert_eq!((refused.0, refused.2), (Code::TooManyRequests, Retry::Elsewhere));
    // Of three tenants each has a third of the line; of a lower priority none.
    for i in 0..13 {
        node.admit(of("one", 1, admit(100 + i, span, &[7; 20], 20, 0)));
        node.admit(of("two", 1, admit(200 + i, span, &[8; 20], 20, 0)));
    }
    for (tenant, number, priority) in [("one", 150, 0), ("three", 300, 1)] {
        node.engine.handle_admit(now(&node), of(tenant, 1, admit(number, span, &[9; 20], 20, priority))).unwrap_err();
    }
    // Who has generated elsewhere has its place.
    node.tokens.insert(160, oracle(&BLOCKS, &[7; 20], 4));
    let tokens = [vec![7; 20], node.tokens[&160].clone()].concat();
    node.admit(of("one", 1, Admit { tokens, prompt_tokens: 20, ..admit(160, span, &[], 20, 0) }));
    let mut sent = Vec::new();
    while node.step(&mut sent) {}
    let lost: Vec<u64> = node.failed.iter().copied().collect();
    assert_eq!(lost, (22..48).collect::<Vec<u64>>(), "the latest of the flooder gave up their places");
    let served = || (0..22).chain(100..113).chain(200..213).chain([160]);
    let short: Vec<u64> = served().filter(|i| node.tokens.get(i).map_or(0, Vec::len) != 20).collect();
    assert!(short.is_empty(), "and all others have their answers, but {short:?}");
}
