//! Plans in time, on a virtual clock with a device whose batches take as long as a formula says.

use super::device::host;
use super::node::{Node, admit, limits};
use crate::state::batch::Batch;
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};

/// A device that reads weights for 20 ms and takes 0.4 ms for each row above eight.
pub(super) fn one_model_us(batch: &Batch) -> u64 {
    20_000 + 400 * u64::from(batch.row_count.saturating_sub(8))
}

/// A fifth of a millisecond for each block, and 10 us for each row in it.
pub(super) fn by_blocks_us(batch: &Batch) -> u64 {
    batch.strands.iter().map(|strand| strand.blocks.len() as u64 * (200 + 10 * u64::from(strand.row_count))).sum()
}

/// Gaps between a sequence's tokens in microseconds.
pub(super) fn gaps(node: &Node, number: u64) -> Vec<u64> {
    node.emitted_us[&number].windows(2).map(|pair| pair[1] - pair[0]).collect()
}

pub(super) fn percentile(mut values: Vec<u64>, share: f64) -> u64 {
    values.sort_unstable();
    values[((values.len() - 1) as f64 * share) as usize]
}

/// Runs a node, admitting `(at_us, sequence)` as their times come, to the end.
pub(super) fn run(node: &mut Node, arrivals: Vec<(u64, Admit)>) {
    run_until(node, arrivals, |_| false);
}

/// The same, but stops when `is_over`.
pub(super) fn run_until(node: &mut Node, mut arrivals: Vec<(u64, Admit)>, is_over: impl Fn(&Node) -> bool) {
    arrivals.reverse();
    let mut sent = Vec::new();
    while !is_over(node) {
        while arrivals.last().is_some_and(|(at, _)| *at <= node.now_us) {
            let (_, admit) = arrivals.pop().expect("there is one");
            node.admit(admit);
        }
        if !node.step(&mut sent) {
            match arrivals.last() {
                Some((at, _)) => node.now_us = node.now_us.max(*at),
                None if node.engine.sequences.is_empty() => return,
                None => {}
            }
        }
    }
}

/// Eight streams decode; a prompt of 1,500 tokens comes every two seconds. Returns the longest gap of the streams and the time of it all.
fn streams_and_prompts(limits: Limits) -> (u64, u64) {
    let mut node = Node::new(limits);
    node.cost_us = Some(one_model_us);
    let blocks = [2000, 1, 1001, 2001];
    let span = node.engine.handle_host(host(&blocks, 0, blocks.len()));
    let mut arrivals: Vec<_> = (0..8u32).map(|i| (0, admit(i.into(), span, &[i; 10], 400, 0))).collect();
    arrivals.extend((0..4u64).map(|i| (1_000_000 + i * 2_000_000, admit(100 + i, span, &vec![i as u32; 1500], 4, 0))));
    run(&mut node, arrivals);
    let longest = (0..8).flat_map(|number| gaps(&node, number)).max().expect("they have gaps");
    (longest, node.now_us)
}

#[test]
fn a_prompt_rides_in_the_slack_of_those_who_decode() {
    let large = Limits { sequences_max: 32, prefix_cache: false, ..limits(2000, 2048, 2048) };
    let (off, off_time) = streams_and_prompts(large.clone());
    let (on, on_time) = streams_and_prompts(Limits { gap_ms: 100, ..large });
    assert!(off > 600_000, "a prompt at once stalls everybody: {off} us");
    assert!(on <= 110_000, "the longest gap is {on} us for a target of 100 ms");
    assert!(off >= 5 * on);
    assert!(on_time as f64 <= 1.05 * off_time as f64, "{on_time} us in all, {off_time} with prompts at once");
}

#[test]
fn prompts_advance_where_a_pass_alone_takes_the_whole_gap() {
    let (longest, _) = streams_and_prompts(Limits { gap_ms: 15, sequences_max: 32, prefix_cache: false, ..limits(2000, 2048, 2048) });
    // A chunk may take as long as a pass: twice 20 ms, and the tile of the first row.
    assert!(longest <= 2 * 20_000 + 400 * 16, "the longest gap is {longest} us");
}

#[test]
fn long_batches_are_split() {
    let limits = Limits { batch_ms_max: 60, prefix_cache: false, ..limits(2000, 2048, 2048) };
    let mut node = Node::new(limits);
    node.cost_us = Some(one_model_us);
    let blocks = [2000, 1, 1001, 2001];
    let span = node.engine.handle_host(host(&blocks, 0, blocks.len()));
    // The first prompts teach what batches cost.
    run(&mut node, (0..4).map(|i| (0, admit(i, span, &vec![7; 400], 2, 0))).collect());
    node.batch_us_most = 0;
    let at = node.now_us;
    run(&mut node, (10..12).map(|i| (at, admit(i, span, &vec![i as u32; 1500], 2, 0))).collect());
    assert!(node.batch_us_most <= 66_000, "a batch took {} us of 60 ms", node.batch_us_most);
}

#[test]
fn siblings_of_any_depth_and_a_stranger_keep_their_gaps() {
    let deep: Vec<u32> = [2000].into_iter().chain((1..=30).flat_map(|i| [i, 1000 + i])).chain([2001]).collect();
    let shallow: Vec<u32> = deep[..13].iter().copied().chain([2002]).collect();
    let stranger: Vec<u32> = [2100].into_iter().chain((41..=52).flat_map(|i| [i, 1000 + i])).chain([2101]).collect();
    let mut node = Node::new(Limits { gap_ms: 80, ttft_ms: 2000, sequences_max: 32, kv_bytes: 1 << 30, ..limits(20_000, 256, 256) });
    node.cost_us = Some(by_blocks_us);
    let spans: Vec<SpanIndex> = [&shallow, &deep, &stranger].map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).to_vec();
    let mut arrivals = Vec::new();
    for i in 0..6u64 {
        arrivals.push((i * 1000, admit(i, spans[i as usize % 3], &[i as u32; 20], 120, 0)));
    }
    for i in 0..6u64 {
        arrivals.push((300_000 + i * 400_000, admit(100 + i, spans[i as usize % 3], &vec![i as u32; 300], 3, 0)));
    }
    run(&mut node, arrivals);
    for number in 0..6 {
        let p99 = percentile(gaps(&node, number), 0.99);
        assert!(p99 <= 80_000, "sequence {number}: the p99 gap is {p99} us");
    }
    assert_eq!(node.late_us_most, 0, "no decode waits past its time");
    for number in 100..106u64 {
        let first = node.emitted_us[&number][0] - (300_000 + (number - 100) * 400_000);
        assert!(first <= 2_000_000, "sequence {number}: {first} us to the first token");
    }
}
