//! A chain whose matrices are being quantised: which of them the recipe changes, and rounding them without data.

use std::collections::BTreeMap;

use super::recipe::{Form, Recipe};
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::draft::{ChainDraft, DraftError};
use crate::inspect::Resolved;
use crate::manifest::{Block, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::store::{MappedBlock, StoreError, Zoo};
use crate::tensor_file;

/// A model on its way to be quantised.
#[derive(Debug)]
pub struct Draft {
    chain: ChainDraft,
    recipe: Recipe,
    /// What tensors of the source were rounded to.
    rounded: BTreeMap<(Digest, Form), TensorRef>,
}

impl Draft {
    /// A draft of `source`. With a name, its tensors are stored; the name must be free, and its tenant must see the source.
    ///
    /// # Errors
    /// Why the source cannot be quantised under that name, or how the store failed.
    pub async fn new(zoo: &Zoo, source: Resolved, recipe: Recipe, name: Option<&ModelId>) -> Result<Self, DraftError> {
        Ok(Self { chain: ChainDraft::new(zoo, source, name).await?, recipe, rounded: BTreeMap::new() })
    }

    /// The chain, with what was made so far.
    pub fn chain(&self) -> &ChainDraft {
        &self.chain
    }

    /// The chain's blocks, with what was made so far.
    pub fn blocks(&self) -> &[Block] {
        self.chain.blocks()
    }

    /// Matrices of a block that the recipe changes, with what they become.
    pub fn targets(&self, index: usize) -> Vec<(String, Form)> {
        let tensors = self.chain.source().blocks[index].tensors.iter();
        let target = |(role, tensor): (&String, &TensorRef)| {
            let target = self.recipe.target(role, &tensor.shape).filter(|target| target.dtype() != tensor.dtype)?;
            Some((role.clone(), target))
        };
        tensors.filter_map(target).collect()
    }

    /// Bytes of all matrices that the recipe changes, as they will be: how much work there is.
    pub fn target_bytes(&self, index: usize) -> u64 {
        let tensors = &self.chain.source().blocks[index].tensors;
        let bytes = |(role, form): &(String, Form)| tensor_file::payload_bytes(form.dtype(), &tensors[role].shape);
        self.targets(index).iter().filter_map(bytes).map(|bytes| bytes as u64).sum()
    }

    /// Rounds all matrices of a block that the recipe changes: without data, so equal matrices stay equal.
    ///
    /// # Errors
    /// When a tensor of the source cannot be read, or the store fails.
    pub async fn round(&mut self, index: usize) -> Result<(), DraftError> {
        for (role, form) in self.targets(index) {
            let source = self.chain.source().blocks[index].tensors[&role].digest;
            if let Some(rounded) = self.rounded.get(&(source, form)) {
                self.take(index, &role, rounded.clone());
                continue;
            }
            let mapped = self.chain.map_tensor(index, &role).await?;
            let payload = blocking(move || {
                let payload = form.round(&mapped.view());
                mapped.release_pages();
                payload
            });
            let payload = payload.await;
            self.set(index, &role, form, payload).await?;
            self.rounded.insert((source, form), self.blocks()[index].tensors[&role].clone());
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
    pub async fn set(&mut self, index: usize, role: &str, form: Form, payload: Vec<u8>) -> Result<(), DraftError> {
        let shape = self.chain.source().blocks[index].tensors[role].shape.clone();
        let tensor = self.chain.put(form.dtype(), shape, payload).await?;
        self.take(index, role, tensor);
        Ok(())
    }

    fn take(&mut self, index: usize, role: &str, tensor: TensorRef) {
        let mut block = self.blocks()[index].clone();
        block.tensors.insert(role.to_owned(), tensor);
        self.chain.set_block(index, block);
    }

    /// As [`ChainDraft::map_block`].
    ///
    /// # Errors
    /// When a tensor is missing or damaged, or the store fails.
    pub async fn map_block(&self, index: usize) -> Result<MappedBlock, StoreError> {
        self.chain.map_block(index).await
    }

    /// Bytes of the distinct tensors.
    pub fn bytes(&self) -> u64 {
        self.chain.bytes()
    }

    /// As [`ChainDraft::store`].
    ///
    /// # Errors
    /// When the name exists, or the store fails; then no name is set.
    ///
    /// # Panics
    /// When the draft was begun without a name, or the record does not pass [`Measure::check`].
    pub async fn store(&self, name: &ModelId, created_ms: u64, measured: Option<&Measure>) -> Result<Digest, DraftError> {
        self.chain.store(name, created_ms, measured).await
    }
}
