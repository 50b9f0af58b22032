//! The cluster: router, executors and clients, and what each event does. One event at a time, and the checkers after it.

use std::collections::BTreeMap;
use std::rc::Rc;

use ashlar_registry::ChainDigest;
use ashlar_router::state::journal::{Step, Then};
use ashlar_router::state::loss::{Loss, Refusal};
use ashlar_wire::code::Code;
use ashlar_wire::id::SequenceKey;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event as SequenceEvent;

use crate::check::{Violation, holds, violated};
use crate::client::Ask;
use crate::dice::Dice;
use crate::events::{Event, Fault, Heard, NodeIndex, ToNode};
use crate::links::Post;
use crate::models::Model;
use crate::node::{Addresses, Node};
use crate::report::Report;
use crate::router::{DEPARTED_KEEP, Router, SUSPECT_FOR};
use crate::scenario::Scenario;
use crate::{Canary, Micros};

/// Changes that come within it are planned at once.
const SETTLE: Micros = 200_000;
/// After so long without a word an executor's record vanishes.
const LEASE: Micros = 3_000_000;
/// Between two looks for sequences that starve.
const LOOK: Micros = 1_000_000;
/// `starvation`: a sequence gets a token at least so long after the one before, on top of `STARVATION_WORK` times all work that was there
/// when it came or has come since.
const STARVATION_BASE: Micros = 60_000_000;
const STARVATION_WORK: Micros = 4;

/// The cluster.
pub(crate) struct Cluster {
    pub(crate) post: Post,
    pub(crate) router: Router,
    pub(crate) nodes: Vec<Node>,
    pub(crate) scenario: Scenario,
    pub(crate) report: Report,
    models: Rc<BTreeMap<ChainDigest, Model>>,
    canary: Canary,
    /// Prompts of turns that have not come yet: what was said before.
    said: BTreeMap<usize, (usize, Vec<u32>)>,
    /// Requests and faults that have not come yet.
    pending: usize,
    /// Work of all requests so far, and of those that have ended.
    work: Micros,
    work_ended: Micros,
    disturbed_at: Micros,
}

impl Cluster {
    pub(crate) fn new(seed: u64, scenario: Scenario, canary: Canary) -> Self {
        let mut post = Post::new(scenario.delays, Dice::new(seed).fork("delays"));
        let models: Rc<BTreeMap<ChainDigest, Model>> = Rc::new(scenario.models.iter().map(|model| (model.digest, model.clone())).collect());
        let node = |(index, identity): (usize, &crate::node::Identity)| {
            Node::new(identity.clone(), NodeIndex(index), 1, Rc::clone(&models), canary)
        };
        let nodes: Vec<Node> = scenario.nodes.iter().enumerate().map(node).collect();
        let mut router = Router::new(scenario.policy);
        router.named = (0..scenario.models.len()).filter(|model| !scenario.nameless.contains(model)).collect();
        nodes.iter().for_each(|node| node.tell_record(&mut post));
        for (index, arrival) in scenario.load.arrivals.iter().enumerate() {
            if let Some(at) = arrival.at {
                post.queue.at(at, Event::Arrive(index));
            }
        }
        scenario.faults.iter().for_each(|(at, fault)| post.queue.at(*at, Event::Fault(fault.clone())));
        post.queue.at(LOOK, Event::Look);
        let pending = scenario.load.arrivals.len() + scenario.faults.len();
        let report = Report { seed, executors: nodes.len(), models: models.len(), ..Report::default() };
        let said = BTreeMap::new();
        Self { post, router, nodes, scenario, report, models, canary, said, pending, work: 0, work_ended: 0, disturbed_at: 0 }
    }

    fn addresses(&self) -> Addresses {
        self.nodes.iter().filter(|node| node.is_alive).map(|node| (node.identity.id.clone(), node.process)).collect()
    }

