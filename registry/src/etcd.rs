//! The registry of a cluster, in etcd 3.4 or newer. Every call has a time limit; watches reconnect by themselves and find what
//! they missed by comparing with a fresh read, which also holds when etcd was compacted or restored from a backup.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, WatchOptions,
};
use tokio::sync::mpsc;

use crate::watch::{CHANGES_MAX, changes};
use crate::{Change, Entry, LeaseId, Registry, RegistryError, Revision, Swap, Watch};

/// Put before every key.
pub const PREFIX_DEFAULT: &str = "/ashlar/";

const CALL_TIMEOUT: Duration = Duration::from_secs(3);
const RECONNECT_FIRST: Duration = Duration::from_millis(100);
const RECONNECT_MAX: Duration = Duration::from_secs(3);
/// etcd refuses pings more frequent than every 5 s, and pings on a connection without streams.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// A cluster's registry. Cheap to clone.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    prefix: String,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Etcd {
    /// Opens `etcd://host:port,host:port[/prefix]`. It connects at the first call, and again whenever the connection is lost.
    ///
    /// # Errors
    /// When the URL names no endpoint.
    pub async fn open(url: &str) -> Result<Self, RegistryError> {
        let invalid = |reason| RegistryError::Url { url: url.to_owned(), reason };
        let rest = url.strip_prefix("etcd://").ok_or_else(|| invalid("expected etcd://"))?;
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let endpoints: Vec<&str> = hosts.split(',').filter(|host| !host.is_empty()).collect();
        if endpoints.is_empty() {
            return Err(invalid("it names no host"));
        }
        let prefix = match path.trim_matches('/') {
            "" => PREFIX_DEFAULT.to_owned(),
            path => format!("/{path}/"),
        };
        let options = ConnectOptions::new().with_connect_timeout(CALL_TIMEOUT).with_keep_alive(PING_INTERVAL, CALL_TIMEOUT);
        let client = Client::connect(endpoints, Some(options)).await.map_err(|error| unreachable("connect", error))?;
        Ok(Self { client, prefix })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn entry(&self, kv: &KeyValue) -> Result<Entry, RegistryError> {
        let not_text = |_| RegistryError::NotText { key: String::from_utf8_lossy(kv.key()).into_owned() };
        let key = kv.key_str().map_err(not_text)?;
        Ok(Entry {
            key: key.strip_prefix(&self.prefix).unwrap_or(key).to_owned(),
            value: kv.value_str().map_err(not_text)?.to_owned(),
            revision: revision(kv.mod_revision()),
            lease: (kv.lease() != 0).then(|| LeaseId(kv.lease().cast_unsigned())),
        })
    }

    async fn snapshot(&self, prefix: &str) -> Result<(BTreeMap<String, Entry>, i64), RegistryError> {
        let mut client = self.client.clone();
        let options = GetOptions::new().with_prefix();
        let reply = call("read", client.get(self.key(prefix), Some(options))).await?;
        let mut entries = BTreeMap::new();
        for kv in reply.kvs() {
            let entry = self.entry(kv)?;
            entries.insert(entry.key.clone(), entry);
        }
        Ok((entries, reply.header().map_or(0, |header| header.revision())))
    }

    /// Feeds a watch until its reader is gone.
    async fn feed(self, prefix: String, mut view: BTreeMap<String, Entry>, mut seen: i64, sender: mpsc::Sender<Change>) {
        let mut wait = RECONNECT_FIRST;
        loop {
            let interrupted = tokio::select! {
                () = sender.closed() => return,
                interrupted = self.follow(&prefix, &mut view, seen, &sender) => interrupted,
            };
            tracing::debug!(prefix, error = &interrupted as &dyn std::error::Error, "watch interrupted");
            loop {
                tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(wait) => {}
                }
                let Ok((new, revision)) = self.snapshot(&prefix).await else {
                    wait = (wait * 2).min(RECONNECT_MAX);
                    continue;
                };
                for change in changes(&view, &new) {
                    if sender.send(change).await.is_err() {
                        return;
                    }
                }
                (view, seen) = (new, revision);
                break;
            }
            wait = RECONNECT_FIRST;
        }
    }

    /// Passes changes after revision `seen` on until the stream breaks.
    async fn follow(&self, prefix: &str, view: &mut BTreeMap<String, Entry>, seen: i64, sender: &mpsc::Sender<Change>) -> RegistryError {
        let mut client = self.client.clone();
        let options = WatchOptions::new().with_prefix().with_start_revision(seen + 1);
        let mut stream = match call("watch", client.watch(self.key(prefix), Some(options))).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        loop {
            let message = match stream.message().await {
                Ok(Some(message)) if !message.canceled() => message,
                Ok(Some(message)) => return unreachable("watch", Error::WatchError(message.cancel_reason().to_owned())),
                Ok(None) => return unreachable("watch", Error::WatchError("the stream ended".to_owned())),
                Err(error) => return unreachable("watch", error),
            };
            for event in message.events() {
                let Some(kv) = event.kv() else { continue };
                let entry = match self.entry(kv) {
                    Ok(entry) => entry,
                    Err(error) => return error,
                };
                let change = match event.event_type() {
                    EventType::Put => {
                        view.insert(entry.key.clone(), entry.clone());
                        Change::Put(entry)
                    }
                    EventType::Delete => {
                        view.remove(&entry.key);
                        Change::Delete { key: entry.key }
                    }
                };
                // A reader that is gone is seen by the caller.
                let _ = sender.send(change).await;
            }
        }
    }
}

