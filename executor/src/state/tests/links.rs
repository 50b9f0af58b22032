//! Chains cut over two engines.

use std::collections::BTreeMap;

use super::device::{host, oracle, oracle_with};
use super::node::{Node, Sent, admit, limits};
use super::{CHANGES, family};
use crate::state::Now;
use crate::state::limits::Limits;

/// Runs sequences on a chain cut over two engines.
fn run_cut(blocks: &[u32], at: usize, prompts: &[Vec<u32>], count: u32, limits: &Limits) -> BTreeMap<u64, Vec<u32>> {
    let (mut up, mut down) = (Node::new(limits.clone()), Node::new(limits.clone()));
    // Sequence after sequence has other adapters.
    let spans = CHANGES.map(|adapters| (up.host_part(blocks, adapters, 0..at), down.host_part(blocks, adapters, at..blocks.len())));
    for (i, prompt) in prompts.iter().enumerate() {
        let (upper, lower) = spans[i % CHANGES.len()];
        up.admit(admit(i as u64, upper, prompt, count, 0));
        down.admit(admit(i as u64, lower, prompt, count, 0));
    }
    for _ in 0..20_000 {
        let (mut from_up, mut from_down) = (Vec::new(), Vec::new());
        let ran = up.step(&mut from_up) | down.step(&mut from_down);
        let moved = !from_up.is_empty() || !from_down.is_empty();
        for sent in from_up {
            match sent {
                Sent::Rows(number, start, rows) => {
                    let Some(id) = down.id(number) else { continue };
                    assert!(down.engine.handle_hidden(id, start, rows.len() as u32));
                    down.inbox.entry(id).or_default().extend(rows);
                }
                Sent::Released(number) => {
                    if let Some(id) = down.id(number) {
                        down.engine.handle_cancel(id);
                    }
                }
                Sent::Token(..) | Sent::Consumed(..) => panic!("only a downstream engine sends these"),
            }
        }
        for sent in from_down {
            match sent {
                Sent::Token(number, position, token) => {
                    if let Some(id) = up.id(number) {
                        up.engine.handle_link_token(id, position, token);
                    }
                }
                Sent::Consumed(number, position) => {
                    if let Some(id) = up.id(number) {
                        up.engine.handle_consumed(id, position);
                    }
                }
                Sent::Released(_) => {}
                Sent::Rows(..) => panic!("the lower span ends with the head"),
            }
        }
        if !ran && !moved && up.engine.sequences.is_empty() && down.engine.sequences.is_empty() {
            assert_eq!(down.engine.gauges().used_pages, 0);
            return up.tokens;
        }
    }
    panic!("sequences never ended");
}

#[test]
fn a_chain_cut_over_two_engines_gives_the_same_tokens() {
    let blocks = &family()[0];
    let prompts: Vec<Vec<u32>> = (1..6).map(|i| (0..i * 9).collect()).collect();
    for at in 1..blocks.len() {
        let tokens = run_cut(blocks, at, &prompts, 7, &limits(400, 16, 7));
        for (i, prompt) in prompts.iter().enumerate() {
            let expected = oracle_with(blocks, CHANGES[i % CHANGES.len()], prompt, 7);
            assert_eq!(tokens[&(i as u64)], expected, "cut before block {at}");
        }
    }
}

/// Takes what one node has sent to the other.
pub(super) fn deliver(sent: Vec<Sent>, to: &mut Node) {
    for sent in sent {
        match sent {
            Sent::Rows(number, start, rows) => {
                let Some(id) = to.id(number) else { continue };
                assert!(to.engine.handle_hidden(id, start, rows.len() as u32));
                to.inbox.entry(id).or_default().extend(rows);
            }
            Sent::Token(number, position, token) => {
                if let Some(id) = to.id(number) {
                    to.engine.handle_link_token(id, position, token);
                }
            }
            Sent::Consumed(number, position) => {
                if let Some(id) = to.id(number) {
                    to.engine.handle_consumed(id, position);
                }
            }
            Sent::Released(number) => {
                if let Some(id) = to.id(number) {
                    to.engine.handle_cancel(id);
                }
            }
        }
    }
}

#[test]
fn chains_cut_the_other_way_round_do_not_wait_for_each_other() {
    let (one, two) = (&family()[3], &vec![2200, 41, 1041, 42, 1042, 2201]);
    // Each executor has pages for one sequence: four of them.
    let mut nodes = [Node::new(limits(7, 16, 16)), Node::new(limits(7, 16, 16))];
    let spans = [
        [nodes[0].engine.handle_host(host(one, 0, 3)), nodes[1].engine.handle_host(host(one, 3, one.len()))],
        [nodes[1].engine.handle_host(host(two, 0, 3)), nodes[0].engine.handle_host(host(two, 3, two.len()))],
    ];
    let prompt = [3; 50];
    // Each starts where its chain begins, and finds the other one's pages taken where it ends.
    nodes[0].admit(admit(1, spans[0][0], &prompt, 4, 0));
    nodes[1].admit(admit(2, spans[1][0], &prompt, 4, 0));
    let mut first = [Vec::new(), Vec::new()];
    nodes.iter_mut().zip(&mut first).for_each(|(node, sent)| assert!(node.step(sent)));
    nodes[1].admit(admit(1, spans[0][1], &prompt, 4, 0));
    nodes[0].admit(admit(2, spans[1][1], &prompt, 4, 0));
    let [from_one, from_two] = first;
    deliver(from_one, &mut nodes[1]);
    deliver(from_two, &mut nodes[0]);
    let mut waits = 0;
    while !nodes.iter().all(|node| node.engine.sequences.is_empty()) {
        let mut moved = false;
        for i in 0..2 {
            let mut sent = Vec::new();
            moved |= nodes[i].step(&mut sent) || !sent.is_empty();
            deliver(sent, &mut nodes[1 - i]);
        }
        if !moved {
            // Nobody has anything to do: the engines say when to ask again.
            let at = nodes.iter().filter_map(|node| node.engine.wake_at()).min().expect("they wait for each other");
            nodes.iter_mut().for_each(|node| node.now_us = node.now_us.max(at.as_micros() as u64) + 1);
            waits += 1;
            assert!(waits < 20, "they wait for ever");
        }
    }
    let failed: Vec<u64> = nodes.iter().flat_map(|node| node.failed.iter().copied()).collect();
    assert_eq!(failed, [2], "the younger gives way");
    assert_eq!(nodes[0].tokens[&1], oracle(one, &prompt, 4));
    assert!(nodes.iter().all(|node| node.engine.wake_at().is_none() && node.engine.gauges().used_pages == 0));
    assert!(nodes[0].now_us >= Now::from_secs(2).as_micros() as u64, "not before it stood still for long");
}

#[test]
fn a_sequence_whose_link_stands_still_keeps_no_hidden_rows() {
    let family = family();
    let mut node = Node::new(limits(400, 16, 16));
    let span = node.engine.handle_host(host(&family[0], 0, 7));
    // A sibling that parts from it early: the span is two segments.
    node.engine.handle_host(host(&family[2], 0, family[2].len()));
    node.admit(admit(1, span, &[3; 200], 4, 0));
    while node.step(&mut Vec::new()) {}
    assert_eq!(node.engine.hidden_free.len(), node.engine.limits.hidden_rows_max as usize, "others can use them");
}
