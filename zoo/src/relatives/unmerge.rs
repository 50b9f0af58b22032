//! A merged LoRA as base and adapter again, so that it shares its base. [`propose`] writes nothing: what it finds can be loaded and
//! measured. [`Proposal::store`] then stores it under a name. The order of writing is an `add`'s.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_kernels::format::Dtype;
use bytes::Bytes;

use super::difference::{BlockDifference, Compared, compare};
use super::low_rank::{LowRank, Proof};
use super::samples::Samples;
use super::sketch::{Sketch, sampled_roles};
use super::survey::{Relative, survey};
use super::viewer::Viewer;
use crate::canonical;
use crate::digest::Digest;
use crate::inspect::Resolved;
use crate::manifest::{Adapter, AdapterRef, Block, Chain, Change, ModelName, TensorRef};
use crate::model_id::ModelId;
use crate::store::{Compression, MappedAdapter, MappedBlock, MappedChange, Object, StoreError, Zoo};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Blocks that are compared at a time: each holds a few copies of a matrix in f32.
const BLOCKS_AT_ONCE: usize = 2;

/// Why a model cannot be unmerged.
#[derive(Debug, thiserror::Error)]
pub enum UnmergeError {
    /// The model or the base belongs to someone who is not public.
    #[error("{model} is not {tenant}'s to see: `ashlar zoo public {}` lets every tenant see and share what {} has", .model.tenant(), .model.tenant())]
    Hidden {
        /// Which.
        model: ModelId,
        /// For whom.
        tenant: String,
    },
    /// It is base and adapter already.
    #[error("{0} has adapters: it is not merged")]
    Adapted(ModelId),
    /// Nothing near enough is there.
    #[error("none of the {visible_count} models that {tenant} may see is a relative of {model}: give its base with --base TENANT/MODEL")]
    NoRelative {
        /// The model.
        model: ModelId,
        /// For whom.
        tenant: String,
        /// How many there are.
        visible_count: usize,
    },
    /// Layers that do not correspond.
    #[error("{model} and {base} have {blocks} and {base_blocks} blocks")]
    Blocks {
        /// The model.
        model: ModelId,
        /// The base.
        base: ModelId,
        /// Its blocks.
        blocks: usize,
        /// The base's.
        base_blocks: usize,
    },
    /// Nothing was merged, as far as can be told.
    #[error("no matrix of {model} is one of {base} and a difference of rank {rank_max} or less")]
    NotMerged {
        /// The model.
        model: ModelId,
        /// The base.
        base: ModelId,
        /// Largest rank that was sought.
        rank_max: usize,
    },
    /// The name is taken.
    #[error("{0} exists: give another name with --name")]
    Exists(ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A model as base and adapters. Nothing of it is stored yet.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// The base's name.
    pub base: ModelId,
    /// How the model's blocks differ from the base's.
    pub differences: Vec<BlockDifference>,
    /// Elements of all unmerged matrices, after rounding.
    pub proof: Proof,
    /// Matrices that were unmerged.
    pub matrix_count: usize,
    /// Bytes of the model's tensors that the base does not have, as it is.
    pub bytes_before: u64,
    /// The same as base and adapters.
    pub bytes_after: u64,
    /// The chain.
    pub chain: Chain,
    /// The chain's blocks, in order: with the base's tensors where the model has these or those and a low-rank difference.
    blocks: Vec<Block>,
    adapters: BTreeMap<usize, Adapter>,
    /// Payloads of the adapters' factors.
    factors: BTreeMap<Digest, (TensorRef, Bytes)>,
    sketch: Sketch,
}

/// Finds what of `model` is a base's and a difference of rank at most `rank_max`. The base is sought among what `viewer` may see unless it is given.
///
/// # Errors
/// Why there is nothing to propose, or how the store failed.
pub async fn propose(
    zoo: &Zoo,
    viewer: (&str, &Viewer),
    model: &ModelId,
    base: Option<&ModelId>,
    rank_max: usize,
) -> Result<Proposal, UnmergeError> {
    let (tenant, viewer) = viewer;
    for id in std::iter::once(model).chain(base) {
        if !viewer.sees(id) {
            return Err(UnmergeError::Hidden { model: id.clone(), tenant: tenant.to_owned() });
        }
    }
    let tuned = zoo.resolve(model).await?;
    if !tuned.chain.adapters.is_empty() {
        return Err(UnmergeError::Adapted(model.clone()));
    }
    let sketch = match zoo.read_sketch(tuned.name.chain).await? {
        Some(sketch) => sketch,
        None => zoo.make_sketch(tuned.name.chain).await?,
    };
    let (base, base_chain) = match base {
        Some(base) => (base.clone(), zoo.read_model(base).await?.chain),
        None => {
            let found = survey(zoo, viewer, &sketch, Some((model, tuned.name.chain))).await?;
            let none = || UnmergeError::NoRelative { model: model.clone(), tenant: tenant.to_owned(), visible_count: found.visible_count };
            found.nearest.as_ref().map(|(id, chain, _)| (id.clone(), *chain)).ok_or_else(none)?
        }
    };
    let base = Relative::read(zoo, base, base_chain).await?;
    if base.blocks.len() != tuned.blocks.len() {
        let (blocks, base_blocks) = (tuned.blocks.len(), base.blocks.len());
        return Err(UnmergeError::Blocks { model: model.clone(), base: base.id, blocks, base_blocks });
    }
    let compared = compare(zoo, &base.blocks, &tuned.blocks, rank_max, BLOCKS_AT_ONCE).await?;
    if compared.iter().all(|block| block.factors.is_empty()) {
        return Err(UnmergeError::NotMerged { model: model.clone(), base: base.id, rank_max });
    }
    Ok(Proposal::new(&tuned, &base, compared, &sketch_samples(zoo, &base, &tuned, &sketch).await?))
}

/// Samples of both models' sampled matrices, by tensor.
async fn sketch_samples(zoo: &Zoo, base: &Relative, tuned: &Resolved, sketch: &Sketch) -> Result<BTreeMap<Digest, Samples>, StoreError> {
    let of_base = match zoo.read_sketch(base.digest).await? {
        Some(sketch) => sketch,
        None => zoo.make_sketch(base.digest).await?,
    };
    let mut samples = BTreeMap::new();
    for (blocks, sketch) in [(&base.blocks, &of_base), (&tuned.blocks, sketch)] {
        for (at, (index, role)) in sampled_roles(&blocks.iter().collect::<Vec<_>>()).into_iter().enumerate() {
            samples.extend(sketch.samples(at).map(|found| (blocks[index].tensors[role].digest, found)));
        }
    }
    Ok(samples)
}

impl Proposal {
    fn new(tuned: &Resolved, base: &Relative, compared: Vec<Compared>, samples: &BTreeMap<Digest, Samples>) -> Self {
        let (mut blocks, mut adapters, mut factors) = (tuned.blocks.clone(), BTreeMap::new(), BTreeMap::new());
        let (mut differences, mut proof, mut matrix_count) = (Vec::new(), Proof::default(), 0);
        for (index, Compared { difference, factors: found }) in compared.into_iter().enumerate() {
            let mut changes = BTreeMap::new();
            for (role, found) in found {
                blocks[index].tensors.insert(role.clone(), base.blocks[index].tensors[&role].clone());
                proof = proof.plus(found.proof);
                matrix_count += 1;
                let [a, b] = tensors(&found, &base.blocks[index].tensors[&role].shape);
                changes.insert(role, Change::LowRank { scale: 1.0, a: a.0.clone(), b: b.0.clone() });
                factors.extend([a, b].map(|(tensor, payload)| (tensor.digest, (tensor, payload))));
            }
            if !changes.is_empty() {
                adapters.insert(index, Adapter { changes });
            }
            differences.push(difference);
        }
        let digests: Vec<Digest> = blocks.iter().map(canonical::digest).collect();
        let described: Vec<(usize, Digest)> = adapters.iter().map(|(index, adapter)| (*index, canonical::digest(adapter))).collect();
        let reference =
            |(index, digest): &(usize, Digest)| AdapterRef { block_index: u32::try_from(*index).expect("at most 4096"), digest: *digest };
        let chain = Chain { blocks: digests.clone(), adapters: described.iter().map(reference).collect(), ..tuned.chain.clone() };
        let of_base: BTreeSet<Digest> = base.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| tensor.digest).collect();
        let own_bytes = |blocks: &[Block]| -> u64 {
            let own = blocks.iter().flat_map(|block| block.tensors.values()).filter(|tensor| !of_base.contains(&tensor.digest));
            own.map(|tensor| (tensor.digest, tensor_bytes(tensor))).collect::<BTreeMap<_, _>>().values().sum()
        };
        let factor_bytes: u64 = factors.values().map(|(_, payload): &(TensorRef, Bytes)| payload.len() as u64).sum();
        let sketched: Vec<(Digest, &Block)> = digests.into_iter().zip(&blocks).collect();
        let over: Vec<(Digest, &Adapter)> = described.iter().map(|(_, digest)| *digest).zip(adapters.values()).collect();
        let sample = |index: usize, role: &str| Ok::<_, std::convert::Infallible>(samples[&blocks[index].tensors[role].digest]);
        let sketch = Sketch::new(&sketched, &over, &chain.assets, sample).unwrap_or_else(|never| match never {});
        Self {
            base: base.id.clone(),
            differences,
            proof,
            matrix_count,
            bytes_before: own_bytes(&tuned.blocks),
            bytes_after: own_bytes(&blocks) + factor_bytes,
            chain,
            blocks,
            adapters,
            factors,
            sketch,
        }
    }

