//! Obeying the plan: reads the blocks of assigned spans from the zoo, packs them, hands them to the device, and tells
//! the registry what is held. A block is loaded once however many spans run through it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ashlar_kernels::ops::{Ops, PageLayout};
use ashlar_registry::record::{ExecutorRecord, Plan, SpanAssignment};
use ashlar_registry::{Registry, Session};
use ashlar_wire::v1;
use ashlar_zoo::blocking::blocking;
use ashlar_zoo::digest::{Digest, lineages};
use ashlar_zoo::joint::{self, Joint};
use ashlar_zoo::manifest::Block;
use ashlar_zoo::profiles::DeviceKey;
use ashlar_zoo::roles::ManifestError;
use ashlar_zoo::store::{MappedChange, StoreError, Zoo};
use ashlar_zoo::tensor::MappedTensor;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use super::adapters::{AdapterIndex, SpanAdapters};
use super::device::Command;
use super::executor::Event;
use super::metrics::ExecutorMetrics;
use crate::model::adapter::LoadedAdapter;
use crate::model::block::LoadedBlock;
use crate::model::outputs::{Outputs, WeightBytes, total_bytes};
use crate::state::cost::CostCurve;
use crate::state::engine::HostSpan;
use crate::state::segments::BlockIndex;

/// A span by what it is: chain and blocks `[from, to)`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpanKey {
    /// The chain.
    pub chain: Digest,
    /// First block.
    pub from: u32,
    /// One past the last.
    pub to: u32,
}

impl SpanKey {
    /// The span that a message names; None if its digest is malformed.
    pub fn parse(span: &v1::Span) -> Option<Self> {
        Some(Self { chain: Digest(span.chain.as_slice().try_into().ok()?), from: span.from, to: span.to })
    }

    fn of(assignment: &SpanAssignment) -> Self {
        Self { chain: Digest(assignment.chain.0), from: assignment.from, to: assignment.to }
    }
}

/// A span whose blocks are on the device, with what an admission is checked against.
#[derive(Debug, Clone)]
pub struct HostedSpan {
    /// Which.
    pub key: SpanKey,
    /// What the engine needs.
    pub host: HostSpan,
    /// What each block takes on the device.
    pub block_weights: Vec<WeightBytes>,
    /// The adapters of its blocks.
    pub adapters: SpanAdapters,
    /// What each of these takes on the device, in bytes.
    pub adapter_bytes: Vec<u64>,
    /// Lineage before the first block; empty at the chain's start.
    pub lineage_from: Vec<u8>,
    /// Lineage after the last block.
    pub lineage_to: Vec<u8>,
    /// Token ids are below it.
    pub vocab: u32,
    /// Positions that the chain takes.
    pub context_tokens: u32,
    /// Width of the hidden rows that its first block takes.
    pub width: u32,
}

impl HostedSpan {
    /// As messages name it.
    pub fn to_wire(&self) -> v1::Span {
        v1::Span {
            chain: self.key.chain.0.to_vec(),
            from: self.key.from,
            to: self.key.to,
            lineage_from: self.lineage_from.clone(),
            lineage_to: self.lineage_to.clone(),
        }
    }
}

/// A span could not be hosted.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The zoo failed.
    #[error(transparent)]
    Store(#[from] ashlar_zoo::store::StoreError),
    /// A block does not make sense.
    #[error("load block {block} (number {index} of its chain)")]
    Load {
        /// The block.
        block: Digest,
        /// Its place.
        index: usize,
        /// What is wrong.
        #[source]
        source: Box<crate::model::load::LoadError>,
    },
    /// An adapter does not make sense, or not with its block.
    #[error("load adapter {adapter} of chain {chain} onto block {index}")]
    Adapter {
        /// The adapter.
        adapter: Digest,
        /// The chain.
        chain: Digest,
        /// The block's place in it.
        index: u32,
        /// What is wrong.
        #[source]
        source: Box<crate::model::load::LoadError>,
    },
    /// Blocks that do not fit each other.
    #[error("put the blocks of chain {chain} together")]
    Chain {
        /// The chain.
        chain: Digest,
        /// Which block, and why.
        #[source]
        source: ManifestError,
    },
    /// The span names blocks that the chain does not have.
    #[error("blocks {from}..{to} are not within the {count} blocks of chain {chain}")]
    Span {
        /// The chain.
        chain: Digest,
        /// First block.
        from: u32,
        /// One past the last.
        to: u32,
        /// Blocks there are.
        count: usize,
    },
    /// The weights do not fit.
    #[error("{kind} {digest} needs {bytes} bytes, {free_bytes} of {memory_bytes} are free for weights")]
    Memory {
        /// `block` or `adapter`.
        kind: &'static str,
        /// Which.
        digest: Digest,
        /// What it needs.
        bytes: u64,
        /// What is free.
        free_bytes: u64,
        /// The budget.
        memory_bytes: u64,
    },
}

