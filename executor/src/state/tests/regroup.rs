//! How well siblings meet where their chains run together, and what it costs where that does not pay: closed loops on devices that cost what
//! SmolLM2-135M costs on two cores, and what a model of a few thousand weights does. The counts are those of docs/scheduling.md, "Meeting".

use std::collections::BTreeMap;

use super::device::host;
use super::node::{Node, admit, limits};
use super::time::{gaps, percentile, run};
use crate::state::batch::{Batch, Strand};
use crate::state::clock::REGROUP_PASSES;
use crate::state::limits::Limits;
use crate::state::sequence::SpanIndex;

/// Blocks from here on say how many layers they stand for, in their last two digits.
pub(super) const LAYERS_FROM: u32 = 10_000;
const HEAD: u32 = 90_008;

/// A chain for each of `models` that share so many of 30 layers, and the head of eight layers' bytes if `head`.
pub(super) fn descendants(models: u32, shared: u32, head: bool) -> Vec<Vec<u32>> {
    let chain = |m: u32| {
        let trunk = if shared > 0 { vec![2000, 1, LAYERS_FROM + shared] } else { vec![2000 + 10 * m, 1 + m] };
        let own = [100 + m, 20_000 + 100 * m + (30 - shared), if head { HEAD } else { HEAD + 100 * m }];
        trunk.into_iter().chain(own).collect()
    };
    (0..models).map(chain).collect()
}

fn layers(strand: &Strand) -> u64 {
    strand.blocks.iter().filter(|block| block.0 >= LAYERS_FROM).map(|block| u64::from(block.0 % 100)).sum()
}

/// Time of all layers of a batch, one of so many rows taking so long.
fn all_layers(batch: &Batch, layer: impl Fn(u64) -> u64) -> u64 {
    batch.strands.iter().map(|strand| layers(strand) * layer(u64::from(strand.row_count))).sum()
}

/// A layer reads its weights in 80 us and takes 8 us for each row; a batch takes 30 us, whatever it does.
pub(super) fn smollm2_us(batch: &Batch) -> u64 {
    30 + all_layers(batch, |rows| 80 + 8 * rows)
}

/// A layer takes 5 us, and one for each row.
pub(super) fn small_us(batch: &Batch) -> u64 {
    30 + all_layers(batch, |rows| 5 + rows)
}

/// What a closed loop came to.
pub(super) struct Outcome {
    pub(super) tokens_s: f64,
    /// Rows of a batch through the shared start, the tops and the head, on average.
    rows: [f64; 3],
    /// Time to the first token at the 95th percentile.
    first_us: u64,
}

/// So many streams for each chain, and so many requests of each stream.
pub(super) fn closed_loop(chains: &[Vec<u32>], node: Node, streams: u64, requests: u64, prompt: u32, tokens: u64) -> Outcome {
    let mut node = node;
    let spans: Vec<SpanIndex> = chains.iter().map(|blocks| node.host(blocks, &[])).collect();
    let (clients, mut sent) = (streams * chains.len() as u64, Vec::new());
    let mut asked = vec![0u64; clients as usize];
    let (mut total, mut came_us) = (0, BTreeMap::new());
    loop {
        for client in 0..clients {
            let turn = &mut asked[client as usize];
            let is_over = *turn == 0 || node.finished.contains_key(&(client + clients * (*turn - 1)));
            if is_over && *turn < requests {
                let number = client + clients * *turn;
                // No two answers are as long.
                let (count, span) = (tokens + number * 7 % 16, spans[client as usize % spans.len()]);
                let prompt: Vec<u32> = (0..prompt).map(|t| (t * 7 + number as u32 * 13) % 97).collect();
                came_us.insert(number, node.now_us);
                node.admit(admit(number, span, &prompt, count as u32, 0));
                (*turn, total) = (*turn + 1, total + count);
            }
        }
        if !node.step(&mut sent) && node.engine.sequences.is_empty() {
            break;
        }
    }
    let through = |from: u32, to: u32| {
        let of = node.crossed.range(from..to).map(|(_, counts)| *counts);
        let (batches, rows) = of.fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1));
        rows as f64 / batches as f64
    };
    let rows = [through(LAYERS_FROM, 20_000), through(20_000, HEAD), through(HEAD, u32::MAX)];
    let first_us = percentile(came_us.iter().map(|(number, came)| node.emitted_us[number][0] - came).collect(), 0.95);
    Outcome { tokens_s: total as f64 * 1e6 / node.now_us as f64, rows, first_us }
}

