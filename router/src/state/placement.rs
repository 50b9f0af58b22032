//! Placement: which executor should hold which blocks. [`plan`] is a pure function of (policy, inventory, previous plan). It keeps
//! what stands, puts chains that share blocks together, and cuts a chain only where it must. It does not know load or models' names. Of time it
//! knows what blocks were profiled to take, and uses it for one thing: where a chain is cut into spans of equal size.
//!
//! Rules, in this order: memory is never exceeded; what the previous plan placed stays while it is valid; every chain is placed once
//! before any is replicated; a chain stays whole where it fits; an executor where it adds the fewest bytes is best. An executor
//! holds at most one span of a chain, and all spans of a cut chain are on executors of one numeric class.

mod cut;
mod keep;
mod ledger;
mod place;

use std::collections::BTreeMap;

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{Plan, PlanPolicy};
use ashlar_wire::id::ExecutorId;
use ashlar_zoo::digest::Digest;

pub use ashlar_registry::record::SpanAssignment;
use ledger::Ledger;

/// What an executor offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutorOffer {
    /// Bytes that weights may take.
    pub memory_bytes: u64,
    /// Executors of one class give the same bits.
    pub numeric_class: String,
    /// The kind of device by which blocks are profiled; empty: unknown.
    pub profiled_on: String,
}

/// A block of a chain and what it takes in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizedBlock {
    /// Identity: equal blocks are resident once.
    pub digest: Digest,
    /// Bytes of its weights.
    pub bytes: u64,
    /// What the chain changes in it.
    pub adapter: Option<SizedAdapter>,
}

/// An adapter of a block and what it takes beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizedAdapter {
    /// Identity of adapter and block together: chains that have both the same have it resident once.
    pub digest: Digest,
    /// Bytes of its factors.
    pub bytes: u64,
}

impl SizedBlock {
    /// What an executor holds for it, by identity.
    fn parts(&self) -> impl Iterator<Item = (Digest, u64)> {
        self.adapter.map(|adapter| (adapter.digest, adapter.bytes)).into_iter().chain([(self.digest, self.bytes)])
    }

    /// Bytes of all that.
    fn all_bytes(&self) -> u128 {
        self.parts().map(|(_, bytes)| u128::from(bytes)).sum()
    }
}

/// A chain as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizedChain {
    /// Its blocks, in order; never empty.
    pub blocks: Vec<SizedBlock>,
    /// Indices in front of which it may be cut, ascending: borders of layers, neither 0 nor the end.
    pub borders: Vec<u32>,
}

/// All that is there to place, and to place it on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Executors that take work: registered and not draining.
    pub executors: BTreeMap<ExecutorId, ExecutorOffer>,
    /// Chains that some name points to.
    pub chains: BTreeMap<ChainDigest, SizedChain>,
    /// Of chains all of whose blocks were profiled on a kind of device: nanoseconds of each block there, for a batch of one size.
    pub times: BTreeMap<ChainDigest, BTreeMap<String, Vec<u64>>>,
}

/// A plan, and why it is as it is: one line for each thing that changed or is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Equal to the previous plan, its generation included, where nothing changed; else of the next generation.
    pub plan: Plan,
    /// For the log.
    pub explanation: Vec<String>,
}

/// Places all chains.
///
/// # Panics
/// When a chain has no blocks or the policy asks for no spans or replicas: the caller makes both.
pub fn plan(policy: &PlanPolicy, inventory: &Inventory, previous: &Plan) -> Planned {
    assert!(policy.spans_per_chain > 0 && policy.replicas > 0, "a policy asks for at least one");
    assert!(inventory.chains.values().all(|chain| !chain.blocks.is_empty()), "a chain has blocks");
    let mut placed = place::place(policy, inventory, keep::keep(policy, inventory, previous, policy.replicas));
    // Replicas make room where a chain would have no place at all, and come back where there is room left.
    while !placed.unplaced.is_empty() && policy.replicas > 1 {
        let current = Plan { generation: 0, policy: *policy, assignments: placed.ledger.assignments(), unplaced: BTreeMap::new() };
        let single = PlanPolicy { replicas: 1, ..*policy };
        let once = place::place(&single, inventory, keep::keep(policy, inventory, &current, 1));
        if once.unplaced.len() >= placed.unplaced.len() {
            break;
        }
        placed = place::place(policy, inventory, keep::restore(policy, inventory, &current, once.ledger));
    }
    let place::Placed { ledger, unplaced, mut notes } = placed;
    let mut plan = Plan { generation: previous.generation, policy: *policy, assignments: ledger.assignments(), unplaced };
    if plan == *previous {
        return Planned { plan, explanation: notes };
    }
    plan.generation += 1;
    let mut explanation = changes(&plan, previous);
    explanation.append(&mut notes);
    Planned { plan, explanation }
}

/// What differs, executor by executor.
fn changes(plan: &Plan, previous: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    for (verb, these, those) in [("takes", plan, previous), ("gives up", previous, plan)] {
        for (executor, spans) in &these.assignments {
            let others = those.assignments.get(executor).map_or(&[][..], Vec::as_slice);
            for span in spans.iter().filter(|span| !others.contains(span)) {
                lines.push(format!("{executor} {verb} {}", name(span)));
            }
        }
    }
    lines
}

/// A span, for people.
fn name(span: &SpanAssignment) -> String {
    format!("{}[{}..{})", span.chain.short(), span.from, span.to)
}

impl SizedChain {
    /// Its length in blocks.
    fn len(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("chains are short")
    }

    fn span(&self, from: u32, to: u32) -> &[SizedBlock] {
        &self.blocks[from as usize..to as usize]
    }

    fn is_border(&self, index: u32) -> bool {
        index == 0 || index == self.len() || self.borders.contains(&index)
    }
}

#[cfg(test)]
mod tests;
