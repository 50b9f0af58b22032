//! Verified reads: manifests are parsed and checked, tensors mapped where they are local files.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta};
use serde::de::DeserializeOwned;

use super::{ASSET_BYTES_MAX, MANIFEST_BYTES_MAX, Object, StoreError, Zoo, key};
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::manifest::{Adapter, Block, Chain, Change, TensorRef};
use crate::mapping::Mapping;
use crate::tensor::{AlignedBytes, MappedTensor, TensorBytes};
use crate::tensor_file;

/// A block with its weights, all verified.
#[derive(Debug, Clone)]
pub struct MappedBlock {
    /// The descriptor.
    pub block: Block,
    /// Weights by role.
    pub tensors: BTreeMap<String, MappedTensor>,
}

/// An adapter with its factors, all verified.
#[derive(Debug, Clone)]
pub struct MappedAdapter {
    /// The descriptor.
    pub adapter: Adapter,
    /// Changes by role.
    pub changes: BTreeMap<String, MappedChange>,
}

/// A [`Change`] with its tensors.
#[derive(Debug, Clone)]
pub enum MappedChange {
    /// `y += scale * (x A^T) B^T`.
    LowRank {
        /// As in the descriptor.
        scale: f32,
        /// Shrink, `[rank, K]`.
        a: MappedTensor,
        /// Expand, `[N, rank]`.
        b: MappedTensor,
    },
}

