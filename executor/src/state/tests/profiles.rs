//! Blocks that were profiled: what a segment costs is known before it has run, is what its blocks cost under any cut, and gives way to what is seen.

use std::time::Duration;

use super::node::{Node, admit, limits};
use super::regroup::{self, LAYERS_FROM, closed_loop, descendants, small_us, smollm2_us};
use super::time::{gaps, one_model_us, run};
use crate::state::batch::Batch;
use crate::state::cost::CostCurve;
use crate::state::limits::Limits;
use crate::state::segments::BlockIndex;
use crate::state::sequence::SpanIndex;

/// As `ashlar zoo profile` measures, where rows take so long.
fn profile(micros: impl Fn(u32) -> f64) -> CostCurve {
    let time = |rows| (rows, Duration::from_secs_f64(micros(rows) / 1e6));
    CostCurve::seeded(&[1, 2, 4, 8, 16, 32, 64, 128, 256].map(time))
}

/// A quarter of `one_model_us`, whose chain has four blocks.
fn of_one_model(_: u32) -> CostCurve {
    profile(|rows| 5000.0 + 100.0 * f64::from(rows.saturating_sub(8)))
}

/// Of a node that hosts the chain: what its segments are predicted to take together.
fn predicted(node: &Node, rows: u32) -> Option<f64> {
    let alive = node.engine.segments.iter().zip(&node.engine.costs).filter(|(segment, _)| segment.span_count > 0);
    alive.map(|(_, costs)| costs.predict(rows)).sum()
}

#[test]
fn what_segments_cost_is_what_their_blocks_do_under_any_cut() {
    let mut node = Node::new(limits(1000, 64, 64));
    node.profiled = Some(|block| profile(|rows| f64::from(block % 100 + rows)));
    node.host(&[2000, 1, 1002, 3, 1004, 2005], &[]);
    assert_eq!((node.engine.costs.len(), predicted(&node, 8)), (1, Some(f64::from(1 + 2 + 3 + 4 + 5 + 6 * 8))));
    // A sibling cuts it; nothing has run, yet the parts are known.
    node.host(&[2000, 1, 1002, 13, 1004, 2005], &[]);
    assert_eq!(predicted(&node, 8), Some(f64::from(1 + 2 + 3 + 13 + 4 + 5 + 7 * 8)));
    // A part with a block that was not profiled is not.
    node.profiled = None;
    node.host(&[2100, 31, 2101], &[]);
    assert_eq!(predicted(&node, 8), None);
    // A place that another block has by now is not what it was.
    assert!(node.engine.profiles.contains_key(&BlockIndex(13)));
    node.host(&[2100, 13, 2101], &[]);
    assert!(!node.engine.profiles.contains_key(&BlockIndex(13)));
}

/// The longest batch of a node to which two long prompts come before anything has run.
fn longest_of_the_first(profiled: Option<fn(u32) -> CostCurve>) -> u64 {
    let mut node = Node::new(Limits { batch_ms_max: 60, prefix_cache: false, ..limits(2000, 2048, 2048) });
    node.cost_us = Some(one_model_us);
    node.profiled = profiled;
    let span = node.host(&[2000, 1, 1001, 2001], &[]);
    run(&mut node, (0..2).map(|i| (0, admit(i, span, &vec![i as u32; 1500], 2, 0))).collect());
    node.batch_us_most
}

#[test]
fn long_batches_are_split_before_any_has_run() {
    let (learned, profiled) = (longest_of_the_first(None), longest_of_the_first(Some(of_one_model)));
    assert!(learned > 300_000, "nobody knows that the first batch is long: {learned} us");
    assert!(profiled <= 66_000, "a batch took {profiled} us of 60 ms");
}

