//! The router: the real journal, assembly and placement over what it sees of the cluster. It carries out what `router/src/io/dispatch` and
//! `planner` do, with the post for calls.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_registry::ChainDigest;
use ashlar_registry::record::{ExecutorRecord, Plan, PlanPolicy};
use ashlar_router::state::assembly::{Route, Scene, assemble};
use ashlar_router::state::journal::{Ends, Journal};
use ashlar_router::state::loss::Loss;
use ashlar_router::state::placement::{ExecutorOffer, Inventory, plan};
use ashlar_wire::id::{ExecutorId, RouterId};
use ashlar_wire::v1;

use crate::Micros;
use crate::client::{Ask, Client};
use crate::events::Process;
use crate::models::Model;

/// How long an executor that failed is avoided where another can serve.
pub(crate) const SUSPECT_FOR: Micros = 5_000_000;
/// How long an executor is kept after its record vanished.
pub(crate) const DEPARTED_KEEP: Micros = 5_000_000;
/// Tries in a row without a new token before a sequence is given up.
const ATTEMPTS_MAX: u32 = 24;

/// An attempt that runs.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) epoch: u32,
    /// Who was called.
    pub(crate) process: Option<Process>,
    executors: Vec<ExecutorId>,
}

/// A request that has not ended.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) client: Client,
    pub(crate) journal: Journal,
    pub(crate) attempt: Option<Attempt>,
    /// Tells waits apart; set while one is under way, and whether a change of the cluster ends it.
    pub(crate) wait: u32,
    pub(crate) awaits: Option<bool>,
    /// Its place in the load, for the next turn.
    pub(crate) arrival: usize,
    /// Virtual time that it would take alone, roughly.
    pub(crate) work: Micros,
    /// Work that had come before it.
    pub(crate) work_before: Micros,
}

/// The router.
pub(crate) struct Router {
    pub(crate) id: RouterId,
    pub(crate) records: BTreeMap<ExecutorId, ExecutorRecord>,
    pub(crate) processes: BTreeMap<ExecutorId, Process>,
    /// Executors whose record vanished, and until when they are kept.
    pub(crate) departed: BTreeMap<ExecutorId, Micros>,
    pub(crate) plan: Plan,
    pub(crate) policy: PlanPolicy,
    pub(crate) suspects: BTreeMap<ExecutorId, Micros>,
    pub(crate) loads: BTreeMap<ExecutorId, u32>,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Models that have a name.
    pub(crate) named: BTreeSet<usize>,
    pub(crate) drawn: u64,
    /// Chains that there was a route for.
    served: BTreeSet<ChainDigest>,
    pub(crate) plan_pending: bool,
}

impl Router {
    pub(crate) fn new(policy: PlanPolicy) -> Self {
        Self {
            id: RouterId("rtr_sim".to_owned()),
            records: BTreeMap::new(),
            processes: BTreeMap::new(),
            departed: BTreeMap::new(),
            plan: Plan { policy, ..Plan::default() },
            policy,
            suspects: BTreeMap::new(),
            loads: BTreeMap::new(),
            requests: BTreeMap::new(),
            named: BTreeSet::new(),
            drawn: 0,
            served: BTreeSet::new(),
            plan_pending: false,
        }
    }

    /// Takes a request in; its number.
    pub(crate) fn admit(&mut self, now: Micros, ask: Ask, arrival: usize, work: Micros, work_before: Micros) -> u64 {
        self.drawn += 1;
        let journal = Journal::new(Ends {
            generated_tokens_max: ask.generated_tokens_max,
            stop_tokens: ask.stop_tokens.clone(),
            attempts_max: ATTEMPTS_MAX,
        });
        let client = Client::new(now);
        let request = Request { ask, client, journal, attempt: None, wait: 0, awaits: None, arrival, work, work_before };
        self.requests.insert(self.drawn, request);
        self.drawn
    }

    /// Whether no name and no plan has a model's chain any more.
    fn is_gone(&self, model: usize, chain: &ChainDigest) -> bool {
        !self.named.contains(&model) && !self.is_planned(chain)
    }

    fn is_planned(&self, chain: &ChainDigest) -> bool {
        self.plan.assignments.values().flatten().any(|span| span.chain == *chain)
    }

