//! Loading tensors: out of memory where someone holds them, by a map of the local file, out of the cache, or out of the store;
//! decoded where they are stored encoded, always verified. Loads of one tensor wait for the first of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use super::{Object, StoreError, Zoo, key};
use crate::aligned::AlignedBytes;
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::encoding::{self, BaseName, DEPTH_MAX, Prelude};
use crate::manifest::TensorRef;
use crate::mapping::Mapping;
use crate::tensor::{MappedTensor, TensorBytes};
use crate::tensor_file::{self, ENCODING_RAW, HEADER_BYTES, Header};

/// Bytes at the start of a tensor file that tell how it is encoded and over what.
const START_BYTES: u64 = (HEADER_BYTES + encoding::BASE_NAME_BYTES) as u64;

/// In what form a tensor lies in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Its bytes as they are.
    Raw,
    /// Encoded by itself.
    Alone,
    /// As the difference to this tensor.
    Over(Digest),
}

/// How a tensor lies in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredAs {
    /// In what form.
    pub form: Form,
    /// Bytes of its file.
    pub bytes: u64,
}

/// Tensors that are in memory or on their way.
#[derive(Debug, Default)]
pub(super) struct Loads {
    /// In memory now, verified when they were loaded. Lookup only.
    held: HashMap<Digest, Weak<TensorBytes>>,
    /// Being loaded: who comes later waits for the lock, and finds the tensor held.
    running: HashMap<Digest, Arc<tokio::sync::Mutex<()>>>,
}

impl Zoo {
    /// Loads a tensor: maps its file, or the cache's, or decodes what is stored; verifies header and digest. Shares what is in memory already.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails. [`StoreError::in_block`] adds the block and role.
    pub async fn map_tensor(&self, tensor: &TensorRef) -> Result<MappedTensor, StoreError> {
        let object = Object::Tensor(tensor.digest);
        let Some(shape) = tensor_file::rows_cols(&tensor.shape) else {
            return Err(StoreError::Damaged { object, reason: format!("shape {:?} is not one or two dimensions", tensor.shape) });
        };
        let bytes = match self.held(tensor.digest) {
            Some(bytes) => bytes,
            None => {
                let running = self.loads().running.entry(tensor.digest).or_default().clone();
                let loaded = {
                    let _turn = running.lock().await;
                    match self.held(tensor.digest) {
                        Some(bytes) => Ok(bytes),
                        None => self.load_verified(tensor, DEPTH_MAX).await,
                    }
                };
                self.forget_running(tensor.digest, &running);
                loaded?
            }
        };
        // Another block may name the same digest with another shape or dtype; the header decides.
        let header = tensor_file::parse_header((*bytes).as_ref()).expect("verified when it was loaded");
        if header.dtype != tensor.dtype || header.shape != tensor.shape {
            let reason = format!("it holds {} {:?}, expected {} {:?}", header.dtype, header.shape, tensor.dtype, tensor.shape);
            return Err(StoreError::Damaged { object, reason });
        }
        Ok(MappedTensor::new(header.dtype, shape, bytes))
    }

    /// Reads a stored tensor to its end, past memory and cache, and checks it. Returns the tensor that it is a delta of, if any.
    pub(crate) async fn check_tensor(&self, digest: Digest) -> Result<Option<Digest>, StoreError> {
        let object = Object::Tensor(digest);
        let stored = self.stored_bytes(&object, u64::MAX).await?;
        let header = tensor_file::parse_header(stored.as_ref()).map_err(|e| damaged(&object, e))?;
        let (bytes, base) = self.decoded(&object, header, stored, DEPTH_MAX).await?;
        let actual = blocking(move || tensor_file::verify_alone(bytes.as_ref())).await.map_err(|e| damaged(&object, e))?;
        if actual == digest { Ok(base) } else { Err(damaged(&object, format!("its bytes have the digest {actual}"))) }
    }

    /// A tensor by its digest alone, verified.
    pub(crate) async fn read_tensor(&self, digest: Digest) -> Result<(TensorRef, Bytes), StoreError> {
        let object = Object::Tensor(digest);
        let start = self.fetch_start(&object, START_BYTES).await?;
        let header = tensor_file::parse_header(&start).map_err(|e| damaged(&object, e))?;
        let tensor = TensorRef { digest, dtype: header.dtype, shape: header.shape };
        let mapped = self.map_tensor(&tensor).await?;
        Ok((tensor, Bytes::from_owner(mapped)))
    }