    /// Ranks of the unmerged matrices, by block index and role.
    pub fn ranks(&self) -> BTreeMap<(usize, &str), usize> {
        let of = |block: &'_ BlockDifference| block.index;
        let tensors =
            self.differences.iter().flat_map(|block| block.tensors.iter().map(move |(role, tensor)| ((of(block), role.as_str()), tensor)));
        tensors.filter_map(|(place, tensor)| Some((place, tensor.rank?))).collect()
    }

    /// Blocks of the chain.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Loads a block of the chain; its tensors are stored already.
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or the store fails.
    pub async fn map_block(&self, zoo: &Zoo, index: usize) -> Result<MappedBlock, StoreError> {
        let (block, digest) = (&self.blocks[index], self.chain.blocks[index]);
        let mut tensors = BTreeMap::new();
        for (role, tensor) in &block.tensors {
            tensors.insert(role.clone(), zoo.map_tensor(tensor).await.map_err(|e| e.in_block(digest, role))?);
        }
        Ok(MappedBlock { block: block.clone(), tensors })
    }

    /// The adapters, by block index, with their factors in memory.
    pub fn adapters(&self) -> BTreeMap<usize, MappedAdapter> {
        let mapped = |tensor: &TensorRef| MappedTensor::owned(tensor, &self.factors[&tensor.digest].1);
        let change = |Change::LowRank { scale, a, b }: &Change| MappedChange::LowRank { scale: *scale, a: mapped(a), b: mapped(b) };
        let adapters = self.adapters.iter().map(|(index, adapter)| {
            let changes = adapter.changes.iter().map(|(role, found)| (role.clone(), change(found))).collect();
            (*index, MappedAdapter { adapter: adapter.clone(), changes })
        });
        adapters.collect()
    }

