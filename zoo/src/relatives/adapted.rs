//! A model as a base that is there and adapters over it, not stored yet: it can be loaded and measured first. What `unmerge` and `compress` make.
//! The order of writing is an `add`'s.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::samples::Samples;
use super::sketch::{Sketch, sampled_roles};
use super::survey::{Candidates, Relative, survey};
use super::viewer::Viewer;
use crate::canonical;
use crate::digest::Digest;
use crate::inspect::{Resolved, tensor_bytes};
use crate::manifest::{Adapter, AdapterRef, Block, Chain, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::store::{Derived, MappedAdapter, MappedBlock, MappedChange, StoreError, Zoo};
use crate::tensor::MappedTensor;

/// Why a model cannot be made base and adapters.
#[derive(Debug, thiserror::Error)]
pub enum AdaptError {
    /// The model or the base belongs to someone who is not public.
    #[error("{model} is not {tenant}'s to see: `ashlar zoo public {}` lets every tenant see and share what {} has", .model.tenant(), .model.tenant())]
    Hidden {
        /// Which.
        model: ModelId,
        /// For whom.
        tenant: String,
    },
    /// It is base and adapter already.
    #[error("{0} has adapters: it is base and adapter already")]
    Adapted(ModelId),
    /// Nothing near enough is there.
    #[error(
        "none of the {visible_count} models that {tenant} may see is a relative of {model} without adapters: give its base with --base TENANT/MODEL"
    )]
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
    /// There is no difference that could be compressed.
    #[error("no matrix of {model} differs from one of {base} that has its shape")]
    Same {
        /// The model.
        model: ModelId,
        /// The base.
        base: ModelId,
    },
    /// A base that is base and adapter itself.
    #[error("{0} has adapters, so nothing can lie over it")]
    BaseAdapted(ModelId),
    /// The name is taken.
    #[error("{0} exists: give another name with --name")]
    Exists(ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A tensor that is not stored yet.
pub(super) type NewTensor = (TensorRef, Bytes);

/// A model and its base, to be compared.
pub(super) struct Related {
    pub(super) tuned: Resolved,
    pub(super) base: Relative,
    /// Samples of both models' sampled matrices, by tensor.
    samples: BTreeMap<Digest, Samples>,
}

impl Related {
    /// Reads `model` and its base, which is sought among what `viewer`, a tenant's, may see unless it is given.
    pub(super) async fn read(zoo: &Zoo, viewer: (&str, &Viewer), model: &ModelId, base: Option<&ModelId>) -> Result<Self, AdaptError> {
        let (tenant, viewer) = viewer;
        for id in std::iter::once(model).chain(base) {
            if !viewer.sees(id) {
                return Err(AdaptError::Hidden { model: id.clone(), tenant: tenant.to_owned() });
            }
        }
        let tuned = zoo.resolve(model).await?;
        if !tuned.chain.adapters.is_empty() {
            return Err(AdaptError::Adapted(model.clone()));
        }
        let sketch = sketch_of(zoo, tuned.name.chain).await?;
        let (base, base_chain) = match base {
            Some(base) => (base.clone(), zoo.read_model(base).await?.chain),
            None => {
                let found = survey(zoo, viewer, &sketch, Some((model, tuned.name.chain)), Candidates::Plain).await?;
                let none =
                    || AdaptError::NoRelative { model: model.clone(), tenant: tenant.to_owned(), visible_count: found.visible_count };
                found.nearest.as_ref().map(|(id, chain, _)| (id.clone(), *chain)).ok_or_else(none)?
            }
        };
        let base = Relative::read(zoo, base, base_chain).await?;
        if !base.chain.adapters.is_empty() {
            return Err(AdaptError::BaseAdapted(base.id));
        }
        if base.blocks.len() != tuned.blocks.len() {
            let (blocks, base_blocks) = (tuned.blocks.len(), base.blocks.len());
            return Err(AdaptError::Blocks { model: model.clone(), base: base.id, blocks, base_blocks });
        }
        let of_base = sketch_of(zoo, base.digest).await?;
        let mut samples = BTreeMap::new();
        for (blocks, sketch) in [(&base.blocks, &of_base), (&tuned.blocks, &sketch)] {
            for (at, (index, role)) in sampled_roles(&blocks.iter().collect::<Vec<_>>()).into_iter().enumerate() {
                samples.extend(sketch.samples(at).map(|found| (blocks[index].tensors[role].digest, found)));
            }
        }
        Ok(Self { tuned, base, samples })
    }
}

async fn sketch_of(zoo: &Zoo, chain: Digest) -> Result<Sketch, StoreError> {
    match zoo.read_sketch(chain).await? {
        Some(sketch) => Ok(sketch),
        None => zoo.make_sketch(chain).await,
    }
}

/// A model as base and adapters. Nothing of it is stored yet.
#[derive(Debug, Clone)]
pub struct Adapted {
    /// The chain of the model as it is.
    pub source: Digest,
    /// The base's name.
    pub base: ModelId,
    /// Bytes of the model's tensors that the base does not have, as it is.
    pub bytes_before: u64,
    /// The same as base and adapters.
    pub bytes_after: u64,
    /// The chain.
    pub chain: Chain,
    /// The chain's blocks, in order, of tensors that are stored already.
    blocks: Vec<Block>,
    adapters: BTreeMap<usize, Adapter>,
    /// The adapters' tensors.
    new: BTreeMap<Digest, NewTensor>,
    sketch: Sketch,
}

impl Adapted {
    /// The tuned model as `blocks`, whose tensors are its own or the base's, and `adapters` by block index, whose tensors are `new`.
    pub(super) fn new(related: &Related, blocks: Vec<Block>, adapters: BTreeMap<usize, Adapter>, new: BTreeMap<Digest, NewTensor>) -> Self {
        let Related { tuned, base, samples } = related;
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
        let new_bytes: u64 = new.values().map(|(_, payload): &NewTensor| payload.len() as u64).sum();
        let sketched: Vec<(Digest, &Block)> = digests.into_iter().zip(&blocks).collect();
        let over: Vec<(Digest, &Adapter)> = described.iter().map(|(_, digest)| *digest).zip(adapters.values()).collect();
        let sample = |index: usize, role: &str| Ok::<_, std::convert::Infallible>(samples[&blocks[index].tensors[role].digest]);
        let sketch = Sketch::new(&sketched, &over, &chain.assets, sample).unwrap_or_else(|never| match never {});
        Self {
            source: tuned.name.chain,
            base: base.id.clone(),
            bytes_before: own_bytes(&tuned.blocks),
            bytes_after: own_bytes(&blocks) + new_bytes,
            chain,
            blocks,
            adapters,
            new,
            sketch,
        }
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

    /// The adapters, by block index, with their tensors in memory.
    pub fn adapters(&self) -> BTreeMap<usize, MappedAdapter> {
        let mapped = |(_, tensor): (&str, &TensorRef)| MappedTensor::owned(tensor, &self.new[&tensor.digest].1);
        let adapters = self.adapters.iter().map(|(index, adapter)| {
            let changes = adapter.changes.iter();
            let changes = changes.map(|(role, change)| (role.clone(), MappedChange::new(change, change.tensors().map(mapped).collect())));
            (*index, MappedAdapter { adapter: adapter.clone(), changes: changes.collect() })
        });
        adapters.collect()
    }

    /// Stores tensors, blocks, adapters, the chain with its sketch and what was measured of it, and then a new name for it, whose parent is the base.
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    ///
    /// # Panics
    /// When the record does not pass [`Measure::check`].
    pub async fn store(&self, zoo: &Zoo, name: &ModelId, created_ms: u64, measured: Option<&Measure>) -> Result<Digest, AdaptError> {
        let derived = Derived {
            chain: &self.chain,
            blocks: &self.blocks,
            adapters: self.adapters.values().collect(),
            new: self.new.values().collect(),
            sketch: Some(&self.sketch),
            measured,
            parent: &self.base,
        };
        zoo.store_derived(name, created_ms, &derived).await?.ok_or_else(|| AdaptError::Exists(name.clone()))
    }
}