pub(super) fn node(regroup_wait_ms: u32, batches_in_flight_max: u32, cost_us: fn(&Batch) -> u64) -> Node {
    let limits = Limits { sequences_max: 32, prefix_cache: false, regroup_wait_ms, batches_in_flight_max, ..limits(20_000, 256, 256) };
    let mut node = Node::new(limits);
    (node.cost_us, node.between_us) = (Some(cost_us), 30);
    node
}

/// Eight descendants that share 22 of 30 layers and the head: the counts of docs/scheduling.md, "Meeting".
#[test]
fn siblings_meet_wherever_their_chains_do() {
    let alone = closed_loop(&descendants(8, 0, false), node(100, 2, smollm2_us), 1, 3, 16, 128);
    // The ideal: of each pass the trunk and the head once, the tops eight times, and the rows' own time.
    let (apart, met) = (8 * 38 * 88, 30 * (80 + 8 * 8) + 8 * 8 * 88);
    let ideal = f64::from(apart) / f64::from(met);
    for in_flight in [1, 2] {
        let [off, on] = [0, 100].map(|wait| closed_loop(&descendants(8, 22, true), node(wait, in_flight, smollm2_us), 1, 3, 16, 128));
        let gains = [off.tokens_s / alone.tokens_s, on.tokens_s / alone.tokens_s];
        println!("{in_flight} in flight: {gains:.2?} of {ideal:.2}, rows {:.2?} and {:.2?}", off.rows, on.rows);
        assert!(off.rows[0] > 8.0 && on.rows[0] > 8.0, "all decode together through the trunk: {:?}, {:?}", off.rows, on.rows);
        assert!(off.rows[2] < 1.5 && on.rows[2] > 8.0, "they wait for each other before the head: {:?}, {:?}", off.rows, on.rows);
        assert!(gains[0] < 0.7 * ideal && gains[1] > 0.9 * ideal, "{gains:?} of {ideal}");
    }
}

/// Whatever is shared: no slower than batches of whole models by more than 3%, on a device where a batch costs 60 us for its own sake and a
/// layer 6, and on one where a layer costs 88.
#[test]
fn sharing_is_not_slower_than_whole_models() {
    for cost_us in [small_us as fn(&Batch) -> u64, smollm2_us] {
        for (models, streams) in [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)] {
            let whole = closed_loop(&descendants(models, 0, false), node(100, 2, cost_us), streams, 6, 16, 96);
            for (shared, head) in [(1, false), (1, true), (8, true), (22, true)] {
                let met = closed_loop(&descendants(models, shared, head), node(100, 2, cost_us), streams, 6, 16, 96);
                let ratio = met.tokens_s / whole.tokens_s;
                println!("{models} models, {streams} streams of each, {shared} layers shared, head {head}: {ratio:.3}");
                assert!(ratio >= 0.97, "{models} models, {streams} streams of each, {shared} layers shared, head {head}: {ratio:.3}");
            }
        }
    }
}

/// A layer takes 800 us, and 20 for each row: a pass of eight such models takes more than the 20 ms that rows once waited, whatever they cost.
fn large_us(batch: &Batch) -> u64 {
    30 + all_layers(batch, |rows| 800 + 20 * rows)
}

/// A pass and a half brings as many together as any wait, whatever a model costs; a fixed one is too short for some.
#[test]
fn a_wait_of_passes_is_as_good_as_any() {
    for cost_us in [small_us as fn(&Batch) -> u64, smollm2_us, large_us] {
        for (streams, prompt, tokens) in [(1, 16, 96), (1, 128, 64), (2, 16, 96)] {
            let run = |wait_ms: u32, passes: f64| {
                let mut node = node(wait_ms, 2, cost_us);
                node.engine.clock.regroup_passes = passes;
                closed_loop(&descendants(8, 22, true), node, streams, 3, prompt, tokens)
            };
            let (bounded, long, fixed) = (run(200, REGROUP_PASSES), run(200, f64::INFINITY), run(20, f64::INFINITY));
            let ratios =
                [bounded.tokens_s / long.tokens_s, bounded.tokens_s / fixed.tokens_s, bounded.first_us as f64 / long.first_us as f64];
            println!("{streams} streams, {prompt} in, {tokens} out: {ratios:.3?}, rows {:.2?} and {:.2?}", bounded.rows, long.rows);
            assert!(ratios[0] >= 0.985, "a long wait gives {} tokens/s, a pass {}", long.tokens_s, bounded.tokens_s);
            assert!(ratios[1] >= 0.985, "20 ms give {} tokens/s, a pass {}", fixed.tokens_s, bounded.tokens_s);
            assert!(ratios[2] <= 1.05, "first tokens take {} us, with a long wait {}", bounded.first_us, long.first_us);
            let is_large = cost_us as usize == large_us as fn(&Batch) -> u64 as usize;
            assert!(!is_large || ratios[1] > 1.1, "20 ms are too short for a pass of a large model: {ratios:?}");
        }
    }
}