struct Resident {
    index: BlockIndex,
    joint: Joint,
    weights: WeightBytes,
    kv_shape: Option<ashlar_kernels::ops::KvShape>,
    /// How far back it sees, if it is an attention block with a window.
    window: Option<u32>,
    /// Number of its form, for `HostSpan::forms`.
    form: u32,
    /// What it was profiled to cost here.
    costs: Option<Arc<CostCurve>>,
    /// Spans that run through it.
    spans: BTreeSet<SpanKey>,
}

struct ResidentAdapter {
    index: AdapterIndex,
    bytes: u64,
    /// Spans of chains that have it.
    spans: BTreeSet<SpanKey>,
}

/// What a block is but for the values of its weights, and how these are stored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Form(String);

impl Form {
    fn of(block: &Block) -> Self {
        let shapes: Vec<_> = block.tensors.iter().map(|(role, tensor)| (role, &tensor.shape)).collect();
        Self(format!("{} {:?} {shapes:?}", block.width, block.params))
    }
}

/// Places on the device, those that are free to be used first.
#[derive(Debug, Default)]
struct Places {
    free: Vec<u32>,
    next: u32,
}

impl Places {
    fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }
}

/// The plan that an entry holds. One that cannot be read is logged, and the plan before stays in force.
fn read_plan(entry: &ashlar_registry::Entry) -> Option<Plan> {
    match ashlar_registry::record::parse::<Plan>(entry) {
        Ok(plan) => Some(plan),
        Err(error) => {
            tracing::error!(%error, "the plan cannot be read; going on with the one before");
            None
        }
    }
}

/// Keeps what is on the device equal to what the plan asks for.
pub struct Hosting<B: Ops> {
    ops: Arc<B>,
    zoo: Zoo,
    commands: std::sync::mpsc::Sender<Command<B>>,
    events: mpsc::UnboundedSender<Event>,
    metrics: ExecutorMetrics,
    memory_bytes: u64,
    pages: PageLayout,
    /// The device by which profiles are found; without it none is looked for.
    profiled_on: Option<DeviceKey>,
    resident: BTreeMap<Digest, Resident>,
    /// Output projections that resident blocks hold.
    outputs: Arc<Outputs<B>>,
    /// By adapter and block: where its outputs lie depends on both.
    adapters: BTreeMap<(Digest, Digest), ResidentAdapter>,
    spans: BTreeSet<SpanKey>,
    /// Spans that finish what they have, until it has ended.
    retiring: FuturesUnordered<BoxFuture<'static, SpanKey>>,
    /// Their keys.
    retiring_keys: BTreeSet<SpanKey>,
    /// Numbers of the forms that blocks had.
    forms: BTreeMap<Form, u32>,
    block_places: Places,
    adapter_places: Places,
    /// Spans that failed, so that the same failure is logged once.
    failed: BTreeSet<SpanKey>,
}

impl<B: Ops> Hosting<B> {
    /// Hosts nothing yet. Weights may take `memory_bytes`.
    pub fn new(
        ops: Arc<B>,
        zoo: Zoo,
        commands: std::sync::mpsc::Sender<Command<B>>,
        events: mpsc::UnboundedSender<Event>,
        metrics: ExecutorMetrics,
        memory_bytes: u64,
        pages: PageLayout,
    ) -> Self {
        Self {
            ops,
            zoo,
            commands,
            events,
            metrics,
            memory_bytes,
            pages,
            profiled_on: None,
            resident: BTreeMap::new(),
            outputs: Arc::default(),
            adapters: BTreeMap::new(),
            spans: BTreeSet::new(),
            retiring: FuturesUnordered::new(),
            retiring_keys: BTreeSet::new(),
            forms: BTreeMap::new(),
            block_places: Places::default(),
            adapter_places: Places::default(),
            failed: BTreeSet::new(),
        }
    }

