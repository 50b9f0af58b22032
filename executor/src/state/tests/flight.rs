//! Several batches with the device at one time.

use super::device::{host, oracle};
use super::family;
use super::node::{Node, admit, limits};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, Reason};

#[test]
fn the_device_has_its_next_batches_before_a_token_is_known() {
    for in_flight in [1, 2, 4] {
        let mut node = Node::new(Limits { batches_in_flight_max: in_flight, ..limits(100, 16, 16) });
        let blocks = &family()[3];
        let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
        node.admit(admit(1, span, &[1, 2, 3], 20, 0));
        for step in 0..20 {
            assert!(node.step(&mut Vec::new()));
            // One was run; the last token is never fed back, so no batch follows the twentieth.
            assert_eq!(node.in_flight.len(), (in_flight as usize - 1).min(19 - step));
        }
        node.run_dry();
        assert_eq!(node.tokens[&1], oracle(blocks, &[1, 2, 3], 20), "{in_flight} in flight");
        assert_eq!(node.engine.counters().discarded_rows, 0, "an end by length is known beforehand");
    }
}

#[test]
fn an_end_found_late_discards_no_more_than_what_is_in_flight() {
    let blocks = &family()[3];
    let alone = oracle(blocks, &[1, 2, 3], 20);
    let end = (1..20).find(|&i| !alone[..i].contains(&alone[i])).expect("a token that comes once");
    for in_flight in [1, 2, 4] {
        let mut node = Node::new(Limits { batches_in_flight_max: in_flight, ..limits(100, 16, 16) });
        let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
        node.admit(Admit { stop_tokens: vec![alone[end]], ..admit(1, span, &[1, 2, 3], 20, 0) });
        node.run_dry();
        assert_eq!(node.tokens[&1], alone[..=end]);
        assert_eq!(node.finished[&1].0, Reason::Stop);
        assert_eq!(node.engine.counters().discarded_rows, u64::from(in_flight) - 1);
    }
}

#[test]
fn pages_stay_until_no_batch_in_flight_can_write_to_them() {
    let mut node = Node::new(Limits { batches_in_flight_max: 4, prefix_cache: false, ..limits(100, 16, 16) });
    let blocks = &family()[3];
    let span = node.engine.handle_host(host(blocks, 0, blocks.len()));
    node.admit(admit(1, span, &[7; 40], 20, 0));
    let mut sent = Vec::new();
    assert!(node.step(&mut sent));
    assert_eq!(node.in_flight.len(), 3);
    node.engine.handle_cancel(node.id(1).expect("it runs"));
    for _ in 0..3 {
        assert!(node.engine.gauges().used_pages > 0);
        assert!(node.step(&mut sent));
    }
    assert_eq!(node.engine.gauges().used_pages, 0);
}