/// A sibling of 6 layers, one of 30 that begins with the same six, and a model of 12; each has a head of its own.
fn depths() -> [Vec<u32>; 3] {
    let shallow = vec![2000, 1, LAYERS_FROM + 6, HEAD + 100];
    let deep = vec![2000, 1, LAYERS_FROM + 6, 101, 20_000 + 24, HEAD + 200];
    let stranger = vec![2010, 2, 20_100 + 12, HEAD + 300];
    [shallow, deep, stranger]
}

/// Two streams of each with a target for gaps; every 60 ms a prompt of 120 tokens of one of them, if `prompts`. None ends before all of these have.
fn streams_of_depths(gap_ms: u32, regroup_wait_ms: u32, prompts: bool) -> Node {
    let mut node = node(regroup_wait_ms, 2, smollm2_us);
    node.engine.limits.gap_ms = gap_ms;
    let spans = depths().map(|blocks| node.engine.handle_host(host(&blocks, 0, blocks.len())));
    let mut arrivals: Vec<_> = (0..6u64).map(|i| (i * 1000, admit(i, spans[i as usize % 3], &[i as u32; 20], 400, 0))).collect();
    let count = if prompts { 12 } else { 0 };
    arrivals.extend((0..count).map(|i| (200_000 + i * 60_000, admit(100 + i, spans[i as usize % 3], &vec![i as u32; 120], 4, 0))));
    run(&mut node, arrivals);
    let last_prompt = node.emitted_us.range(100..).map(|(_, emitted)| emitted[3]).max().unwrap_or(0);
    assert!((0..6).all(|number| node.emitted_us[&number][399] > last_prompt), "the streams see all prompts");
    node
}

/// One token for everybody takes 6.7 ms, and a tile of a prompt in every segment 4.2 ms more: whatever more than that is wanted holds.
#[test]
fn siblings_of_any_depth_and_a_stranger_keep_what_costs_allow() {
    for (prompts, gaps_ms) in [(false, [8, 12, 20]), (true, [12, 20, 40])] {
        for gap_ms in gaps_ms {
            for wait in [0, 20, 200] {
                let node = streams_of_depths(gap_ms, wait, prompts);
                // Once each has decoded a while: before, nobody knows what batches cost.
                let gaps: Vec<Vec<u64>> = (0..6).map(|number| gaps(&node, number).split_off(20)).collect();
                let p99: Vec<u64> = gaps.iter().map(|gaps| percentile(gaps.clone(), 0.99)).collect();
                let most = gaps.iter().flatten().max();
                println!("prompts {prompts}, gap {gap_ms}, wait {wait}: p99 {p99:?}, most {most:?}, waited {:?}", node.waited_us_most);
                assert!(
                    p99.iter().all(|p99| *p99 <= u64::from(gap_ms) * 1000),
                    "prompts {prompts}, wait {wait}: of {gap_ms} ms the p99 gaps are {p99:?} us"
                );
            }
        }
    }
}

/// A row that is ready goes before whatever becomes ready `row_wait_ms` after it: it waits so long, and for what the device has by then.
#[test]
fn no_ready_row_waits_longer_than_its_turn() {
    for row_wait_ms in [10, 30, 200] {
        for wait in [0, 20, 200] {
            let mut node = node(wait, 2, smollm2_us);
            node.engine.limits.row_wait_ms = row_wait_ms;
            let chains: Vec<Vec<u32>> = depths().into_iter().chain(descendants(4, 22, true)).collect();
            let spans: Vec<SpanIndex> = chains.iter().map(|blocks| node.engine.handle_host(host(blocks, 0, blocks.len()))).collect();
            let stream = |i: u64| (i * 3000, admit(i, spans[i as usize % spans.len()], &vec![i as u32; 20 + i as usize * 9 % 70], 60, 0));
            run(&mut node, (0..40).map(stream).collect());
            let bound = u64::from(row_wait_ms) * 1000 + 3 * node.batch_us_most;
            println!("row_wait_ms {row_wait_ms}, wait {wait}: {:?} of {bound}, batch {}", node.waited_us_most, node.batch_us_most);
            assert!(
                node.waited_us_most[..2].iter().all(|waited| *waited <= bound),
                "rows wait for {:?} us, {bound} at most",
                node.waited_us_most
            );
        }
    }
}