    /// What an event does.
    pub(crate) fn handle(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Arrive(index) => self.arrive(index),
            Event::HangUp(number) => {
                if self.router.requests.contains_key(&number) {
                    self.cancel_attempt(number);
                    self.report.cancelled += 1;
                    self.end(number, false);
                }
                Ok(())
            }
            Event::Retry(number, wait) => {
                let waits = |request: &crate::router::Request| request.awaits.is_some() && request.wait == wait;
                if self.router.requests.get(&number).is_some_and(waits) { self.open(number) } else { Ok(()) }
            }
            Event::Router(number, epoch, heard) => self.hear(number, epoch, heard),
            Event::Record(process, record) => {
                let node = &self.nodes[process.node.0];
                if node.process != process || !node.is_alive {
                    return Ok(());
                }
                let is_new = self.router.processes.insert(record.id.clone(), process) != Some(process);
                self.router.departed.remove(&record.id);
                self.router.records.insert(record.id.clone(), *record);
                if is_new && self.router.plan.generation > 0 {
                    let plan = Rc::new(self.router.plan.clone());
                    self.post.send(Event::ToNode(process, ToNode::Plan(plan)));
                }
                self.changed()
            }
            Event::LeaseOver(process) => {
                let id = self.nodes[process.node.0].identity.id.clone();
                if self.router.processes.get(&id) == Some(&process) {
                    self.router.processes.remove(&id);
                    self.router.departed.insert(id, self.post.now + DEPARTED_KEEP);
                    self.post.after(DEPARTED_KEEP, Event::DepartedOver);
                }
                self.changed()
            }
            Event::DepartedOver => {
                let now = self.post.now;
                let over: Vec<_> = self.router.departed.iter().filter(|(_, until)| **until <= now).map(|(id, _)| id.clone()).collect();
                for id in over {
                    self.router.departed.remove(&id);
                    self.router.records.remove(&id);
                }
                self.changed()
            }
            Event::MakePlan => {
                self.router.plan_pending = false;
                if self.router.make_plan(&self.scenario.models) {
                    self.report.plans += 1;
                    let plan = Rc::new(self.router.plan.clone());
                    for node in self.nodes.iter().filter(|node| node.is_alive) {
                        self.post.send(Event::ToNode(node.process, ToNode::Plan(Rc::clone(&plan))));
                    }
                    return self.changed();
                }
                Ok(())
            }
            Event::ToNode(process, to) => {
                let addresses = self.addresses();
                let node = &mut self.nodes[process.node.0];
                if node.process != process || !node.is_alive {
                    return Ok(());
                }
                if let ToNode::FromUpstream(link, _) | ToNode::FromDownstream(link, _) = &to
                    && !self.post.is_open(*link)
                {
                    return Ok(());
                }
                if let ToNode::Plan(_) | ToNode::Loaded | ToNode::RetireDue = to {
                    self.disturbed_at = self.post.now;
                }
                node.handle(&mut self.post, &addresses, to)
            }
            Event::Fault(fault) => self.fault(fault),
            Event::Look => self.look(),
        }
    }

    fn arrive(&mut self, index: usize) -> Result<(), Violation> {
        self.pending -= 1;
        let arrival = self.scenario.load.arrivals[index].clone();
        self.report.requests += 1;
        let named: Vec<usize> = self.router.named.iter().copied().collect();
        let (model, mut prompt) = match self.said.remove(&index) {
            Some((model, said)) if named.contains(&model) => (model, said),
            _ if named.is_empty() => {
                self.report.refuse("model_not_found");
                return self.no_next_turn(index);
            }
            other => (named[(arrival.model % named.len() as u64) as usize], other.map_or_else(Vec::new, |(_, said)| said)),
        };
        arrival.prompt.iter().for_each(|part| prompt.extend(part.tokens()));
        if prompt.is_empty() {
            prompt.push(0);
        }
        // Every fifth model's tenants read each other's cache.
        let domain = if model % 5 == 4 { [255; 32] } else { [arrival.tenant as u8; 32] };
        let ask = Ask {
            model,
            tenant: arrival.tenant,
            prompt: prompt.into(),
            generated_tokens_max: arrival.generated_tokens_max,
            stop_tokens: arrival.stop_tokens,
            seed: arrival.seed,
            priority: arrival.priority,
            domain,
        };
        let (work, before) = (self.work_of(&ask), self.work_ended);
        self.work += work;
        let number = self.router.admit(self.post.now, ask, index, work, before);
        if let Some(after) = arrival.hang_up {
            self.post.after(after, Event::HangUp(number));
        }
        self.open(number)
    }

    /// Virtual time that a request would take alone, on the slowest executor with a link behind each block.
    fn work_of(&self, ask: &Ask) -> Micros {
        let blocks = self.scenario.models[ask.model].blocks.len() as Micros;
        let (prompt, generated) = (ask.prompt.len() as Micros, Micros::from(ask.generated_tokens_max));
        let wire = 2 * (self.scenario.delays.least + 2 * self.scenario.delays.more);
        let of = |node: &crate::node::Identity| {
            let passes = prompt.div_ceil(Micros::from(node.limits.chunk_tokens_max)) + generated;
            blocks * (passes * (node.cost.batch + wire) + (prompt + generated) * node.cost.row)
        };
        self.scenario.nodes.iter().map(of).max().unwrap_or(0)
    }

    /// Begins an attempt of a sequence.
    fn open(&mut self, number: u64) -> Result<(), Violation> {
        let request = self.router.requests.get_mut(&number).expect("the caller knows that it lives");
        request.awaits = None;
        let (model, tenant) = (&self.scenario.models[request.ask.model], request.ask.tenant);
        let weight = self.scenario.load.weights.get(tenant).copied().unwrap_or(1);
        match self.router.begin(self.post.now, number, model, weight) {
            Err(loss) => self.lost(number, loss),
            Ok(admission) => {
                let epoch = admission.epoch;
                let first = admission.route[0].executor_id.clone();
                self.report.hops_most = self.report.hops_most.max(admission.route.len());
                let process = self.nodes.iter().find(|node| node.is_alive && node.identity.id.0 == first).map(|node| node.process);
                let attempt = self.router.requests.get_mut(&number).and_then(|request| request.attempt.as_mut());
                attempt.expect("just begun").process = process;
                match process {
                    Some(process) => self.post.call(process, number, epoch, ToNode::Run(admission)),
                    None => self.post.router_hears(number, epoch, Heard::Broken),
                }
                Ok(())
            }
        }
    }

    /// Drops the call that runs a sequence.
    fn cancel_attempt(&mut self, number: u64) {
        let router = self.router.id.clone();
        if let Some(attempt) = self.router.drop_attempt(number)
            && let Some(process) = attempt.process
        {
            self.post.call(process, number, attempt.epoch, ToNode::Cancel(SequenceKey { router, number }, attempt.epoch));
        }
    }

    fn hear(&mut self, number: u64, epoch: u32, heard: Heard) -> Result<(), Violation> {
        let now = self.post.now;
        let Some(request) = self.router.requests.get_mut(&number) else { return Ok(()) };
        if request.attempt.as_ref().is_none_or(|attempt| attempt.epoch != epoch) {
            return Ok(());
        }
        let event = match heard {
            Heard::Broken => {
                let loss = Loss::broken(request.journal.route());
                self.router.drop_attempt(number);
                return self.lost(number, loss);
            }
            Heard::Event(event) => event,
        };
        let has_failed = matches!(event, SequenceEvent::Failed(_));
        match request.journal.handle_event(event) {
            Step::Skip => Ok(()),
            Step::HandOut(SequenceEvent::Token(token)) => {
                let model = &self.scenario.models[request.ask.model];
                let class = request.journal.route().numeric_class.clone();
                let was_first = request.client.first.is_none();
                let before = request.client.latest;
                request.client.token(now, number, &request.ask, model, &class, &token)?;
                self.report.token(if was_first { None } else { Some(now - before) }, now - request.client.arrived);
                Ok(())
            }
            Step::HandOut(SequenceEvent::Started(started)) => {
                self.report.cached_tokens += u64::from(started.cached_tokens);
                let length = request.ask.prompt.len() as u32;
                self.report.prompt_tokens += u64::from(length);
                holds("order", started.cached_tokens < length, || {
                    format!("sequence {number} starts with {} of {length} tokens cached", started.cached_tokens)
                })
            }
            Step::HandOut(SequenceEvent::Finished(finished)) => {
                self.router.drop_attempt(number);
                self.finished(number, finished)
            }
            Step::HandOut(SequenceEvent::Failed(_)) => violated("ends", format!("sequence {number}: a failure was handed out")),
            Step::Lost(loss) => {
                if has_failed {
                    self.router.drop_attempt(number);
                } else {
                    self.cancel_attempt(number);
                }
                self.lost(number, loss)
            }
        }
    }

    /// What follows a loss.
    fn lost(&mut self, number: u64, loss: Loss) -> Result<(), Violation> {
        let now = self.post.now;
        let request = self.router.requests.get_mut(&number).expect("the caller knows that it lives");
        let recovery = request.journal.handle_loss(loss, false);
        self.router.suspects.extend(recovery.suspects.into_iter().map(|id| (id, now + SUSPECT_FOR)));
        match recovery.then {
            Then::Finished(finished) => self.finished(number, finished),
            Then::GiveUp(refusal) => self.gave_up(number, &refusal),
            Then::Again { wait, until_change } => {
                if !request.journal.generated().is_empty() {
                    self.report.resumes += 1;
                }
                request.wait += 1;
                request.awaits = Some(until_change);
                let event = Event::Retry(number, request.wait);
                self.post.after(wait.as_micros() as Micros, event);
                Ok(())
            }
        }
    }

    fn finished(&mut self, number: u64, finished: v1::Finished) -> Result<(), Violation> {
        let request = &self.router.requests[&number];
        request.client.finished(number, &request.ask, finished.reason())?;
        self.report.finished += 1;
        let arrival = &self.scenario.load.arrivals[request.arrival];
        if let Some((next, pause)) = arrival.next {
            let mut said = request.ask.prompt.to_vec();
            said.extend_from_slice(&request.client.tokens);
            self.said.insert(next, (request.ask.model, said));
            self.post.after(pause, Event::Arrive(next));
        }
        self.end(number, true);
        Ok(())
    }

    /// `ends`: an error is handed out only where one is due.
    fn gave_up(&mut self, number: u64, refusal: &Refusal) -> Result<(), Violation> {
        let request = &self.router.requests[&number];
        let tokens = request.ask.prompt.len() as u32 + request.ask.generated_tokens_max;
        let is_disturbed = self.disturbed_at + STARVATION_BASE >= request.client.arrived;
        let is_unplaced = self.router.plan.unplaced.contains_key(&self.scenario.models[request.ask.model].digest);
        let is_due = match refusal.code {
            Code::TooManyRequests => self.scenario.nodes.iter().any(|node| node.limits.waiting_max < 1000),
            Code::NeverFits => tokens > self.scenario.always_fits_tokens,
            Code::ModelNotReady | Code::Unavailable => is_disturbed || is_unplaced,
            _ => false,
        };
        holds("ends", is_due, || format!("sequence {number} ends with {}: {}", refusal.code, refusal.message))?;
        self.report.refuse(refusal.code.as_str());
        self.end(number, false);
        Ok(())
    }

    fn end(&mut self, number: u64, has_next: bool) {
        let request = self.router.requests.remove(&number).expect("the caller knows that it lives");
        self.work_ended += request.work;
        self.post.forget_streams(number);
        if !has_next {
            let _ = self.no_next_turn(request.arrival);
        }
    }

    /// The turns that would have followed never come.
    fn no_next_turn(&mut self, arrival: usize) -> Result<(), Violation> {
        let mut at = arrival;
        while let Some((next, _)) = self.scenario.load.arrivals[at].next {
            self.pending -= 1;
            at = next;
        }
        Ok(())
    }

    /// The router's picture of the cluster changed: who waits for that tries again, and the leader plans a while later.
    fn changed(&mut self) -> Result<(), Violation> {
        if !std::mem::replace(&mut self.router.plan_pending, true) {
            self.post.after(SETTLE, Event::MakePlan);
        }
        let waits = |request: &crate::router::Request| request.awaits == Some(true);
        let waiting: Vec<u64> = self.router.requests.iter().filter(|(_, request)| waits(request)).map(|(number, _)| *number).collect();
        waiting.into_iter().try_for_each(|number| self.open(number))
    }

    fn disturb(&mut self) {
        self.disturbed_at = self.post.now;
        let now = self.post.now;
        self.router.requests.values_mut().for_each(|request| request.client.progress = now);
    }

    fn fault(&mut self, fault: Fault) -> Result<(), Violation> {
        self.pending -= 1;
        self.disturb();
        match fault {
            Fault::Kill(index) => {
                let node = &mut self.nodes[index.0];
                if !std::mem::take(&mut node.is_alive) {
                    return Ok(());
                }
                let process = node.process;
                self.report.kills += 1;
                self.report.add_engine(&self.nodes[index.0]);
                self.post.process_gone(process);
                let runs =
                    |request: &crate::router::Request| request.attempt.as_ref().is_some_and(|attempt| attempt.process == Some(process));
                let lost = self.router.requests.iter().filter(|(_, request)| runs(request));
                let lost: Vec<(u64, u32)> =
                    lost.map(|(number, request)| (*number, request.attempt.as_ref().map_or(0, |attempt| attempt.epoch))).collect();
                lost.into_iter().for_each(|(number, epoch)| self.post.router_hears(number, epoch, Heard::Broken));
                self.post.after(LEASE, Event::LeaseOver(process));
                Ok(())
            }
            Fault::Restart(index) => {
                let node = &mut self.nodes[index.0];
                if node.is_alive && !node.is_draining {
                    return Ok(());
                }
                if node.is_alive {
                    self.pending += 1;
                    self.fault(Fault::Kill(index))?;
                }
                let node = &self.nodes[index.0];
                let (identity, incarnation) = (node.identity.clone(), node.process.incarnation + 1);
                self.nodes[index.0] = Node::new(identity, index, incarnation, Rc::clone(&self.models), self.canary);
                self.nodes[index.0].tell_record(&mut self.post);
                Ok(())
            }
            Fault::Cut(drawn) => {
                self.report.cuts += u64::from(self.post.cut_any(drawn));
                Ok(())
            }
            Fault::Drain(index) => {
                let node = &mut self.nodes[index.0];
                if node.is_alive {
                    node.is_draining = true;
                    self.report.drains += 1;
                    node.tell_record(&mut self.post);
                }
                Ok(())
            }
            Fault::AddModel(model) => {
                self.router.named.insert(model);
                self.changed()
            }
            Fault::RemoveModel(model) => {
                self.router.named.remove(&model);
                self.changed()
            }
        }
    }

    /// `starvation`, and whether anything is left to come.
    fn look(&mut self) -> Result<(), Violation> {
        let now = self.post.now;
        for (number, request) in &self.router.requests {
            let bound = STARVATION_BASE + STARVATION_WORK * (self.work - request.work_before);
            let since = now - request.client.latest.max(request.client.progress);
            holds("starvation", since <= bound, || {
                let (tokens, place) =
                    (request.client.tokens.len(), if request.awaits.is_some() { "waits for its next attempt" } else { "runs" });
                let route: Vec<String> = request.attempt.iter().flat_map(|_| request.journal.route().executors()).map(|id| id.0).collect();
                format!(
                    "sequence {number} ({place} on {}) had {tokens} tokens, and none for {} of {} ms",
                    route.join(", "),
                    since / 1000,
                    bound / 1000
                )
            })?;
        }
        if !self.router.requests.is_empty() || self.pending > 0 {
            self.post.after(LOOK, Event::Look);
        }
        Ok(())
    }

    /// Nothing is left to come: all has ended, and all is free.
    pub(crate) fn check_end(&mut self) -> Result<(), Violation> {
        let left = self.router.requests.len();
        holds("idle", left == 0, || format!("the run is over and {left} sequences have not ended"))?;
        holds("idle", self.router.loads.is_empty(), || format!("the router counts load of nobody: {:?}", self.router.loads))?;
        for node in self.nodes.iter().filter(|node| node.is_alive) {
            node.check_end()?;
            self.report.add_engine(node);
        }
        self.report.virtual_us = self.post.now;
        Ok(())
    }
}
