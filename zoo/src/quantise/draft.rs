//! A chain whose matrices are being quantised. Tensors go to the zoo as they are made, or stay in memory to be measured; blocks, chain and name
//! are written at the end, in the order of an add, so what is killed before leaves unreferenced objects only.

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use bytes::Bytes;

use super::planar::round;
use super::recipe::Recipe;
use crate::blocking::blocking;
use crate::canonical;
use crate::digest::Digest;
use crate::inspect::Resolved;
use crate::manifest::{Block, Chain, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::store::{Compression, Derived, MappedBlock, StoreError, Zoo};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Why a model was not quantised. No name changed.
#[derive(Debug, thiserror::Error)]
pub enum QuantiseError {
    /// The model belongs to someone who is not public.
    #[error("{model} is not {tenant}'s to see: `ashlar zoo public {}` lets every tenant see and share what {} has", .model.tenant(), .model.tenant())]
    Hidden {
        /// Which.
        model: ModelId,
        /// For whom.
        tenant: String,
    },
    /// It is base and adapters.
    #[error("{0} has adapters, which were trained over its base as it is: quantise the base, or merge them first")]
    Adapted(ModelId),
    /// The name is taken.
    #[error("{0} exists: give another name with --name")]
    Exists(ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A model on its way to be quantised.
#[derive(Debug)]
pub struct Draft {
    zoo: Zoo,
    source: Resolved,
    recipe: Recipe,
    /// Whether tensors are written to the zoo as they are made.
    is_stored: bool,
    /// In order, with the tensors that were made so far.
    blocks: Vec<Block>,
    /// What was made and is not in the zoo.
    held: BTreeMap<Digest, MappedTensor>,
    /// What tensors of the source were rounded to.
    rounded: BTreeMap<(Digest, Dtype), TensorRef>,
}

impl Draft {
    /// A draft of `source`. With a name, its tensors are stored; the name must be free, and its tenant must see the source.
    ///
    /// # Errors
    /// Why the source cannot be quantised under that name, or how the store failed.
    pub async fn new(zoo: &Zoo, source: Resolved, recipe: Recipe, name: Option<&ModelId>) -> Result<Self, QuantiseError> {
        if !source.chain.adapters.is_empty() {
            return Err(QuantiseError::Adapted(source.id));
        }
        if let Some(name) = name {
            if !zoo.viewer(name.tenant()).await?.sees(&source.id) {
                return Err(QuantiseError::Hidden { model: source.id, tenant: name.tenant().to_owned() });
            }
            if !zoo.is_free(name).await? {
                return Err(QuantiseError::Exists(name.clone()));
            }
        }
        let blocks = source.blocks.clone();
        let (held, rounded) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { zoo: zoo.clone(), source, recipe, is_stored: name.is_some(), blocks, held, rounded })
    }

    /// The chain's blocks, with what was made so far.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Matrices of a block that the recipe changes, with what they become.
    pub fn targets(&self, index: usize) -> Vec<(String, Dtype)> {
        let tensors = self.source.blocks[index].tensors.iter();
        let target = |(role, tensor): (&String, &TensorRef)| {
            let target = self.recipe.target(role, &tensor.shape).filter(|target| *target != tensor.dtype)?;
            Some((role.clone(), target))
        };
        tensors.filter_map(target).collect()
    }

    /// Bytes of all matrices that the recipe changes, as they will be: how much work there is.
    pub fn target_bytes(&self, index: usize) -> u64 {
        let bytes = |(role, dtype): &(String, Dtype)| tensor_file::payload_bytes(*dtype, &self.source.blocks[index].tensors[role].shape);
        self.targets(index).iter().filter_map(bytes).map(|bytes| bytes as u64).sum()
    }

    /// Rounds all matrices of a block that the recipe changes: without data, so equal matrices stay equal.
    ///
    /// # Errors
    /// When a tensor of the source cannot be read, or the store fails.
    pub async fn round(&mut self, index: usize) -> Result<(), QuantiseError> {
        for (role, dtype) in self.targets(index) {
            let tensor = self.source.blocks[index].tensors[&role].clone();
            if let Some(rounded) = self.rounded.get(&(tensor.digest, dtype)) {
                self.blocks[index].tensors.insert(role, rounded.clone());
                continue;
            }
            let mapped = self.zoo.map_tensor(&tensor).await.map_err(|e| e.in_block(self.source.chain.blocks[index], &role))?;
            let payload = blocking(move || {
                let payload = round(&mapped.view(), dtype);
                mapped.release_pages();
                payload
            });
            let payload = payload.await;
            self.set(index, &role, dtype, payload).await?;
            self.rounded.insert((tensor.digest, dtype), self.blocks[index].tensors[&role].clone());
        }
        Ok(())
    }

    /// Takes the payload of a matrix.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the payload is not one of the source's shape.
    pub async fn set(&mut self, index: usize, role: &str, dtype: Dtype, payload: Vec<u8>) -> Result<(), QuantiseError> {
        let shape = self.source.blocks[index].tensors[role].shape.clone();
        assert_eq!(tensor_file::payload_bytes(dtype, &shape), Some(payload.len()), "{role} as {dtype}");
        let tensor = TensorRef { digest: tensor_file::digest(dtype, &shape, &payload), dtype, shape };
        if self.is_stored {
            self.zoo.put_tensor(&tensor, Bytes::from(payload), Compression::Alone).await?;
        } else {
            self.held.insert(tensor.digest, MappedTensor::owned(&tensor, &payload));
        }
        self.blocks[index].tensors.insert(role.to_owned(), tensor);
        Ok(())
    }

    /// A block with what was made of it so far, and the source's tensors for the rest.
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or the store fails.
    pub async fn map_block(&self, index: usize) -> Result<MappedBlock, StoreError> {
        let (block, mut tensors) = (self.blocks[index].clone(), BTreeMap::new());
        for (role, tensor) in &block.tensors {
            let mapped = match self.held.get(&tensor.digest) {
                Some(held) => held.clone(),
                None => self.zoo.map_tensor(tensor).await.map_err(|e| e.in_block(self.source.chain.blocks[index], role))?,
            };
            tensors.insert(role.clone(), mapped);
        }
        Ok(MappedBlock { block, tensors })
    }

    /// Bytes of the distinct tensors.
    pub fn bytes(&self) -> u64 {
        let tensors: BTreeMap<Digest, &TensorRef> =
            self.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| (tensor.digest, tensor)).collect();
        tensors.values().filter_map(|tensor| tensor_file::payload_bytes(tensor.dtype, &tensor.shape)).map(|bytes| bytes as u64).sum()
    }

    /// Stores blocks, the chain with its sketch and what was measured of it, and then a new name for it, whose parent is the source.
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    ///
    /// # Panics
    /// When the draft was begun without a name, or the record does not pass [`Measure::check`].
    pub async fn store(&self, name: &ModelId, created_ms: u64, measured: Option<&Measure>) -> Result<Digest, QuantiseError> {
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
        self.zoo.store_derived(name, created_ms, &derived).await?.ok_or_else(|| QuantiseError::Exists(name.clone()))
    }
}
