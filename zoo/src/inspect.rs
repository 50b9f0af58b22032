//! Looking at a zoo: what models it holds, what one is made of, how two differ. Reads manifests only, never weights.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::adapter::AdapterError;
use crate::diff::{Diff, diff};
use crate::digest::{Digest, lineages};
use crate::joint::{self, Joint};
use crate::manifest::{Adapter, AdapterRef, Block, BlockKind, Chain, Change, ModelName, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::store::{Object, StoreError, Zoo};
use crate::tensor_file;

/// A model and all its manifests.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The name.
    pub id: ModelId,
    /// What it points to.
    pub name: ModelName,
    /// The chain.
    pub chain: Chain,
    /// The chain's blocks, in order.
    pub blocks: Vec<Block>,
    /// The chain's adapters, by block index.
    pub adapters: BTreeMap<usize, Adapter>,
}

/// One line of `zoo list`.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// `tenant/name`.
    pub model: String,
    /// Family.
    pub architecture: String,
    /// Attention and feed-forward pairs.
    pub layer_count: usize,
    /// Positions it can take.
    pub context_tokens: u32,
    /// Blocks that have an adapter.
    pub adapter_count: usize,
    /// Bytes of its distinct tensors, adapters included.
    pub bytes: u64,
    /// Of these, in no other model of the list.
    pub own_bytes: u64,
    /// Model it was tuned from.
    pub parent: Option<String>,
    /// Unix time of the name's last change.
    pub created_ms: u64,
    /// The chain.
    pub chain: Option<Digest>,
    /// Why it cannot be resolved, if so.
    pub error: Option<String>,
}

/// `zoo show`.
#[derive(Debug, Clone, Serialize)]
pub struct Shown {
    /// `tenant/name`.
    pub model: String,
    /// The name's object.
    pub name: ModelName,
    /// The chain.
    pub chain: Chain,
    /// Bytes of its distinct tensors, adapters included.
    pub bytes: u64,
    /// Of these, bytes of adapters.
    pub adapter_bytes: u64,
    /// What it was measured to change against the model that it approximates, newest first.
    pub measures: Vec<Measure>,
    /// Its blocks, in order.
    pub blocks: Vec<ShownBlock>,
}

/// A block of [`Shown`].
#[derive(Debug, Clone, Serialize)]
pub struct ShownBlock {
    /// Place in the chain.
    pub index: usize,
    /// `embed`, `attention`, `feed_forward`, `head` or `stitch`.
    pub kind: &'static str,
    /// Its digest.
    pub digest: Digest,
    /// Digest of the chain up to and with it.
    pub lineage: Digest,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Dtypes of its matrices.
    pub dtypes: Vec<String>,
    /// Other models that have it.
    pub shared_with: Vec<String>,
    /// What lies over it.
    pub adapter: Option<ShownAdapter>,
}

/// An adapter of [`ShownBlock`].
#[derive(Debug, Clone, Serialize)]
pub struct ShownAdapter {
    /// Its digest.
    pub digest: Digest,
    /// Rank of each matrix that it changes by one of low rank.
    pub ranks: BTreeMap<String, u64>,
    /// Matrices that it changes by a sign for each weight.
    pub one_bit: Vec<String>,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Other models that have it.
    pub shared_with: Vec<String>,
}

impl Zoo {
    /// Reads a model with its chain and blocks.
    ///
    /// # Errors
    /// The first manifest that is missing or damaged.
    pub async fn resolve(&self, id: &ModelId) -> Result<Resolved, StoreError> {
        let name = self.read_model(id).await?;
        self.resolve_name(id, name, &mut Cache::default()).await
    }

    /// All models, one line each; what cannot be resolved says why.
    ///
    /// # Errors
    /// When the store cannot list.
    pub async fn list_resolved(&self) -> Result<Vec<Listed>, StoreError> {
        let resolved = self.resolve_all().await?;
        let mut owners: BTreeMap<Digest, usize> = BTreeMap::new();
        for tensors in resolved.iter().filter_map(|(_, model)| model.as_ref().ok()).map(distinct_tensors) {
            tensors.keys().for_each(|digest| *owners.entry(*digest).or_default() += 1);
        }
        Ok(resolved.iter().map(|(id, model)| listed(id, model.as_ref(), &owners)).collect())
    }

