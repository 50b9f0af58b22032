//! Who is in the cluster and what should be: keys under leases, watches, compare-and-swap, election. It knows records, never
//! models. Start with [`Registry`]; its two implementations are [`embedded::Embedded`] (one machine, one file) and
//! [`etcd::Etcd`]; [`Session`] keeps a record registered, [`Election`] chooses one leader, both built on the trait alone.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

mod chain_digest;
mod election;
pub mod embedded;
mod error;
pub mod etcd;
pub mod key;
pub mod record;
mod session;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use chain_digest::{ChainDigest, ParseChainDigestError};
pub use election::{Election, Leadership};
pub use error::{RegistryError, Retry};
pub use session::{Session, SessionState};
pub use watch::{Change, Watch};

/// Grows with each change of the store; two values of one key never have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// A time-bounded right: keys put under it vanish when it is not kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl std::fmt::Display for LeaseId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "lease_{:x}", self.0)
    }
}

/// A key's value at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key, without the store's own prefix.
    pub key: String,
    /// The value: JSON in all keys of ours, but the registry does not look into it.
    pub value: String,
    /// When this value was put.
    pub revision: Revision,
    /// The lease it lives under; `None`: it lasts.
    pub lease: Option<LeaseId>,
}

/// What a compare-and-swap did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// The value is set, at this revision.
    Done(Revision),
    /// The key had another revision than expected; this is what it holds now.
    Conflict(Option<Entry>),
}

/// The store of cluster facts. All calls return within a few seconds: a store out of reach is an error, never a hang.
#[async_trait]
pub trait Registry: Send + Sync + std::fmt::Debug {
    /// Grants a lease that ends `ttl` after the last keep-alive. Stores may round `ttl` up to a second or two.
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, RegistryError>;

    /// Renews a lease. [`RegistryError::LeaseLost`] when it has ended.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), RegistryError>;

    /// Ends a lease now and removes its keys. Revoking a lease that has ended is no error.
    async fn revoke(&self, lease: LeaseId) -> Result<(), RegistryError>;

    /// Sets a key; with a lease it vanishes when the lease ends.
    async fn put(&self, key: &str, value: &str, lease: Option<LeaseId>) -> Result<Revision, RegistryError>;

    /// Reads a key.
    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError>;

    /// Reads all keys that begin with `prefix`, in order of key.
    async fn get_prefix(&self, prefix: &str) -> Result<Vec<Entry>, RegistryError>;

    /// Removes a key; false when it was not there.
    async fn delete(&self, key: &str) -> Result<bool, RegistryError>;

    /// Sets a key only if its revision is `expected`; `None`: only if it does not exist.
    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: &str,
        lease: Option<LeaseId>,
    ) -> Result<Swap, RegistryError>;

    /// Watches all keys that begin with `prefix`: what is there now, then changes in order of revision. Changes of one key that
    /// follow closely may be merged into the newest. It survives reconnects: what was missed is found by comparing.
    async fn watch_prefix(&self, prefix: &str) -> Result<Watch, RegistryError>;
}

/// Opens a registry by its URL: `etcd://host:port,host:port[/prefix]`, `file:PATH` (or a bare path), `memory:`.
///
/// # Errors
/// When the URL is of no known form, or the file cannot be read. An etcd that is down is no error here.
pub async fn open(url: &str) -> Result<Arc<dyn Registry>, RegistryError> {
    if url.starts_with("etcd://") {
        return Ok(Arc::new(etcd::Etcd::open(url).await?));
    }
    if url == "memory:" {
        return Ok(Arc::new(embedded::Embedded::in_memory()));
    }
    let path = url.strip_prefix("file:").unwrap_or(url);
    if path.is_empty() || path.contains("://") {
        return Err(RegistryError::Url { url: url.to_owned(), reason: "expected etcd://HOST:PORT, file:PATH or memory:" });
    }
    Ok(Arc::new(embedded::Embedded::open(std::path::Path::new(path)).await?))
}
