//! What tenants may hold while others wait: a newcomer starts within a bounded number of batches, whatever a flooder holds.

use std::collections::BTreeMap;

use super::device::{host, oracle};
use super::links::deliver;
use super::node::{Node, admit, limits};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};

const BLOCKS: [u32; 4] = [2000, 1, 1001, 2001];

fn node(limits: Limits) -> (Node, SpanIndex) {
    let mut node = Node::new(Limits { prefix_cache: false, ..limits });
    let span = node.engine.handle_host(host(&BLOCKS, 0, BLOCKS.len()));
    (node, span)
}

fn of(tenant: &str, admit: Admit) -> Admit {
    Admit { tenant: tenant.to_owned(), ..admit }
}

/// Steps until a sequence has its first token.
fn steps_to_first_token(node: &mut Node, number: u64) -> usize {
    let mut sent = Vec::new();
    (0..1000)
        .take_while(|_| {
            node.step(&mut sent);
            !node.tokens.contains_key(&number)
        })
        .count()
}

fn step(node: &mut Node, count: usize) {
    let mut sent = Vec::new();
    (0..count).for_each(|_| {
        node.step(&mut sent);
    });
}

#[test]
fn each_of_many_newcomers_gets_a_place_soon() {
    let (mut node, span) = node(limits(4000, 64, 64));
    for i in 0..12 {
        node.admit(of("flood", admit(i, span, &[i as u32; 20], 400, 0)));
    }
    step(&mut node, 20);
    // More than the flooder has sequences that run, each of a tenant of its own, and each answer is longer than the pause between two.
    for i in 0..20 {
        node.admit(of(&format!("new_{i}"), admit(100 + i, span, &[9; 20], 30, 0)));
        let steps = steps_to_first_token(&mut node, 100 + i);
        assert!(steps <= 60, "newcomer {i} waits {steps} batches");
    }
    assert!(node.finished.keys().all(|number| *number >= 100), "no sequence of the flooder had to end for them");
    node.run_dry();
    for i in 0..12 {
        assert_eq!(node.tokens[&i], oracle(&BLOCKS, &[i as u32; 20], 400), "sequence {i}");
    }
}

#[test]
fn few_long_sequences_do_not_keep_all_pages() {
    let (mut node, span) = node(limits(100, 64, 64));
    for i in 0..2 {
        node.admit(of("flood", admit(i, span, &[i as u32; 700], 800, 0)));
    }
    // A third of the pages is what the newcomer needs, and more than are left.
    while node.engine.gauges().free_pages > 4 {
        step(&mut node, 1);
    }
    for i in 0..4 {
        node.admit(of(&format!("new_{i}"), admit(100 + i, span, &[9; 400], 40, 0)));
        let steps = steps_to_first_token(&mut node, 100 + i);
        assert!(steps <= 80, "newcomer {i} waits {steps} batches");
        // It also goes on: whoever is above its share gives way to its growth.
        step(&mut node, 120);
        assert!(node.finished.contains_key(&(100 + i)), "newcomer {i} has {} tokens", node.tokens[&(100 + i)].len());
    }
    assert!(node.finished.keys().all(|number| *number >= 100));
    node.run_dry();
    for i in 0..2 {
        assert_eq!(node.tokens[&i], oracle(&BLOCKS, &[i as u32; 700], 800), "sequence {i}");
    }
}