    /// One model in detail.
    ///
    /// # Errors
    /// When a manifest is missing or damaged.
    pub async fn show(&self, id: &ModelId) -> Result<Shown, StoreError> {
        let model = self.resolve(id).await?;
        let mut holders: BTreeMap<Digest, BTreeSet<String>> = BTreeMap::new();
        for (other, name) in self.list_models().await? {
            // Others that are damaged do not keep this one from being shown; `verify` tells of them.
            let chain = match name {
                Ok(name) if other != *id => self.read_chain(name.chain).await.ok(),
                _ => None,
            };
            let Some(chain) = chain else { continue };
            for digest in chain.adapters.into_iter().map(|adapter| adapter.digest).chain(chain.blocks) {
                holders.entry(digest).or_default().insert(other.to_string());
            }
        }
        let shared_with = |digest: &Digest| holders.get(digest).into_iter().flatten().cloned().collect();
        let adapters: Vec<(u32, Digest)> = model.chain.adapters.iter().map(|adapter| (adapter.block_index, adapter.digest)).collect();
        let lineages = lineages(&model.chain.blocks, &adapters);
        let blocks = model.blocks.iter().enumerate().map(|(index, block)| {
            let digest = model.chain.blocks[index];
            let matrices: BTreeSet<String> = block.tensors.values().filter(|t| t.shape.len() == 2).map(|t| t.dtype.to_string()).collect();
            ShownBlock {
                index,
                kind: kind(&block.params),
                digest,
                lineage: lineages[index],
                bytes: block.tensors.values().map(tensor_bytes).sum(),
                dtypes: matrices.into_iter().collect(),
                shared_with: shared_with(&digest),
                adapter: model.adapters.get(&index).map(|adapter| shown_adapter(&model.chain, index, adapter, shared_with)),
            }
        });
        let (blocks, bytes) = (blocks.collect(), distinct_tensors(&model).values().sum());
        let adapter_tensors: BTreeMap<Digest, u64> = adapter_tensors(&model).collect();
        let adapter_bytes = adapter_tensors.values().sum();
        let measures = self.read_measures(model.name.chain).await?;
        Ok(Shown { model: id.to_string(), name: model.name, chain: model.chain, bytes, adapter_bytes, measures, blocks })
    }

    /// How two models differ.
    ///
    /// # Errors
    /// When a manifest of either is missing or damaged.
    pub async fn diff(&self, a: &ModelId, b: &ModelId) -> Result<Diff, StoreError> {
        Ok(diff(&self.resolve(a).await?, &self.resolve(b).await?))
    }

    /// Every model; a manifest that many have is read once. One that cannot be read is an error in its place.
    ///
    /// # Errors
    /// When the store cannot list.
    pub async fn resolve_all(&self) -> Result<Vec<(ModelId, Result<Resolved, StoreError>)>, StoreError> {
        let mut cache = Cache::default();
        let mut resolved = Vec::new();
        for (id, name) in self.list_models().await? {
            let model = match name {
                Ok(name) => self.resolve_name(&id, name, &mut cache).await,
                Err(e) => Err(e),
            };
            resolved.push((id, model));
        }
        Ok(resolved)
    }

    async fn resolve_name(&self, id: &ModelId, name: ModelName, cache: &mut Cache) -> Result<Resolved, StoreError> {
        let chain = self.read_chain(name.chain).await?;
        let mut blocks = Vec::with_capacity(chain.blocks.len());
        for digest in &chain.blocks {
            if !cache.blocks.contains_key(digest) {
                cache.blocks.insert(*digest, self.read_block(*digest).await?);
            }
            blocks.push(cache.blocks[digest].clone());
        }
        joint::check(0, blocks.len(), blocks.iter().map(Joint::of))
            .map_err(|e| StoreError::Damaged { object: Object::Chain(name.chain), reason: e.to_string() })?;
        let mut adapters = BTreeMap::new();
        for AdapterRef { block_index, digest } in &chain.adapters {
            if !cache.adapters.contains_key(digest) {
                cache.adapters.insert(*digest, self.read_adapter(*digest).await?);
            }
            let (index, adapter) = (*block_index as usize, cache.adapters[digest].clone());
            let damaged =
                |e: AdapterError| StoreError::Damaged { object: Object::Adapter(*digest), reason: format!("over block {index}, {e}") };
            adapter.check_against(&blocks[index]).map_err(damaged)?;
            adapters.insert(index, adapter);
        }
        Ok(Resolved { id: id.clone(), name, chain, blocks, adapters })
    }
}

