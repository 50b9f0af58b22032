//! Chains that differ in adapters alone: one batch wherever they meet, and each its own keys and values from its first adapter on.

use super::device::{PAGE, oracle_with};
use super::node::{Node, admit, limits};
use crate::state::limits::Limits;
use crate::state::sequence::SpanIndex;

/// Four attention blocks: 1 to 4.
const CHAIN: [u32; 10] = [2000, 1, 1001, 2, 1002, 3, 1003, 4, 1004, 2001];

type Changes = Vec<(u32, u64)>;

/// The base, and two models with adapters on all blocks between embedding and head, or on those from `first` on.
fn models(first: u32) -> Vec<Changes> {
    let adapters = |model: u64| (first..9).map(|place| (place, 100 * model + u64::from(place))).collect();
    vec![Vec::new(), adapters(1), adapters(2)]
}

fn node(limits: Limits, models: &[Changes]) -> (Node, Vec<SpanIndex>) {
    let mut node = Node::new(limits);
    let spans: Vec<SpanIndex> = models.iter().map(|adapters| node.host(&CHAIN, adapters)).collect();
    (node, spans)
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|t| t * 7 % 97).collect()
}

/// Rows of all sequences that a block computed, and batches.
fn crossed(node: &Node, block: u32) -> (u64, u64) {
    node.crossed[&block]
}

#[test]
fn chains_that_differ_in_adapters_run_in_one_batch() {
    for first in [1, 2, 5, 8] {
        let models = models(first);
        let (mut node, spans) = node(Limits { batches_in_flight_max: 1, ..limits(400, 32, 8) }, &models);
        for (number, span) in (0..).zip(&spans) {
            node.admit(admit(number, *span, &prompt(8), 20, 0));
        }
        node.run_dry();
        assert_eq!(node.models_met_max, 3);
        for (number, adapters) in (0..).zip(&models) {
            assert_eq!(node.tokens[&number], oracle_with(&CHAIN, adapters, &prompt(8), 20), "model {number}, adapters from {first} on");
        }
        // A step of all three at once for each token, in the deepest block too; a prompt or two may come earlier.
        let (batches, rows) = crossed(&node, 1004);
        assert_eq!(rows, 3 * (8 + 19));
        assert!(batches <= 20 + 3, "{batches} batches for {rows} rows, adapters from {first} on");
    }
}

/// Where the adapters are on all blocks, nothing is cut: there is nothing that could be shared but the embedding.
#[test]
fn adapters_from_the_first_attention_block_on_cut_nothing() {
    let (node, _) = node(limits(400, 32, 8), &models(1));
    assert_eq!(node.engine.segments.iter().filter(|segment| segment.span_count > 0).count(), 1);
}

#[test]
fn pages_are_shared_below_the_first_adapter_and_never_from_there_on() {
    for (first, chunk) in [(1, 16), (2, 64), (5, 7), (5, 64), (6, 16)] {
        let models = models(first);
        let (mut node, spans) = node(limits(400, 64, chunk), &models);
        let prompt = prompt(100);
        // Base, then the others, then all again.
        for (number, model) in [(0, 0), (1, 1), (2, 2), (3, 1), (4, 0)] {
            node.admit(admit(number, spans[model], &prompt, 4, 0));
            node.run_dry();
            assert_eq!(node.tokens[&number], oracle_with(&CHAIN, &models[model], &prompt, 4), "sequence {number}");
            let cached = node.finished[&number].1;
            match number {
                0 => assert_eq!(cached, 0),
                // Six pages are full before the last token; what lies before the first adapter is not computed again.
                1 | 2 => assert_eq!(cached, if first > 1 { 6 * PAGE * first / 10 } else { 0 }, "adapters from {first} on"),
                _ => assert_eq!(cached, 6 * PAGE, "the same model finds all"),
            }
        }
    }
}

#[test]
fn models_with_adapters_that_come_and_go_change_no_token() {
    for at in 0..14 {
        let models = models(5);
        let mut node = Node::new(limits(200, 16, 8));
        let first = node.host(&CHAIN, &models[0]);
        let prompt: Vec<u32> = (0..50).collect();
        node.admit(admit(1, first, &prompt, 10, 0));
        let mut sent = Vec::new();
        (0..at).for_each(|_| {
            node.step(&mut sent);
        });
        let second = node.host(&CHAIN, &models[1]);
        node.admit(admit(2, second, &prompt, 10, 0));
        (0..at).for_each(|_| {
            node.step(&mut sent);
        });
        node.engine.handle_unhost(first);
        node.engine.check_integrity().expect("integrity after a re-cut");
        let third = node.host(&CHAIN, &models[2]);
        node.admit(admit(3, third, &prompt, 10, 0));
        while !node.engine.sequences.is_empty() {
            node.step(&mut sent);
        }
        while node.step(&mut sent) {}
        assert_eq!(node.tokens[&2], oracle_with(&CHAIN, &models[1], &prompt, 10), "added at step {at}");
        assert_eq!(node.tokens[&3], oracle_with(&CHAIN, &models[2], &prompt, 10), "added at step {at}");
        assert!(node.failed.iter().all(|number| *number == 1), "only the model taken away may fail");
    }
}
