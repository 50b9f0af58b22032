//! Attention blocks with a sliding window: what lies behind it is given back, and is found by others as far as they see.

use super::device::{PAGE, host, oracle};
use super::node::{BOUNDARY_BYTES, Node, admit, limits};
use super::{Windows, family_with};
use crate::state::Now;
use crate::state::limits::Limits;
use crate::state::pages::HandleKey;

/// Blocks 501 and 505 see 17 tokens, 502 sees 33, 3 sees all.
const ALL: [u32; 6] = [2000, 501, 1001, 502, 1002, 2001];
const MIXED: [u32; 8] = [2000, 501, 1001, 3, 1003, 505, 1005, 2001];

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|t| t * 7 % 97).collect()
}

/// Pages that a node's engine holds at most while a sequence of `length` and `count` tokens runs.
fn pages_held(node: &mut Node, blocks: &[u32], length: u32, count: u32) -> u64 {
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt = prompt(length);
    node.admit(admit(1, span, &prompt, count, 0));
    let (mut most, mut sent) = (0, Vec::new());
    while node.step(&mut sent) {
        most = most.max(node.engine.gauges().used_pages);
    }
    assert_eq!(node.tokens[&1], oracle(blocks, &prompt, count as usize));
    assert_eq!(node.engine.gauges().used_pages, 0);
    most
}

#[test]
fn a_long_sequence_holds_no_more_pages_than_its_windows() {
    for (flight, prefix_cache) in [(1, true), (2, true), (4, true), (2, false)] {
        let limits = |pages| Limits { batches_in_flight_max: flight, prefix_cache, ..limits(pages, 16, 16) };
        // 33 tokens seen and a chunk of 16 are in four pages at most, 17 and 16 in three; each batch in flight may have left one more behind.
        let most = 4 + 3 + 2 * u64::from(flight);
        for (length, count) in [(600, 10), (10, 600)] {
            let held = pages_held(&mut Node::new(limits(200)), &ALL, length, count);
            assert!(held <= most, "{held} pages for {length} + {count} tokens with {flight} in flight");
            // They are enough: nobody else has to give way, and nothing stands still.
            let mut node = Node::new(limits(7));
            assert!(pages_held(&mut node, &ALL, length, count) <= 7);
            assert_eq!(node.engine.counters().preemption_count, 0);
            // A block without a window keeps all, the two beside it do not.
            let held = pages_held(&mut Node::new(limits(200)), &MIXED, length, count);
            let all = u64::from((length + count) / PAGE + 1);
            assert!((all..=all + 2 * (3 + u64::from(flight))).contains(&held), "{held} pages for {length} + {count} tokens");
        }
    }
}

#[test]
fn a_windowed_sequence_fits_if_its_windows_do() {
    let mut node = Node::new(limits(7, 16, 16));
    let span = node.engine.handle_host(host(&ALL, 0, ALL.len()));
    node.admit(admit(1, span, &prompt(100), 2000, 0));
    let mut node = Node::new(limits(6, 16, 16));
    let span = node.engine.handle_host(host(&ALL, 0, ALL.len()));
    let refusal = node.engine.handle_admit(Now::ZERO, admit(1, span, &prompt(100), 2000, 0)).expect_err("refused");
    assert_eq!(refusal.1, "2100 tokens need 7 KV pages, this executor has 6 for the model's shape (executor.kv_bytes); ask for fewer");
}

