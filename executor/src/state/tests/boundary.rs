//! Prefix reuse across models: what one has computed, another does not compute again.

use super::device::{PAGE, host, oracle};
use super::family;
use super::node::{BOUNDARY_BYTES, Node, admit, limits};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};

/// Two descendants that differ in the top three of their ten blocks.
fn siblings() -> [Vec<u32>; 2] {
    [vec![2000, 1, 1001, 2, 1002, 3, 1003, 4, 1004, 2001], vec![2000, 1, 1001, 2, 1002, 3, 1003, 14, 1014, 2011]]
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|t| t * 7 % 97).collect()
}

/// Rows of one sequence that a block computed.
fn rows_of(node: &Node, block: u32, sequence: u64) -> u32 {
    let mine = |picture: &str| -> u32 {
        let (blocks, rows) = picture[1..].split_once("] ").expect("a picture");
        rows.split(", ")
            .filter(|_| blocks.split(' ').any(|known| known == block.to_string()))
            .filter_map(|rows| rows.strip_prefix(&format!("{sequence}: ")))
            .map(|count| count.parse::<u32>().expect("a count"))
            .sum()
    };
    node.pictures.iter().map(|picture| mine(picture)).sum()
}

fn two_models(limits: Limits) -> (Node, [Vec<u32>; 2], [SpanIndex; 2]) {
    let mut node = Node::new(limits);
    let chains = siblings();
    let spans = [0, 1].map(|i| node.engine.handle_host(host(&chains[i], 0, chains[i].len())));
    (node, chains, spans)
}

#[test]
fn a_sibling_computes_only_its_own_top_of_a_prompt_that_another_has_seen() {
    for chunk in [7, 16, 64] {
        let (mut node, chains, spans) = two_models(limits(200, 64, chunk));
        let prompt = prompt(100);
        node.admit(admit(1, spans[0], &prompt, 4, 0));
        node.run_dry();
        assert_eq!((rows_of(&node, 2000, 1), rows_of(&node, 4, 1)), (103, 103));
        node.admit(admit(2, spans[1], &prompt, 4, 0));
        node.run_dry();
        // Six pages of sixteen tokens are full before the last token.
        assert_eq!((rows_of(&node, 2000, 2), rows_of(&node, 14, 2)), (7, 103), "chunks of {chunk}");
        assert_eq!(node.tokens[&1], oracle(&chains[0], &prompt, 4));
        assert_eq!(node.tokens[&2], oracle(&chains[1], &prompt, 4));
        // Seven of ten blocks were skipped.
        assert_eq!(node.finished[&2].1, 96 * 7 / 10);
        let counters = node.engine.counters();
        assert_eq!((counters.prefix_hit_tokens, counters.cross_model_hit_tokens), (67, 67));
        // The same model again: all of the chain is skipped, which is no hit across models.
        node.admit(admit(3, spans[1], &prompt, 4, 0));
        node.run_dry();
        assert_eq!(node.finished[&3].1, 96);
        assert_eq!(node.engine.counters().cross_model_hit_tokens, 67);
        assert_eq!(node.tokens[&3], node.tokens[&2]);
    }
}

#[test]
fn pages_without_their_boundary_are_no_hit() {
    let (mut node, chains, spans) = two_models(Limits { boundary_bytes: 0, ..limits(200, 64, 64) });
    let prompt = prompt(100);
    for (number, model) in [(1, 0), (2, 1)] {
        node.admit(admit(number, spans[model], &prompt, 4, 0));
        node.run_dry();
        assert_eq!(node.tokens[&number], oracle(&chains[model], &prompt, 4));
    }
    assert_eq!(rows_of(&node, 2000, 2), 103);
    assert_eq!((node.finished[&2].1, node.engine.counters().prefix_hit_tokens), (0, 0));
}

