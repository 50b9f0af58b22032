//! The registry of one machine. Lasting keys are in one file, which several processes may share (a server and the command line);
//! keys under leases are in memory, for they die with their process. Entries change only under the writer's lock, as one new
//! snapshot at a time; readers and watchers take snapshots and never wait.

mod file;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc, watch as snapshots};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::watch::{CHANGES_MAX, changes};
use crate::{Entry, LeaseId, Registry, RegistryError, Revision, Swap, Watch};
use file::LastingFile;
pub use file::resolve;

/// How often the file is looked at for changes by other processes.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// All keys at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Entries {
    /// By key.
    map: BTreeMap<String, Entry>,
    /// Of the newest change.
    revision: u64,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    deadline: Instant,
}

#[derive(Debug)]
struct Inner {
    /// The newest snapshot; replaced under `writer` only.
    entries: snapshots::Sender<Arc<Entries>>,
    /// Leases that live or have not been reaped; keys under them are removed with them, under `writer`.
    leases: Mutex<BTreeMap<LeaseId, Lease>>,
    /// Numbers of leases are not given twice.
    leases_granted: AtomicU64,
    /// Held by whoever changes entries. The file, where there is one.
    writer: Arc<tokio::sync::Mutex<Option<LastingFile>>>,
    /// A lease was granted, or ended by hand.
    leases_changed: Notify,
}

/// The registry of one machine.
#[derive(Debug)]
pub struct Embedded {
    inner: Arc<Inner>,
    /// Ends leases in time and looks at the file.
    _keeper: AbortOnDropHandle<()>,
}

impl Embedded {
    /// A registry that is gone with the process. Must be called within a tokio runtime.
    pub fn in_memory() -> Self {
        Self::with(Entries::default(), None)
    }

    /// A registry whose lasting keys are in `path`; the file is made at the first write.
    ///
    /// # Errors
    /// When the file is there and cannot be read, or is no registry; and as [`resolve`].
    pub async fn open(path: &Path) -> Result<Self, RegistryError> {
        let path = path.to_owned();
        let (file, entries) = blocking(move || {
            let mut file = LastingFile::new(resolve(&path)?);
            let mut entries = Entries::default();
            if let Some(found) = file.read_if_changed()? {
                entries.adopt(found);
            }
            Ok((file, entries))
        })
        .await?;
        Ok(Self::with(entries, Some(file)))
    }

    fn with(entries: Entries, file: Option<LastingFile>) -> Self {
        let polled = file.is_some();
        let inner = Arc::new(Inner {
            entries: snapshots::Sender::new(Arc::new(entries)),
            leases: Mutex::default(),
            leases_granted: AtomicU64::new(0),
            writer: Arc::new(tokio::sync::Mutex::new(file)),
            leases_changed: Notify::new(),
        });
        let keeper = tokio::spawn(inner.clone().keep(polled));
        Self { inner, _keeper: AbortOnDropHandle::new(keeper) }
    }
}

impl Entries {
    fn next_revision(&mut self) -> Revision {
        self.revision += 1;
        Revision(self.revision)
    }

    fn put(&mut self, key: &str, value: &str, lease: Option<LeaseId>) -> Revision {
        let revision = self.next_revision();
        self.map.insert(key.to_owned(), Entry { key: key.to_owned(), value: value.to_owned(), revision, lease });
        revision
    }

    /// Keys that belong into the file.
    fn lasting(&self) -> impl Iterator<Item = &Entry> {
        self.map.values().filter(|entry| entry.lease.is_none())
    }

    /// Takes the lasting keys that the file holds now in place of those we knew.
    fn adopt(&mut self, found: Entries) {
        self.map.retain(|_, entry| entry.lease.is_some());
        self.revision = self.revision.max(found.revision);
        for (key, entry) in found.map {
            self.map.entry(key).or_insert(entry);
        }
    }
}

