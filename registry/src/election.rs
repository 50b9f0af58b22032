//! One leader among candidates, from a lease and compare-and-swap: who creates the key leads while its lease lives. A leader that
//! cannot renew in time deems itself deposed before the lease can end, so that two never lead by their own clocks.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::{Change, LeaseId, Registry, RegistryError, Revision, Swap};

const RETRY: Duration = Duration::from_millis(200);

/// The right to lead, with a number that grows from leader to leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// Revision of the election: of two leaders the later has the greater.
    pub term: Revision,
}

/// A candidacy that goes on until dropped or resigned.
#[derive(Debug)]
pub struct Election {
    leading: watch::Receiver<Option<Leadership>>,
    lease: watch::Receiver<Option<LeaseId>>,
    registry: Arc<dyn Registry>,
    task: AbortOnDropHandle<()>,
}

impl Election {
    /// Begins to campaign for `key` as `candidate`.
    pub fn start(registry: Arc<dyn Registry>, key: &str, candidate: String, ttl: Duration) -> Self {
        let (leading_tx, leading) = watch::channel(None);
        let (lease_tx, lease) = watch::channel(None);
        let campaign = Campaign { registry: registry.clone(), key: key.to_owned(), candidate, ttl, leading: leading_tx, lease: lease_tx };
        let task = AbortOnDropHandle::new(tokio::spawn(campaign.run()));
        Self { leading, lease, registry, task }
    }

    /// Follows whether we lead.
    pub fn leading(&self) -> watch::Receiver<Option<Leadership>> {
        self.leading.clone()
    }

    /// Gives the lead up at once, and the candidacy with it.
    ///
    /// # Errors
    /// When the store is out of reach; the lead then ends with its lease.
    pub async fn resign(self) -> Result<(), RegistryError> {
        let Self { lease, registry, task, .. } = self;
        task.abort();
        let _ = task.await;
        let lease = *lease.borrow();
        match lease {
            Some(lease) => registry.revoke(lease).await,
            None => Ok(()),
        }
    }
}

struct Campaign {
    registry: Arc<dyn Registry>,
    key: String,
    candidate: String,
    ttl: Duration,
    leading: watch::Sender<Option<Leadership>>,
    lease: watch::Sender<Option<LeaseId>>,
}

impl Campaign {
    async fn run(self) {
        loop {
            if let Err(error) = self.stand().await {
                tracing::debug!(key = self.key, error = &error as &dyn std::error::Error, "election interrupted");
            }
            self.leading.send_replace(None);
            // A lease left behind would keep the seat taken for its TTL.
            let lease = self.lease.send_replace(None);
            if let Some(lease) = lease {
                let _ = self.registry.revoke(lease).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Waits for the seat, takes it, and leads until something ends it.
    async fn stand(&self) -> Result<(), RegistryError> {
        let mut watch = self.registry.watch_prefix(&self.key).await?;
        while watch.entries().contains_key(&self.key) {
            if watch.next().await.is_none() {
                return Ok(());
            }
        }
        let mut renewed = Instant::now();
        let lease = self.registry.grant(self.ttl).await?;
        self.lease.send_replace(Some(lease));
        let Swap::Done(term) = self.registry.compare_and_swap(&self.key, None, &self.candidate, Some(lease)).await? else {
            return Ok(());
        };
        self.leading.send_replace(Some(Leadership { term }));
        tracing::info!(key = self.key, candidate = self.candidate, term = term.0, "elected");
        let mut next = renewed + self.ttl / 3;
        loop {
            // A third of the TTL is kept as margin between our deadline and the store's.
            let deadline = renewed + self.ttl * 2 / 3;
            tokio::select! {
                () = tokio::time::sleep_until(next.min(deadline)) => {}
                change = watch.next() => match change {
                    Some(Change::Put(entry)) if entry.key == self.key && entry.revision == term => continue,
                    Some(change) if change.key() != self.key => continue,
                    _ => return Ok(()), // Deposed: someone removed or took the key.
                },
            }
            let began = Instant::now();
            match tokio::time::timeout_at(deadline, self.registry.keep_alive(lease)).await {
                Ok(Ok(())) => {
                    renewed = began;
                    next = renewed + self.ttl / 3;
                }
                Ok(Err(error @ RegistryError::LeaseLost(_))) => return Err(error),
                Ok(Err(error)) if Instant::now() >= deadline => return Err(error),
                Ok(Err(_)) => next = Instant::now() + RETRY,
                Err(_) => return Ok(()),
            }
        }
    }
}
