//! Reading objects that are no local files: by ranges, several at a time. And trying again, with growing pauses, what may be done twice while the
//! store fails: all but the swaps of names, which look what became of them instead.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore};

use super::{Object, StoreError, Zoo, key};
use crate::aligned::AlignedBytes;

/// Bytes of one request. A part that fails is asked for again, and not what came before it.
const PART_BYTES: u64 = 8 << 20;
/// Requests at a time for one object.
const PARTS_AT_ONCE: usize = 4;

/// How often and how patiently reads, and writes of what never changes, are tried again.
#[derive(Debug, Clone, Copy)]
pub struct Retries {
    /// Tries in all; 1: none again.
    pub attempts: u32,
    /// Pause after the first failure; it doubles with each further one.
    pub pause: Duration,
}

impl Default for Retries {
    /// Five tries over 1.5 seconds: as long as a store takes to choose another leader or to lift a throttle, and no longer than an operator waits.
    fn default() -> Self {
        Self { attempts: 5, pause: Duration::from_millis(100) }
    }
}

/// Whether the same request may succeed later. What the store says about the object itself will not change by asking again.
fn may_pass(error: &Error) -> bool {
    matches!(error, Error::Generic { .. } | Error::JoinError { .. })
}

impl Zoo {
    /// The first bytes of an object, at most so many.
    pub(super) async fn fetch_start(&self, object: &Object, bytes: u64) -> Result<Bytes, StoreError> {
        let key = key(object);
        let read = self.retried(|| self.part(&key, 0, bytes)).await;
        read.map_err(|source| self.failed_read(object, source))
    }

    /// All bytes of an object, unverified; `expected_bytes` is what it will have at most, near enough to choose how to ask.
    pub(super) async fn fetch(&self, object: &Object, expected_bytes: u64) -> Result<AlignedBytes, StoreError> {
        let key = key(object);
        let damaged = |reason: String| StoreError::Damaged { object: object.clone(), reason };
        if expected_bytes <= PART_BYTES {
            let all = self.retried(|| async { self.inner.store.get_opts(&key, GetOptions::default()).await?.bytes().await }).await;
            let all = all.map_err(|source| self.failed_read(object, source))?;
            let mut bytes = AlignedBytes::to_fill(all.len());
            bytes.as_mut().copy_from_slice(&all);
            return Ok(bytes);
        }
        let meta = self.head(object).await?.ok_or_else(|| StoreError::Missing { object: object.clone() })?;
        let len = usize::try_from(meta.size).map_err(|e| damaged(e.to_string()))?;
        if meta.size > expected_bytes.saturating_mul(2) {
            return Err(damaged(format!("it has {} bytes, {expected_bytes} belong there", meta.size)));
        }
        let mut bytes = AlignedBytes::to_fill(len);
        let starts = (0..meta.size).step_by(usize::try_from(PART_BYTES).expect("a small number"));
        let parts = stream::iter(starts).map(|start| {
            let key = &key;
            async move {
                let part = self.retried(|| self.part(key, start, PART_BYTES.min(meta.size - start))).await;
                part.map(|part| (start, part))
            }
        });
        let mut parts = std::pin::pin!(parts.buffer_unordered(PARTS_AT_ONCE));
        let mut arrived = 0;
        while let Some((start, part)) = parts.try_next().await.map_err(|source| self.failed_read(object, source))? {
            let start = usize::try_from(start).expect("within the object");
            let target =
                bytes.as_mut().get_mut(start..start + part.len()).ok_or_else(|| damaged("longer than the store said".to_owned()))?;
            target.copy_from_slice(&part);
            arrived += part.len();
        }
        if arrived == len { Ok(bytes) } else { Err(damaged(format!("only {arrived} of {len} bytes arrived"))) }
    }

    pub(super) fn failed_read(&self, object: &Object, source: Error) -> StoreError {
        match source {
            Error::NotFound { .. } => StoreError::Missing { object: object.clone() },
            source => StoreError::Read { object: object.clone(), place: self.inner.place.as_str().into(), source: Box::new(source) },
        }
    }

    async fn part(&self, key: &Path, start: u64, bytes: u64) -> Result<Bytes, Error> {
        let options = GetOptions { range: Some(GetRange::Bounded(start..start + bytes)), ..GetOptions::default() };
        self.inner.store.get_opts(key, options).await?.bytes().await
    }

    /// Does what may be done twice, and does it again after a pause where it may pass then.
    pub(super) async fn retried<T, F: Future<Output = Result<T, Error>>>(&self, request: impl Fn() -> F) -> Result<T, Error> {
        let Retries { attempts, mut pause } = self.inner.retries;
        for attempt in 1.. {
            match request().await {
                Err(error) if attempt < attempts && may_pass(&error) => {
                    tracing::debug!(%error, attempt, place = self.inner.place, "a request to the zoo failed and is tried again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                done => return done,
            }
        }
        unreachable!("the loop ends by returning")
    }
}
