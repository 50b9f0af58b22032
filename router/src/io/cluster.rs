//! The router's picture of the cluster, kept by one watch of the registry: executors, plan, tenants. It is replaced as a whole and
//! read without waiting; while the registry is away the last picture stands. An executor whose record vanished is kept as
//! *departed* for a while, because a registry that comes back from a fault forgets those that live.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::record::{self, DeploymentRecord, ExecutorRecord, Plan, TenantRecord};
use ashlar_registry::{Entry, Registry, RegistryError, Revision, Swap, key};
use ashlar_wire::id::{ExecutorId, TenantName};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::keys_file::KeysFile;
use crate::state::tenants::{Tenants, Without};

const RETRY: Duration = Duration::from_millis(500);
/// How often the file of keys is read again.
const KEYS_FILE_INTERVAL: Duration = Duration::from_secs(5);

/// How the picture is taken.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// What a server without tenants does. Where there is a file of keys it is closed, whatever stands here or in the file.
    pub without: Without,
    /// Keys beside those in the registry (a mounted secret).
    pub keys_file: Option<KeysFile>,
    /// How long an executor is kept after its record vanished: longer than a registry's restart, shorter than patience.
    pub departed_keep: Duration,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { without: Without::Closed, keys_file: None, departed_keep: Duration::from_secs(5) }
    }
}

/// The cluster at one moment.
#[derive(Debug, Clone)]
pub struct ClusterState {
    /// Whether the registry was read at least once. Until then nobody is let in.
    pub loaded: bool,
    /// Executors that are registered, and departed ones.
    pub executors: BTreeMap<ExecutorId, ExecutorRecord>,
    /// Executors of the above whose record vanished, and when.
    pub departed: BTreeMap<ExecutorId, Instant>,
    /// The plan in force.
    pub plan: Plan,
    /// For the compare-and-swap of the next plan; `None`: there is no plan yet.
    pub plan_revision: Option<Revision>,
    /// Who may call.
    pub tenants: Tenants,
    /// How models are deployed, by `tenant/name`; those that nothing is said of are left out.
    pub deployments: BTreeMap<String, DeploymentRecord>,
}

/// Keeps the picture.
#[derive(Debug)]
pub struct Cluster {
    state: watch::Receiver<Arc<ClusterState>>,
    _task: AbortOnDropHandle<()>,
}

impl Cluster {
    /// Starts to follow the registry; it returns at once, with an empty picture.
    pub fn start(registry: Arc<dyn Registry>, options: ClusterOptions) -> Arc<Self> {
        let empty = ClusterState {
            loaded: false,
            executors: BTreeMap::new(),
            departed: BTreeMap::new(),
            plan: Plan::default(),
            plan_revision: None,
            tenants: Tenants::new(BTreeMap::new(), Without::Closed, [0; 32]),
            deployments: BTreeMap::new(),
        };
        let (sender, state) = watch::channel(Arc::new(empty));
        let task = tokio::spawn(async move {
            let secret = persist("read the cluster's secret", || load_secret(&*registry)).await;
            // The watch ends only when the registry is dropped, with the process.
            let without = if options.keys_file.is_some() { Without::Closed } else { options.without };
            Follower { registry, options, without, secret, sender }.follow().await;
        });
        Arc::new(Self { state, _task: AbortOnDropHandle::new(task) })
    }

    /// The picture now.
    pub fn state(&self) -> Arc<ClusterState> {
        self.state.borrow().clone()
    }

    /// Follows the picture.
    pub fn subscribe(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    /// Waits until the registry was read.
    pub async fn loaded(&self) {
        // An error means that the task has ended, which it does with the process only.
        let _ = self.state.clone().wait_for(|state| state.loaded).await;
    }
}

struct Follower {
    registry: Arc<dyn Registry>,
    options: ClusterOptions,
    /// Closed for good once a tenant was seen, so that neither a revocation nor a lost record opens the server.
    without: Without,
    secret: [u8; 32],
    sender: watch::Sender<Arc<ClusterState>>,
}

impl Follower {
    async fn follow(mut self) {
        let mut watch = persist("watch the registry", || self.registry.watch_prefix("")).await;
        let mut keys_due = Instant::now() + KEYS_FILE_INTERVAL;
        loop {
            self.publish(watch.entries());
            let departure = self.sender.borrow().departed.values().min().map(|at| *at + self.options.departed_keep);
            tokio::select! {
                changed = watch.changed() => if !changed { return },
                () = tokio::time::sleep_until(departure.unwrap_or(keys_due)), if departure.is_some() => {}
                () = tokio::time::sleep_until(keys_due), if self.options.keys_file.is_some() => {
                    keys_due = Instant::now() + KEYS_FILE_INTERVAL;
                    self.read_keys_file();
                }
            }
        }
    }

