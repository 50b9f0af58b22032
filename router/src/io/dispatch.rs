//! Dispatch: runs sequences for REST on the executors of a route. It implements [`Backend`]: who calls, which models there are, and
//! [`Backend::start`], which hands out one stream of tokens however many executors are lost on the way. One sequence's life is in
//! `dispatch/running.rs`; where it may run is decided by `state::assembly`, what follows a loss by `state::journal`.

mod adapters;
mod books;
mod running;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ashlar_registry::ChainDigest;
use ashlar_wire::code::Code;
use ashlar_wire::id::{ExecutorId, RouterId, TenantName};
use ashlar_zoo::digest::Digest;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use prometheus::{IntCounter, IntCounterVec, Registry as MetricRegistry};

use super::backend::{ApiError, Backend, ModelView, NewSequence, Readiness, SequenceEvents};
use super::catalog::Catalog;
use super::cluster::{Cluster, ClusterState};
use super::grpc::Clients;
use crate::state::assembly::{ChainPath, ModelNotReady, Route, Scene, assemble};
use crate::state::places::Standing;
use crate::state::tenants::PUBLIC;
pub use adapters::Adapters;
use books::{Loads, Requests, Suspects};
use running::{Caller, Running};

/// How dispatch behaves.
#[derive(Debug, Clone)]
pub struct DispatchOptions {
    /// Tries in a row without a new token before a sequence is given up. With the waits between them (50 ms, doubling up to a
    /// second) the default outlasts a lease and a re-placement.
    pub attempts_max: u32,
    /// A sequence must end within it; `None`: no limit.
    pub deadline: Option<Duration>,
    /// How long an executor that failed is avoided where another can serve.
    pub suspect_for: Duration,
}

impl Default for DispatchOptions {
    fn default() -> Self {
        Self { attempts_max: 24, deadline: None, suspect_for: Duration::from_secs(5) }
    }
}

/// Runs sequences. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dispatch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    router: RouterId,
    catalog: Arc<Catalog>,
    cluster: Arc<Cluster>,
    clients: Clients,
    options: DispatchOptions,
    sequences_drawn: AtomicU64,
    draining: AtomicBool,
    loads: Arc<Loads>,
    /// Chains that there was a route for since the start, by digest.
    served: Mutex<BTreeSet<ChainDigest>>,
    requests: Arc<Requests>,
    suspects: Suspects,
    resumes: IntCounter,
    lost: IntCounter,
    adapter_changes: IntCounterVec,
}

impl Dispatch {
    /// Over the pictures of cluster and zoo. `metrics` is where it registers its counters.
    ///
    /// # Errors
    /// When the counters are registered already.
    pub fn new(
        router: RouterId,
        cluster: Arc<Cluster>,
        catalog: Arc<Catalog>,
        clients: Clients,
        options: DispatchOptions,
        metrics: &MetricRegistry,
    ) -> Result<Self, prometheus::Error> {
        let resumes = IntCounter::new("ashlar_sequence_resumes_total", "Sequences that went on elsewhere after an executor was lost.")?;
        let lost =
            IntCounter::new("ashlar_sequences_lost_total", "Sequences that had begun and ended because no executor could take over.")?;
        metrics.register(Box::new(resumes.clone()))?;
        metrics.register(Box::new(lost.clone()))?;
        let adapter_changes = adapters::counter()?;
        metrics.register(Box::new(adapter_changes.clone()))?;
        let suspects = Suspects::new(options.suspect_for);
        let (sequences_drawn, draining) = (AtomicU64::new(0), AtomicBool::new(false));
        let (loads, requests) = (Arc::default(), Arc::default());
        let shared = Arc::new(Shared {
            router,
            catalog,
            cluster,
            clients,
            options,
            sequences_drawn,
            draining,
            loads,
            served: Mutex::default(),
            requests,
            suspects,
            resumes,
            lost,
            adapter_changes,
        });
        tokio::spawn(close_unused(Arc::downgrade(&shared), shared.cluster.subscribe()));
        Ok(Self { shared })
    }

    /// Refuses new sequences from now on; those that run go on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    /// Sequences that run now, in all.
    pub fn in_flight(&self) -> u32 {
        self.shared.requests.sequence_count()
    }
}

/// Closes connections to addresses that no executor has any more; ends with the dispatch.
async fn close_unused(shared: Weak<Shared>, mut clusters: tokio::sync::watch::Receiver<Arc<ClusterState>>) {
    while clusters.changed().await.is_ok() {
        let state = clusters.borrow_and_update().clone();
        let Some(shared) = shared.upgrade() else { return };
        shared.clients.retain(|address| state.executors.values().any(|record| record.address == address));
    }
}

impl Shared {
    /// Finds a route now. `avoided` are suspects of the caller's own.
    fn assemble(&self, path: &ChainPath, class: Option<&str>, avoided: &BTreeSet<ExecutorId>) -> Result<Route, ModelNotReady> {
        let state = self.cluster.state();
        let mut suspects = self.suspects.now();
        suspects.extend(state.departed.keys().cloned());
        suspects.extend(avoided.iter().cloned());
        let load = self.loads.now();
        let scene = Scene { executors: &state.executors, plan: &state.plan, load: &load, suspects: &suspects };
        assemble(path, scene, class)
    }

    fn path(&self, model: &ModelView) -> ChainPath {
        match self.catalog.view().chains.get(&ChainDigest(model.chain_digest.0)) {
            Some(entry) => entry.path.clone(),
            // The name has changed since the route looked it up.
            None => ChainPath::new(model.chain_digest, &model.chain),
        }
    }