#[async_trait]
impl Registry for Etcd {
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, RegistryError> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        let reply = call("grant a lease", self.client.clone().lease_grant(seconds, None)).await?;
        Ok(LeaseId(reply.id().cast_unsigned()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), RegistryError> {
        let mut client = self.client.clone();
        let renew = async {
            // The client asks once for itself when it opens the stream, and fails where the lease has ended.
            let (_keeper, _replies) = client.lease_keep_alive(lease.0.cast_signed()).await?;
            Ok(())
        };
        match call("keep a lease alive", renew).await {
            Err(RegistryError::Unreachable { source, .. }) if is_lease_end(source.as_ref()) => Err(RegistryError::LeaseLost(lease)),
            other => other,
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), RegistryError> {
        match call("revoke a lease", self.client.clone().lease_revoke(lease.0.cast_signed())).await {
            Err(RegistryError::Unreachable { source, .. }) if is_lease_end(source.as_ref()) => Ok(()),
            other => other.map(drop),
        }
    }

    async fn put(&self, key: &str, value: &str, lease: Option<LeaseId>) -> Result<Revision, RegistryError> {
        let mut client = self.client.clone();
        match call("write", client.put(self.key(key), value, put_options(lease))).await {
            Ok(reply) => Ok(revision(reply.header().map_or(0, |header| header.revision()))),
            Err(error) => Err(lease_lost(error, lease)),
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        let reply = call("read", self.client.clone().get(self.key(key), None)).await?;
        reply.kvs().first().map(|kv| self.entry(kv)).transpose()
    }

    async fn get_prefix(&self, prefix: &str) -> Result<Vec<Entry>, RegistryError> {
        Ok(self.snapshot(prefix).await?.0.into_values().collect())
    }

    async fn delete(&self, key: &str) -> Result<bool, RegistryError> {
        let reply = call("delete", self.client.clone().delete(self.key(key), None)).await?;
        Ok(reply.deleted() > 0)
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: &str,
        lease: Option<LeaseId>,
    ) -> Result<Swap, RegistryError> {
        let key = self.key(key);
        // Revision 0 is a key that does not exist.
        let expected = expected.map_or(0, |revision| revision.0.cast_signed());
        let txn = Txn::new()
            .when([Compare::mod_revision(key.clone(), CompareOp::Equal, expected)])
            .and_then([TxnOp::put(key.clone(), value, put_options(lease))])
            .or_else([TxnOp::get(key, None)]);
        let reply = call("swap", self.client.clone().txn(txn)).await.map_err(|error| lease_lost(error, lease))?;
        if reply.succeeded() {
            return Ok(Swap::Done(revision(reply.header().map_or(0, |header| header.revision()))));
        }
        let held = reply.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(get) => get.kvs().first().cloned(),
            _ => None,
        });
        Ok(Swap::Conflict(held.map(|kv| self.entry(&kv)).transpose()?))
    }

    async fn watch_prefix(&self, prefix: &str) -> Result<Watch, RegistryError> {
        let (view, seen) = self.snapshot(prefix).await?;
        let (sender, receiver) = mpsc::channel(CHANGES_MAX);
        let feeder = tokio::spawn(self.clone().feed(prefix.to_owned(), view.clone(), seen, sender));
        Ok(Watch::new(view, receiver, feeder))
    }
}

async fn call<T>(action: &'static str, work: impl Future<Output = Result<T, Error>>) -> Result<T, RegistryError> {
    match tokio::time::timeout(CALL_TIMEOUT, work).await {
        Ok(result) => result.map_err(|error| unreachable(action, error)),
        Err(elapsed) => Err(RegistryError::Unreachable { action, source: Box::new(elapsed) }),
    }
}

fn unreachable(action: &'static str, error: Error) -> RegistryError {
    RegistryError::Unreachable { action, source: Box::new(error) }
}

/// Whether etcd said that the lease named does not exist.
fn is_lease_end(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    match error.downcast_ref::<Error>() {
        Some(Error::LeaseKeepAliveError(_)) => true,
        Some(Error::GRpcStatus(status)) => status.message().contains("requested lease not found"),
        _ => false,
    }
}

fn lease_lost(error: RegistryError, lease: Option<LeaseId>) -> RegistryError {
    match (error, lease) {
        (RegistryError::Unreachable { source, .. }, Some(lease)) if is_lease_end(source.as_ref()) => RegistryError::LeaseLost(lease),
        (error, _) => error,
    }
}

fn put_options(lease: Option<LeaseId>) -> Option<PutOptions> {
    lease.map(|lease| PutOptions::new().with_lease(lease.0.cast_signed()))
}

fn revision(revision: i64) -> Revision {
    Revision(u64::try_from(revision).unwrap_or(0))
}