/// Manifests that were read for another model.
#[derive(Default)]
struct Cache {
    blocks: BTreeMap<Digest, Block>,
    adapters: BTreeMap<Digest, Adapter>,
}

/// Kind of a block, as it is written.
pub fn kind(params: &BlockKind) -> &'static str {
    match params {
        BlockKind::Embed { .. } => "embed",
        BlockKind::Attention { .. } => "attention",
        BlockKind::FeedForward { .. } => "feed_forward",
        BlockKind::Head { .. } => "head",
        BlockKind::Stitch { .. } => "stitch",
    }
}

/// Attention and feed-forward pairs of a chain.
pub(crate) fn layer_count(blocks: &[Block]) -> usize {
    blocks.iter().filter(|block| matches!(block.params, BlockKind::Attention { .. })).count()
}

fn listed(id: &ModelId, model: Result<&Resolved, &StoreError>, owners: &BTreeMap<Digest, usize>) -> Listed {
    let model = match model {
        Ok(model) => model,
        Err(e) => {
            let (model, error) = (id.to_string(), Some(e.to_string()));
            let architecture = String::new();
            return Listed {
                model,
                architecture,
                layer_count: 0,
                context_tokens: 0,
                adapter_count: 0,
                bytes: 0,
                own_bytes: 0,
                parent: None,
                created_ms: 0,
                chain: None,
                error,
            };
        }
    };
    let tensors = distinct_tensors(model);
    Listed {
        model: id.to_string(),
        architecture: model.chain.architecture.clone(),
        layer_count: layer_count(&model.blocks),
        context_tokens: model.chain.context_tokens,
        adapter_count: model.adapters.len(),
        bytes: tensors.values().sum(),
        own_bytes: tensors.iter().filter(|(digest, _)| owners.get(digest) == Some(&1)).map(|(_, bytes)| bytes).sum(),
        parent: model.name.parent.clone(),
        created_ms: model.name.created_ms,
        chain: Some(model.name.chain),
        error: None,
    }
}

pub(crate) fn distinct_tensors(model: &Resolved) -> BTreeMap<Digest, u64> {
    let of_blocks = model.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| (tensor.digest, tensor_bytes(tensor)));
    of_blocks.chain(adapter_tensors(model)).collect()
}

fn adapter_tensors(model: &Resolved) -> impl Iterator<Item = (Digest, u64)> {
    model.adapters.values().flat_map(Adapter::tensors).map(|(_, tensor)| (tensor.digest, tensor_bytes(tensor)))
}

fn shown_adapter(chain: &Chain, index: usize, adapter: &Adapter, shared_with: impl Fn(&Digest) -> Vec<String>) -> ShownAdapter {
    let digest = chain.adapters.iter().find(|adapter| adapter.block_index as usize == index).expect("resolved from it").digest;
    let (mut ranks, mut one_bit) = (BTreeMap::new(), Vec::new());
    for (role, change) in &adapter.changes {
        match change {
            Change::LowRank { a, .. } => drop(ranks.insert(role.clone(), a.shape[0])),
            Change::OneBit { .. } => one_bit.push(role.clone()),
        }
    }
    let tensors: BTreeMap<Digest, u64> = adapter.tensors().map(|(_, tensor)| (tensor.digest, tensor_bytes(tensor))).collect();
    ShownAdapter { digest, ranks, one_bit, bytes: tensors.values().sum(), shared_with: shared_with(&digest) }
}

pub(crate) fn tensor_bytes(tensor: &TensorRef) -> u64 {
    tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(0, |bytes| bytes as u64)
}