    fn publish(&mut self, entries: &BTreeMap<String, Entry>) {
        let old = self.sender.borrow().clone();
        let now = Instant::now();
        let mut executors: BTreeMap<ExecutorId, ExecutorRecord> = BTreeMap::new();
        for record in
            entries.range(key::EXECUTORS.to_owned()..).map(|(_, entry)| entry).take_while(|entry| entry.key.starts_with(key::EXECUTORS))
        {
            if let Some(record) = readable::<ExecutorRecord>(record) {
                executors.insert(record.id.clone(), record);
            }
        }
        let mut departed = BTreeMap::new();
        for (id, record) in old.executors.iter().filter(|(_, record)| !record.draining) {
            let since = old.departed.get(id).copied().unwrap_or(now);
            if !executors.contains_key(id) && now < since + self.options.departed_keep {
                departed.insert(id.clone(), since);
                executors.insert(id.clone(), record.clone());
            }
        }
        // An unreadable plan leaves the old one in force.
        let found = entries.get(key::PLAN).map(|entry| (readable::<Plan>(entry), entry.revision));
        let (plan, plan_revision) = match found {
            Some((plan, revision)) => (plan.unwrap_or_else(|| old.plan.clone()), Some(revision)),
            None => (Plan::default(), None),
        };
        let tenants = Tenants::new(self.tenant_records(entries), self.without, self.secret);
        if tenants.is_any() {
            self.without = Without::Closed;
        }
        if old.loaded && old.tenants.is_open() && !tenants.is_open() {
            tracing::warn!("the server is closed now: it has tenants, so only callers with a key are served");
        }
        if !old.loaded && tenants.is_open() {
            tracing::info!("the server is open: it has no tenants, so everyone who can reach it is served");
        }
        let deployments = deployments(entries);
        let state = ClusterState { loaded: true, executors, departed, plan, plan_revision, tenants, deployments };
        self.sender.send_replace(Arc::new(state));
    }

    fn tenant_records(&self, entries: &BTreeMap<String, Entry>) -> BTreeMap<TenantName, TenantRecord> {
        let of_file = self.options.keys_file.as_ref().map(|file| file.records().clone()).unwrap_or_default();
        let mut records = of_file.clone();
        for entry in entries.range(key::TENANTS.to_owned()..).map(|(_, entry)| entry) {
            let Some(name) = entry.key.strip_prefix(key::TENANTS) else { break };
            let Some(mut record) = readable::<TenantRecord>(entry) else { continue };
            let name = TenantName(name.to_owned());
            if let Some(of_file) = of_file.get(&name) {
                record.keys.extend(of_file.keys.iter().cloned());
            }
            records.insert(name, record);
        }
        records
    }

    fn read_keys_file(&mut self) {
        let Some(file) = &mut self.options.keys_file else { return };
        if let Err(error) = file.read_again() {
            tracing::warn!(error = &error as &dyn std::error::Error, "keeping the keys as they were");
        }
    }
}

fn deployments(entries: &BTreeMap<String, Entry>) -> BTreeMap<String, DeploymentRecord> {
    let named = entries.range(key::DEPLOYMENTS.to_owned()..).map_while(|(key, entry)| Some((key.strip_prefix(key::DEPLOYMENTS)?, entry)));
    named.filter_map(|(model, entry)| Some((model.to_owned(), readable(entry)?))).collect()
}

fn readable<T: serde::de::DeserializeOwned>(entry: &Entry) -> Option<T> {
    match record::parse(entry) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "ignoring a record of the registry");
            None
        }
    }
}

/// The cluster's secret: made by the first router, read by the others.
async fn load_secret(registry: &dyn Registry) -> Result<[u8; 32], RegistryError> {
    let mut random = [0u8; 32];
    getrandom::fill(&mut random).expect("the system has random numbers");
    let value = ashlar_registry::ChainDigest(random).to_string();
    let held = match registry.get(key::SECRET).await? {
        Some(entry) => entry.value,
        None => match registry.compare_and_swap(key::SECRET, None, &value, None).await? {
            Swap::Done(_) => value,
            Swap::Conflict(Some(entry)) => entry.value,
            Swap::Conflict(None) => return Box::pin(load_secret(registry)).await,
        },
    };
    // Any text serves, so that an operator may set one.
    Ok(*blake3::hash(held.as_bytes()).as_bytes())
}