impl Zoo {
    /// Reads a block descriptor.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_block(&self, digest: Digest) -> Result<Block, StoreError> {
        let block: Block = self.read_manifest(Object::Block(digest), digest).await?;
        block.check().map_err(|e| StoreError::Damaged { object: Object::Block(digest), reason: e.to_string() })?;
        Ok(block)
    }

    /// Reads an adapter descriptor. Whether it fits a block is [`Adapter::check_against`].
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_adapter(&self, digest: Digest) -> Result<Adapter, StoreError> {
        let adapter: Adapter = self.read_manifest(Object::Adapter(digest), digest).await?;
        adapter.check().map_err(|e| StoreError::Damaged { object: Object::Adapter(digest), reason: e.to_string() })?;
        Ok(adapter)
    }

    /// Reads a chain manifest.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_chain(&self, digest: Digest) -> Result<Chain, StoreError> {
        let chain: Chain = self.read_manifest(Object::Chain(digest), digest).await?;
        chain.check().map_err(|e| StoreError::Damaged { object: Object::Chain(digest), reason: e.to_string() })?;
        Ok(chain)
    }

    /// Reads a tokenizer, chat template or model card.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_asset(&self, digest: Digest) -> Result<Bytes, StoreError> {
        let object = Object::Asset(digest);
        let bytes = self.read(&object, ASSET_BYTES_MAX).await?;
        check_digest(object, digest, &bytes)?;
        Ok(bytes)
    }

    /// Loads a tensor: maps its file and verifies header and digest, or shares the map that is already in memory.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails. [`StoreError::in_block`] adds the block and role.
    pub async fn map_tensor(&self, tensor: &TensorRef) -> Result<MappedTensor, StoreError> {
        let object = Object::Tensor(tensor.digest);
        let Some(shape) = tensor_file::rows_cols(&tensor.shape) else {
            return Err(StoreError::Damaged { object, reason: format!("shape {:?} is not one or two dimensions", tensor.shape) });
        };
        let held = self.loaded().get(&tensor.digest).and_then(std::sync::Weak::upgrade);
        let bytes = match held {
            Some(bytes) => bytes,
            None => self.load_verified(tensor).await?,
        };
        // Another block may name the same digest with another shape or dtype; the header decides.
        let (dtype, stored) = tensor_file::parse_header((*bytes).as_ref()).expect("verified when it was loaded");
        if dtype != tensor.dtype || stored != tensor.shape {
            let reason = format!("it holds {dtype} {stored:?}, expected {} {:?}", tensor.dtype, tensor.shape);
            return Err(StoreError::Damaged { object, reason });
        }
        Ok(MappedTensor::new(dtype, shape, bytes))
    }

    /// Loads a block with all its tensors.
    ///
    /// # Errors
    /// As [`Zoo::map_tensor`], with block and role named.
    pub async fn map_block(&self, digest: Digest) -> Result<MappedBlock, StoreError> {
        let block = self.read_block(digest).await?;
        let mut tensors = BTreeMap::new();
        for (role, tensor) in &block.tensors {
            let mapped = self.map_tensor(tensor).await.map_err(|e| e.in_block(digest, role))?;
            tensors.insert(role.clone(), mapped);
        }
        Ok(MappedBlock { block, tensors })
    }

    /// Loads an adapter with all its factors.
    ///
    /// # Errors
    /// As [`Zoo::map_tensor`], with adapter, role and factor named.
    pub async fn map_adapter(&self, digest: Digest) -> Result<MappedAdapter, StoreError> {
        let adapter = self.read_adapter(digest).await?;
        let mut changes = BTreeMap::new();
        for (role, change) in &adapter.changes {
            let Change::LowRank { scale, a, b } = change;
            let a = self.map_tensor(a).await.map_err(|e| e.in_adapter(digest, &format!("{role}.a")))?;
            let b = self.map_tensor(b).await.map_err(|e| e.in_adapter(digest, &format!("{role}.b")))?;
            changes.insert(role.clone(), MappedChange::LowRank { scale: *scale, a, b });
        }
        Ok(MappedAdapter { adapter, changes })
    }

    /// Digest of the object's bytes as they are stored now (for a tensor: of what its header says), to compare with its name.
    pub(crate) async fn stored_digest(&self, object: &Object) -> Result<Digest, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { object: object.clone(), reason };
        match object {
            Object::Tensor(_) | Object::TensorOf { .. } | Object::TensorOfAdapter { .. } => {
                let bytes = self.load_tensor_bytes(object).await?;
                blocking(move || tensor_file::verify_alone(bytes.as_ref())).await.map_err(|e| damaged(e.to_string()))
            }
            _ => Ok(Digest::of(&self.read(object, ASSET_BYTES_MAX).await?)),
        }
    }

    /// Objects under a folder (`tensors`, `blocks`, ...), in no particular order.
    pub(crate) async fn list(&self, folder: &'static str) -> Result<Vec<ObjectMeta>, StoreError> {
        let mut stream = self.inner.store.list(Some(&Path::from(folder)));
        let mut metas = Vec::new();
        while let Some(meta) = stream.next().await {
            match meta {
                Ok(meta) => metas.push(meta),
                Err(object_store::Error::NotFound { .. }) => {} // Gone since the listing began.
                Err(source) => return Err(StoreError::Store { action: "list", key: folder.to_owned(), source }),
            }
        }
        Ok(metas)
    }

    /// The bytes of an object, unverified, unless there are more than `bytes_max`.
    pub(super) async fn read(&self, object: &Object, bytes_max: u64) -> Result<Bytes, StoreError> {
        let key = key(object);
        let failed = |source| match source {
            object_store::Error::NotFound { .. } => StoreError::Missing { object: object.clone() },
            source => StoreError::Store { action: "read", key: key.to_string(), source },
        };
        let result = self.inner.store.get_opts(&key, GetOptions::default()).await.map_err(failed)?;
        if result.meta.size > bytes_max {
            let reason = format!("it has {} bytes, more than {bytes_max}", result.meta.size);
            return Err(StoreError::Damaged { object: object.clone(), reason });
        }
        result.bytes().await.map_err(failed)
    }

    async fn read_manifest<T: DeserializeOwned>(&self, object: Object, digest: Digest) -> Result<T, StoreError> {
        let bytes = self.read(&object, MANIFEST_BYTES_MAX).await?;
        check_digest(object.clone(), digest, &bytes)?;
        serde_json::from_slice(&bytes).map_err(|e| StoreError::Damaged { object, reason: format!("this build cannot read it: {e}") })
    }

    async fn load_verified(&self, tensor: &TensorRef) -> Result<Arc<TensorBytes>, StoreError> {
        let object = Object::Tensor(tensor.digest);
        let bytes = self.load_tensor_bytes(&object).await?;
        let expected = tensor.clone();
        let (bytes, verified) = blocking(move || {
            let verified = tensor_file::verify(&expected, bytes.as_ref());
            (bytes, verified)
        })
        .await;
        verified.map_err(|e| StoreError::Damaged { object, reason: e.to_string() })?;
        let bytes = Arc::new(bytes);
        let mut loaded = self.loaded();
        loaded.retain(|_, weak| weak.strong_count() > 0);
        loaded.insert(tensor.digest, Arc::downgrade(&bytes));
        Ok(bytes)
    }

    async fn load_tensor_bytes(&self, object: &Object) -> Result<TensorBytes, StoreError> {
        if let Some(root) = &self.inner.root {
            let path = root.join(key(object).as_ref());
            return match Mapping::open(&path) {
                Ok(map) => Ok(TensorBytes::Mapped(map)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(StoreError::Missing { object: object.clone() }),
                Err(source) => Err(StoreError::File { action: "map", path: path.display().to_string(), source }),
            };
        }
        let key = key(object);
        let failed = |source| match source {
            object_store::Error::NotFound { .. } => StoreError::Missing { object: object.clone() },
            source => StoreError::Store { action: "read", key: key.to_string(), source },
        };
        let result = self.inner.store.get_opts(&key, GetOptions::default()).await.map_err(failed)?;
        let damaged = |reason: String| StoreError::Damaged { object: object.clone(), reason };
        let len = usize::try_from(result.meta.size).map_err(|e| damaged(e.to_string()))?;
        let mut bytes = AlignedBytes::zeroed(len);
        let mut stream = result.into_stream();
        let mut at = 0;
        while let Some(part) = stream.next().await {
            let part = part.map_err(failed)?;
            let target = bytes.as_mut().get_mut(at..at + part.len()).ok_or_else(|| damaged("longer than the store said".to_owned()))?;
            target.copy_from_slice(&part);
            at += part.len();
        }
        if at == len { Ok(TensorBytes::Owned(bytes)) } else { Err(damaged(format!("only {at} of {len} bytes arrived"))) }
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<Digest, std::sync::Weak<TensorBytes>>> {
        // A panic while holding it leaves a map of weak references that is still right.
        self.inner.loaded.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn check_digest(object: Object, expected: Digest, bytes: &[u8]) -> Result<(), StoreError> {
    let actual = Digest::of(bytes);
    if actual == expected {
        return Ok(());
    }
    Err(StoreError::Damaged { object, reason: format!("its bytes have the digest {actual}") })
}
