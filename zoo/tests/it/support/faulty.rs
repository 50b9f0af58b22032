//! A store that stops for good after so many changes, as a killed process would leave it, with the change that it died
//! in either done or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

/// Counts changes down; at zero everything fails.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    pub(crate) inner: Arc<InMemory>,
    left: Arc<AtomicI64>,
    /// Whether the fatal change still happens.
    torn: bool,
}

impl FaultyStore {
    pub(crate) fn new(inner: Arc<InMemory>, changes: i64, torn: bool) -> Self {
        Self { inner, left: Arc::new(AtomicI64::new(changes)), torn }
    }

    fn dead() -> Error {
        Error::Generic { store: "faulty", source: "stopped".into() }
    }

    fn alive(&self) -> Result<()> {
        if self.left.load(Ordering::SeqCst) < 0 { Err(Self::dead()) } else { Ok(()) }
    }
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left > 0 {
            return self.inner.put_opts(location, payload, opts).await;
        }
        if left == 0 && self.torn {
            self.inner.put_opts(location, payload, opts).await?;
        }
        Err(Self::dead())
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.alive()?;
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.alive()?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, left, torn) = (self.inner.clone(), self.left.clone(), self.torn);
        let deleted = locations.then(move |location| {
            let (inner, left) = (inner.clone(), left.clone());
            async move {
                let location = location?;
                let before = left.fetch_sub(1, Ordering::SeqCst);
                if before > 0 || (before == 0 && torn) {
                    inner.delete(&location).await?;
                }
                if before > 0 { Ok(location) } else { Err(FaultyStore::dead()) }
            }
        });
        deleted.boxed()
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
