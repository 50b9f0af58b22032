//! A chain that is being made of a stored one, block by block. Tensors go to the zoo as they are made, or stay in memory to be measured; blocks,
//! chain and name are written at the end, in the order of an add, so what is killed before leaves unreferenced objects only. What becomes of the
//! blocks is for others to know: `quantise`, `surrogate`.

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use bytes::Bytes;

use crate::canonical;
use crate::digest::Digest;
use crate::inspect::Resolved;
use crate::manifest::{Block, Chain, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::store::{Compression, Derived, MappedBlock, StoreError, Zoo};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Why no other form of a model was made. No name changed.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// The model belongs to someone who is not public.
    #[error("{model} is not {tenant}'s to see: `ashlar zoo public {}` lets every tenant see and share what {} has", .model.tenant(), .model.tenant())]
    Hidden {
        /// Which.
        model: ModelId,
        /// For whom.
        tenant: String,
    },
    /// It is base and adapters.
    #[error("{0} has adapters, which were trained over its base as it is: take the base, or merge them first")]
    Adapted(ModelId),
    /// The name is taken.
    #[error("{0} exists: give another name with --name")]
    Exists(ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A chain on its way to be another form of its source.
#[derive(Debug)]
pub struct ChainDraft {
    zoo: Zoo,
    source: Resolved,
    /// Whether tensors are written to the zoo as they are made.
    is_stored: bool,
    /// In order, with what was made so far.
    blocks: Vec<Block>,
    /// What was made and is not in the zoo.
    held: BTreeMap<Digest, MappedTensor>,
}

impl ChainDraft {
    /// A draft of `source`. With a name, its tensors are stored; the name must be free, and its tenant must see the source.
    ///
    /// # Errors
    /// Why nothing can be made of the source under that name, or how the store failed.
    pub async fn new(zoo: &Zoo, source: Resolved, name: Option<&ModelId>) -> Result<Self, DraftError> {
        if !source.chain.adapters.is_empty() {
            return Err(DraftError::Adapted(source.id));
        }
        if let Some(name) = name {
            if !zoo.viewer(name.tenant()).await?.sees(&source.id) {
                return Err(DraftError::Hidden { model: source.id, tenant: name.tenant().to_owned() });
            }
            if !zoo.is_free(name).await? {
                return Err(DraftError::Exists(name.clone()));
            }
        }
        let blocks = source.blocks.clone();
        Ok(Self { zoo: zoo.clone(), source, is_stored: name.is_some(), blocks, held: BTreeMap::new() })
    }

    /// What it is made of.
    pub fn source(&self) -> &Resolved {
        &self.source
    }

    /// The chain's blocks, with what was made so far.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Takes the payload of a new tensor, which no block has yet.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the payload is not of that dtype and shape.
    pub async fn put(&mut self, dtype: Dtype, shape: Vec<u64>, payload: Vec<u8>) -> Result<TensorRef, StoreError> {
        assert_eq!(tensor_file::payload_bytes(dtype, &shape), Some(payload.len()), "a payload of {shape:?} as {dtype}");
        let tensor = TensorRef { digest: tensor_file::digest(dtype, &shape, &payload), dtype, shape };
        if self.is_stored {
            self.zoo.put_tensor(&tensor, Bytes::from(payload), Compression::Alone).await?;
        } else {
            self.held.insert(tensor.digest, MappedTensor::owned(&tensor, &payload));
        }
        Ok(tensor)
    }

    /// Puts a block into the place of another one.
    ///
    /// # Panics
    /// When it is no block that can be stored.
    pub fn set_block(&mut self, index: usize, block: Block) {
        assert_eq!(block.check(), Ok(()), "block {index}");
        self.blocks[index] = block;
    }

    /// A tensor of a block with what was made of it so far.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    ///
    /// # Panics
    /// When the block has no such role.
    pub async fn map_tensor(&self, index: usize, role: &str) -> Result<MappedTensor, StoreError> {
        let tensor = &self.blocks[index].tensors[role];
        match self.held.get(&tensor.digest) {
            Some(held) => Ok(held.clone()),
            None => self.zoo.map_tensor(tensor).await.map_err(|e| e.in_block(self.source.chain.blocks[index], role)),
        }
    }

    /// A block with what was made of it so far, and the source's tensors for the rest.
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or the store fails.
    pub async fn map_block(&self, index: usize) -> Result<MappedBlock, StoreError> {
        let (block, mut tensors) = (self.blocks[index].clone(), BTreeMap::new());
        for role in block.tensors.keys() {
            tensors.insert(role.clone(), self.map_tensor(index, role).await?);
        }
        Ok(MappedBlock { block, tensors })
    }

    /// Bytes of the distinct tensors.
    pub fn bytes(&self) -> u64 {
        distinct(&self.blocks).values().sum()
    }

    /// Bytes of the source's distinct tensors.
    pub fn source_bytes(&self) -> u64 {
        distinct(&self.source.blocks).values().sum()
    }

    /// Bytes of the distinct tensors that the source does not have: what it takes beside the source.
    pub fn own_bytes(&self) -> u64 {
        let source = distinct(&self.source.blocks);
        distinct(&self.blocks).iter().filter(|(digest, _)| !source.contains_key(digest)).map(|(_, bytes)| bytes).sum()
    }

    /// Stores blocks, the chain with its sketch and what was measured of it, and then a new name for it, whose parent is the source.
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    ///
    /// # Panics
    /// When the draft was begun without a name, or the record does not pass [`Measure::check`].
    pub async fn store(&self, name: &ModelId, created_ms: u64, measured: Option<&Measure>) -> Result<Digest, DraftError> {
        assert!(self.is_stored, "a draft that is stored is begun with its name");
        let blocks = self.blocks.iter().map(canonical::digest).collect();
        let derived = Derived {
            chain: &Chain { blocks, ..self.source.chain.clone() },
            blocks: &self.blocks,
            adapters: Vec::new(),
            new: Vec::new(),
            sketch: None,
            measured,
            parent: &self.source.id,
        };
        self.zoo.store_derived(name, created_ms, &derived).await?.ok_or_else(|| DraftError::Exists(name.clone()))
    }
}

/// Bytes of each distinct tensor.
fn distinct(blocks: &[Block]) -> BTreeMap<Digest, u64> {
    let tensors = blocks.iter().flat_map(|block| block.tensors.values());
    tensors.map(|tensor| (tensor.digest, tensor_file::payload_bytes(tensor.dtype, &tensor.shape).unwrap_or(0) as u64)).collect()
}
