//! Models come and go while others run.

use super::device::{host, oracle};
use super::family;
use super::node::{Node, admit, limits};

#[test]
fn a_model_added_while_others_run_changes_no_token() {
    for at in 0..14 {
        let mut node = Node::new(limits(200, 16, 8));
        let family = family();
        let first = node.engine.handle_host(host(&family[0], 0, family[0].len()));
        let prompt: Vec<u32> = (0..50).collect();
        node.admit(admit(1, first, &prompt, 10, 0));
        let mut sent = Vec::new();
        for _ in 0..at {
            node.step(&mut sent);
        }
        let second = node.engine.handle_host(host(&family[1], 0, family[1].len()));
        node.engine.check_integrity().expect("integrity after a re-cut");
        node.admit(admit(2, second, &prompt, 10, 0));
        for _ in 0..at {
            node.step(&mut sent);
        }
        node.engine.handle_unhost(second);
        let third = node.engine.handle_host(host(&family[2], 0, family[2].len()));
        node.admit(admit(3, third, &prompt, 10, 0));
        while !node.engine.sequences.is_empty() {
            node.step(&mut sent);
        }
        while node.step(&mut sent) {}
        assert_eq!(node.tokens[&1], oracle(&family[0], &prompt, 10), "added at step {at}");
        assert_eq!(node.tokens[&3], oracle(&family[2], &prompt, 10), "added at step {at}");
        assert!(node.failed.iter().all(|number| *number == 2), "only the model taken away may fail");
    }
}

#[test]
fn pages_cached_before_a_cut_are_found_after_it() {
    let family = family();
    let prompt: Vec<u32> = (0..70).map(|t| t * 3 % 97).collect();
    let mut node = Node::new(limits(200, 64, 64));
    let first = node.engine.handle_host(host(&family[0], 0, family[0].len()));
    node.admit(admit(1, first, &prompt, 5, 0));
    node.run_dry();
    let keys = node.engine.cached_keys();
    let second = node.engine.handle_host(host(&family[1], 0, family[1].len()));
    assert!(node.engine.segments.iter().filter(|segment| segment.span_count > 0).count() >= 3, "the chain was cut");
    assert_eq!(node.engine.cached_keys(), keys, "keys know nothing of cuts");
    node.engine.check_integrity().expect("integrity after a cut");
    node.admit(admit(2, first, &prompt, 5, 0));
    node.run_dry();
    assert_eq!(node.finished[&2].1, 64, "four pages were found in two parts each");
    node.engine.handle_unhost(second);
    while node.step(&mut Vec::new()) {}
    node.engine.check_integrity().expect("integrity after segments were joined");
    node.admit(admit(3, first, &prompt, 5, 0));
    node.run_dry();
    assert_eq!(node.finished[&3].1, 64, "and joined again");
    assert_eq!(node.tokens[&3], oracle(&family[0], &prompt, 5));
}

#[test]
fn keys_agree_between_executors_with_different_cuts() {
    let family = family();
    let prompt: Vec<u32> = (0..50).collect();
    let keys = [vec![0], vec![0, 1], vec![2, 0, 3]].map(|hosted| {
        let mut node = Node::new(limits(200, 64, 64));
        let spans: Vec<_> = hosted.iter().map(|&i| (i, node.engine.handle_host(host(&family[i], 0, family[i].len())))).collect();
        let (_, span) = spans.iter().find(|(i, _)| *i == 0).expect("hosted");
        node.admit(admit(1, *span, &prompt, 3, 0));
        node.run_dry();
        node.engine.cached_keys()
    });
    assert!(!keys[0].is_empty());
    assert_eq!(keys[0], keys[1]);
    assert_eq!(keys[0], keys[2]);
}

#[test]
fn a_sequence_that_no_longer_fits_fails_and_holds_nobody_up() {
    let family = family();
    // Whether its next token fits where it has stopped, or its next chunk only does not.
    for (chunk, steps) in [(16, 4), (5, 3), (40, 1), (7, 9)] {
        let mut node = Node::new(limits(24, 40, chunk));
        let first = node.engine.handle_host(host(&family[0], 0, family[0].len()));
        // Eight pages in each of three attention blocks: all that there are.
        node.admit(admit(1, first, &[5; 100], 20, 0));
        let mut sent = Vec::new();
        for _ in 0..steps {
            node.step(&mut sent);
        }
        // A model of another KV shape has its share of the pages from now on.
        let mut other = host(&family[3], 0, family[3].len());
        other.kv_shapes.iter_mut().flatten().for_each(|shape| shape.kv_heads = 2);
        node.engine.handle_host(other);
        node.admit(admit(2, first, &[5; 20], 4, 0));
        while node.step(&mut sent) {
            node.engine.check_integrity().expect("integrity after a step");
        }
        assert!(node.engine.sequences.is_empty(), "nobody waits for pages that are not there");
        assert!(node.failed.contains(&1), "the one that no longer fits is told so");
        assert_eq!(node.tokens[&2], oracle(&family[0], &[5; 20], 4));
    }
}