    /// Has the profiles of a device read with the blocks that are loaded from now on.
    #[must_use]
    pub fn profiled_on(mut self, device: DeviceKey) -> Self {
        self.profiled_on = Some(device);
        self
    }

    /// Follows the plan until the registry is gone. The session's record always tells what is hosted.
    pub async fn follow(
        &mut self,
        registry: Arc<dyn Registry>,
        session: Arc<Session<ExecutorRecord>>,
    ) -> Result<(), ashlar_registry::RegistryError> {
        let mut watch = registry.watch_prefix(ashlar_registry::key::PLAN).await?;
        let mut wanted = watch.entries().get(ashlar_registry::key::PLAN).and_then(read_plan);
        let mut first = true;
        loop {
            let retry = tokio::time::sleep(std::time::Duration::from_secs(5));
            tokio::select! {
                () = std::future::ready(()), if first && wanted.is_some() => {}
                change = watch.next() => match change {
                    Some(ashlar_registry::Change::Put(entry)) => match read_plan(&entry) {
                        Some(plan) if wanted.as_ref().is_none_or(|known| plan.generation >= known.generation) => wanted = Some(plan),
                        _ => continue,
                    },
                    Some(ashlar_registry::Change::Delete { .. }) => continue,
                    None => return Ok(()),
                },
                // What it held may be what another span waits for.
                Some(key) = self.retiring.next() => {
                    self.retiring_keys.remove(&key);
                    self.forget_unused(&key);
                    tracing::info!(chain = %key.chain.short(), from = key.from, to = key.to, "let go of a span");
                }
                // A block that could not be read before may be readable now.
                () = retry, if !self.failed.is_empty() => {}
            }
            first = false;
            let Some(plan) = &wanted else { continue };
            let generation = plan.generation;
            let mine: Vec<SpanKey> = plan.assignments.get(&session.record().id).into_iter().flatten().map(SpanKey::of).collect();
            self.obey(&mine, &session).await;
            self.metrics.plan_generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
            let _ = self.events.send(Event::Plan(generation));
            self.tell(&session, generation);
        }
    }

    fn tell(&self, session: &Session<ExecutorRecord>, generation: u64) {
        let spans = self
            .spans
            .iter()
            .map(|key| SpanAssignment { chain: ashlar_registry::ChainDigest(key.chain.0), from: key.from, to: key.to })
            .collect();
        session.update(|record| {
            record.spans = spans;
            record.plan_generation = generation;
        });
    }

    /// Retires what is no longer wanted, and loads what is new, one span after another.
    pub async fn obey(&mut self, wanted: &[SpanKey], session: &Session<ExecutorRecord>) {
        let gone: Vec<SpanKey> = self.spans.iter().filter(|key| !wanted.contains(key)).cloned().collect();
        for key in gone {
            self.retire_span(key);
        }
        self.failed.retain(|key| wanted.contains(key));
        for key in wanted {
            // One that is wanted again is loaded when it is gone.
            if self.spans.contains(key) || self.retiring_keys.contains(key) {
                continue;
            }
            match self.load_span(key).await {
                Ok(hosted) => {
                    self.failed.remove(key);
                    self.spans.insert(key.clone());
                    let _ = self.events.send(Event::Host(Box::new(hosted)));
                    let generation = session.record().plan_generation;
                    self.tell(session, generation);
                }
                Err(error) => {
                    self.forget_unused(key);
                    if matches!(error, HostError::Memory { .. }) && !self.retiring_keys.is_empty() {
                        tracing::info!(chain = %key.chain.short(), "waiting for memory of spans that are on their way out");
                        continue;
                    }
                    if self.failed.insert(key.clone()) {
                        tracing::error!(chain = %key.chain, from = key.from, to = key.to, error = &error as &dyn std::error::Error, "failed to host a span");
                    }
                }
            }
        }
    }

