//! Verified reads of manifests, which are parsed and checked, and of blocks and adapters with their tensors (`store/tensors.rs`).

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta};
use serde::de::DeserializeOwned;

use super::{ASSET_BYTES_MAX, MANIFEST_BYTES_MAX, Object, StoreError, Zoo, key};
use crate::digest::Digest;
use crate::manifest::{Adapter, Block, Chain, Change};
use crate::tensor::MappedTensor;

/// Tensors of a block that are loaded at a time: they are decoded and verified on as many threads, and memory is bounded by so many.
const TENSORS_AT_ONCE: usize = 4;

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
    /// `y += x D^T`.
    OneBit {
        /// D, `[N, K]`, int1.
        signs: MappedTensor,
    },
}

impl MappedChange {
    /// A change with its tensors, which come in the order of [`Change::tensors`].
    ///
    /// # Panics
    /// When there are more or fewer.
    pub(crate) fn new(change: &Change, tensors: Vec<MappedTensor>) -> Self {
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().expect("a tensor for each that the change names");
        let mapped = match change {
            Change::LowRank { scale, .. } => Self::LowRank { scale: *scale, a: next(), b: next() },
            Change::OneBit { .. } => Self::OneBit { signs: next() },
        };
        assert!(tensors.next().is_none(), "no tensor that the change does not name");
        mapped
    }

    /// The tensors of it, in the order of [`Change::tensors`].
    pub fn tensors(&self) -> impl Iterator<Item = &MappedTensor> {
        let (first, second) = match self {
            Self::LowRank { a, b, .. } => (a, Some(b)),
            Self::OneBit { signs } => (signs, None),
        };
        std::iter::once(first).chain(second)
    }
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

    /// Loads a block with all its tensors.
    ///
    /// # Errors
    /// As [`Zoo::map_tensor`], with block and role named.
    pub async fn map_block(&self, digest: Digest) -> Result<MappedBlock, StoreError> {
        let block = self.read_block(digest).await?;
        let tensors = stream::iter(block.tensors.clone()).map(|(role, tensor)| async move {
            let mapped = self.map_tensor(&tensor).await.map_err(|e| e.in_block(digest, &role))?;
            Ok::<_, StoreError>((role, mapped))
        });
        let tensors = tensors.buffered(TENSORS_AT_ONCE).try_collect().await?;
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
            let mut mapped = Vec::new();
            for (name, tensor) in change.tensors() {
                mapped.push(self.map_tensor(tensor).await.map_err(|e| e.in_adapter(digest, &format!("{role}.{name}")))?);
            }
            changes.insert(role.clone(), MappedChange::new(change, mapped));
        }
        Ok(MappedAdapter { adapter, changes })
    }

    /// Objects under a folder (`tensors`, `blocks`, ...), in no particular order.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        let path = Path::from(folder);
        let listed = self.retried(|| async {
            let mut stream = self.inner.store.list(Some(&path));
            let mut metas = Vec::new();
            while let Some(meta) = stream.next().await {
                match meta {
                    Ok(meta) => metas.push(meta),
                    Err(object_store::Error::NotFound { .. }) => {} // Gone since the listing began.
                    Err(source) => return Err(source),
                }
            }
            Ok(metas)
        });
        listed.await.map_err(|source| StoreError::Store { action: "list", key: folder.to_owned(), source })
    }

    /// The bytes of an object, unverified, unless there are more than `bytes_max`.
    pub(super) async fn read(&self, object: &Object, bytes_max: u64) -> Result<Bytes, StoreError> {
        let key = key(object);
        let read = self.retried(|| async {
            let result = self.inner.store.get_opts(&key, GetOptions::default()).await?;
            let size = result.meta.size;
            if size > bytes_max { Ok(Err(size)) } else { result.bytes().await.map(Ok) }
        });
        let bytes = read.await.map_err(|source| self.failed_read(object, source))?;
        bytes.map_err(|size| StoreError::Damaged { object: object.clone(), reason: format!("it has {size} bytes, more than {bytes_max}") })
    }

    pub(super) async fn read_manifest<T: DeserializeOwned>(&self, object: Object, digest: Digest) -> Result<T, StoreError> {
        self.read_json(object, digest, MANIFEST_BYTES_MAX).await
    }

    /// A JSON object of at most so many bytes, which are those of `digest`.
    pub(super) async fn read_json<T: DeserializeOwned>(&self, object: Object, digest: Digest, bytes_max: u64) -> Result<T, StoreError> {
        let bytes = self.read(&object, bytes_max).await?;
        check_digest(object.clone(), digest, &bytes)?;
        serde_json::from_slice(&bytes).map_err(|e| StoreError::Damaged { object, reason: format!("this build cannot read it: {e}") })
    }
}

fn check_digest(object: Object, expected: Digest, bytes: &[u8]) -> Result<(), StoreError> {
    let actual = Digest::of(bytes);
    if actual == expected {
        return Ok(());
    }
    Err(StoreError::Damaged { object, reason: format!("its bytes have the digest {actual}") })
}
