//! Chains cut over two engines.

use std::collections::BTreeMap;

use super::device::{host, oracle};
use super::family;
use super::node::{Node, Sent, admit, limits};
use crate::state::limits::Limits;

/// Runs sequences on a chain cut over two engines.
fn run_cut(blocks: &[u32], at: usize, prompts: &[Vec<u32>], count: u32, limits: &Limits) -> BTreeMap<u64, Vec<u32>> {
    let (mut up, mut down) = (Node::new(limits.clone()), Node::new(limits.clone()));
    let upper = up.engine.handle_host(host(blocks, 0, at));
    let lower = down.engine.handle_host(host(blocks, at, blocks.len()));
    for (i, prompt) in prompts.iter().enumerate() {
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
            assert_eq!(tokens[&(i as u64)], oracle(blocks, prompt, 7), "cut before block {at}");
        }
    }
}