    /// Stores factors, blocks, adapters, the chain and its sketch, and then a new name for it, whose parent is the base.
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    pub async fn store(&self, zoo: &Zoo, name: &ModelId, created_ms: u64) -> Result<Digest, UnmergeError> {
        match zoo.read_model(name).await {
            Err(StoreError::Missing { .. }) => {}
            Ok(_) => return Err(UnmergeError::Exists(name.clone())),
            Err(other) => return Err(other.into()),
        }
        let storing = zoo.begin_storing().await?;
        let mut chain = self.store_unnamed(zoo).await?;
        if zoo.must_store_again(storing).await? {
            chain = self.store_unnamed(zoo).await?;
        }
        let new = ModelName { chain, created_ms, parent: Some(self.base.to_string()), history: Vec::new(), loaded: false };
        match zoo.set_model(name, None, &new).await {
            Err(StoreError::Conflict { .. }) => Err(UnmergeError::Exists(name.clone())),
            other => Ok(other.map(|()| chain)?),
        }
    }

    /// Stores all but the name. Returns the chain.
    async fn store_unnamed(&self, zoo: &Zoo) -> Result<Digest, StoreError> {
        for (tensor, payload) in self.factors.values() {
            zoo.put_tensor(tensor, payload.clone(), Compression::Alone).await?;
        }
        // What the base and the model have may lose its names while this is written.
        let assets = &self.chain.assets;
        let tensors = self.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| Object::Tensor(tensor.digest));
        let assets = [assets.tokenizer, assets.chat_template, assets.card].into_iter().flatten().map(Object::Asset);
        for object in tensors.chain(assets).collect::<BTreeSet<_>>() {
            zoo.renew(&object).await?;
        }
        for block in &self.blocks {
            zoo.put_block(block).await?;
        }
        for adapter in self.adapters.values() {
            zoo.put_adapter(adapter).await?;
        }
        let (chain, _) = zoo.put_chain(&self.chain).await?;
        zoo.put_sketch(chain, &self.sketch).await?;
        Ok(chain)
    }
}

/// Both factors as f32 tensors: f32 keeps the proof, and they are small.
fn tensors(found: &LowRank, shape: &[u64]) -> [(TensorRef, Bytes); 2] {
    let tensor = |shape: Vec<u64>, values: &[f32]| {
        let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let digest = tensor_file::digest(Dtype::F32, &shape, &payload);
        (TensorRef { digest, dtype: Dtype::F32, shape }, Bytes::from(payload))
    };
    let rank = found.rank as u64;
    [tensor(vec![rank, shape[1]], &found.a), tensor(vec![shape[0], rank], &found.b)]
}

fn tensor_bytes(tensor: &TensorRef) -> u64 {
    tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(0, |bytes| bytes as u64)
}