/// Blocks with windows of 17 and 33 tokens beside one that sees all: a step has three lanes, whose pages are of one class.
#[test]
fn shares_hold_where_windows_slide() {
    let blocks = [2000, 501, 1001, 3, 1003, 502, 1005, 2001];
    let mut node = Node::new(limits(60, 64, 64));
    let span = node.engine.handle_host(host(&blocks, 0, blocks.len()));
    for i in 0..4 {
        node.admit(of("flood", admit(i, span, &[i as u32; 150], 600, 0)));
    }
    while node.engine.gauges().free_pages > 4 {
        step(&mut node, 1);
    }
    for i in 0..4 {
        node.admit(of(&format!("new_{i}"), admit(100 + i, span, &[9; 250], 40, 0)));
        let steps = steps_to_first_token(&mut node, 100 + i);
        assert!(steps <= 80, "newcomer {i} waits {steps} batches");
        step(&mut node, 60);
        assert!(node.finished.contains_key(&(100 + i)), "newcomer {i} has {} tokens", node.tokens[&(100 + i)].len());
    }
    assert!(node.finished.keys().all(|number| *number >= 100));
    node.run_dry();
    for i in 0..4 {
        assert_eq!(node.tokens[&i], oracle(&blocks, &[i as u32; 150], 600), "sequence {i}");
    }
}

#[test]
fn one_sequence_does_not_keep_all_pages() {
    let (mut node, span) = node(limits(100, 64, 64));
    node.admit(of("flood", admit(0, span, &[1; 1400], 190, 0)));
    while node.engine.gauges().free_pages > 8 {
        step(&mut node, 1);
    }
    node.admit(of("new", admit(100, span, &[9; 400], 40, 0)));
    let steps = steps_to_first_token(&mut node, 100);
    assert!(steps <= 40, "the newcomer waits {steps} batches");
    node.run_dry();
    assert_eq!(node.tokens[&0], oracle(&BLOCKS, &[1; 1400], 190));
    assert_eq!(node.tokens[&100], oracle(&BLOCKS, &[9; 400], 40));
}

/// Sequences that give way of forty, of so many tenants, of which about five have pages at one time.
fn gave_way(tenants: u64) -> u64 {
    let (mut node, span) = node(limits(32, 64, 64));
    for i in 0..40 {
        let length = 30 + i as u32 * 7 % 40;
        node.admit(of(&format!("ten_{}", i % tenants), admit(i, span, &[i as u32; 60], length, 0)));
    }
    node.run_dry();
    node.engine.counters().preemption_count
}

#[test]
fn shares_smaller_than_one_sequence_are_not_claimed_back_and_forth() {
    let (one, many) = (gave_way(1), gave_way(40));
    assert!(many * 2 <= one * 3, "{many} give way where each is of a tenant of its own, {one} where all are of one");
}

/// So small shares do not save who holds much more than others need.
#[test]
fn a_small_newcomer_takes_from_a_giant_where_shares_are_smaller_than_both() {
    let (mut node, span) = node(limits(76, 64, 64));
    node.admit(of("giant", admit(0, span, &[1; 800], 300, 0)));
    for i in 1..4 {
        node.admit(of(&format!("ten_{i}"), admit(i, span, &[i as u32; 60], 60, 0)));
    }
    step(&mut node, 35);
    assert!(node.engine.gauges().free_pages < 8 && node.engine.counters().preemption_count == 0);
    for i in 4..40 {
        node.admit(of(&format!("ten_{i}"), admit(i, span, &[i as u32; 120], 20, 0)));
    }
    let steps = steps_to_first_token(&mut node, 4);
    assert!(steps <= 10, "it waits {steps} batches");
    assert!(node.finished.is_empty(), "for no end of a sequence");
    assert_eq!(node.engine.counters().preemption_count, 1);
    let giant = node.id(0).expect("it is there");
    assert_eq!(node.engine.sequences[giant].status, crate::state::sequence::Status::Waiting, "the giant gave way");
    node.run_dry();
    assert_eq!(node.tokens[&0], oracle(&BLOCKS, &[1; 800], 300));
}

#[test]
fn who_stays_within_its_share_is_spared() {
    let (mut node, span) = node(limits(100, 64, 64));
    node.admit(of("modest", admit(50, span, &[7; 100], 400, 0)));
    for i in 0..6 {
        node.admit(of("flood", admit(i, span, &[i as u32; 200], 300, 0)));
    }
    let id = node.id(50).expect("it runs");
    let mut sent = Vec::new();
    while !node.finished.contains_key(&50) {
        node.step(&mut sent);
        let waits = node.engine.sequences.get(id).is_some_and(|sequence| sequence.status == crate::state::sequence::Status::Waiting);
        assert!(!waits || !node.started_us.contains_key(&50), "it never gives way");
    }
    assert!(node.engine.counters().preemption_count > 0, "the flooder's do, to each other");
    node.run_dry();
}

