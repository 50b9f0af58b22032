//! Writing immutable objects: present ones are only touched (but by those who must not learn that they are present, `Zoo::blind`), so that
//! `gc` takes nothing that an `add` relies on. In a local directory an object appears by rename of a synced temporary file (`LocalFileSystem` with fsync).

use std::fs::File;
use std::time::SystemTime;

use bytes::Bytes;
use object_store::{ObjectMeta, ObjectStoreExt, PutPayload, WriteMultipart};

use super::{Object, StoreError, Zoo, key};
use crate::blocking::blocking;
use crate::canonical;
use crate::digest::Digest;
use crate::encoding::{self, Base, DEPTH_MAX, Encoded, Encoding};
use crate::manifest::{Adapter, Block, Chain, TensorRef};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Objects above this go up in parts where the store is remote: one put must end within a request's time, and S3 takes at most 5 GB of it.
const ONE_PUT_BYTES_MAX: usize = 32 << 20;
/// Bytes of a part. S3 takes 10,000 of them: 156 GiB, more than any tensor.
const UPLOAD_PART_BYTES: usize = 16 << 20;
/// Parts of one object that are on their way at a time.
const UPLOADS_AT_ONCE: usize = 4;

/// How a tensor may be stored. It never changes what is read, nor its identity.
#[derive(Debug, Clone, Copy)]
pub enum Compression<'a> {
    /// As its bytes are.
    Off,
    /// Encoded, where that saves enough.
    Alone,
    /// Encoded alone or as a delta of this tensor, whichever is the smallest.
    Over(&'a TensorRef),
}

