//! The planner: one router, elected, keeps the plan in line with executors, catalog and policy. It writes by compare-and-swap on the
//! plan it started from, so that a leader that was asleep cannot undo a newer plan.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::record::{self, Plan, PlanPolicy};
use ashlar_registry::{Election, Registry, RegistryError, Swap, key};
use ashlar_wire::id::RouterId;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::catalog::{Catalog, CatalogView};
use super::cluster::{Cluster, ClusterState};
use super::times::Times;
use crate::state::placement::{ExecutorOffer, Inventory, plan};

/// How a planner works.
#[derive(Debug, Clone)]
pub struct PlannerOptions {
    /// What placement aims at.
    pub policy: PlanPolicy,
    /// After how long another router takes over.
    pub election_ttl: Duration,
    /// Changes that come within it are planned at once, as when executors start together.
    pub settle: Duration,
    /// How long a new leader waits for executors that the plan names and the registry does not.
    pub return_wait: Duration,
}

impl Default for PlannerOptions {
    fn default() -> Self {
        Self {
            policy: PlanPolicy::default(),
            election_ttl: Duration::from_secs(5),
            settle: Duration::from_millis(200),
            return_wait: Duration::from_secs(5),
        }
    }
}

/// A planner that stands for election, and plans while it leads.
#[derive(Debug)]
pub struct Planner {
    election: Election,
    task: AbortOnDropHandle<()>,
}

impl Planner {
    /// Starts it.
    pub fn start(
        registry: Arc<dyn Registry>,
        cluster: Arc<Cluster>,
        catalog: Arc<Catalog>,
        router: &RouterId,
        options: PlannerOptions,
    ) -> Self {
        let election = Election::start(registry.clone(), key::LEADER, router.0.clone(), options.election_ttl);
        let leading = election.leading();
        let task = tokio::spawn(async move {
            let times = Times::new(catalog.zoo().clone());
            let mut office = Office { registry, cluster, catalog, options, leading, times };
            while office.leading.wait_for(Option::is_some).await.is_ok() {
                office.lead().await;
            }
        });
        Self { election, task: AbortOnDropHandle::new(task) }
    }

    /// Hands the lead over at once.
    ///
    /// # Errors
    /// When the registry is out of reach; the lead then ends by itself.
    pub async fn resign(self) -> Result<(), RegistryError> {
        drop(self.task);
        self.election.resign().await
    }
}

struct Office {
    registry: Arc<dyn Registry>,
    cluster: Arc<Cluster>,
    catalog: Arc<Catalog>,
    options: PlannerOptions,
    leading: tokio::sync::watch::Receiver<Option<ashlar_registry::Leadership>>,
    times: Times,
}

impl Office {
    /// Plans until it no longer leads.
    async fn lead(&mut self) {
        let (mut clusters, mut catalogs) = (self.cluster.subscribe(), self.catalog.subscribe());
        let began = Instant::now();
        let term = *self.leading.borrow_and_update();
        loop {
            let (cluster, catalog) = (clusters.borrow_and_update().clone(), catalogs.borrow_and_update().clone());
            let wait_until = began + self.options.return_wait;
            let missing = cluster.plan.assignments.keys().any(|id| !cluster.executors.contains_key(id)) && Instant::now() < wait_until;
            if cluster.loaded && catalog.loaded && !missing {
                self.plan(&cluster, &catalog).await;
            }
            tokio::select! {
                changed = clusters.changed() => if changed.is_err() { return },
                changed = catalogs.changed() => if changed.is_err() { return },
                changed = self.leading.changed() => if changed.is_err() { return },
                // A plan that could not be written is tried again.
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            tokio::time::sleep(self.options.settle).await;
            if *self.leading.borrow() != term {
                return;
            }
        }
    }

    /// The plan in force. Where the registry lost it, what executors hold stands for it, and generations go on from what they saw:
    /// nothing moves, and nobody takes the next plan for an old one.
    fn previous(&self, cluster: &ClusterState) -> Plan {
        let seen = cluster.executors.values().map(|record| record.plan_generation).max().unwrap_or(0);
        if cluster.plan_revision.is_some() {
            return Plan { generation: cluster.plan.generation.max(seen), ..cluster.plan.clone() };
        }
        let held = cluster.executors.values().filter(|record| !record.spans.is_empty());
        let assignments = held.map(|record| (record.id.clone(), record.spans.clone())).collect();
        Plan { generation: seen, policy: self.options.policy, assignments, ..Plan::default() }
    }

    async fn plan(&mut self, cluster: &ClusterState, catalog: &CatalogView) {
        let (previous, mut inventory) = (self.previous(cluster), inventory(cluster, catalog));
        self.times.read(&self.options.policy, &mut inventory, &previous).await;
        let planned = plan(&self.options.policy, &inventory, &previous);
        if planned.plan == cluster.plan {
            return;
        }
        let generation = planned.plan.generation;
        match self.registry.compare_and_swap(key::PLAN, cluster.plan_revision, &record::to_value(&planned.plan), None).await {
            Ok(Swap::Done(_)) => {
                tracing::info!(generation, unplaced_count = planned.plan.unplaced.len(), "a new plan is in force");
                tell_unplaced(&planned.plan, cluster, catalog);
                for line in &planned.explanation {
                    tracing::debug!(generation, "{line}");
                }
            }
            // The picture is older than the plan in force; the next one is on its way.
            Ok(Swap::Conflict(_)) => tracing::debug!(generation, "another plan came first"),
            Err(error) => tracing::warn!(generation, error = &error as &dyn std::error::Error, "failed to write the plan; trying on"),
        }
    }
}

/// Warns once of each model that newly found no place. Without any executor all have none, as at every start: that is no news.
fn tell_unplaced(plan: &Plan, cluster: &ClusterState, catalog: &CatalogView) {
    if cluster.executors.is_empty() {
        return;
    }
    let new = plan.unplaced.iter().filter(|(chain, reason)| cluster.plan.unplaced.get(*chain) != Some(*reason));
    for (chain, reason) in new {
        for model in catalog.models.values().filter(|model| model.chain_digest.0 == chain.0) {
            tracing::warn!(model = model.id, reason, "a model has no place and is not served");
        }
    }
}

/// Executors that take work, and all chains, without times. Departed executors count until they are given up.
fn inventory(cluster: &ClusterState, catalog: &CatalogView) -> Inventory {
    let working = cluster.executors.values().filter(|record| !record.draining);
    let offer = |record: &record::ExecutorRecord| {
        let offer = ExecutorOffer {
            memory_bytes: record.memory_bytes,
            numeric_class: record.numeric_class.clone(),
            profiled_on: record.profiled_on.clone(),
        };
        (record.id.clone(), offer)
    };
    Inventory {
        executors: working.map(offer).collect(),
        chains: catalog.chains.iter().map(|(digest, entry)| (*digest, entry.sized.clone())).collect(),
        times: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests;