    /// In what form a tensor lies here, without reading it all.
    ///
    /// # Errors
    /// When it is missing or its start is damaged, or the store fails.
    pub async fn stored_as(&self, digest: Digest) -> Result<StoredAs, StoreError> {
        let object = Object::Tensor(digest);
        let bytes = self.head(&object).await?.ok_or_else(|| StoreError::Missing { object: object.clone() })?.size;
        let form = match self.start_of(digest).await? {
            None => Form::Raw,
            Some(None) => Form::Alone,
            Some(Some(base)) => Form::Over(base.digest),
        };
        Ok(StoredAs { form, bytes })
    }

    /// What a tensor is stored over, without reading it all; `None` where it is raw or stored alone.
    pub(crate) async fn base_of(&self, digest: Digest) -> Result<Option<BaseName>, StoreError> {
        self.start_of(digest).await.map(Option::flatten)
    }

    /// The base of an encoded tensor, if it has one; `None` where its bytes are raw.
    async fn start_of(&self, digest: Digest) -> Result<Option<Option<BaseName>>, StoreError> {
        let object = Object::Tensor(digest);
        let start = self.fetch_start(&object, START_BYTES).await?;
        let header = tensor_file::parse_header(&start).map_err(|e| damaged(&object, e))?;
        if header.encoding == ENCODING_RAW {
            return Ok(None);
        }
        encoding::parse_base(header.encoding, &start[HEADER_BYTES..]).map(Some).map_err(|e| damaged(&object, e))
    }

    /// A verified tensor that nobody holds. `depth_max` deltas may lie one over the other.
    fn load_verified<'a>(&'a self, tensor: &'a TensorRef, depth_max: u8) -> BoxFuture<'a, Result<Arc<TensorBytes>, StoreError>> {
        async move {
            let object = Object::Tensor(tensor.digest);
            let bytes = match self.cached(tensor).await {
                Some(bytes) => bytes,
                None => {
                    let raw_bytes =
                        tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(u64::MAX, |bytes| (bytes + HEADER_BYTES) as u64);
                    let stored = self.stored_bytes(&object, raw_bytes).await?;
                    let header = tensor_file::parse_header(stored.as_ref()).map_err(|e| damaged(&object, e))?;
                    let (bytes, _) = self.decoded(&object, header, stored, depth_max).await?;
                    let expected = tensor.clone();
                    let (bytes, verified) = blocking(move || {
                        let verified = tensor_file::verify(&expected, bytes.as_ref());
                        (bytes, verified)
                    })
                    .await;
                    verified.map_err(|e| damaged(&object, e))?;
                    self.cache(tensor.digest, bytes).await
                }
            };
            let bytes = Arc::new(bytes);
            let mut loads = self.loads();
            loads.held.retain(|_, weak| weak.strong_count() > 0);
            loads.held.insert(tensor.digest, Arc::downgrade(&bytes));
            Ok(bytes)
        }
        .boxed()
    }

    /// Raw bytes (header and payload) of what is stored, unverified, and the tensor that it is a delta of.
    async fn decoded(
        &self,
        object: &Object,
        header: Header,
        stored: TensorBytes,
        depth_max: u8,
    ) -> Result<(TensorBytes, Option<Digest>), StoreError> {
        if header.encoding == ENCODING_RAW {
            return Ok((stored, None));
        }
        let prelude = prelude(object, &header, &stored.as_ref()[HEADER_BYTES..])?;
        let base = match prelude.base {
            None => None,
            Some(BaseName { digest, .. }) => {
                let below = depth_max.checked_sub(1).ok_or_else(|| damaged(object, "too many deltas lie one over the other"))?;
                let base = TensorRef { digest, dtype: header.dtype, shape: header.shape.clone() };
                // Without waiting for others that load it: in a store that is wrong, two deltas may name each other.
                let held = self.held(digest);
                let bytes = match held {
                    Some(bytes) => bytes,
                    None => self.load_verified(&base, below).await.map_err(|e| as_base(object, e))?,
                };
                tensor_file::verify_shape(&base, (*bytes).as_ref()).map_err(|e| damaged(object, format!("its base {digest}: {e}")))?;
                Some((digest, bytes))
            }
        };
        let digest = base.as_ref().map(|(digest, _)| *digest);
        let decoded = blocking(move || {
            let base = base.as_ref().map(|(_, bytes)| &(**bytes).as_ref()[HEADER_BYTES..]);
            let payload = tensor_file::payload_bytes(header.dtype, &header.shape).expect("the prelude was read with this shape");
            let mut bytes = AlignedBytes::to_fill(HEADER_BYTES + payload);
            let (head, out) = bytes.as_mut().split_at_mut(HEADER_BYTES);
            head.copy_from_slice(&tensor_file::header(ENCODING_RAW, header.dtype, &header.shape));
            encoding::decode(&prelude, &stored.as_ref()[HEADER_BYTES..], base, out).map(|()| bytes)
        });
        let bytes = decoded.await.map_err(|e| damaged(object, e))?;
        Ok((TensorBytes::Owned(bytes), digest))
    }

