//! What each executor would hold: spans, and the distinct blocks they bring. It accounts; it chooses nothing.

use std::collections::BTreeMap;

use ashlar_registry::ChainDigest;
use ashlar_registry::record::SpanAssignment;
use ashlar_wire::id::ExecutorId;
use ashlar_zoo::digest::Digest;

use super::{Inventory, SizedBlock};

/// One executor's part.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    pub(super) numeric_class: String,
    memory_bytes: u64,
    used_bytes: u64,
    /// Bytes of each resident block and adapter, and in how many places of its spans it stands.
    resident: BTreeMap<Digest, (u64, u32)>,
    /// At most one span of a chain: `[from, to)`.
    spans: BTreeMap<ChainDigest, (u32, u32)>,
}

/// All executors.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    pub(super) shelves: BTreeMap<ExecutorId, Shelf>,
}

impl Shelf {
    pub(super) fn free_bytes(&self) -> u64 {
        self.memory_bytes - self.used_bytes
    }

    /// Bytes that these blocks would add with their adapters: each that is not resident, once.
    pub(super) fn added_bytes(&self, blocks: &[SizedBlock]) -> u64 {
        let parts = blocks.iter().flat_map(SizedBlock::parts);
        let new: BTreeMap<Digest, u64> = parts.filter(|(digest, _)| !self.resident.contains_key(digest)).collect();
        new.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    pub(super) fn fits(&self, blocks: &[SizedBlock]) -> bool {
        self.added_bytes(blocks) <= self.free_bytes()
    }

    pub(super) fn span(&self, chain: &ChainDigest) -> Option<(u32, u32)> {
        self.spans.get(chain).copied()
    }
}

impl Ledger {
    pub(super) fn new(inventory: &Inventory) -> Self {
        let shelf = |(id, offer): (&ExecutorId, &super::ExecutorOffer)| {
            let shelf = Shelf {
                numeric_class: offer.numeric_class.clone(),
                memory_bytes: offer.memory_bytes,
                used_bytes: 0,
                resident: BTreeMap::new(),
                spans: BTreeMap::new(),
            };
            (id.clone(), shelf)
        };
        Self { shelves: inventory.executors.iter().map(shelf).collect() }
    }

    /// Puts a span on an executor that has room for it and nothing of its chain.
    pub(super) fn put(&mut self, executor: &ExecutorId, span: SpanAssignment, inventory: &Inventory) {
        let blocks = inventory.chains[&span.chain].span(span.from, span.to);
        let shelf = self.shelves.get_mut(executor).expect("an executor of the inventory");
        shelf.used_bytes += shelf.added_bytes(blocks);
        assert!(shelf.used_bytes <= shelf.memory_bytes, "the caller saw that it fits");
        for (digest, bytes) in blocks.iter().flat_map(SizedBlock::parts) {
            shelf.resident.entry(digest).or_insert((bytes, 0)).1 += 1;
        }
        let before = shelf.spans.insert(span.chain, (span.from, span.to));
        assert!(before.is_none(), "one span of a chain for each executor");
    }

    /// Takes all spans of a chain off.
    pub(super) fn remove(&mut self, chain: &ChainDigest, inventory: &Inventory) {
        for shelf in self.shelves.values_mut() {
            let Some((from, to)) = shelf.spans.remove(chain) else { continue };
            for (digest, _) in inventory.chains[chain].span(from, to).iter().flat_map(SizedBlock::parts) {
                let (bytes, count) = shelf.resident.get_mut(&digest).expect("it was put");
                *count -= 1;
                if *count == 0 {
                    shelf.used_bytes -= *bytes;
                    shelf.resident.remove(&digest);
                }
            }
        }
    }

    /// Executors that hold a span of the chain, with the span.
    pub(super) fn holders(&self, chain: &ChainDigest) -> Vec<(ExecutorId, (u32, u32))> {
        self.shelves.iter().filter_map(|(id, shelf)| Some((id.clone(), shelf.span(chain)?))).collect()
    }

    pub(super) fn assignments(&self) -> BTreeMap<ExecutorId, Vec<SpanAssignment>> {
        let spans =
            |shelf: &Shelf| shelf.spans.iter().map(|(chain, (from, to))| SpanAssignment { chain: *chain, from: *from, to: *to }).collect();
        self.shelves.iter().filter(|(_, shelf)| !shelf.spans.is_empty()).map(|(id, shelf)| (id.clone(), spans(shelf))).collect()
    }
}
