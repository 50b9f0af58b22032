//! Segments that are alike, abreast: who comes along, and that nobody else does.

use super::device::oracle;
use super::form;
use super::node::{Node, admit, limits};
use crate::state::batch::Batch;
use crate::state::limits::Limits;

/// Three descendants, each with an attention block and a feed-forward of its own between what they share, and a stranger of the same form as the own parts
/// and the ends.
fn chains() -> Vec<Vec<u32>> {
    let descendant = |own: u32| vec![2000, 1, 1001, 2, 1002, 10 + own, 1010 + own, 2001];
    vec![descendant(0), descendant(1), descendant(2), vec![2100, 31, 1031, 2101]]
}

/// A block reads its weights in a millisecond.
fn cost_us(batch: &Batch) -> u64 {
    batch.strands.iter().map(|strand| strand.blocks.len() as u64 * (1000 + 10 * u64::from(strand.row_count))).sum()
}

fn node(strands_max: u32, forms: fn(u32) -> u32) -> Node {
    let mut node = Node::new(Limits { strands_max, prefix_cache: false, batches_in_flight_max: 1, ..limits(400, 64, 64) });
    node.forms = forms;
    node.cost_us = Some(cost_us);
    let spans: Vec<_> = chains().iter().map(|blocks| node.host(blocks, &[])).collect();
    for (number, span) in spans.into_iter().enumerate() {
        node.admit(admit(number as u64, span, &[3, 1, 4], 40, 0));
    }
    node.run_dry();
    for (number, blocks) in chains().iter().enumerate() {
        assert_eq!(node.tokens[&(number as u64)], oracle(blocks, &[3, 1, 4], 40));
    }
    node
}

#[test]
fn own_parts_of_descendants_run_in_one_batch() {
    let node = node(64, form);
    let abreast = "[10 1010] 0: 1 | [11 1011] 1: 1 | [12 1012] 2: 1";
    assert_eq!(node.strands_most, 3);
    // Some batches show what a segment takes alone.
    let count = node.pictures.iter().filter(|picture| sorted(picture) == abreast).count();
    assert!(count > 25, "{count} of 39 passes: {:#?}", node.pictures);
    // Neither what is shared (two rows of one segment are one strand) nor a whole chain of another form comes along.
    let strangers = node.pictures.iter().filter(|picture| picture.contains('|') && picture.contains("31 "));
    assert_eq!(strangers.count(), 0);
}

/// Strands in order of their blocks.
fn sorted(picture: &str) -> String {
    let mut strands: Vec<&str> = picture.split(" | ").collect();
    strands.sort_unstable();
    strands.join(" | ")
}

#[test]
fn no_more_strands_than_are_set_and_none_of_another_form() {
    assert_eq!(node(2, form).strands_most, 2);
    assert_eq!(node(1, form).strands_most, 1);
    assert_eq!(node(64, |block| block).strands_most, 1);
}

#[test]
fn models_that_share_nothing_run_abreast_as_wholes() {
    let mut node = Node::new(Limits { batches_in_flight_max: 1, ..limits(400, 64, 64) });
    node.forms = form;
    node.cost_us = Some(cost_us);
    let chains: Vec<Vec<u32>> = (0..4).map(|m| vec![2010 + 10 * m, 1 + m, 1001 + m, 2011 + 10 * m]).collect();
    let spans: Vec<_> = chains.iter().map(|blocks| node.host(blocks, &[])).collect();
    for (number, span) in spans.into_iter().enumerate() {
        node.admit(admit(number as u64, span, &[number as u32; 5], 40, 0));
    }
    node.run_dry();
    for (number, blocks) in chains.iter().enumerate() {
        assert_eq!(node.tokens[&(number as u64)], oracle(blocks, &[number as u32; 5], 40));
    }
    assert_eq!(node.strands_most, 4);
}

/// Where strands in one batch take twice what they take one after another, that is seen once, and then once in 256 batches.
#[test]
fn segments_do_not_run_abreast_where_that_does_not_pay() {
    let mut node = Node::new(Limits { prefix_cache: false, batches_in_flight_max: 1, ..limits(400, 64, 64) });
    node.forms = form;
    node.cost_us = Some(|batch| cost_us(batch) * if batch.strands.len() > 1 { 2 } else { 1 });
    let spans: Vec<_> = chains()[..3].iter().map(|blocks| node.host(blocks, &[])).collect();
    for (number, span) in spans.into_iter().enumerate() {
        node.admit(admit(number as u64, span, &[3, 1, 4], 200, 0));
    }
    node.run_dry();
    let (abreast, all) = (node.pictures.iter().filter(|picture| picture.contains('|')).count(), node.pictures.len());
    assert!((1..=1 + all / 128).contains(&abreast), "{abreast} of {all} batches");
}

/// A pass takes 12 ms: two blocks of each of three, and six that are shared. Rows whose next token would be late after another pass run alone; where no
/// order keeps the target, they are all sooner done abreast.
#[test]
fn a_row_that_is_due_waits_for_no_twin() {
    let abreast = |gap_ms: u32| {
        let mut node = Node::new(Limits { gap_ms, prefix_cache: false, batches_in_flight_max: 1, ..limits(400, 64, 64) });
        node.forms = form;
        node.cost_us = Some(cost_us);
        let spans: Vec<_> = chains()[..3].iter().map(|blocks| node.host(blocks, &[])).collect();
        for (number, span) in spans.into_iter().enumerate() {
            node.admit(admit(number as u64, span, &[3, 1, 4], 60, 0));
        }
        node.run_dry();
        node.pictures.iter().filter(|picture| picture.contains('|')).count()
    };
    let counts = [0, 100, 16, 11].map(abreast);
    println!("{counts:?}");
    assert!(counts[0] > 40 && counts[1] > 40 && counts[2] < 10 && counts[3] > 40, "{counts:?} batches abreast");
}