impl Inner {
    fn leases(&self) -> MutexGuard<'_, BTreeMap<LeaseId, Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> Arc<Entries> {
        self.entries.borrow().clone()
    }

    fn check(&self, lease: Option<LeaseId>) -> Result<(), RegistryError> {
        let Some(id) = lease else { return Ok(()) };
        match self.leases().get(&id) {
            Some(lease) if Instant::now() < lease.deadline => Ok(()),
            _ => Err(RegistryError::LeaseLost(id)),
        }
    }

    /// A holder that waits for the writer cannot renew meanwhile, and a slow disk may keep the writer longer than a lease lasts. So its
    /// lease counts from when it got the lock; whoever asked before the lease ended stands before the reaper in the lock's queue.
    fn renew_after_wait(&self, lease: Option<LeaseId>) -> Result<(), RegistryError> {
        let Some(id) = lease else { return Ok(()) };
        match self.leases().get_mut(&id) {
            Some(held) => {
                held.deadline = held.deadline.max(Instant::now() + held.ttl);
                Ok(())
            }
            None => Err(RegistryError::LeaseLost(id)),
        }
    }

    /// Makes one change. What it does to lasting keys is in the file before anyone sees it.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        key: &str,
        lease: Option<LeaseId>,
        change: impl FnOnce(&mut Entries) -> T + Send + 'static,
    ) -> Result<T, RegistryError> {
        self.check(lease)?;
        let mut writer = self.writer.clone().lock_owned().await;
        self.renew_after_wait(lease)?;
        let old = self.snapshot();
        let lasting = lease.is_none() || old.map.get(key).is_some_and(|entry| entry.lease.is_none());
        if !lasting || writer.is_none() {
            let mut new = (*old).clone();
            let result = change(&mut new);
            self.publish(&old, new);
            return Ok(result);
        }
        let inner = self.clone();
        blocking(move || {
            let file = writer.as_mut().expect("checked above, under the same lock");
            let _locked = file.lock()?;
            let mut base = (*old).clone();
            if let Some(found) = file.read_if_changed()? {
                base.adopt(found);
            }
            let mut new = base.clone();
            let result = change(&mut new);
            if !base.lasting().eq(new.lasting()) {
                file.write(&new)?;
            }
            inner.publish(&old, new);
            Ok(result)
        })
        .await
    }

    fn publish(&self, old: &Entries, new: Entries) {
        if *old != new {
            self.entries.send_replace(Arc::new(new));
        }
    }

    /// Removes leases that have ended, or one by hand, with their keys.
    async fn reap(&self, revoked: Option<LeaseId>) {
        let _writer = self.writer.lock().await;
        let now = Instant::now();
        let mut ended = Vec::new();
        self.leases().retain(|id, lease| {
            let ends = revoked == Some(*id) || lease.deadline <= now;
            ended.extend(ends.then_some(*id));
            !ends
        });
        let old = self.snapshot();
        let mut new = (*old).clone();
        new.map.retain(|_, entry| entry.lease.is_none_or(|lease| !ended.contains(&lease)));
        if new.map.len() != old.map.len() {
            new.next_revision();
        }
        self.publish(&old, new);
    }

    async fn keep(self: Arc<Self>, polled: bool) {
        let mut poll_at = Instant::now() + POLL_INTERVAL;
        loop {
            let first = self.leases().values().map(|lease| lease.deadline).min();
            let poll = async { if polled { tokio::time::sleep_until(poll_at).await } else { std::future::pending().await } };
            let expiry = async {
                match first {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.leases_changed.notified() => {}
                () = expiry => self.reap(None).await,
                () = poll => {
                    if let Err(error) = self.poll_file().await {
                        tracing::warn!(error = &error as &dyn std::error::Error, "failed to read the registry's file; keeping what was known");
                    }
                    poll_at = Instant::now() + POLL_INTERVAL;
                }
            }
        }
    }

    async fn poll_file(self: &Arc<Self>) -> Result<(), RegistryError> {
        let mut writer = self.writer.clone().lock_owned().await;
        let inner = self.clone();
        blocking(move || {
            let Some(file) = writer.as_mut() else { return Ok(()) };
            if let Some(found) = file.read_if_changed()? {
                let old = inner.snapshot();
                let mut new = (*old).clone();
                new.adopt(found);
                inner.publish(&old, new);
            }
            Ok(())
        })
        .await
    }
}

#[async_trait]
impl Registry for Embedded {
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, RegistryError> {
        let id = LeaseId(self.inner.leases_granted.fetch_add(1, Ordering::Relaxed) + 1);
        self.inner.leases().insert(id, Lease { ttl, deadline: Instant::now() + ttl });
        self.inner.leases_changed.notify_one();
        Ok(id)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), RegistryError> {
        let now = Instant::now();
        match self.inner.leases().get_mut(&lease) {
            Some(held) if now < held.deadline => {
                held.deadline = now + held.ttl;
                Ok(())
            }
            _ => Err(RegistryError::LeaseLost(lease)),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), RegistryError> {
        self.inner.reap(Some(lease)).await;
        self.inner.leases_changed.notify_one();
        Ok(())
    }

    async fn put(&self, key: &str, value: &str, lease: Option<LeaseId>) -> Result<Revision, RegistryError> {
        let (owned_key, value) = (key.to_owned(), value.to_owned());
        self.inner.change(key, lease, move |entries| entries.put(&owned_key, &value, lease)).await
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        Ok(self.inner.snapshot().map.get(key).cloned())
    }

    async fn get_prefix(&self, prefix: &str) -> Result<Vec<Entry>, RegistryError> {
        Ok(under(&self.inner.snapshot(), prefix).into_values().collect())
    }

    async fn delete(&self, key: &str) -> Result<bool, RegistryError> {
        let owned_key = key.to_owned();
        let delete = move |entries: &mut Entries| {
            let found = entries.map.remove(&owned_key).is_some();
            if found {
                entries.next_revision();
            }
            found
        };
        self.inner.change(key, None, delete).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: &str,
        lease: Option<LeaseId>,
    ) -> Result<Swap, RegistryError> {
        let (owned_key, value) = (key.to_owned(), value.to_owned());
        let swap = move |entries: &mut Entries| {
            let held = entries.map.get(&owned_key);
            if held.map(|entry| entry.revision) != expected {
                return Swap::Conflict(held.cloned());
            }
            Swap::Done(entries.put(&owned_key, &value, lease))
        };
        self.inner.change(key, lease, swap).await
    }

    async fn watch_prefix(&self, prefix: &str) -> Result<Watch, RegistryError> {
        let mut snapshots = self.inner.entries.subscribe();
        let view = under(&snapshots.borrow_and_update().clone(), prefix);
        let (sender, receiver) = mpsc::channel(CHANGES_MAX);
        let (mut known, prefix) = (view.clone(), prefix.to_owned());
        let feeder = tokio::spawn(async move {
            while snapshots.changed().await.is_ok() {
                let new = under(&snapshots.borrow_and_update().clone(), &prefix);
                for change in changes(&known, &new) {
                    if sender.send(change).await.is_err() {
                        return;
                    }
                }
                known = new;
            }
        });
        Ok(Watch::new(view, receiver, feeder))
    }
}

fn under(entries: &Entries, prefix: &str) -> BTreeMap<String, Entry> {
    let from = entries.map.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
    from.take_while(|(key, _)| key.starts_with(prefix)).map(|(key, entry)| (key.clone(), entry.clone())).collect()
}

/// Runs file work off the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static) -> Result<T, RegistryError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(source) => Err(RegistryError::Unreachable { action: "use the file", source: Box::new(source) }),
        },
    }
}