    /// Finds a route for a sequence and begins an attempt on it; what is to be sent, and to whom.
    pub(crate) fn begin(&mut self, now: Micros, number: u64, model: &Model, weight: u32) -> Result<Box<v1::Admission>, Loss> {
        let request = &self.requests[&number];
        let mut suspects: BTreeSet<ExecutorId> =
            self.suspects.iter().filter(|(_, until)| now < **until).map(|(id, _)| id.clone()).collect();
        suspects.extend(self.departed.keys().cloned());
        suspects.extend(request.journal.avoided().iter().cloned());
        let scene = Scene { executors: &self.records, plan: &self.plan, load: &self.loads, suspects: &suspects };
        let route = assemble(&model.path, scene, request.journal.pinned_class());
        let is_gone = self.is_gone(request.ask.model, &model.digest);
        if route.is_ok() {
            self.served.insert(model.digest);
        }
        let returns = route.is_err() && self.served.contains(&model.digest) && self.is_planned(&model.digest);
        let request = self.requests.get_mut(&number).expect("it has not ended");
        let epoch = request.journal.begin(route, returns, || is_gone)?;
        let route = request.journal.route();
        let executors: Vec<ExecutorId> = route.executors().collect();
        executors.iter().for_each(|id| *self.loads.entry(id.clone()).or_default() += 1);
        let mut admission = admission(&self.id, number, epoch, route, &request.ask, request.journal.generated(), weight);
        (admission.ttft_ms, admission.gap_ms) = (model.deployment.ttft_ms, model.deployment.gap_ms);
        request.attempt = Some(Attempt { epoch, process: None, executors });
        Ok(Box::new(admission))
    }

    /// The attempt of a sequence is over.
    pub(crate) fn drop_attempt(&mut self, number: u64) -> Option<Attempt> {
        let attempt = self.requests.get_mut(&number)?.attempt.take()?;
        for id in &attempt.executors {
            let count = self.loads.get_mut(id).expect("counted when it began");
            *count -= 1;
            if *count == 0 {
                self.loads.remove(id);
            }
        }
        Some(attempt)
    }

    /// Makes the next plan; true if it differs.
    pub(crate) fn make_plan(&mut self, models: &[Model]) -> bool {
        let working = self.records.values().filter(|record| !record.draining);
        let offer = |record: &ExecutorRecord| {
            let offer = ExecutorOffer {
                memory_bytes: record.memory_bytes,
                numeric_class: record.numeric_class.clone(),
                profiled_on: record.profiled_on.clone(),
            };
            (record.id.clone(), offer)
        };
        let chains = self.named.iter().map(|model| (models[*model].digest, models[*model].sized.clone())).collect();
        let inventory = Inventory { executors: working.map(offer).collect(), chains, times: BTreeMap::new() };
        let seen = self.records.values().map(|record| record.plan_generation).max().unwrap_or(0);
        let previous = Plan { generation: self.plan.generation.max(seen), ..self.plan.clone() };
        let planned = plan(&self.policy, &inventory, &previous).plan;
        let differs = planned != self.plan;
        self.plan = planned;
        differs
    }
}

fn admission(router: &RouterId, number: u64, epoch: u32, route: &Route, ask: &Ask, generated: &[u32], weight: u32) -> v1::Admission {
    v1::Admission {
        request_id: String::new(),
        sequence_id: number,
        router_id: router.0.clone(),
        tenant: format!("ten_{}", ask.tenant),
        cache_domain: ask.domain.to_vec(),
        priority: ask.priority,
        deadline_unix_ms: 0,
        epoch,
        numeric_class: route.numeric_class.clone(),
        seed: ask.seed,
        choice_index: 0,
        plan_generation: route.plan_generation,
        route: route.hops.clone(),
        prompt: ask.prompt.to_vec(),
        generated: generated.to_vec(),
        generated_tokens_max: ask.generated_tokens_max,
        stop_tokens: ask.stop_tokens.clone(),
        sampling: None,
        traceparent: String::new(),
        tenant_weight: weight,
        ttft_ms: None,
        gap_ms: None,
    }
}
