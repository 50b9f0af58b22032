//! Targets that a deployment brings: each sequence has its own.

use super::device::host;
use super::node::{Node, admit, limits};
use super::time::{gaps, one_model_us, percentile, run};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};
use crate::state::targets::Targets;

const ONE: [u32; 4] = [2000, 1, 1001, 2001];
const OTHER: [u32; 4] = [2100, 31, 1031, 2101];

fn node(limits: Limits) -> (Node, SpanIndex, SpanIndex) {
    let mut node = Node::new(Limits { prefix_cache: false, ..limits });
    node.cost_us = Some(one_model_us);
    let spans = [ONE, OTHER].map(|blocks| node.engine.handle_host(host(&blocks, 0, blocks.len())));
    (node, spans[0], spans[1])
}

fn large() -> Limits {
    Limits { sequences_max: 32, ..limits(4000, 1024, 1024) }
}

fn wants(ttft_ms: Option<u32>, gap_ms: Option<u32>, admit: Admit) -> Admit {
    Admit { targets: Targets { ttft_ms, gap_ms }, ..admit }
}

/// Microseconds from `at` to a sequence's first token.
fn first(node: &Node, number: u64, at: u64) -> u64 {
    node.emitted_us[&number][0] - at
}

/// Four streams of each of two models that share nothing, and prompts of 600 tokens for each. Returns the gaps of the two models' streams and
/// the longest time to the first token of the second one's prompts.
fn two_models(of_one: u32, of_other: u32, executor_gap_ms: u32) -> ([Vec<u64>; 2], u64) {
    let (mut node, one, other) = node(Limits { gap_ms: executor_gap_ms, ..large() });
    let mut arrivals: Vec<_> = (0..4u32).map(|i| (0, wants(None, Some(of_one), admit(i.into(), one, &[i; 10], 600, 0)))).collect();
    arrivals.extend((0..4u32).map(|i| (0, wants(None, Some(of_other), admit(10 + u64::from(i), other, &[i; 10], 60, 0)))));
    let prompt = |number: u64, span, gap| wants(None, Some(gap), admit(number, span, &vec![number as u32; 600], 4, 0));
    for i in 0..2u64 {
        arrivals.push((1_000_000 + i * 4_000_000, prompt(100 + i, other, of_other)));
        arrivals.push((3_000_000 + i * 4_000_000, prompt(200 + i, one, of_one)));
    }
    run(&mut node, arrivals);
    let of_streams = [0..4, 10..14].map(|numbers| numbers.flat_map(|number| gaps(&node, number)).collect());
    let waits = (0..2).map(|i| first(&node, 100 + i, 1_000_000 + i * 4_000_000)).max().expect("two prompts");
    (of_streams, waits)
}

#[test]
fn each_model_keeps_its_own_gap() {
    // Whatever the executor is set to: the deployments say otherwise.
    for executor_gap_ms in [0, 30, 1000] {
        let ([one, other], waits) = two_models(50, 500, executor_gap_ms);
        for (wanted, gaps) in [(50_000, one), (500_000, other)] {
            let (p99, longest) = (percentile(gaps.clone(), 0.99), percentile(gaps, 1.0));
            assert!(p99 <= wanted && longest <= wanted * 6 / 5, "of {wanted} us wanted the p99 gap is {p99} us, the longest {longest}");
        }
        assert!(waits <= 6_000_000, "its prompts advance: {waits} us to the first token");
    }
}

#[test]
fn zero_is_no_target_whatever_the_executor_is_set_to() {
    let ([one, _], waits) = two_models(0, 0, 50);
    let longest = percentile(one, 1.0);
    assert!(longest > 200_000, "a prompt runs at once and holds the streams up: {longest} us");
    assert!(waits <= 1_000_000, "{waits} us to the first token");
}

#[test]
fn the_executors_targets_hold_where_a_deployment_has_none() {
    let longest = |gap_ms, limits| {
        let (mut node, one, _) = node(limits);
        let mut arrivals: Vec<_> = (0..8u32).map(|i| (0, wants(None, gap_ms, admit(i.into(), one, &[i; 10], 100, 0)))).collect();
        arrivals.push((500_000, admit(100, one, &[5; 1000], 4, 0)));
        run(&mut node, arrivals);
        (0..8).flat_map(|number| gaps(&node, number)).max().expect("they have gaps")
    };
    let own = longest(Some(60), large());
    assert!(own <= 66_000, "{own} us");
    assert_eq!(longest(None, Limits { gap_ms: 60, ..large() }), own);
}