#[test]
fn what_is_left_of_an_evicted_boundary_is_used() {
    // Room for three pages of hidden rows; the prompt has six.
    let (mut node, chains, spans) = two_models(Limits { boundary_bytes: 3 * BOUNDARY_BYTES, ..limits(200, 64, 16) });
    let prompt = prompt(100);
    for (number, model) in [(1, 0), (2, 1)] {
        node.admit(admit(number, spans[model], &prompt, 4, 0));
        node.run_dry();
        assert_eq!(node.tokens[&number], oracle(&chains[model], &prompt, 4));
    }
    assert_eq!(rows_of(&node, 2000, 2), 103 - 3 * PAGE);
    assert_eq!(node.finished[&2].1, 3 * PAGE * 7 / 10);
}

/// Three prompts of six pages.
fn prompts() -> [Vec<u32>; 3] {
    [1, 2, 3].map(|salt| (0..100).map(|t| (t * 7 + salt) % 97).collect())
}

#[test]
fn hidden_rows_are_as_much_in_use_as_the_pages_that_they_make_useful() {
    // Room for the hidden rows of two prompts.
    let (mut node, chains, spans) = two_models(Limits { boundary_bytes: 12 * BOUNDARY_BYTES, ..limits(400, 64, 64) });
    let prompts = prompts();
    // The first model comes back to the first prompt: it reads no hidden rows, but uses the pages.
    for (number, prompt) in [(1, 0), (2, 1), (3, 0), (4, 2)] {
        node.admit(admit(number, spans[0], &prompts[prompt], 4, 0));
        node.run_dry();
    }
    for (number, prompt, rows) in [(5, 0, 7), (6, 2, 7)] {
        node.admit(admit(number, spans[1], &prompts[prompt], 4, 0));
        node.run_dry();
        assert_eq!(rows_of(&node, 2000, number), rows, "prompt {prompt}");
        assert_eq!(node.tokens[&number], oracle(&chains[1], &prompts[prompt], 4));
    }
    node.admit(admit(7, spans[1], &prompts[1], 4, 0));
    node.run_dry();
    assert_eq!(rows_of(&node, 2000, 7), 103, "the one that was not used again is gone");
}

#[test]
fn hidden_rows_go_with_the_pages_that_they_need() {
    // Seven pages in four attention blocks: all that there are. The second prompt takes the pages of the first.
    let (mut node, chains, spans) = two_models(Limits { boundary_bytes: 20 * BOUNDARY_BYTES, ..limits(35, 64, 64) });
    let prompts = prompts();
    for (number, prompt) in [(1, 0), (2, 1), (3, 2)] {
        node.admit(admit(number, spans[0], &prompts[prompt], 4, 0));
        node.run_dry();
    }
    let gauges = node.engine.gauges();
    assert!(gauges.boundary_pages <= gauges.cached_pages / 3, "{gauges:?}");
    node.admit(admit(4, spans[1], &prompts[2], 4, 0));
    node.run_dry();
    assert_eq!(rows_of(&node, 2000, 4), 7, "the latest is whole");
    assert_eq!(node.tokens[&4], oracle(&chains[1], &prompts[2], 4));
}

#[test]
fn tenants_see_nothing_of_each_other_across_models() {
    let (mut node, _, spans) = two_models(limits(200, 64, 64));
    let prompt = prompt(100);
    node.admit(admit(1, spans[0], &prompt, 4, 0));
    node.run_dry();
    node.admit(Admit { domain: [8; 32], ..admit(2, spans[1], &prompt, 4, 0) });
    node.run_dry();
    assert_eq!(rows_of(&node, 2000, 2), 103);
    assert_eq!(node.engine.counters().prefix_hit_tokens, 0);
}

