//! Writing immutable objects: present ones are only touched, so that `gc` takes nothing that an `add` relies on.
//! In a local directory an object appears by rename of a synced temporary file (`LocalFileSystem` with fsync).

use std::fs::File;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::{ObjectMeta, ObjectStoreExt, PutPayload, WriteMultipart};

use super::{Object, StoreError, Zoo, key};
use crate::canonical;
use crate::digest::Digest;
use crate::manifest::{Adapter, Block, Chain, TensorRef};
use crate::tensor_file;

/// Objects above this go up in parts where the store is remote (S3 takes at most 5 GB in one put).
const ONE_PUT_BYTES_MAX: usize = 256 << 20;

/// Whether a put stored anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It was not there.
    New,
    /// It was there already.
    Present,
}

impl Zoo {
    /// Stores a tensor; `payload` must be what `tensor.digest` was computed from.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_tensor(&self, tensor: &TensorRef, payload: Bytes) -> Result<Put, StoreError> {
        debug_assert_eq!(tensor.digest, tensor_file::digest(tensor.dtype, &tensor.shape, &payload));
        let header = Bytes::copy_from_slice(&tensor_file::header(tensor.dtype, &tensor.shape));
        self.put(&Object::Tensor(tensor.digest), vec![header, payload]).await
    }

    /// Stores a block descriptor.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the block does not pass [`Block::check`]: ingest has checked it.
    pub async fn put_block(&self, block: &Block) -> Result<(Digest, Put), StoreError> {
        assert_eq!(block.check(), Ok(()));
        let bytes = canonical::to_bytes(block);
        let digest = Digest::of(&bytes);
        Ok((digest, self.put(&Object::Block(digest), vec![bytes.into()]).await?))
    }

    /// Stores an adapter descriptor.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the adapter does not pass [`Adapter::check`]: ingest has checked it.
    pub async fn put_adapter(&self, adapter: &Adapter) -> Result<(Digest, Put), StoreError> {
        assert_eq!(adapter.check(), Ok(()));
        let bytes = canonical::to_bytes(adapter);
        let digest = Digest::of(&bytes);
        Ok((digest, self.put(&Object::Adapter(digest), vec![bytes.into()]).await?))
    }

    /// Stores a chain manifest.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the chain does not pass [`Chain::check`]: ingest has checked it.
    pub async fn put_chain(&self, chain: &Chain) -> Result<(Digest, Put), StoreError> {
        assert_eq!(chain.check(), Ok(()));
        let bytes = canonical::to_bytes(chain);
        let digest = Digest::of(&bytes);
        Ok((digest, self.put(&Object::Chain(digest), vec![bytes.into()]).await?))
    }

    /// Stores an asset.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_asset(&self, bytes: Bytes) -> Result<(Digest, Put), StoreError> {
        let digest = Digest::of(&bytes);
        Ok((digest, self.put(&Object::Asset(digest), vec![bytes]).await?))
    }

    /// Whether the tensor is there and sound; as [`Zoo::keep`].
    pub(crate) async fn keep_tensor(&self, tensor: &TensorRef) -> Result<bool, StoreError> {
        let payload = tensor_file::payload_bytes(tensor.dtype, &tensor.shape).expect("refs have shapes that can be stored");
        self.keep(&Object::Tensor(tensor.digest), (tensor_file::HEADER_BYTES + payload) as u64).await
    }

    /// Whether the object is there and sound (a remote store is trusted with that); where it is, makes sure that `gc` leaves it for a grace period.
    pub(crate) async fn keep(&self, object: &Object, len: u64) -> Result<bool, StoreError> {
        let Some(meta) = self.head(object).await? else { return Ok(false) };
        if meta.size != len {
            return Ok(false); // Damaged by something outside; the caller writes it anew.
        }
        if self.inner.root.is_some() {
            match crate::verify::check(self, object).await {
                Ok(()) => {}
                Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => return Ok(false),
                Err(other) => return Err(other),
            }
        }
        self.touch(object, &meta).await
    }

    /// Makes sure that `gc` leaves an object for a grace period that is in use already, and so is not read to its end here.
    ///
    /// # Errors
    /// When it is missing, or the store fails.
    pub(crate) async fn renew(&self, object: &Object) -> Result<(), StoreError> {
        let missing = || StoreError::Missing { object: object.clone() };
        let meta = self.head(object).await?.ok_or_else(missing)?;
        if self.touch(object, &meta).await? {
            return Ok(());
        }
        match self.inner.root {
            Some(_) => Err(missing()),
            None => self.write(object, vec![self.read(object, u64::MAX).await?]).await,
        }
    }

    /// Renews an object that is older than half the grace period. Returns whether it is young now: a remote store must write it again.
    async fn touch(&self, object: &Object, meta: &ObjectMeta) -> Result<bool, StoreError> {
        let age = SystemTime::now().duration_since(meta.last_modified.into()).unwrap_or_default();
        if age <= self.inner.grace / 2 {
            return Ok(true);
        }
        match &self.inner.root {
            // Under the lock that `gc` deletes under, so it is either gone before or young afterwards.
            Some(root) => {
                let path = root.join(key(object).as_ref());
                let _lock = self.lock().await?;
                let touched = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                match touched {
                    Ok(()) => Ok(true),
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
                    Err(source) => Err(StoreError::File { action: "touch", path: path.display().to_string(), source }),
                }
            }
            None => Ok(false), // Written again: a put is the one way to renew an object's age everywhere.
        }
    }

    async fn put(&self, object: &Object, parts: Vec<Bytes>) -> Result<Put, StoreError> {
        let len: usize = parts.iter().map(Bytes::len).sum();
        let present = self.head(object).await?.is_some_and(|meta| meta.size == len as u64);
        if self.keep(object, len as u64).await? {
            return Ok(Put::Present);
        }
        self.write(object, parts).await?;
        Ok(if present { Put::Present } else { Put::New })
    }

    async fn write(&self, object: &Object, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let len: usize = parts.iter().map(Bytes::len).sum();
        let key = key(object);
        let failed = |source| StoreError::Store { action: "write", key: key.to_string(), source };
        if len > ONE_PUT_BYTES_MAX && self.inner.root.is_none() {
            let upload = self.inner.store.put_multipart(&key).await.map_err(failed)?;
            let mut writer = WriteMultipart::new(upload);
            for part in parts {
                writer.wait_for_capacity(4).await.map_err(failed)?;
                writer.put(part);
            }
            writer.finish().await.map_err(failed)?;
        } else {
            self.inner.store.put(&key, PutPayload::from_iter(parts)).await.map_err(failed)?;
        }
        Ok(())
    }
}
