//! Sequences of several models together: sharing, reuse, memory pressure, refusals, cancellation.

use super::device::{host, oracle};
use super::family;
use super::node::{Node, admit, limits};
use super::time::by_blocks_us;
use crate::state::Now;
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, Reason, SpanIndex};

#[test]
fn models_meet_in_shared_segments_and_keep_their_tokens() {
    let mut node = Node::new(limits(200, 64, 64));
    let family = family();
    let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| (0..20 + i).map(|t| (t * 7 + i) % 97).collect()).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        node.admit(admit(i as u64, spans[i % 4], prompt, 12, 0));
    }
    node.run_dry();
    assert!(node.models_met_max >= 3, "three models share their first blocks, {} met", node.models_met_max);
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(node.tokens[&(i as u64)], oracle(&family[i % 4], prompt, 12), "sequence {i}");
    }
}

#[test]
fn second_prompt_takes_cached_pages_and_gives_the_same_tokens() {
    let mut node = Node::new(limits(100, 64, 64));
    let blocks = &family()[0];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt: Vec<u32> = (0..70).map(|t| t * 3 % 97).collect();
    node.admit(admit(1, span, &prompt, 5, 0));
    node.run_dry();
    node.admit(admit(2, span, &prompt, 5, 0));
    node.run_dry();
    assert_eq!(node.tokens[&1], node.tokens[&2]);
    assert_eq!(node.finished[&2], (Reason::Length, 64), "four full pages of 16 are before the last token");
    // Another cache domain sees nothing.
    node.admit(Admit { domain: [8; 32], ..admit(3, span, &prompt, 5, 0) });
    node.run_dry();
    assert_eq!(node.finished[&3], (Reason::Length, 0));
    assert_eq!(node.tokens[&1], node.tokens[&3]);
}

#[test]
fn a_prompt_of_whole_pages_leaves_its_last_token_to_compute() {
    let mut node = Node::new(limits(100, 64, 64));
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt: Vec<u32> = (0..32).collect();
    for number in [1, 2] {
        node.admit(admit(number, span, &prompt, 3, 0));
        node.run_dry();
    }
    assert_eq!(node.finished[&2], (Reason::Length, 16));
    assert_eq!(node.tokens[&1], node.tokens[&2]);
}

#[test]
fn preempted_sequence_gets_same_tokens() {
    // Two attention blocks, 12 pages: six pages of tokens in all, for three sequences that grow to three each.
    let mut node = Node::new(Limits { prefix_cache: false, ..limits(12, 16, 16) });
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| (0..17).map(|t| t + i).collect()).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        node.admit(admit(i as u64, span, prompt, 28, 0));
    }
    node.run_dry();
    assert!(node.engine.counters().preemption_count > 0);
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(node.tokens[&(i as u64)], oracle(blocks, prompt, 28));
    }
}

#[test]
fn sequence_that_can_never_fit_is_refused_with_the_numbers() {
    let mut node = Node::new(limits(12, 16, 16));
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let refusal = node.engine.handle_admit(Now::ZERO, admit(1, span, &[1; 90], 20, 0)).expect_err("refused");
    assert_eq!(refusal.1, "110 tokens need 14 KV pages, this executor has 12 for the model's shape (executor.kv_bytes); ask for fewer");
}

#[test]
fn cancelled_sequence_frees_everything_at_once() {
    let mut node = Node::new(limits(100, 16, 16));
    let family = family();
    let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let mut sent = Vec::new();
    for steps in 0..12 {
        node.admit(admit(100 + steps, spans[steps as usize % 4], &[5; 40], 9, 0));
        for _ in 0..steps {
            node.step(&mut sent);
        }
        if let Some(id) = node.id(100 + steps) {
            node.engine.handle_cancel(id);
        }
        node.engine.check_integrity().expect("integrity after cancel");
        while node.step(&mut sent) {}
        assert_eq!(node.engine.gauges().used_pages, 0);
    }
}

/// The picture in docs/scheduling.md, "One step, worked": sequence 1 is A's, 2 is B's, 3 is C's.
#[test]
fn the_worked_step_is_as_documented() {
    let mut node = Node::new(limits(200, 64, 64));
    node.cost_us = Some(by_blocks_us);
    // e = 2000, a1 = 1, f1 = 1001, a2 = 2 or 12, f2 = 1002, h = 2001.
    let chains = [vec![2000, 1, 1001, 2, 1002, 2001], vec![2000, 1, 1001, 12, 1002, 2001], vec![2100, 31, 1031, 2101]];
    let spans: Vec<SpanIndex> = chains.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    node.admit(admit(1, spans[0], &[5; 9], 20, 0));
    node.admit(admit(3, spans[2], &[5; 9], 20, 0));
    let mut sent = Vec::new();
    while !node.tokens.contains_key(&3) {
        node.step(&mut sent);
    }
    node.admit(admit(2, spans[1], &[6; 40], 20, 0));
    for _ in 0..10 {
        node.step(&mut sent);
    }
    let from = node.pictures.iter().position(|picture| picture.ends_with("2: 40")).expect("B's prompt was planned");
    let documented = [
        "[2000 1 1001] 1: 1, 2: 40",
        "[2100 31 1031 2101] 3: 1",
        "[2 1002 2001] 1: 1",
        "[12] 2: 40",
        "[2100 31 1031 2101] 3: 1",
        "[2000 1 1001 2] 1: 1",
        "[1002 2001] 1: 1, 2: 40",
    ];
    assert_eq!(node.pictures[from..from + documented.len()], documented);
}