#[test]
fn a_model_that_is_added_later_finds_pages_of_the_first() {
    let chains = siblings();
    let mut node = Node::new(limits(200, 64, 64));
    let first = node.engine.handle_host(host(&chains[0], 0, chains[0].len()));
    let prompt = prompt(100);
    node.admit(admit(1, first, &prompt, 4, 0));
    node.run_dry();
    assert_eq!(node.engine.gauges().cached_pages, 6 * 4, "six pages in four attention blocks");
    let second = node.engine.handle_host(host(&chains[1], 0, chains[1].len()));
    // Nothing was kept at the fork while there was none: the shared blocks are computed once more, and what they give is not kept twice.
    for (number, rows) in [(2, 103), (3, 7)] {
        node.admit(admit(number, second, &prompt, 4, 0));
        node.run_dry();
        assert_eq!(rows_of(&node, 2000, number), rows);
        assert_eq!(node.engine.gauges().cached_pages, 6 * 5, "three attention blocks are shared, two are not");
        assert_eq!(node.tokens[&number], oracle(&chains[1], &prompt, 4));
    }
    node.admit(admit(4, first, &prompt, 4, 0));
    node.run_dry();
    assert_eq!(node.finished[&4].1, 96, "the first model still finds its own");
}

#[test]
fn a_lineage_may_fork_twice() {
    let family = family();
    let mut node = Node::new(limits(400, 64, 16));
    let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
    let prompt = prompt(60);
    for (number, model) in [(1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 2)] {
        node.admit(admit(number, spans[model], &prompt, 4, 0));
        node.run_dry();
        assert_eq!(node.tokens[&number], oracle(&family[model], &prompt, 4));
    }
    // Three pages: model 1 skips five of eight blocks thanks to model 0, model 2 three; then each skips all.
    let cached: Vec<u32> = (1..7).map(|number| node.finished[&number].1).collect();
    assert_eq!(cached, [0, 48 * 5 / 8, 48 * 3 / 8, 48, 48, 48]);
}

#[test]
fn a_sibling_without_attention_of_its_own_skips_the_prefix_altogether() {
    let [first, _] = siblings();
    let mut second = first.clone();
    second.splice(8.., [1024, 2021]);
    let mut node = Node::new(Limits { boundary_bytes: 0, ..limits(200, 64, 64) });
    let spans = [&first, &second].map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len())));
    let prompt = prompt(100);
    for (number, span) in [(1, spans[0]), (2, spans[1])] {
        node.admit(admit(number, span, &prompt, 4, 0));
        node.run_dry();
    }
    assert_eq!(node.tokens[&2], oracle(&second, &prompt, 4));
    assert_eq!((node.finished[&2].1, node.engine.counters().cross_model_hit_tokens), (96, 96));
}

#[test]
fn more_hidden_rows_than_there_are_slots_wait_at_a_fork_without_a_deadlock() {
    let family = family();
    for (pages, chunk, prefix_cache, flight) in [(18, 4, false, 4), (18, 1, true, 2), (18, 4, true, 2), (60, 3, true, 4)] {
        // Sixteen slots change hands; prompts are longer.
        let limits = Limits {
            boundary_bytes: BOUNDARY_BYTES,
            batches_in_flight_max: flight,
            prefix_cache,
            row_wait_ms: 1,
            ..limits(pages, 4, chunk)
        };
        let mut node = Node::new(limits);
        let spans: Vec<SpanIndex> = family.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
        let requests = [(2usize, 34, 10, 0), (0, 19, 1, 1), (0, 14, 3, 0), (0, 36, 6, 0), (1, 32, 1, 1), (1, 36, 11, 0), (1, 47, 11, 0)];
        for (number, (model, length, count, priority)) in requests.iter().enumerate() {
            let tenant = format!("ten_{}", number % 3);
            node.admit(Admit { tenant, ..admit(number as u64, spans[*model], &prompt(*length), *count, *priority) });
        }
        node.run_dry();
        for (number, (model, length, count, _)) in requests.iter().enumerate() {
            assert_eq!(node.tokens[&(number as u64)], oracle(&family[*model], &prompt(*length), *count as usize), "sequence {number}");
        }
    }
}