/// Runs the same prompt twice; in between, cached pages of the windowed blocks are evicted so that only those from `from` to `to` are left.
fn cached_tokens(blocks: &[u32], from: usize, to: usize) -> u32 {
    let mut node = Node::new(limits(400, 64, 64));
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    let prompt = prompt(200);
    node.admit(admit(1, span, &prompt, 4, 0));
    node.run_dry();
    let id = node.engine.handle_admit(Now::ZERO, admit(2, span, &prompt, 4, 0)).expect("admitted");
    node.keys.insert(id, 2);
    node.engine.sequences[id].extend_hashes(PAGE);
    let hashes = node.engine.sequences[id].hashes.clone();
    for step in node.engine.spans[0].path.steps.clone() {
        for lane in step.lanes.iter().filter(|lane| lane.window.is_some()) {
            for (page, tokens) in hashes.iter().enumerate().filter(|(page, _)| !(from..to).contains(page)) {
                let key = HandleKey { tokens: *tokens, stretch: lane.stretch };
                assert!(node.engine.pages.contains(&key), "page {page} was given back to the cache");
                node.engine.pages.drop_cached(&key);
            }
        }
    }
    node.engine.check_integrity().expect("integrity after pages were evicted");
    node.run_dry();
    assert_eq!(node.tokens[&2], oracle(blocks, &prompt, 4));
    node.finished[&2].1
}

#[test]
fn a_prefix_is_found_by_the_pages_within_the_window() {
    // Twelve pages are full. The token at position 192 sees 160 and later, in pages 10 and 11, or 176 and later, in page 11.
    for blocks in [&ALL[..], &MIXED] {
        assert_eq!(cached_tokens(blocks, 0, 12), 192);
        assert_eq!(cached_tokens(blocks, 10, 12), 192, "what lies behind the windows is not missed");
        assert_eq!(cached_tokens(blocks, 0, 11), 176, "the last page is gone: one page less");
    }
    assert_eq!((cached_tokens(&ALL, 11, 12), cached_tokens(&MIXED, 11, 12)), (0, 192), "one that is seen is gone");
    assert_eq!(cached_tokens(&MIXED, 12, 12), 0);
    assert_eq!(cached_tokens(&ALL, 3, 9), 144, "what is left in the middle is a prefix too");
}

#[test]
fn what_a_sibling_with_windows_has_seen_is_computed_from_the_fork() {
    for windows in Windows::ALL {
        for chunk in [7, 16, 64] {
            let family = family_with(windows);
            let mut node = Node::new(Limits { boundary_bytes: 40 * BOUNDARY_BYTES, ..limits(400, 64, chunk) });
            let spans = [0, 1].map(|i| node.engine.handle_host(host(&family[i], 0, family[i].len())));
            let prompt = prompt(150);
            for (number, model) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
                node.admit(admit(number, spans[model], &prompt, 4, 0));
                node.run_dry();
                assert_eq!(node.tokens[&number], oracle(&family[model], &prompt, 4), "{windows:?}");
            }
            let cached: Vec<u32> = (1..5).map(|number| node.finished[&number].1).collect();
            assert_eq!(cached, [0, 144 * 5 / 8, 144, 144], "{windows:?}");
        }
    }
}

#[test]
fn cuts_move_lanes_of_sequences_that_run() {
    for windows in Windows::ALL {
        for at in 0..30 {
            let family = family_with(windows);
            let mut node = Node::new(limits(400, 16, 8));
            let first = node.engine.handle_host(host(&family[0], 0, family[0].len()));
            let prompt = prompt(90);
            for number in [1, 2] {
                node.admit(admit(number, first, &prompt, 40, 0));
            }
            let mut sent = Vec::new();
            for _ in 0..at {
                node.step(&mut sent);
            }
            // It cuts between any two of the attention blocks, and goes again.
            let others = [1, 2].map(|i| node.engine.handle_host(host(&family[i], 0, family[i].len())));
            node.engine.check_integrity().expect("integrity after a cut");
            for _ in 0..9 {
                node.step(&mut sent);
            }
            others.iter().for_each(|other| node.engine.handle_unhost(*other));
            node.engine.check_integrity().expect("integrity after segments were joined, or are to be");
            node.run_dry();
            for number in [1, 2] {
                assert_eq!(node.tokens[&number], oracle(&family[0], &prompt, 40), "{windows:?}, cut at step {at}");
            }
        }
    }
}
