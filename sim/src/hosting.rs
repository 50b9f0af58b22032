//! Obeying the plan, as `executor/src/io/hosting.rs` does: one span is loaded after another, a block (and an adapter on it) once however many spans run
//! through it; what is no longer wanted retires, and its memory and its places on the device are used again.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_executor::state::segments::BlockIndex;
use ashlar_registry::record::{ExecutorRecord, Plan, SpanAssignment};
use ashlar_zoo::digest::Digest;

use crate::check::{Violation, holds};
use crate::device::Command;
use crate::events::{Event, ToNode};
use crate::links::Post;
use crate::models::Block;
use crate::node::Node;

/// How long a span that found no memory waits.
const HOST_AGAIN: crate::Micros = 5_000_000;

#[derive(Debug)]
struct Resident {
    /// Of a block; adapters have none.
    place: Option<BlockIndex>,
    bytes: u64,
    spans: BTreeSet<SpanAssignment>,
}

/// What is on the device, and what should be.
#[derive(Debug, Default)]
pub(crate) struct Hosting {
    wanted: Vec<SpanAssignment>,
    pub(crate) generation: u64,
    loading: Option<SpanAssignment>,
    resident: BTreeMap<Digest, Resident>,
    /// Blocks and widths by place, as batches that are planned now find them.
    pub(crate) blocks: BTreeMap<BlockIndex, (Block, u32)>,
    /// Places of evicted blocks, to be used again.
    free: Vec<BlockIndex>,
    made: u32,
    waits: bool,
}

impl Node {
    /// What the executor says of itself.
    pub(crate) fn record(&self) -> ExecutorRecord {
        ExecutorRecord {
            id: self.identity.id.clone(),
            address: self.identity.id.0.clone(),
            device: "modelled".to_owned(),
            profiled_on: String::new(),
            numeric_class: self.identity.class.clone(),
            memory_bytes: self.identity.memory_bytes,
            kv_bytes: self.identity.limits.kv_bytes,
            threads: 1,
            spans: self.hosted.keys().filter(|key| !self.retiring.contains_key(*key)).copied().collect(),
            plan_generation: self.hosting.generation,
            draining: self.is_draining,
            incarnation: self.process.incarnation,
        }
    }

    pub(crate) fn tell_record(&self, post: &mut Post) {
        post.record(self.process, self.record());
    }

    /// Retires what is no longer wanted, and begins to load what is new.
    pub(crate) fn obey(&mut self, post: &mut Post, plan: &Plan) -> Result<(), Violation> {
        if plan.generation < self.hosting.generation {
            return Ok(());
        }
        self.hosting.generation = plan.generation;
        self.hosting.wanted = plan.assignments.get(&self.identity.id).cloned().unwrap_or_default();
        let wanted = &self.hosting.wanted;
        let gone: Vec<SpanAssignment> =
            self.hosted.keys().filter(|key| !wanted.contains(key) && !self.retiring.contains_key(*key)).copied().collect();
        for key in gone {
            self.retiring.insert(key, post.now + self.identity.retire);
            post.after(self.identity.retire, Event::ToNode(self.process, ToNode::RetireDue));
        }
        self.load_next(post)?;
        self.tell_record(post);
        Ok(())
    }