/// A prompt of 4,000 tokens is under way in chunks when a short one comes, of the same tenant and with a target or without. Returns the time
/// to the first token of both.
fn behind_a_long_prompt(ttft_ms: Option<u32>) -> (u64, u64) {
    let (mut node, one, _) = node(Limits { sequences_max: 32, ..limits(4000, 128, 128) });
    let arrivals = vec![(0, admit(1, one, &vec![1; 4000], 4, 0)), (300_000, wants(ttft_ms, None, admit(2, one, &[2; 100], 4, 0)))];
    run(&mut node, arrivals);
    (first(&node, 1, 0), first(&node, 2, 300_000))
}

#[test]
fn the_prompt_whose_first_token_is_due_sooner_goes_first() {
    let (long, short) = behind_a_long_prompt(None);
    assert!(short > 1_000_000, "in turn it waits for the long prompt: {short} us");
    let (long_then, short_then) = behind_a_long_prompt(Some(500));
    assert!(short_then <= 500_000, "with a target of 500 ms: {short_then} us");
    assert!(long_then <= long + 100_000, "the long one waits for it and no more: {long_then} us, {long} before");
}

#[test]
fn of_a_tenants_waiting_sequences_the_one_due_sooner_starts_first() {
    let (mut node, one, _) = node(Limits { sequences_max: 1, ..large() });
    node.admit(admit(0, one, &[1; 10], 20, 0));
    for (number, ttft_ms, priority) in [(1, None, 0), (2, Some(9000), 0), (3, Some(3000), 0), (4, Some(100), 1)] {
        node.admit(wants(ttft_ms, None, admit(number, one, &[1; 10], 5, priority)));
    }
    node.run_dry();
    let mut order: Vec<u64> = (1..5).collect();
    order.sort_by_key(|number| node.started_us[number]);
    assert_eq!(order, [3, 2, 1, 4], "by priority, then by when the first token is due; without a target it is wanted later");
}

#[test]
fn a_target_far_off_is_no_worse_than_none() {
    let (mut node, one, _) = node(Limits { sequences_max: 1, ..large() });
    node.admit(admit(0, one, &[1; 10], 20, 0));
    for (number, ttft_ms) in [(1, Some(4_000_000_000)), (2, None), (3, Some(20_000))] {
        node.admit(wants(ttft_ms, None, admit(number, one, &[1; 10], 5, 0)));
    }
    node.run_dry();
    assert!(node.started_us[&1] < node.started_us[&2] && node.started_us[&2] < node.started_us[&3]);
}

#[test]
fn one_tenants_targets_do_not_come_before_fairness() {
    let (mut node, one, _) = node(Limits { sequences_max: 1, waiting_max: 100, ..large() });
    let of = |tenant: &str, admit: Admit| Admit { tenant: tenant.to_owned(), ..admit };
    node.admit(of("a", admit(0, one, &[1; 10], 20, 0)));
    for i in 0..20 {
        node.admit(of("a", wants(Some(10), None, admit(100 + i, one, &[1; 10], 10, 0))));
        node.admit(of("b", admit(200 + i, one, &[1; 10], 10, 0)));
    }
    let mut sent = Vec::new();
    while node.started_us.len() < 21 {
        node.step(&mut sent);
    }
    let of_a = node.started_us.range(100..200).count();
    assert!((9..=11).contains(&of_a), "{of_a} of 20 starts are of the tenant whose tokens are due at once");
}

#[test]
fn a_chunk_leaves_a_first_token_that_is_due_its_time() {
    // Prompts of one model come in long batches; the other's is due in 400 ms and takes 60.
    let wait = |ttft_ms| {
        let (mut node, one, other) = node(Limits { batches_in_flight_max: 1, row_wait_ms: 1000, ..large() });
        // What batches cost is known.
        let mut arrivals: Vec<_> = (0..8u64).map(|i| (i * 1000, admit(i, one, &vec![i as u32; 900], 2, 0))).collect();
        arrivals.extend((0..8u64).map(|i| (20_000_000 + i * 1000, admit(20 + i, one, &vec![i as u32; 900], 2, 0))));
        arrivals.push((0, admit(50, other, &[9; 100], 2, 0)));
        arrivals.push((20_100_000, wants(ttft_ms, None, admit(51, other, &[9; 100], 2, 0))));
        run(&mut node, arrivals);
        first(&node, 51, 20_100_000)
    };
    let (without, with) = (wait(None), wait(Some(500)));
    assert!(without > 700_000, "in turn it waits for {without} us");
    assert!(with <= 500_000, "with a target of 500 ms it waits for {with} us");
}
