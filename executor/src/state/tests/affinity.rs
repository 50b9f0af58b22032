//! Who goes before its turn because its prompt is cached: what that saves, and what it never does.

use proptest::prelude::*;

use super::device::{host, oracle};
use super::node::{Node, admit, limits};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};
use crate::state::targets::Targets;

const BLOCKS: [u32; 4] = [2000, 1, 1001, 2001];
/// Tokens of a prefix that many prompts share: 16 pages.
const PREFIX_TOKENS: usize = 256;

fn node(limits: Limits) -> (Node, SpanIndex) {
    let mut node = Node::new(limits);
    let span = node.engine.handle_host(host(&BLOCKS, 0, BLOCKS.len()));
    (node, span)
}

/// The `number`th prompt that begins with a prefix, of a tenant.
fn ask(tenant: &str, number: u64, span: SpanIndex, prefix: u32) -> Admit {
    let prompt = [vec![prefix; PREFIX_TOKENS], vec![number as u32; 8]].concat();
    Admit { tenant: tenant.to_owned(), ..admit(number, span, &prompt, 4, 0) }
}

/// Prompt tokens computed when forty prompts, of two long prefixes in turn, wait for one place beside pages for one of the prefixes.
fn computed(is_ordered: bool) -> u64 {
    let (mut node, span) = node(Limits { sequences_max: 1, ..limits(18, 64, 64) });
    for i in 0..40 {
        // Where each has a priority of its own nobody goes before its turn.
        node.admit(Admit { priority: if is_ordered { i as i32 } else { 0 }, ..ask("ten", i, span, i as u32 % 2) });
    }
    node.run_dry();
    for i in 0..40 {
        assert_eq!(node.tokens[&i], oracle(&BLOCKS, &ask("ten", i, span, i as u32 % 2).tokens, 4), "sequence {i}");
    }
    let counters = node.engine.counters();
    counters.prefix_query_tokens - counters.prefix_hit_tokens
}

#[test]
fn prompts_of_two_prefixes_in_turn_are_computed_less_often() {
    let (near, ordered) = (computed(false), computed(true));
    assert!(ordered >= 37 * PREFIX_TOKENS as u64, "each drives out the prefix of the next: {ordered}");
    assert!(near * 3 <= ordered, "{near} tokens are computed, in order {ordered}");
}

/// Places in the order of their start.
fn started(node: &Node) -> Vec<u64> {
    let mut numbers: Vec<u64> = node.started_us.keys().copied().collect();
    numbers.sort_by_key(|number| (node.started_us[number], *number));
    numbers
}

#[test]
fn nobody_is_passed_over_without_end() {
    let (mut node, span) = node(Limits { sequences_max: 1, ..limits(100, 64, 64) });
    node.admit(ask("ten", 0, span, 0));
    node.admit(ask("ten", 1, span, 1));
    let mut sent = Vec::new();
    // However many come whose prefix is cached, there are always some that wait.
    for i in 2..100 {
        node.admit(ask("ten", i, span, 0));
        while node.engine.gauges().waiting_count > 3 {
            node.step(&mut sent);
        }
    }
    let place = started(&node).iter().position(|number| *number == 1);
    assert_eq!(place, Some(9), "eight go before it, and the first of all");
}

#[test]
fn first_tokens_that_have_a_target_are_not_passed_over() {
    let (mut node, span) = node(Limits { sequences_max: 1, ..limits(100, 64, 64) });
    node.admit(ask("ten", 0, span, 0));
    node.step(&mut Vec::new());
    let targets = Targets { ttft_ms: Some(60_000), gap_ms: None };
    node.admit(ask("ten", 1, span, 0));
    node.admit(ask("ten", 2, span, 1));
    node.admit(ask("ten", 3, span, 0));
    node.admit(Admit { targets, ..ask("ten", 4, span, 1) });
    node.admit(ask("ten", 5, span, 0));
    node.run_dry();
    // The one with a target has its turn when it would have it without, and nobody goes before it that came later.
    assert_eq!(started(&node), [0, 1, 3, 2, 4, 5]);
    let (mut node, span) = self::node(Limits { sequences_max: 1, ..limits(100, 64, 64) });
    node.admit(ask("ten", 0, span, 0));
    node.step(&mut Vec::new());
    let targets = Targets { ttft_ms: Some(5_000), gap_ms: None };
    node.admit(ask("ten", 1, span, 0));
    node.admit(Admit { targets, ..ask("ten", 2, span, 1) });
    node.admit(ask("ten", 3, span, 0));
    node.run_dry();
    assert_eq!(started(&node), [0, 2, 1, 3]);
}

#[test]
fn another_tenant_goes_first_only_while_it_had_hardly_more_service() {
    let (mut node, span) = node(Limits { sequences_max: 1, ..limits(100, 64, 64) });
    // One's prompts are all cached but for the first, none of the other's ever is.
    for i in 0..60 {
        node.admit(ask("cached", i, span, 1000));
        node.admit(ask("cold", 100 + i, span, 2000 + i as u32));
    }
    let [cached, cold] = ["cached", "cold"].map(|name| node.engine.tenants.named(name, 1));
    let (mut most, mut least, mut passed, mut sent) = (0i64, 0i64, 0, Vec::new());
    while node.started_us.len() < 60 {
        node.step(&mut sent);
        let served = |tenant| (node.engine.tenants.counter(tenant) >> 16) as i64;
        let ahead = served(cached) - served(cold);
        (most, least) = (most.max(ahead), least.min(ahead));
        passed = passed.max(node.engine.sequences.iter().map(|sequence| sequence.passes).max().unwrap_or(0));
    }
    // A prompt of the other's, and what the last one that goes first takes itself.
    let prompt = PREFIX_TOKENS as i64 + 8;
    assert!(most <= prompt + 8 + 2 * 4, "the tenant whose prompts are cached is {most} ahead");
    assert!(least >= -(prompt + 2 * 4), "it is {least} behind");
    assert!(passed > 0, "it goes before its turn");
    node.run_dry();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Of one tenant's sequences none is passed over by more than eight that were behind it.
    #[test]
    fn passes_are_bounded(prefixes in proptest::collection::vec(0u32..4, 2..60), places in 1u32..4, pages in 40u64..120, pause in 0usize..6) {
        let (mut node, span) = node(Limits { sequences_max: places, ..limits(pages, 64, 64) });
        let mut sent = Vec::new();
        for (i, prefix) in prefixes.iter().enumerate() {
            node.admit(ask("ten", i as u64, span, *prefix));
            (0..pause).for_each(|_| { node.step(&mut sent); });
        }
        node.run_dry();
        let order: Vec<usize> = started(&node).into_iter().map(|number| number as usize).collect();
        for i in 0..prefixes.len() {
            let place = order.iter().position(|number| *number == i).expect("it started");
            let before = order[..place].iter().filter(|number| **number > i).count();
            // Those who start at one time are sorted by number.
            prop_assert!(before <= 8, "sequence {} starts after {} that came behind it: {:?}", i, before, order);
        }
    }
}