    /// Whether a chain that has no route now had one before and is to have one again: an executor of it starts again, or spans move.
    fn will_be_served(&self, chain: ChainDigest, has_route: bool) -> bool {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        if has_route {
            served.insert(chain);
        }
        !has_route && served.contains(&chain) && self.is_planned(chain)
    }

    fn is_planned(&self, chain: ChainDigest) -> bool {
        self.cluster.state().plan.assignments.values().flatten().any(|span| span.chain == chain)
    }

    /// Whether no name and no plan has the model's chain any more.
    fn is_gone(&self, model: &ModelView) -> bool {
        let (catalog, chain) = (self.catalog.view(), ChainDigest(model.chain_digest.0));
        catalog.loaded && !catalog.chains.contains_key(&chain) && !self.is_planned(chain)
    }

    fn sees(&self, state: &ClusterState, tenant: &TenantName, id: &str) -> bool {
        id.split_once('/').is_some_and(|(owner, name)| state.tenants.may_use(tenant, owner, name))
    }
}

#[async_trait]
impl Backend for Dispatch {
    fn authenticate(&self, key: Option<&str>) -> Result<TenantName, ApiError> {
        let state = self.shared.cluster.state();
        if !state.loaded {
            return Err(ApiError::new(Code::Unavailable, "the server has not reached its registry yet"));
        }
        state.tenants.authenticate(key).map_err(|_| match key {
            None => ApiError::new(Code::InvalidApiKey, "this server needs an API key: send `Authorization: Bearer KEY`"),
            Some(_) => ApiError::new(Code::InvalidApiKey, "the API key is not known here"),
        })
    }

    fn standing(&self, tenant: &TenantName) -> Standing {
        let state = self.shared.cluster.state();
        Standing { weight: state.tenants.weight(tenant), is_alone: state.tenants.is_alone(tenant) }
    }

    fn models(&self, tenant: &TenantName) -> Vec<Arc<ModelView>> {
        let state = self.shared.cluster.state();
        self.shared.catalog.view().models.values().filter(|model| self.shared.sees(&state, tenant, &model.id)).cloned().collect()
    }

    /// `tenant/name`, or a bare name: the tenant's own model, then the public one, then on an open server the only one of that name.
    fn model(&self, tenant: &TenantName, id: &str) -> Option<Arc<ModelView>> {
        let (state, catalog) = (self.shared.cluster.state(), self.shared.catalog.view());
        let seen = |id: &str| catalog.models.get(id).filter(|model| self.shared.sees(&state, tenant, &model.id)).cloned();
        if id.contains('/') {
            return seen(id);
        }
        let only = || {
            let mut named = catalog.models.values().filter(|model| model.id.split_once('/').is_some_and(|(_, name)| name == id));
            let first = named.next()?;
            (named.next().is_none() && state.tenants.is_open()).then(|| first.clone())
        };
        seen(&format!("{tenant}/{id}")).or_else(|| seen(&format!("{PUBLIC}/{id}"))).or_else(only)
    }

    async fn asset(&self, digest: &Digest) -> Result<Bytes, ApiError> {
        self.shared.catalog.zoo().read_asset(*digest).await.map_err(|error| {
            tracing::error!(asset = %digest, error = &error as &dyn std::error::Error, "failed to read an asset");
            ApiError::new(Code::Unavailable, "the model's tokenizer or template cannot be read now")
        })
    }

    async fn start(&self, sequence: NewSequence) -> Result<SequenceEvents, ApiError> {
        if self.draining() {
            return Err(ApiError::new(Code::Draining, "the server is shutting down"));
        }
        let state = self.shared.cluster.state();
        let requests_max = state.tenants.requests_max(&sequence.tenant);
        let Some(place) = Requests::enter(&self.shared.requests, &sequence.tenant, &sequence.request_id, requests_max) else {
            let message = format!("tenant {} has its limit of {} requests in flight", sequence.tenant, requests_max.unwrap_or(0));
            return Err(ApiError::new(Code::TooManyRequests, message));
        };
        let cache_domain = state.tenants.cache_domain(&sequence.tenant);
        let weight = state.tenants.weight(&sequence.tenant);
        let deployment = state.deployments.get(&sequence.model.id).copied().unwrap_or_default();
        let caller = Caller { cache_domain, weight, deployment };
        let mut running = Running::new(self.shared.clone(), sequence, caller, place);
        running.open_first().await?;
        let events = futures::stream::unfold(running, |mut running| async move {
            let event = running.next().await?;
            Some((event, running))
        });
        Ok(events.boxed())
    }

    fn ready(&self) -> Readiness {
        let (state, catalog) = (self.shared.cluster.state(), self.shared.catalog.view());
        let not_ready = |reason: &str| Readiness::NotReady(reason.to_owned());
        if !state.loaded {
            return not_ready("the registry was not reached yet");
        }
        if catalog.chains.is_empty() {
            return not_ready(if catalog.loaded { "the zoo names no model" } else { "the zoo was not read yet" });
        }
        let mut reasons: BTreeMap<String, u32> = BTreeMap::new();
        for entry in catalog.chains.values() {
            match self.shared.assemble(&entry.path, None, &BTreeSet::new()) {
                Ok(_) => return Readiness::Ready,
                Err(error) => *reasons.entry(error.reason).or_default() += 1,
            }
        }
        let most = reasons.into_iter().max_by_key(|(_, count)| *count).map(|(reason, _)| reason);
        Readiness::NotReady(most.unwrap_or_default())
    }

    fn draining(&self) -> bool {
        self.shared.draining.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
