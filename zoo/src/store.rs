//! The zoo: objects in a directory, a bucket or memory, every read verified against its digest. Start with [`Zoo`].
//! Layout and write order are docs/block-format.md; writing is in `store/write.rs`, names in `store/names.rs`.

mod cache;
mod delete;
mod derived;
mod domains;
mod equivalences;
mod error;
mod fetch;
mod measures;
mod names;
mod place;
mod profiles;
mod read;
mod sketches;
mod sweep;
mod tensors;
mod write;

use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

pub use cache::{Cache, CacheError};
pub(crate) use derived::Derived;
pub use domains::Domains;
pub use error::{Object, Retry, StoreError};
pub use fetch::Retries;
pub use names::KnownNames;
pub use place::{Place, PlaceError};
pub use read::{MappedAdapter, MappedBlock, MappedChange};
pub use tensors::{Form, StoredAs};
pub use write::{Compression, Put, Stored};

use crate::canonical;
use crate::digest::Digest;
use crate::model_id::ModelId;

/// Unreferenced objects younger than this are left alone by `gc`, so that what an `add` is writing stays.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(3600);
/// Largest JSON manifest.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Largest asset (a tokenizer).
pub const ASSET_BYTES_MAX: u64 = 256 << 20;

/// A stored zoo. Cheap to clone.
#[derive(Clone)]
pub struct Zoo {
    inner: Arc<Inner>,
    /// Whether puts write what is there already as they write what is not, and say that it is new.
    blind: bool,
}

struct Inner {
    store: Arc<dyn ObjectStore>,
    /// Where the objects are files, the directory: reads map them, names are locked by a file.
    root: Option<PathBuf>,
    place: String,
    /// Objects present but older than half of it are touched by `put_*`.
    grace: Duration,
    /// Where decoded tensors are kept.
    cache: Option<Arc<Cache>>,
    retries: Retries,
    loads: Mutex<tensors::Loads>,
}

impl std::fmt::Debug for Zoo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Zoo").field("place", &self.inner.place).finish_non_exhaustive()
    }
}

impl Zoo {
    /// Opens the zoo in a local directory.
    ///
    /// # Errors
    /// [`StoreError::NoZoo`] when there is none, [`StoreError::Format`] when it is of another version.
    pub async fn open_dir(root: &FilePath) -> Result<Self, StoreError> {
        if !root.join("format.json").exists() {
            return Err(StoreError::NoZoo { place: root.display().to_string() });
        }
        Self::at_dir(root)?.checked().await
    }

    /// Opens the zoo in a local directory, or begins one there.
    ///
    /// # Errors
    /// When the directory cannot be made, or holds a zoo of another version.
    pub async fn create_dir(root: &FilePath) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).map_err(|source| StoreError::File { action: "create", path: root.display().to_string(), source })?;
        Self::at_dir(root)?.begun().await
    }

    /// Opens the zoo in any object store; `place` names it in messages. Conditional puts must work there.
    ///
    /// # Errors
    /// As for [`Zoo::open_dir`].
    pub async fn open(store: Arc<dyn ObjectStore>, place: &str) -> Result<Self, StoreError> {
        Self::new(store, None, place.to_owned()).checked().await
    }

    /// Opens the zoo in any object store, or begins one there.
    ///
    /// # Errors
    /// As for [`Zoo::create_dir`].
    pub async fn create(store: Arc<dyn ObjectStore>, place: &str) -> Result<Self, StoreError> {
        Self::new(store, None, place.to_owned()).begun().await
    }

    /// The same zoo with another grace period (tests, and `gc --grace`).
    #[must_use]
    pub fn with_grace(self, grace: Duration) -> Self {
        self.with(|inner| inner.grace = grace)
    }

    /// The same zoo with a cache for tensors that are not mapped where they are stored.
    #[must_use]
    pub fn with_cache(self, cache: Cache) -> Self {
        self.with(|inner| inner.cache = Some(Arc::new(cache)))
    }

    /// The same zoo, more or less patient with a store that fails.
    #[must_use]
    pub fn with_retries(self, retries: Retries) -> Self {
        self.with(|inner| inner.retries = retries)
    }

    /// The same zoo to someone who must not learn what it holds: puts do what they would do if it held nothing, and say that all is new.
    #[must_use]
    pub fn blind(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), blind: true }
    }

    /// The directory or bucket, for people.
    pub fn place(&self) -> &str {
        &self.inner.place
    }

    /// How long unreferenced objects are left alone.
    pub fn grace(&self) -> Duration {
        self.inner.grace
    }

    fn new(store: Arc<dyn ObjectStore>, root: Option<PathBuf>, place: String) -> Self {
        let (grace, cache, retries, loads) = (GRACE_DEFAULT, None, Retries::default(), Mutex::default());
        Self { inner: Arc::new(Inner { store, root, place, grace, cache, retries, loads }), blind: false }
    }

    fn with(self, change: impl FnOnce(&mut Inner)) -> Self {
        let blind = self.blind;
        let Inner { store, root, place, grace, cache, retries, .. } = &*self.inner;
        let mut inner = Inner {
            store: store.clone(),
            root: root.clone(),
            place: place.clone(),
            grace: *grace,
            cache: cache.clone(),
            retries: *retries,
            loads: Mutex::default(),
        };
        change(&mut inner);
        Self { inner: Arc::new(inner), blind }
    }

    fn at_dir(root: &FilePath) -> Result<Self, StoreError> {
        let place = root.display().to_string();
        let store = LocalFileSystem::new_with_prefix(root)
            .map_err(|source| StoreError::Store { action: "open", key: place.clone(), source })?
            .with_fsync(true);
        let root = root.canonicalize().map_err(|source| StoreError::File { action: "open", path: place.clone(), source })?;
        Ok(Self::new(Arc::new(store), Some(root), place))
    }

    async fn checked(self) -> Result<Self, StoreError> {
        let bytes = match self.read(&Object::Format, MANIFEST_BYTES_MAX).await {
            Err(StoreError::Missing { .. }) => return Err(StoreError::NoZoo { place: self.inner.place.clone() }),
            other => other?,
        };
        #[derive(serde::Deserialize)]
        struct Format {
            format: u64,
        }
        let found = match serde_json::from_slice::<Format>(&bytes) {
            Ok(Format { format: 1 }) => return Ok(self),
            Ok(Format { format }) => format.to_string(),
            Err(_) => String::from_utf8_lossy(&bytes).chars().take(80).collect(),
        };
        Err(StoreError::Format { place: self.inner.place.clone(), found })
    }

    async fn begun(self) -> Result<Self, StoreError> {
        let bytes = canonical::to_bytes(&serde_json::json!({"format": 1}));
        match self.inner.store.put_opts(&key(&Object::Format), bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(self),
            Err(object_store::Error::AlreadyExists { .. }) => self.checked().await,
            // The answer may be what was lost.
            Err(source) => match self.checked().await {
                Err(StoreError::NoZoo { .. }) => Err(StoreError::Store { action: "write", key: "format.json".to_owned(), source }),
                other => other,
            },
        }
    }

    /// Size and age of an object that is there.
    pub(crate) async fn head(&self, object: &Object) -> Result<Option<object_store::ObjectMeta>, StoreError> {
        let key = key(object);
        match self.retried(|| self.inner.store.head(&key)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(StoreError::Store { action: "look up", key: key.to_string(), source }),
        }
    }
}