/// Tries until it succeeds; says so once.
async fn persist<T, F: Future<Output = Result<T, RegistryError>>>(action: &str, work: impl Fn() -> F) -> T {
    let mut told = false;
    loop {
        match work().await {
            Ok(done) => return done,
            Err(error) if !told => {
                tracing::warn!(action, error = &error as &dyn std::error::Error, "the registry does not answer; trying on");
                told = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_registry::embedded::Embedded;

    fn record(name: &str) -> ExecutorRecord {
        ExecutorRecord {
            id: ExecutorId(name.to_owned()),
            address: "a:1".to_owned(),
            device: "test".to_owned(),
            profiled_on: String::new(),
            numeric_class: "cpu".to_owned(),
            memory_bytes: 1,
            kv_bytes: 1,
            threads: 1,
            spans: vec![],
            plan_generation: 0,
            draining: false,
            incarnation: 1,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn vanished_executors_stay_for_a_while_and_drained_ones_do_not() {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        for name in ["exe_a", "exe_b"] {
            let record = ExecutorRecord { draining: name == "exe_b", ..record(name) };
            registry.put(&key::executor(&record.id), &record::to_value(&record), None).await.unwrap();
        }
        let cluster = Cluster::start(registry.clone(), ClusterOptions::default());
        cluster.loaded().await;
        assert_eq!(cluster.state().executors.len(), 2);
        registry.delete("executors/exe_b").await.unwrap();
        registry.delete("executors/exe_a").await.unwrap();
        let mut states = cluster.subscribe();
        let state = states.wait_for(|state| state.executors.len() == 1 && state.departed.len() == 1).await.unwrap().clone();
        assert!(state.departed.contains_key(&ExecutorId("exe_a".into())));
        let began = Instant::now();
        states.wait_for(|state| state.executors.is_empty()).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(4));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_let_in_before_the_registry_was_read() {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        let cluster = Cluster::start(registry.clone(), ClusterOptions { without: Without::Open, ..ClusterOptions::default() });
        assert!(cluster.state().tenants.authenticate(None).is_err());
        cluster.loaded().await;
        assert!(cluster.state().tenants.authenticate(None).is_ok());

        let (key, keys) = crate::state::tenants::new_key([1; 24], 0);
        let record = TenantRecord { keys: vec![keys], ..TenantRecord::default() };
        registry.put("tenants/acme", &record::to_value(&record), None).await.unwrap();
        cluster.subscribe().wait_for(|state| !state.tenants.has_no_keys()).await.unwrap();
        let tenants = &cluster.state().tenants;
        assert!(tenants.authenticate(None).is_err());
        assert_eq!(tenants.authenticate(Some(&key)), Ok(TenantName("acme".to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn server_that_had_a_key_stays_closed_when_keys_and_tenants_vanish() {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        let (key, keys) = crate::state::tenants::new_key([1; 24], 0);
        let record = TenantRecord { keys: vec![keys], ..TenantRecord::default() };
        registry.put("tenants/acme", &record::to_value(&record), None).await.unwrap();
        let options = ClusterOptions { without: Without::Open, ..ClusterOptions::default() };
        let cluster = Cluster::start(registry.clone(), options);
        cluster.loaded().await;
        assert!(cluster.state().tenants.authenticate(Some(&key)).is_ok());

        registry.put("tenants/acme", &record::to_value(&TenantRecord::default()), None).await.unwrap();
        cluster.subscribe().wait_for(|state| state.tenants.has_no_keys()).await.unwrap();
        assert!(cluster.state().tenants.authenticate(None).is_err(), "the last key was revoked");
        assert!(cluster.state().tenants.authenticate(Some(&key)).is_err(), "this is the revoked key");

        registry.delete("tenants/acme").await.unwrap();
        cluster.subscribe().wait_for(|state| !state.tenants.is_any()).await.unwrap();
        assert!(cluster.state().tenants.authenticate(None).is_err(), "the record was lost");
    }

    #[tokio::test(start_paused = true)]
    async fn server_with_an_empty_keys_file_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        std::fs::write(&path, "{}").unwrap();
        let keys_file = Some(KeysFile::open(&path).unwrap());
        let options = ClusterOptions { without: Without::Open, keys_file, ..ClusterOptions::default() };
        let cluster = Cluster::start(Arc::new(Embedded::in_memory()), options);
        cluster.loaded().await;
        assert!(cluster.state().tenants.authenticate(None).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn all_routers_derive_from_one_secret() {
        let registry: Arc<dyn Registry> = Arc::new(Embedded::in_memory());
        let [one, two] = [(), ()].map(|()| Cluster::start(registry.clone(), ClusterOptions::default()));
        one.loaded().await;
        two.loaded().await;
        let tenant = TenantName("acme".to_owned());
        assert_eq!(one.state().tenants.cache_domain(&tenant), two.state().tenants.cache_domain(&tenant));
    }
}
