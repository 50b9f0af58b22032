//! A store that asks a script before each operation: whether it happens, and whether it seems to fail. The script may also let others go first.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It happens.
    Done,
    /// It does not, and fails.
    Refused,
    /// It happens, and its answer is lost.
    Lost,
}

type Script = Arc<dyn Fn(String) -> BoxFuture<'static, Verdict> + Send + Sync>;

/// Hands everything on to a store in memory as its script says.
pub(crate) struct ScriptedStore {
    inner: Arc<InMemory>,
    script: Script,
    /// What was written before this is two hours older than it is.
    aged_before: SystemTime,
}

impl ScriptedStore {
    /// `script` is asked with the key, or the prefix of a listing.
    pub(crate) fn new(inner: Arc<InMemory>, script: impl Fn(String) -> BoxFuture<'static, Verdict> + Send + Sync + 'static) -> Self {
        Self { inner, script: Arc::new(script), aged_before: SystemTime::UNIX_EPOCH }
    }

    pub(crate) fn aged_before(self, aged_before: SystemTime) -> Self {
        Self { aged_before, ..self }
    }

    async fn asked<T>(&self, key: &Path, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match (self.script)(key.to_string()).await {
            Verdict::Done => operation.await,
            Verdict::Refused => Err(failure()),
            // One that failed for a reason of its own is told of.
            Verdict::Lost => operation.await.and_then(|_| Err(failure())),
        }
    }

    fn aged(meta: ObjectMeta, aged_before: SystemTime) -> ObjectMeta {
        let written: SystemTime = meta.last_modified.into();
        match written < aged_before {
            true => ObjectMeta { last_modified: (written - Duration::from_secs(7200)).into(), ..meta },
            false => meta,
        }
    }
}

fn failure() -> Error {
    Error::Generic { store: "scripted", source: "503 slow down".into() }
}

impl std::fmt::Debug for ScriptedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ScriptedStore")
    }
}

impl std::fmt::Display for ScriptedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("scripted")
    }
}

#[async_trait]
impl ObjectStore for ScriptedStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.asked(location, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.asked(location, self.inner.put_multipart_opts(location, opts)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let mut got = self.asked(location, self.inner.get_opts(location, options)).await?;
        got.meta = Self::aged(got.meta, self.aged_before);
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, script) = (self.inner.clone(), self.script.clone());
        let deleted = locations.then(move |location| {
            let (inner, script) = (inner.clone(), script.clone());
            async move {
                let location = location?;
                let verdict = script(location.to_string()).await;
                if verdict != Verdict::Refused {
                    inner.delete(&location).await?;
                }
                if verdict == Verdict::Done { Ok(location) } else { Err(failure()) }
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, script, aged_before) = (self.inner.clone(), self.script.clone(), self.aged_before);
        let prefix = prefix.cloned();
        let listed = async move {
            match script(prefix.as_ref().map(ToString::to_string).unwrap_or_default()).await {
                Verdict::Done => Ok(inner.list(prefix.as_ref()).map_ok(move |meta| Self::aged(meta, aged_before))),
                Verdict::Refused | Verdict::Lost => Err(failure()),
            }
        };
        listed.into_stream().try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
