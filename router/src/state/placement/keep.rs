//! What of the previous plan still stands: executors that live, chains that are still named, cuts that are still allowed, bytes
//! that still fit. The rest is dropped and placed anew by `place`.

use std::collections::BTreeMap;

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{Plan, PlanPolicy, SpanAssignment};
use ashlar_wire::id::ExecutorId;

use super::cut::Pattern;
use super::{Inventory, Ledger, SizedChain};

/// A ledger with what stands of `previous`, at most `copies` of each span.
pub(super) fn keep(policy: &PlanPolicy, inventory: &Inventory, previous: &Plan, copies: u32) -> Ledger {
    let mut ledger = Ledger::new(inventory);
    // First copies of all chains before second ones, for memory may have shrunk.
    for copy in 1..=copies {
        keep_up_to(policy, inventory, previous, copy, &mut ledger);
    }
    ledger
}

/// Puts replicas of the previous plan back where they still fit beside what `ledger` holds.
pub(super) fn restore(policy: &PlanPolicy, inventory: &Inventory, previous: &Plan, mut ledger: Ledger) -> Ledger {
    keep_up_to(policy, inventory, previous, policy.replicas, &mut ledger);
    ledger
}

fn keep_up_to(policy: &PlanPolicy, inventory: &Inventory, previous: &Plan, copies: u32, ledger: &mut Ledger) {
    for (chain, holders) in holders(previous, inventory) {
        let sized = &inventory.chains[&chain];
        let cut_by_policy = previous.policy.spans_per_chain != policy.spans_per_chain;
        let Some(pattern) = pattern(sized, &holders) else { continue };
        if cut_by_policy && pattern.len() != 1.max(policy.spans_per_chain) as usize {
            continue;
        }
        let class = (pattern.len() > 1).then(|| inventory.executors[&holders[0].0].numeric_class.as_str());
        for (executor, (from, to)) in &holders {
            let shelf = &ledger.shelves[executor];
            let held = ledger.holders(&chain);
            let copies_held = held.iter().filter(|(_, span)| *span == (*from, *to)).count();
            let overlaps = held.iter().any(|(_, span)| *span != (*from, *to) && span.0 < *to && *from < span.1);
            let right_class = class.is_none_or(|class| class == shelf.numeric_class);
            let fits = shelf.fits(sized.span(*from, *to));
            if shelf.span(&chain).is_none() && copies_held < copies as usize && !overlaps && right_class && fits {
                ledger.put(executor, SpanAssignment { chain, from: *from, to: *to }, inventory);
            }
        }
    }
}

type Holders = Vec<(ExecutorId, (u32, u32))>;

/// For each chain that is still named: living executors that hold a span of it which is still one, in order of (span, executor).
fn holders(previous: &Plan, inventory: &Inventory) -> BTreeMap<ChainDigest, Holders> {
    let mut all: BTreeMap<ChainDigest, Holders> = BTreeMap::new();
    for (executor, spans) in previous.assignments.iter().filter(|(id, _)| inventory.executors.contains_key(id)) {
        for span in spans {
            let Some(chain) = inventory.chains.get(&span.chain) else { continue };
            if span.from < span.to && span.to <= chain.len() && chain.is_border(span.from) && chain.is_border(span.to) {
                all.entry(span.chain).or_default().push((executor.clone(), (span.from, span.to)));
            }
        }
    }
    for holders in all.values_mut() {
        holders.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    }
    all
}

/// The cut that these spans come from: the spans themselves, and a span for each gap. `None` when they overlap.
pub(super) fn pattern(chain: &SizedChain, holders: &[(ExecutorId, (u32, u32))]) -> Option<Pattern> {
    let mut spans: Vec<(u32, u32)> = holders.iter().map(|(_, span)| *span).collect();
    spans.sort_unstable();
    spans.dedup();
    let mut pattern = Vec::new();
    let mut at = 0;
    for (from, to) in spans {
        if from < at {
            return None;
        }
        if at < from {
            pattern.push((at, from));
        }
        pattern.push((from, to));
        at = to;
    }
    if at < chain.len() {
        pattern.push((at, chain.len()));
    }
    Some(pattern)
}
