//! Whatever the mix, chunking, page pressure, preemption and cache state: the tokens of each sequence run alone.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::device::oracle_with;
use super::node::{BOUNDARY_BYTES, Node, admit, limits};
use super::{CHANGES, Windows, family_with, form};
use crate::state::limits::Limits;
use crate::state::sequence::{Admit, SpanIndex};

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever the mix, chunking, page pressure, preemption and cache state: the tokens of each sequence run alone.
    #[test]
    fn any_mix_gives_each_sequence_its_own_tokens(
        requests in proptest::collection::vec((0usize..4, 0usize..CHANGES.len(), 1usize..60, 1u32..14, 0u32..3, 0i32..2, 0usize..4), 1..10),
        step in 4u32..40, chunk in 1u32..20, spare_pages in 0u64..60, prefix_cache: bool,
        boundary_pages in 0u64..9, in_flight in proptest::sample::select(vec![1u32, 2, 4]), gap_ms in 0u32..3, batch_ms_max in 0u32..2, stop in proptest::option::of(0u32..97), cancel in proptest::option::of(0u64..10),
        windows in proptest::sample::select(Windows::ALL.as_slice()), with_adapters: bool, strands_max in proptest::sample::select(vec![1u32, 2, 64]),
    ) {
        let family = family_with(windows);
        let chunk = chunk.min(step);
        // The largest sequence (74 tokens, 5 pages) on the widest chain's share must fit.
        let boundary_bytes = boundary_pages * BOUNDARY_BYTES;
        let mut node = Node::new(Limits { gap_ms, batch_ms_max, row_wait_ms: 1, prefix_cache, boundary_bytes, strands_max, batches_in_flight_max: in_flight, ..limits(18 + spare_pages, step, chunk) });
        node.forms = form;
        let mut spans: BTreeMap<(usize, usize), SpanIndex> = (0..4).map(|model| ((model, 0), node.host(&family[model], &[]))).collect();
        let mut sent = Vec::new();
        let mut expected = BTreeMap::new();
        for (number, (model, adapted, length, count, salt, priority, steps)) in requests.iter().enumerate() {
            let changes = if with_adapters { *adapted } else { 0 };
            let span = *spans.entry((*model, changes)).or_insert_with(|| node.host(&family[*model], CHANGES[changes]));
            let prompt: Vec<u32> = (0..*length as u32).map(|t| (t * 5 + salt) % 97).collect();
            let mut tokens = oracle_with(&family[*model], CHANGES[changes], &prompt, *count as usize);
            if let Some(end) = tokens.iter().position(|token| Some(*token) == stop) {
                tokens.truncate(end + 1);
            }
            expected.insert(number as u64, tokens);
            let admit = admit(number as u64, span, &prompt, *count, *priority);
            let tenant = format!("ten_{}", number % 3);
            node.admit(Admit { stop_tokens: stop.into_iter().collect(), tenant, ..admit });
            for _ in 0..*steps {
                node.step(&mut sent);
            }
        }
        if let Some(number) = cancel && let Some(id) = node.id(number) {
            node.engine.handle_cancel(id);
            expected.remove(&number);
        }
        node.run_dry();
        for (number, tokens) in expected {
            prop_assert_eq!(&node.tokens[&number], &tokens, "sequence {}", number);
        }
        prop_assert_eq!(node.engine.gauges().used_pages, 0);
    }
}

/// What may happen next.
#[derive(Debug, Clone)]
enum Event {
    /// Host this chain of the family if it is not.
    Host(usize),
    /// Stop to host it, if it is.
    Unhost(usize),
    /// Admit a sequence of it, with so many prompt tokens and tokens to generate.
    Admit(usize, u32, u32),
    /// Let so many batches run.
    Step(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let chain = 0usize..5 + CHANGES.len();
    prop_oneof![
        2 => chain.clone().prop_map(Event::Host),
        1 => chain.clone().prop_map(Event::Unhost),
        4 => (chain, 1u32..60, 1u32..14).prop_map(|(chain, length, count)| Event::Admit(chain, length, count)),
        6 => (0usize..9).prop_map(Event::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 2, failure_persistence: None, ..ProptestConfig::default() })]
    /// Cuts change all the time, under sequences that run and pages that are cached.
    #[test]
    fn models_come_and_go_and_change_no_token(
        events in proptest::collection::vec(event(), 1..40),
        step in 4u32..40, chunk in 1u32..20, spare_pages in 0u64..120, boundary_pages in 0u64..9, in_flight in proptest::sample::select(vec![1u32, 2, 4]),
        windows in proptest::sample::select(Windows::ALL.as_slice()),
    ) {
        let mut family = family_with(windows);
        // Ends inside another one, and shares its start.
        family.push([&family[0][..5], &[2001]].concat());
        // And the first one with adapters.
        let changes: Vec<&[(u32, u64)]> = std::iter::repeat_n(CHANGES[0], family.len()).chain(CHANGES).collect();
        family.extend(std::iter::repeat_n(family[0].clone(), CHANGES.len()));
        let boundary_bytes = boundary_pages * BOUNDARY_BYTES;
        let mut node = Node::new(Limits { boundary_bytes, batches_in_flight_max: in_flight, ..limits(30 + spare_pages, step, chunk.min(step)) });
        node.forms = form;
        let mut hosted: Vec<Option<SpanIndex>> = vec![None; family.len()];
        let mut expected: BTreeMap<u64, (usize, Vec<u32>)> = BTreeMap::new();
        let mut sent = Vec::new();
        for (number, event) in events.into_iter().enumerate() {
            match event {
                Event::Host(chain) if hosted[chain].is_none() => {
                    hosted[chain] = Some(node.host(&family[chain], changes[chain]));
                }
                Event::Unhost(chain) => {
                    if let Some(span) = hosted[chain].take() {
                        node.engine.handle_unhost(span);
                        expected.retain(|number, (of, _)| *of != chain || node.finished.contains_key(number));
                    }
                }
                Event::Admit(chain, length, count) => {
                    let Some(span) = hosted[chain] else { continue };
                    // Prompts begin alike, so that models and sequences share pages.
                    let prompt: Vec<u32> = (0..length).map(|t| if t < 40 { t } else { t + number as u32 }).collect();
                    let admit = admit(number as u64, span, &prompt, count, 0);
                    if node.engine.handle_admit(crate::state::Now::ZERO, admit.clone()).is_ok() {
                        let id = node.id(number as u64).expect("admitted");
                        node.keys.insert(id, number as u64);
                        expected.insert(number as u64, (chain, oracle_with(&family[chain], changes[chain], &prompt, count as usize)));
                    }
                }
                Event::Step(steps) => (0..steps).for_each(|_| {
                    node.step(&mut sent);
                }),
                Event::Host(_) => {}
            }
            prop_assert_eq!(node.engine.check_integrity(), Ok(()));
        }
        node.failed.clear();
        for _ in 0..10_000 {
            if !node.step(&mut sent) && node.engine.sequences.is_empty() {
                break;
            }
        }
        prop_assert!(node.engine.sequences.is_empty());
        for (number, (_, tokens)) in expected {
            prop_assert_eq!(&node.tokens[&number], &tokens, "sequence {}", number);
        }
        prop_assert_eq!(node.engine.gauges().used_pages, 0);
    }
}
