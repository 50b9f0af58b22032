//! Storing a model that was made of one that is here (unmerged, compressed, quantised): in the order of an `add`, under a name that is free.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{Compression, Object, StoreError, Zoo};
use crate::digest::Digest;
use crate::manifest::{Adapter, Block, Chain, ModelName, TensorRef};
use crate::measures::Measure;
use crate::model_id::ModelId;
use crate::relatives::Sketch;

/// A model to be stored. Tensors that are not `new` are stored already.
pub(crate) struct Derived<'a> {
    pub(crate) chain: &'a Chain,
    /// The chain's, in order.
    pub(crate) blocks: &'a [Block],
    /// The chain's.
    pub(crate) adapters: Vec<&'a Adapter>,
    /// Tensors with their payloads.
    pub(crate) new: Vec<&'a (TensorRef, Bytes)>,
    /// `None`: made of the stored tensors.
    pub(crate) sketch: Option<&'a Sketch>,
    /// What was measured of it; it passes [`Measure::check`].
    pub(crate) measured: Option<&'a Measure>,
    /// What it was made of, or lies over.
    pub(crate) parent: &'a ModelId,
}

impl Zoo {
    /// Whether there is no such name.
    pub(crate) async fn is_free(&self, name: &ModelId) -> Result<bool, StoreError> {
        match self.read_model(name).await {
            Err(StoreError::Missing { .. }) => Ok(true),
            other => other.map(|_| false),
        }
    }

    /// Stores all of it, and last the name. `None` where the name is there already; it is as it was then, and when the store fails.
    pub(crate) async fn store_derived(&self, name: &ModelId, created_ms: u64, derived: &Derived<'_>) -> Result<Option<Digest>, StoreError> {
        if !self.is_free(name).await? {
            return Ok(None);
        }
        let chain = self.storing(|| self.store_unnamed(derived)).await?;
        let new = ModelName { chain, created_ms, parent: Some(derived.parent.to_string()), history: Vec::new(), loaded: false };
        match self.set_model(name, None, &new).await {
            Err(StoreError::Conflict { .. }) => Ok(None),
            other => other.map(|()| Some(chain)),
        }
    }

    async fn store_unnamed(&self, derived: &Derived<'_>) -> Result<Digest, StoreError> {
        for (tensor, payload) in &derived.new {
            self.put_tensor(tensor, payload.clone(), Compression::Alone).await?;
        }
        // What it shares may lose its names while this is written.
        let assets = &derived.chain.assets;
        let tensors = derived.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| Object::Tensor(tensor.digest));
        let assets = [assets.tokenizer, assets.chat_template, assets.card].into_iter().flatten().map(Object::Asset);
        for object in tensors.chain(assets).collect::<BTreeSet<_>>() {
            self.renew(&object).await?;
        }
        for block in derived.blocks {
            self.put_block(block).await?;
        }
        for adapter in &derived.adapters {
            self.put_adapter(adapter).await?;
        }
        let (chain, _) = self.put_chain(derived.chain).await?;
        match derived.sketch {
            Some(sketch) => self.put_sketch(chain, sketch).await?,
            None => drop(self.make_sketch(chain).await?),
        }
        if let Some(measured) = derived.measured {
            self.put_measure(chain, measured).await?;
        }
        Ok(chain)
    }
}
