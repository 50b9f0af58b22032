//! A record kept registered: put under a lease, renewed, put again after the lease or the store was lost. While the store is
//! away the owner goes on; what it changed meanwhile is written when the store returns.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use crate::record::to_value;
use crate::{LeaseId, Registry, RegistryError};

/// Wait before the first new try after a failure; it doubles up to a third of the TTL.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Failures in a row after which an operator should hear of it.
const FAILURES_TO_WARN: u32 = 3;

/// Whether the record is in the registry, as far as its owner knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionState {
    /// It is being put.
    Registering,
    /// It was put and the lease renewed in time.
    Registered,
    /// The store does not answer; others may hold the owner for dead by now.
    Lost,
}

/// A registered record. Dropping it lets the lease run out; [`Session::close`] removes the record at once.
#[derive(Debug)]
pub struct Session<T> {
    record: watch::Sender<T>,
    state: watch::Receiver<SessionState>,
    lease: watch::Receiver<Option<LeaseId>>,
    registry: Arc<dyn Registry>,
    task: AbortOnDropHandle<()>,
}

impl<T: Serialize + Clone + Send + Sync + 'static> Session<T> {
    /// Starts to register `record` at `key`; it returns at once.
    pub fn start(registry: Arc<dyn Registry>, key: String, record: T, ttl: Duration) -> Self {
        let (record, record_rx) = watch::channel(record);
        let (state_tx, state) = watch::channel(SessionState::Registering);
        let (lease_tx, lease) = watch::channel(None);
        let keeper = Keeper { registry: registry.clone(), key, ttl, record: record_rx, state: state_tx, lease: lease_tx };
        let task = AbortOnDropHandle::new(tokio::spawn(keeper.run()));
        Self { record, state, lease, registry, task }
    }

    /// Changes the record; it is written soon.
    pub fn update(&self, change: impl FnOnce(&mut T)) {
        self.record.send_modify(change);
    }

    /// The record as it should stand.
    pub fn record(&self) -> T {
        self.record.borrow().clone()
    }

    /// Follows whether the record stands.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// Waits until the record stands (again).
    pub async fn registered(&self) {
        let mut state = self.state.clone();
        // An error means that the task has ended, which it does with the session only.
        let _ = state.wait_for(|state| *state == SessionState::Registered).await;
    }

    /// Removes the record now.
    ///
    /// # Errors
    /// When the store is out of reach; the record then vanishes with its lease.
    pub async fn close(self) -> Result<(), RegistryError> {
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

struct Keeper<T> {
    registry: Arc<dyn Registry>,
    key: String,
    ttl: Duration,
    record: watch::Receiver<T>,
    state: watch::Sender<SessionState>,
    lease: watch::Sender<Option<LeaseId>>,
}

impl<T: Serialize + Clone + Send + Sync + 'static> Keeper<T> {
    async fn run(mut self) {
        let mut retry = RETRY_FIRST;
        let mut failure_count = 0;
        loop {
            let began = Instant::now();
            let error = self.keep().await;
            let told = *self.state.borrow();
            match error {
                RegistryError::LeaseLost(lease) => tracing::info!(key = self.key, %lease, "lease ended; registering again"),
                error => {
                    failure_count = if told == SessionState::Registered { 1 } else { failure_count + 1 };
                    let error = &error as &dyn std::error::Error;
                    match failure_count {
                        // A connection that broke; the next one usually stands.
                        1 => tracing::info!(key = self.key, error, "failed to register; trying again"),
                        // Said once: while the store is away, only the state says so.
                        FAILURES_TO_WARN => tracing::warn!(key = self.key, error, "failed to register; trying on"),
                        _ => {}
                    }
                }
            }
            self.state.send_replace(SessionState::Lost);
            if began.elapsed() > self.ttl {
                retry = RETRY_FIRST;
            }
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(self.ttl / 3).max(RETRY_FIRST);
        }
    }

    /// Registers and renews until something fails.
    async fn keep(&mut self) -> RegistryError {
        let lease = match self.register().await {
            Ok(lease) => lease,
            Err(error) => return error,
        };
        let mut ticks = tokio::time::interval(self.ttl / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            let done = tokio::select! {
                changed = self.record.changed() => match changed {
                    Ok(()) => self.put(lease).await,
                    Err(_) => std::future::pending().await, // The session is being dropped.
                },
                _ = ticks.tick() => self.renew(lease).await,
            };
            if let Err(error) = done {
                return error;
            }
        }
    }

    /// Puts the record under the lease we had, where it still lives, else under a new one.
    async fn register(&mut self) -> Result<LeaseId, RegistryError> {
        let held = *self.lease.borrow();
        let lease = match held {
            Some(lease) => match self.registry.keep_alive(lease).await {
                Ok(()) => lease,
                Err(RegistryError::LeaseLost(_)) => self.registry.grant(self.ttl).await?,
                Err(error) => return Err(error),
            },
            None => self.registry.grant(self.ttl).await?,
        };
        self.lease.send_replace(Some(lease));
        self.put(lease).await?;
        self.state.send_replace(SessionState::Registered);
        Ok(lease)
    }

    async fn put(&mut self, lease: LeaseId) -> Result<(), RegistryError> {
        let value = to_value(&*self.record.borrow_and_update());
        self.registry.put(&self.key, &value, Some(lease)).await.map(drop)
    }

    /// Renews the lease, and puts the record again where someone removed it.
    async fn renew(&mut self, lease: LeaseId) -> Result<(), RegistryError> {
        self.registry.keep_alive(lease).await?;
        let entry = self.registry.get(&self.key).await?;
        if entry.is_none_or(|entry| entry.lease != Some(lease)) {
            self.put(lease).await?;
        }
        Ok(())
    }
}