    /// What is stored of a tensor: a map of a local file, a copy else.
    async fn stored_bytes(&self, object: &Object, expected_bytes: u64) -> Result<TensorBytes, StoreError> {
        let Some(root) = &self.inner.root else {
            return self.fetch(object, expected_bytes).await.map(TensorBytes::Owned);
        };
        let path = root.join(key(object).as_ref());
        match Mapping::open(&path) {
            Ok(map) => Ok(TensorBytes::Mapped(map)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(StoreError::Missing { object: object.clone() }),
            // A folder or a link to a device, say: damage like any other, and no reason to look at nothing else.
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => Err(damaged(object, e)),
            Err(source) => Err(StoreError::File { action: "map", path: path.display().to_string(), source }),
        }
    }

    /// The tensor out of the cache, verified.
    async fn cached(&self, tensor: &TensorRef) -> Option<TensorBytes> {
        let cache = self.inner.cache.clone()?;
        let tensor = tensor.clone();
        let found = blocking(move || {
            let map = cache.get(tensor.digest)?;
            match tensor_file::verify(&tensor, map.as_ref()) {
                Ok(()) => Some(TensorBytes::Mapped(map)),
                Err(error) => {
                    tracing::warn!(%error, tensor = %tensor.digest, "a file of the cache is damaged and is read anew");
                    cache.drop_damaged(tensor.digest);
                    None
                }
            }
        });
        found.await
    }

    /// Puts a verified tensor that is no map of a file of the zoo into the cache. Where it cannot be written the tensor stays in memory.
    async fn cache(&self, digest: Digest, bytes: TensorBytes) -> TensorBytes {
        let (Some(cache), TensorBytes::Owned(_)) = (self.inner.cache.clone(), &bytes) else { return bytes };
        blocking(move || match cache.put(digest, bytes.as_ref()) {
            Ok(Some(map)) => TensorBytes::Mapped(map),
            Ok(None) => bytes,
            Err(error) => {
                tracing::warn!(%error, tensor = %digest, "the cache cannot keep a tensor; it stays in memory");
                bytes
            }
        })
        .await
    }

    fn held(&self, digest: Digest) -> Option<Arc<TensorBytes>> {
        self.loads().held.get(&digest).and_then(Weak::upgrade)
    }

    /// Takes the lock away once nobody waits for it.
    fn forget_running(&self, digest: Digest, running: &Arc<tokio::sync::Mutex<()>>) {
        if let Entry::Occupied(entry) = self.loads().running.entry(digest) {
            // Whoever comes clones it under the lock that is held here: two are the map's and ours.
            if Arc::ptr_eq(entry.get(), running) && Arc::strong_count(running) <= 2 {
                entry.remove();
            }
        }
    }

    fn loads(&self) -> MutexGuard<'_, Loads> {
        // A panic while holding it leaves maps of weak references and idle locks that are still right.
        self.inner.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn prelude(object: &Object, header: &Header, bytes: &[u8]) -> Result<Prelude, StoreError> {
    let (rows, cols) = tensor_file::rows_cols(&header.shape).ok_or_else(|| damaged(object, "its header is malformed"))?;
    encoding::parse(header.encoding, header.dtype, rows, cols, bytes).map_err(|e| damaged(object, e))
}

fn damaged(object: &Object, reason: impl ToString) -> StoreError {
    StoreError::Damaged { object: object.clone(), reason: reason.to_string() }
}

/// A base that cannot be read damages what is stored over it.
fn as_base(object: &Object, error: StoreError) -> StoreError {
    match error {
        StoreError::Damaged { object: base, reason } => damaged(object, format!("it is stored over {base}, which is damaged: {reason}")),
        StoreError::Missing { object: base } => damaged(object, format!("it is stored over {base}, which is missing")),
        other => other,
    }
}