/// Two executors with a chain cut over both, and the router's part: what fails is admitted again with its journal, as another sequence.
struct Cut {
    nodes: [Node; 2],
    spans: [SpanIndex; 2],
    /// Prompt and length of each sequence, by the number that it has now, and its first number.
    asked: BTreeMap<u64, (u64, &'static str, Vec<u32>, u32)>,
    failures: u32,
}

impl Cut {
    fn new(blocks: &[u32], pages: u64) -> Self {
        let mut nodes = [0, 1].map(|_| Node::new(Limits { prefix_cache: false, ..limits(pages, 16, 16) }));
        let spans = [nodes[0].engine.handle_host(host(blocks, 0, 3)), nodes[1].engine.handle_host(host(blocks, 3, blocks.len()))];
        Self { nodes, spans, asked: BTreeMap::new(), failures: 0 }
    }

    fn admit(&mut self, number: u64, first: u64, tenant: &'static str, prompt: &[u32], said: &[u32], count: u32) {
        for (node, span) in self.nodes.iter_mut().zip(self.spans) {
            let tokens = [prompt, said].concat();
            node.tokens.insert(number, said.to_vec());
            node.admit(of(tenant, Admit { tokens, ..admit(number, span, prompt, count, 0) }));
        }
        self.asked.insert(number, (first, tenant, prompt.to_vec(), count));
    }

    fn step(&mut self) {
        for i in 0..2 {
            let mut sent = Vec::new();
            self.nodes[i].step(&mut sent);
            deliver(sent, &mut self.nodes[1 - i]);
        }
        let failed: Vec<u64> = self.nodes.iter_mut().flat_map(|node| std::mem::take(&mut node.failed)).collect();
        for number in failed {
            let Some((first, tenant, prompt, count)) = self.asked.remove(&number) else { continue };
            self.failures += 1;
            for node in &mut self.nodes {
                if let Some(id) = node.id(number) {
                    node.engine.handle_cancel(id);
                }
            }
            let said = self.nodes[0].tokens[&number].clone();
            self.admit(number + 1000, first, tenant, &prompt, &said, count);
        }
    }

    /// Tokens of the sequence that was first called so.
    fn tokens(&self, first: u64) -> &[u32] {
        let number = self.asked.iter().find(|(_, asked)| asked.0 == first).map(|(number, _)| number);
        &self.nodes[0].tokens[number.expect("it was asked for")]
    }
}

#[test]
fn chains_that_cannot_be_preempted_give_way_too() {
    let blocks = [2100, 31, 1031, 32, 1032, 2101];
    // Of forty pages on each executor the flooder's two have all, from start to end.
    let mut cut = Cut::new(&blocks, 40);
    for i in 0..2 {
        cut.admit(i, i, "flood", &[i as u32; 60], &[], 260);
    }
    (0..80).for_each(|_| cut.step());
    assert!(cut.nodes.iter().all(|node| node.engine.gauges().free_pages == 0));
    for i in 0..3 {
        cut.admit(100 + i, 100 + i, "new", &[9; 60], &[], 10);
        let steps = (0..1000)
            .take_while(|_| {
                cut.step();
                cut.tokens(100 + i).is_empty()
            })
            .count();
        assert!(steps <= 120, "newcomer {i} waits {steps} batches");
    }
    assert!(cut.failures >= 1 && (0..2).all(|i| cut.tokens(i).len() < 260), "for no end of a sequence");
    for _ in 0..4000 {
        cut.step();
    }
    for i in 0..2 {
        assert_eq!(cut.tokens(i), oracle(&blocks, &[i as u32; 60], 260), "sequence {i}");
    }
    assert!(cut.nodes.iter().all(|node| node.engine.gauges().used_pages == 0));
}
