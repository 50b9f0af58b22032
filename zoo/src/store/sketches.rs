//! `sketches/<chain>`: what finds relatives (`relatives/sketch.rs`). Each is a function of its chain, so a missing one is no damage: it is
//! made again from manifests and tensors when it is wanted.

use std::collections::BTreeMap;

use super::{Object, StoreError, Zoo};
use crate::digest::Digest;
use crate::manifest::{Adapter, Block};
use crate::relatives::{SKETCH_BYTES_MAX, Samples, Sketch, sampled_roles};

impl Zoo {
    /// The sketch of a chain; `None` where there is none, or a damaged one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn read_sketch(&self, chain: Digest) -> Result<Option<Sketch>, StoreError> {
        match self.checked_sketch(chain).await {
            Ok(sketch) => Ok(Some(sketch)),
            Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// As [`Zoo::read_sketch`], with what is wrong.
    pub(crate) async fn checked_sketch(&self, chain: Digest) -> Result<Sketch, StoreError> {
        let object = Object::Sketch(chain);
        let bytes = self.read(&object, SKETCH_BYTES_MAX).await?;
        Sketch::parse(&bytes).map_err(|e| StoreError::Damaged { object, reason: e.to_string() })
    }

    /// Stores the sketch of a chain that is there.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_sketch(&self, chain: Digest, sketch: &Sketch) -> Result<(), StoreError> {
        self.put(&Object::Sketch(chain), vec![sketch.to_bytes().into()]).await.map(drop)
    }

    /// Makes the sketch of a stored chain and stores it. Reads and verifies the sampled matrices: all of a model of 16 layers, else less.
    ///
    /// # Errors
    /// When a manifest or a sampled matrix is missing or damaged, or the store fails.
    pub async fn make_sketch(&self, chain: Digest) -> Result<Sketch, StoreError> {
        let manifest = self.read_chain(chain).await?;
        let (mut blocks, mut adapters): (Vec<Block>, Vec<Adapter>) = (Vec::new(), Vec::new());
        for digest in &manifest.blocks {
            blocks.push(self.read_block(*digest).await?);
        }
        for adapter in &manifest.adapters {
            adapters.push(self.read_adapter(adapter.digest).await?);
        }
        let mut samples = BTreeMap::new();
        for (index, role) in sampled_roles(&blocks.iter().collect::<Vec<_>>()) {
            let tensor = self.map_tensor(&blocks[index].tensors[role]).await.map_err(|e| e.in_block(manifest.blocks[index], role))?;
            samples.insert((index, role), Samples::of(&tensor.view()));
            tensor.release_pages();
        }
        let blocks: Vec<(Digest, &Block)> = manifest.blocks.iter().copied().zip(&blocks).collect();
        let adapters: Vec<(Digest, &Adapter)> = manifest.adapters.iter().map(|adapter| adapter.digest).zip(&adapters).collect();
        let sketch = Sketch::new(&blocks, &adapters, &manifest.assets, |index, role| Ok::<_, StoreError>(samples[&(index, role)]))?;
        self.put_sketch(chain, &sketch).await?;
        Ok(sketch)
    }
}