    /// Its blocks leave the device after its last sequence has ended.
    fn retire_span(&mut self, key: SpanKey) {
        self.spans.remove(&key);
        let (done, retired) = oneshot::channel();
        let _ = self.events.send(Event::Retire(key.clone(), done));
        self.retiring_keys.insert(key.clone());
        self.retiring.push(Box::pin(async move {
            // Also over where the engine task has ended.
            let _ = retired.await;
            key
        }));
    }

    fn forget_unused(&mut self, key: &SpanKey) {
        for resident in self.resident.values_mut() {
            resident.spans.remove(key);
        }
        let unused: Vec<Digest> = self.resident.iter().filter(|(_, r)| r.spans.is_empty()).map(|(digest, _)| *digest).collect();
        for digest in unused {
            let resident = self.resident.remove(&digest).expect("just listed");
            let _ = self.commands.send(Command::Evict(resident.index));
            self.block_places.free.push(resident.index.0);
        }
        self.adapters.retain(|_, adapter| {
            adapter.spans.remove(key);
            if adapter.spans.is_empty() {
                let _ = self.commands.send(Command::EvictAdapter(adapter.index));
                self.adapter_places.free.push(adapter.index.0);
            }
            !adapter.spans.is_empty()
        });
    }

    async fn load_span(&mut self, key: &SpanKey) -> Result<HostedSpan, HostError> {
        let chain = self.zoo.read_chain(key.chain).await?;
        let (from, to) = (key.from as usize, key.to as usize);
        if from >= to || to > chain.blocks.len() {
            return Err(HostError::Span { chain: key.chain, from: key.from, to: key.to, count: chain.blocks.len() });
        }
        let adapters: Vec<(u32, Digest)> = chain.adapters.iter().map(|a| (a.block_index, a.digest)).collect();
        let all_lineages = lineages(&chain.blocks, &adapters);
        let mut host = HostSpan {
            blocks: Vec::new(),
            lineages: all_lineages[from..to].iter().map(|lineage| lineage.0).collect(),
            kv_shapes: Vec::new(),
            windows: Vec::new(),
            forms: Vec::new(),
            widths: Vec::new(),
            costs: Vec::new(),
            begins_with_embed: from == 0,
            ends_with_head: to == chain.blocks.len(),
        };
        let mut block_weights = Vec::new();
        // The head first: a token table of the same tensor is read out of it.
        for index in (from..to).rev() {
            let digest = chain.blocks[index];
            if !self.resident.contains_key(&digest) {
                self.load_block(digest, index).await?;
            }
            self.resident.get_mut(&digest).expect("just loaded").spans.insert(key.clone());
        }
        let joints = chain.blocks[from..to].iter().map(|digest| self.resident[digest].joint);
        joint::check(from, chain.blocks.len(), joints).map_err(|source| HostError::Chain { chain: key.chain, source })?;
        for digest in &chain.blocks[from..to] {
            let resident = &self.resident[digest];
            host.widths.push(resident.joint.width);
            host.blocks.push(resident.index);
            host.kv_shapes.push(resident.kv_shape);
            host.windows.push(resident.window);
            host.forms.push(resident.form);
            host.costs.push(resident.costs.clone());
            block_weights.push(resident.weights);
        }
        host.widths.push(self.resident[&chain.blocks[to - 1]].joint.output_width);
        let (mut adapters, mut adapter_bytes) = (SpanAdapters::new(), Vec::new());
        for adapter in chain.adapters.iter().filter(|adapter| (key.from..key.to).contains(&adapter.block_index)) {
            let pair = (adapter.digest, chain.blocks[adapter.block_index as usize]);
            if !self.adapters.contains_key(&pair) {
                self.load_adapter(pair, key.chain, adapter.block_index).await?;
            }
            let resident = self.adapters.get_mut(&pair).expect("just loaded");
            resident.spans.insert(key.clone());
            adapters.push((adapter.block_index - key.from, resident.index));
            adapter_bytes.push(resident.bytes);
        }
        let profiled_count = host.costs.iter().flatten().count();
        tracing::info!(chain = %key.chain.short(), from, to, profiled_count, "hosting a span");
        Ok(HostedSpan {
            key: key.clone(),
            width: host.widths[0],
            host,
            block_weights,
            adapters,
            adapter_bytes,
            lineage_from: from.checked_sub(1).map_or_else(Vec::new, |before| all_lineages[before].0.to_vec()),
            lineage_to: all_lineages[to - 1].0.to_vec(),
            vocab: chain.vocab,
            context_tokens: chain.context_tokens,
        })
    }