/// Eight streams that want a token every 100 ms, and a prompt of 1,500 tokens before any has run. Returns the longest gap of the streams and the
/// time to the prompt's first token.
fn early_prompt(profiled: Option<fn(u32) -> CostCurve>) -> (u64, u64) {
    let mut node = Node::new(Limits { gap_ms: 100, sequences_max: 32, prefix_cache: false, ..limits(2000, 2048, 2048) });
    node.cost_us = Some(one_model_us);
    node.profiled = profiled;
    let span = node.host(&[2000, 1, 1001, 2001], &[]);
    let mut arrivals: Vec<_> = (0..8u32).map(|i| (0, admit(i.into(), span, &[i; 10], 200, 0))).collect();
    arrivals.push((100_000, admit(100, span, &vec![7; 1500], 4, 0)));
    run(&mut node, arrivals);
    let longest = (0..8).flat_map(|number| gaps(&node, number)).max().expect("they have gaps");
    (longest, node.emitted_us[&100][0] - 100_000)
}

#[test]
fn gaps_are_kept_before_large_batches_have_run_and_a_prompt_is_as_fast() {
    let (learned, profiled) = (early_prompt(None), early_prompt(Some(of_one_model)));
    println!("longest gap and first token, learned {learned:?}, profiled {profiled:?}");
    assert!(profiled.0 <= 110_000, "the longest gap is {} us for a target of 100 ms", profiled.0);
    assert!(profiled.0 <= learned.0, "the longest gap is {} us, {} where nothing is known", profiled.0, learned.0);
    let (first, learned) = (profiled.1 as f64, learned.1 as f64);
    assert!(first <= 1.05 * learned, "the first token comes after {first} us, {learned} where nothing is known");
}

/// Of a chain of `descendants` where a layer takes so long, by `share` wrong.
fn of_layers(block: u32, share: f64, layer: impl Fn(f64) -> f64) -> CostCurve {
    let layers = if block < LAYERS_FROM { 0 } else { block % 100 };
    profile(|rows| share * f64::from(layers) * layer(f64::from(rows)))
}

/// A layer of `small_us`.
fn small(block: u32, share: f64) -> CostCurve {
    of_layers(block, share, |rows| 5.0 + rows)
}

/// A layer of `smollm2_us`.
fn large(block: u32, share: f64) -> CostCurve {
    of_layers(block, share, |rows| 80.0 + 8.0 * rows)
}

/// Siblings of a small model and of a large one give as many tokens as where all is learned, be the profile true or three times off: what is seen
/// corrects it.
#[test]
fn siblings_give_as_much_with_any_profile() {
    let of_small: [fn(u32) -> CostCurve; 3] = [|block| small(block, 1.0), |block| small(block, 3.0), |block| small(block, 0.33)];
    let of_large: [fn(u32) -> CostCurve; 3] = [|block| large(block, 1.0), |block| large(block, 3.0), |block| large(block, 0.33)];
    for (cost_us, profiles) in [(small_us as fn(&Batch) -> u64, of_small), (smollm2_us, of_large)] {
        for (models, streams) in [(2, 1), (8, 1), (4, 2)] {
            let chains = descendants(models, 22, true);
            let outcome = |profiled| {
                let mut node = regroup::node(100, 2, cost_us);
                node.profiled = profiled;
                closed_loop(&chains, node, streams, 6, 16, 96).tokens_s
            };
            let learned = outcome(None);
            let ratios = profiles.map(|profiled| outcome(Some(profiled)) / learned);
            println!("{models} models, {streams} streams of each: {ratios:.3?} of {learned:.0} tokens/s");
            assert!(ratios.iter().all(|ratio| *ratio >= 0.97), "{models} models, {streams} streams of each: {ratios:.3?}");
        }
    }
}

/// A profile never changes what a sequence says.
#[test]
fn tokens_are_those_without_a_profile() {
    let tokens = |profiled| {
        let mut node = Node::new(limits(200, 64, 32));
        node.cost_us = Some(one_model_us);
        node.profiled = profiled;
        let spans: Vec<SpanIndex> = super::family().iter().map(|blocks| node.host(blocks, &[])).collect();
        let arrivals = (0..12u64).map(|i| (i * 20_000, admit(i, spans[i as usize % 4], &vec![i as u32; 5 + i as usize * 7], 20, 0)));
        run(&mut node, arrivals.collect());
        node.tokens
    };
    assert_eq!(tokens(None), tokens(Some(of_one_model)));
}