    /// Begins to load the first span that is wanted and not there, if none is being loaded. `memory`: it fits what the plan left for it.
    pub(crate) fn load_next(&mut self, post: &mut Post) -> Result<(), Violation> {
        self.hosting.waits = false;
        if self.hosting.loading.is_some() {
            return Ok(());
        }
        let missing: Vec<SpanAssignment> = self.hosting.wanted.iter().filter(|key| !self.hosted.contains_key(*key)).copied().collect();
        let used: u64 = self.hosting.resident.values().map(|resident| resident.bytes).sum();
        for key in missing {
            let parts = self.models[&key.chain].parts(key.from, key.to);
            let fresh: BTreeMap<Digest, u64> = parts.filter(|(digest, _)| !self.hosting.resident.contains_key(digest)).collect();
            let bytes: u64 = fresh.values().sum();
            if used + bytes <= self.identity.memory_bytes {
                self.hosting.loading = Some(key);
                post.after(1 + bytes * self.identity.load, Event::ToNode(self.process, ToNode::Loaded));
                return Ok(());
            }
            holds("memory", !self.retiring.is_empty(), || {
                let memory = self.identity.memory_bytes;
                format!("{}: the plan gives it a span of {bytes} bytes more, and {used} of {memory} are taken", self.identity.id)
            })?;
        }
        if !self.hosting.waits && !self.retiring.is_empty() {
            self.hosting.waits = true;
            post.after(HOST_AGAIN, Event::ToNode(self.process, ToNode::HostAgain));
        }
        Ok(())
    }

    /// A span's blocks are on the device: the engine hosts it.
    pub(crate) fn loaded(&mut self, post: &mut Post) -> Result<(), Violation> {
        let Some(key) = self.hosting.loading.take() else { return Ok(()) };
        if self.hosting.wanted.contains(&key) {
            let models = std::rc::Rc::clone(&self.models);
            let model = &models[&key.chain];
            let mut places = Vec::new();
            for block in &model.blocks[key.from as usize..key.to as usize] {
                if !self.hosting.resident.contains_key(&block.digest) {
                    let place = self.hosting.free.pop().unwrap_or_else(|| {
                        self.hosting.made += 1;
                        BlockIndex(self.hosting.made - 1)
                    });
                    self.device.commands.push_back(Command::Load(place, *block, model.width));
                    self.hosting.blocks.insert(place, (*block, model.width));
                    let resident = Resident { place: Some(place), bytes: block.bytes, spans: BTreeSet::new() };
                    self.hosting.resident.insert(block.digest, resident);
                }
                let resident = &self.hosting.resident[&block.digest];
                places.push(resident.place.expect("a block has one"));
            }
            for (digest, bytes) in model.parts(key.from, key.to) {
                let fresh = || Resident { place: None, bytes, spans: BTreeSet::new() };
                self.hosting.resident.entry(digest).or_insert_with(fresh).spans.insert(key);
            }
            let host = model.host(key.from, key.to, places, self.identity.limits.page_tokens);
            let index = self.engine.handle_host(host);
            self.device.commands.push_back(Command::Adapt(index, model.adapters[key.from as usize..key.to as usize].to_vec()));
            self.hosted.insert(key, (index, model.width));
            self.tell_record(post);
        }
        self.load_next(post)
    }

    /// Lets go of retiring spans that have nothing left to do, or no time to do it. Whether there were any.
    pub(crate) fn unhost_retired(&mut self, post: &mut Post) -> Result<bool, Violation> {
        let is_over =
            |(key, until): &(&SpanAssignment, &crate::Micros)| post.now >= **until || self.engine.sequence_count(self.hosted[*key].0) == 0;
        let over: Vec<SpanAssignment> = self.retiring.iter().filter(is_over).map(|(key, _)| *key).collect();
        for key in &over {
            self.retiring.remove(key);
            let (index, _) = self.hosted.remove(key).expect("retiring spans are hosted");
            self.engine.handle_unhost(index);
            for resident in self.hosting.resident.values_mut() {
                resident.spans.remove(key);
            }
            let unused: Vec<Digest> =
                self.hosting.resident.iter().filter(|(_, resident)| resident.spans.is_empty()).map(|(digest, _)| *digest).collect();
            for digest in unused {
                let Some(place) = self.hosting.resident.remove(&digest).expect("just listed").place else { continue };
                self.device.commands.push_back(Command::Evict(place));
                self.hosting.blocks.remove(&place);
                self.hosting.free.push(place);
            }
        }
        if !over.is_empty() {
            self.tell_record(post);
            self.load_next(post)?;
        }
        Ok(!over.is_empty())
    }
}