/// The key of an object.
pub(crate) fn key(object: &Object) -> Path {
    match object {
        Object::Format => Path::from("format.json"),
        Object::Tensor(digest) | Object::TensorOf { tensor: digest, .. } | Object::TensorOfAdapter { tensor: digest, .. } => {
            let digest = digest.to_string();
            Path::from(format!("tensors/{}/{digest}", &digest[..2]))
        }
        Object::Base { tensor, base } => Path::from(format!("bases/{tensor}/{base}")),
        Object::Block(digest) => Path::from(format!("blocks/{digest}.json")),
        Object::Adapter(digest) => Path::from(format!("adapters/{digest}.json")),
        Object::Chain(digest) => Path::from(format!("chains/{digest}.json")),
        Object::Asset(digest) => Path::from(format!("assets/{digest}")),
        Object::Sketch(chain) => Path::from(format!("sketches/{chain}")),
        Object::Measure { chain, record } => Path::from(format!("measures/{chain}/{record}.json")),
        Object::Profile { block, device } => Path::from(format!("profiles/{block}/{device}.json")),
        Object::Equivalence(digest) => Path::from(format!("equivalences/{digest}.json")),
        Object::Scratch(digest) => Path::from(format!("scratch/{digest}")),
        Object::Domains => Path::from("domains.json"),
        Object::Model(id) => Path::from(format!("models/{}/{}.json", id.tenant(), id.name())),
    }
}

/// The object that a key names; `None` for anything else that lies in the store.
pub(crate) fn object(key: &Path) -> Option<Object> {
    let parts: Vec<String> = key.parts().map(|part| part.as_ref().to_owned()).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts.as_slice() {
        ["format.json"] => Some(Object::Format),
        ["tensors", shelf, digest] => {
            let parsed: Digest = digest.parse().ok()?;
            digest.starts_with(shelf).then_some(Object::Tensor(parsed))
        }
        ["bases", tensor, base] => Some(Object::Base { tensor: tensor.parse().ok()?, base: base.parse().ok()? }),
        ["blocks", file] => Some(Object::Block(file.strip_suffix(".json")?.parse().ok()?)),
        ["adapters", file] => Some(Object::Adapter(file.strip_suffix(".json")?.parse().ok()?)),
        ["chains", file] => Some(Object::Chain(file.strip_suffix(".json")?.parse().ok()?)),
        ["assets", file] => Some(Object::Asset(file.parse().ok()?)),
        ["sketches", file] => Some(Object::Sketch(file.parse().ok()?)),
        ["measures", chain, file] => {
            Some(Object::Measure { chain: chain.parse().ok()?, record: file.strip_suffix(".json")?.parse().ok()? })
        }
        ["profiles", block, file] => {
            Some(Object::Profile { block: block.parse().ok()?, device: file.strip_suffix(".json")?.parse().ok()? })
        }
        ["equivalences", file] => Some(Object::Equivalence(file.strip_suffix(".json")?.parse().ok()?)),
        ["scratch", file] => Some(Object::Scratch(file.parse().ok()?)),
        ["domains.json"] => Some(Object::Domains),
        ["models", tenant, file] => Some(Object::Model(ModelId::new(tenant, file.strip_suffix(".json")?).ok()?)),
        _ => None,
    }
}
