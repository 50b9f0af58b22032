//! A store that counts reads and fails some of them.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

/// Says which reads fail: by number, from 0.
type Fails = Box<dyn Fn(usize) -> bool + Send + Sync>;

/// Hands everything on to a store in memory, but for reads of tensors that fail.
pub(crate) struct FlakyStore {
    pub(crate) inner: Arc<InMemory>,
    /// Ranges of the reads of tensors so far; `None`: all of it.
    pub(crate) reads: Mutex<Vec<Option<Range<u64>>>>,
    fails: Fails,
}

impl FlakyStore {
    pub(crate) fn new(inner: Arc<InMemory>, fails: impl Fn(usize) -> bool + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { inner, reads: Mutex::default(), fails: Box::new(fails) })
    }

    pub(crate) fn read_count(&self) -> usize {
        self.reads.lock().unwrap().len()
    }
}

impl std::fmt::Debug for FlakyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FlakyStore")
    }
}

impl std::fmt::Display for FlakyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("flaky")
    }
}

#[async_trait]
impl ObjectStore for FlakyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if location.as_ref().starts_with("tensors/") && !options.head {
            let range = match &options.range {
                Some(GetRange::Bounded(range)) => Some(range.clone()),
                _ => None,
            };
            let number = {
                let mut reads = self.reads.lock().unwrap();
                reads.push(range);
                reads.len() - 1
            };
            // Others that want the same tensor come meanwhile.
            tokio::task::yield_now().await;
            if (self.fails)(number) {
                return Err(Error::Generic { store: "flaky", source: "connection reset".into() });
            }
        }
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