    /// Bytes of what is resident, and of `more` beside it. An output projection counts once while its head or an embedding that reads rows
    /// out of it is resident, whichever was evicted first.
    fn weight_bytes(&self, more: Option<WeightBytes>) -> u64 {
        let adapters: u64 = self.adapters.values().map(|adapter| adapter.bytes).sum();
        total_bytes(self.resident.values().map(|resident| resident.weights).chain(more)) + adapters
    }

    fn check_memory(&self, kind: &'static str, digest: Digest, bytes: u64) -> Result<(), HostError> {
        let free_bytes = self.memory_bytes.saturating_sub(self.weight_bytes(None));
        if bytes > free_bytes {
            return Err(HostError::Memory { kind, digest, bytes, free_bytes, memory_bytes: self.memory_bytes });
        }
        Ok(())
    }

    async fn load_block(&mut self, digest: Digest, index: usize) -> Result<(), HostError> {
        let mapped = self.zoo.map_block(digest).await?;
        let (form, joint) = (Form::of(&mapped.block), Joint::of(&mapped.block));
        let (ops, outputs) = (Arc::clone(&self.ops), Arc::clone(&self.outputs));
        let loaded = blocking(move || {
            let loaded = LoadedBlock::load(&*ops, &mapped.block, &mapped, &outputs);
            // Verifying read every page. What is packed needs none of them any more, and of a table only rows that are asked for.
            mapped.tensors.values().for_each(MappedTensor::release_pages);
            loaded
        });
        let loaded = loaded.await.map_err(|source| HostError::Load { block: digest, index, source: Box::new(source) })?;
        let weights = loaded.weights();
        self.check_memory("block", digest, self.weight_bytes(Some(weights)) - self.weight_bytes(None))?;
        let (kv_shape, window) = (loaded.kv_shape(self.pages), loaded.window());
        let next = self.forms.len() as u32;
        let form = *self.forms.entry(form).or_insert(next);
        let costs = read_costs(&self.zoo, digest, self.profiled_on.as_ref()).await;
        let place = BlockIndex(self.block_places.take());
        let _ = self.commands.send(Command::Load(place, Box::new(loaded)));
        self.resident.insert(digest, Resident { index: place, joint, weights, kv_shape, window, form, costs, spans: BTreeSet::new() });
        Ok(())
    }

    async fn load_adapter(&mut self, pair: (Digest, Digest), chain: Digest, index: u32) -> Result<(), HostError> {
        let (adapter, block) = pair;
        let (mapped, block) = (self.zoo.map_adapter(adapter).await?, self.zoo.read_block(block).await?);
        let ops = Arc::clone(&self.ops);
        let loaded = blocking(move || {
            let loaded = LoadedAdapter::load(&*ops, &block, &mapped.adapter, &mapped);
            mapped.changes.values().flat_map(MappedChange::tensors).for_each(MappedTensor::release_pages);
            loaded
        });
        let loaded = loaded.await.map_err(|source| HostError::Adapter { adapter, chain, index, source: Box::new(source) })?;
        let bytes = loaded.bytes() as u64;
        self.check_memory("adapter", adapter, bytes)?;
        let place = AdapterIndex(self.adapter_places.take());
        let _ = self.commands.send(Command::LoadAdapter(place, Box::new(loaded)));
        self.adapters.insert(pair, ResidentAdapter { index: place, bytes, spans: BTreeSet::new() });
        Ok(())
    }
}

/// What a block was profiled to cost on a device. It is a hint: without it what a batch costs is learned.
async fn read_costs(zoo: &Zoo, block: Digest, device: Option<&DeviceKey>) -> Option<Arc<CostCurve>> {
    match zoo.read_profile(block, device?).await {
        Ok(profile) => Some(Arc::new(CostCurve::seeded(&profile.times()))),
        Err(StoreError::Missing { .. }) => None,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(block = %block, error, "leaving a block's profile out; what it costs is learned as it runs");
            None
        }
    }
}

#[cfg(test)]
mod tests;