/// What storing a tensor did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Whether it was new.
    pub put: Put,
    /// Bytes of the file that was written; 0 where none was.
    pub bytes: u64,
}

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
    pub async fn put_tensor(&self, tensor: &TensorRef, payload: Bytes, compression: Compression<'_>) -> Result<Stored, StoreError> {
        if self.keep_tensor(tensor).await? {
            return Ok(Stored { put: Put::Present, bytes: 0 });
        }
        // What is there is damaged, too old in a store where only a put renews it, or not to be known of.
        let there = self.head(&Object::Tensor(tensor.digest)).await?.is_some();
        let bytes = self.write_tensor(tensor, payload, compression, there).await?;
        Ok(Stored { put: if there && !self.blind { Put::Present } else { Put::New }, bytes })
    }

    /// Writes a tensor whatever is there: what is there is damaged.
    pub(crate) async fn rewrite_tensor(&self, tensor: &TensorRef, payload: Bytes) -> Result<(), StoreError> {
        self.write_tensor(tensor, payload, Compression::Alone, true).await.map(|_| ())
    }

    /// Marks that a tensor is stored as a delta of another one, so that `gc` keeps that as long.
    pub(crate) async fn put_base(&self, tensor: Digest, base: Digest) -> Result<(), StoreError> {
        self.put(&Object::Base { tensor, base }, vec![Bytes::new()]).await.map(|_| ())
    }

    /// Writes a tensor. Returns the bytes of its file. Where it is `there`, others may be stored over it: it must come to lie no deeper, nor over one of
    /// them, so it never becomes a delta then.
    async fn write_tensor(&self, tensor: &TensorRef, payload: Bytes, compression: Compression<'_>, there: bool) -> Result<u64, StoreError> {
        debug_assert_eq!(tensor.digest, tensor_file::digest(tensor.dtype, &tensor.shape, &payload));
        let base = match compression {
            Compression::Over(_) if there && !self.blind => None,
            Compression::Over(near) if near.digest != tensor.digest && near.dtype == tensor.dtype && near.shape == tensor.shape => {
                self.base_to_store_over(near).await?
            }
            _ => None,
        };
        let encoded = match compression {
            Compression::Off => None,
            Compression::Alone | Compression::Over(_) => self.encoded(tensor, payload.clone(), base.as_ref()).await,
        };
        let (encoding, body) = match encoded {
            Some(encoded) => (encoded.encoding as u8, Bytes::from(encoded.bytes)),
            None => (tensor_file::ENCODING_RAW, payload.clone()),
        };
        let (is_delta, raw) = (encoding == Encoding::Delta as u8, payload);
        let header = Bytes::copy_from_slice(&tensor_file::header(encoding, tensor.dtype, &tensor.shape));
        let bytes = (header.len() + body.len()) as u64;
        if is_delta && there {
            self.write_beside(tensor, vec![header, body], raw).await?;
            return Ok(bytes);
        }
        if let Some((base, ..)) = base.filter(|_| is_delta) {
            // Before the delta, so that no `gc` can see one whose base seems unused.
            self.put_base(tensor.digest, base).await?;
        }
        self.write(&Object::Tensor(tensor.digest), vec![header, body]).await?;
        Ok(bytes)
    }

    /// Does for a tensor that is there what would be done if it were not: writes the same bytes, and takes them away again. What is there is
    /// trusted if its start can be read, as it is in a remote store, and renewed; else it is written raw.
    async fn write_beside(&self, tensor: &TensorRef, parts: Vec<Bytes>, raw: Bytes) -> Result<(), StoreError> {
        let scratch = Object::Scratch(tensor.digest);
        self.write(&scratch, parts).await?;
        let scratch_key = key(&scratch);
        match self.retried(|| self.inner.store.delete(&scratch_key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(StoreError::Store { action: "delete", key: scratch_key.to_string(), source }),
        }
        match self.renew(&Object::Tensor(tensor.digest)).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => {
                let header = tensor_file::header(tensor_file::ENCODING_RAW, tensor.dtype, &tensor.shape);
                self.write(&Object::Tensor(tensor.digest), vec![Bytes::copy_from_slice(&header), raw]).await
            }
            renewed => renewed,
        }
    }

    /// A tensor to store another one over, with its depth, where it is there and sound and has room for one more; `gc` leaves it from now on.
    async fn base_to_store_over(&self, near: &TensorRef) -> Result<Option<(Digest, u8, MappedTensor)>, StoreError> {
        let usable = async {
            let depth = self.base_of(near.digest).await?.map_or(0, |base| base.depth + 1);
            if depth >= DEPTH_MAX {
                return Ok(None);
            }
            self.renew(&Object::Tensor(near.digest)).await?;
            Ok(Some((near.digest, depth, self.map_tensor(near).await?)))
        };
        match usable.await {
            Err(error @ (StoreError::Missing { .. } | StoreError::Damaged { .. })) => {
                tracing::warn!(%error, "a relative's tensor cannot be read; nothing is stored over it");
                Ok(None)
            }
            other => other,
        }
    }

    /// The smallest form of a tensor that is worth it, and decodes to the same bytes.
    async fn encoded(&self, tensor: &TensorRef, payload: Bytes, base: Option<&(Digest, u8, MappedTensor)>) -> Option<Encoded> {
        let (tensor, base) = (tensor.clone(), base.cloned());
        blocking(move || {
            let (rows, cols) = tensor_file::rows_cols(&tensor.shape).expect("refs have shapes that can be stored");
            let base = base.as_ref().map(|(digest, depth, held)| Base { digest: *digest, depth: *depth, payload: held.as_ref() });
            let encoded = encoding::encode(tensor.dtype, rows, cols, &payload, base.as_ref())?;
            // A tensor that could not be read back would be lost for good: it costs a tenth of the encoding to know.
            let mut decoded = vec![0; payload.len()];
            let prelude = encoding::parse(encoded.encoding as u8, tensor.dtype, rows, cols, &encoded.bytes);
            let read_back =
                prelude.and_then(|prelude| encoding::decode(&prelude, &encoded.bytes, base.map(|base| base.payload), &mut decoded));
            assert!(read_back.is_ok() && decoded == payload, "tensor {} does not decode to itself: {read_back:?}", tensor.digest);
            Some(encoded)
        })
        .await
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

    /// An empty file without a name, that ends with whoever holds it: on the zoo's own file system where it has one.
    ///
    /// # Errors
    /// When none can be made there.
    pub(crate) fn private_file(&self) -> Result<File, StoreError> {
        let folder = self.inner.root.clone().unwrap_or_else(std::env::temp_dir);
        let failed = |source| StoreError::File { action: "make a temporary file in", path: folder.display().to_string(), source };
        tempfile::tempfile_in(&folder).map_err(failed)
    }

    /// Whether the tensor is there and sound, as [`Zoo::keep`]; where it is, `gc` leaves what it is stored over as well.
    pub(crate) async fn keep_tensor(&self, tensor: &TensorRef) -> Result<bool, StoreError> {
        if self.blind {
            return Ok(false);
        }
        let object = Object::Tensor(tensor.digest);
        let Some(meta) = self.head(&object).await? else { return Ok(false) };
        let kept = async {
            if self.inner.root.is_some() {
                self.check_tensor(tensor.digest).await?;
            }
            // The base first: a `gc` that took it since would leave a delta that cannot be read.
            if let Some(base) = self.base_of(tensor.digest).await? {
                self.renew(&Object::Tensor(base.digest)).await?;
                self.put_base(tensor.digest, base.digest).await?;
            }
            self.touch(&object, &meta).await
        };
        match kept.await {
            // Damaged by something outside; the caller writes it anew.
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => Ok(false),
            other => other,
        }
    }

    /// Whether the object is there and sound (a remote store is trusted with that); where it is, makes sure that `gc` leaves it for a grace period.
    pub(crate) async fn keep(&self, object: &Object, len: u64) -> Result<bool, StoreError> {
        if self.blind {
            return Ok(false);
        }
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

    /// Makes sure that `gc` leaves an object for a grace period that is in use already, and so is not read to its end here; of a tensor also all
    /// that it is stored over.
    ///
    /// # Errors
    /// When it is missing, or the store fails.
    pub(crate) async fn renew(&self, object: &Object) -> Result<(), StoreError> {
        let Object::Tensor(digest) = object else { return self.renew_alone(object).await };
        let mut chain = vec![*digest];
        while let Some(base) = self.base_of(chain[chain.len() - 1]).await? {
            if chain.len() > usize::from(DEPTH_MAX) {
                let reason = "too many deltas lie one over the other".to_owned();
                return Err(StoreError::Damaged { object: object.clone(), reason });
            }
            chain.push(base.digest);
        }
        // The bases first, and marks before their deltas: a `gc` that finds the delta young and its base or mark old would leave a delta that cannot be read,
        // or one that does not say what it needs.
        for (at, digest) in chain.iter().enumerate().rev() {
            if let Some(base) = chain.get(at + 1) {
                self.put_base(*digest, *base).await?;
            }
            self.renew_alone(&Object::Tensor(*digest)).await?;
        }
        Ok(())
    }

    async fn renew_alone(&self, object: &Object) -> Result<(), StoreError> {
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

    pub(super) async fn put(&self, object: &Object, parts: Vec<Bytes>) -> Result<Put, StoreError> {
        if self.blind {
            return self.write(object, parts).await.map(|()| Put::New);
        }
        let len: usize = parts.iter().map(Bytes::len).sum();
        let present = self.head(object).await?.is_some_and(|meta| meta.size == len as u64);
        if self.keep(object, len as u64).await? {
            return Ok(Put::Present);
        }
        self.write(object, parts).await?;
        Ok(if present { Put::Present } else { Put::New })
    }

    /// Writes an object that never changes, or is one of a kind, whole: so it may be written twice.
    pub(super) async fn write(&self, object: &Object, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let len: usize = parts.iter().map(Bytes::len).sum();
        let key = key(object);
        // In a local directory a `gc` that has just found an old object here would take what comes in its place.
        if self.inner.root.is_some()
            && let Some(meta) = self.head(object).await?
        {
            self.touch(object, &meta).await?;
        }
        let written = self.retried(|| async {
            if len > ONE_PUT_BYTES_MAX && self.inner.root.is_none() {
                let mut writer = WriteMultipart::new_with_chunk_size(self.inner.store.put_multipart(&key).await?, UPLOAD_PART_BYTES);
                for part in &parts {
                    // Handed on piece by piece: all of it at once would start all uploads at once.
                    for start in (0..part.len()).step_by(UPLOAD_PART_BYTES) {
                        writer.wait_for_capacity(UPLOADS_AT_ONCE).await?;
                        writer.put(part.slice(start..part.len().min(start + UPLOAD_PART_BYTES)));
                    }
                }
                writer.finish().await.map(drop)
            } else {
                self.inner.store.put(&key, PutPayload::from_iter(parts.iter().cloned())).await.map(drop)
            }
        });
        written.await.map_err(|source| StoreError::Store { action: "write", key: key.to_string(), source })
    }
}
