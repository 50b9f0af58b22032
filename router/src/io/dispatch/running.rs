//! One sequence on its way: its journal, the attempt that runs it now, and what happens when that attempt is lost. The journal is
//! prompt plus tokens handed out; every attempt starts from it under the next epoch, so the caller sees each token once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ashlar_wire::code::Code;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;
use futures::StreamExt;
use tokio::time::Instant;

use super::super::backend::{ApiError, NewSequence};
use super::super::grpc::RunEvents;
use super::Shared;
use super::books::{Load, Loads, Place};
use super::loss::{Loss, Next};
use crate::state::assembly::{ChainPath, Route};

const WAIT_FIRST: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// A sequence that has not ended.
pub(super) struct Running {
    shared: Arc<Shared>,
    sequence: NewSequence,
    path: ChainPath,
    cache_domain: [u8; 32],
    tenant_weight: u32,
    number: u64,
    /// Of the next attempt.
    epoch: u32,
    /// Of the last route; once there are tokens, all routes are of it.
    numeric_class: Option<String>,
    /// Tokens handed out.
    generated: Vec<u32>,
    attempt: Option<Attempt>,
    /// Attempts lost since the last token.
    lost_count: u32,
    /// Executors that did not take this sequence.
    avoided: BTreeSet<ExecutorId>,
    /// What the last of them said, where that may be the answer.
    refusal: Option<ApiError>,
    started: bool,
    ended: bool,
    deadline: Option<(Instant, u64)>,
    _place: Place,
}

struct Attempt {
    events: RunEvents,
    route: Route,
    _load: Load,
}

/// What one event of an attempt means.
enum Step {
    HandOut(Event),
    Skip,
    Lost(Loss),
}

impl Running {
    pub(super) fn new(shared: Arc<Shared>, sequence: NewSequence, cache_domain: [u8; 32], tenant_weight: u32, place: Place) -> Self {
        let number = shared.sequences_drawn.fetch_add(1, Ordering::Relaxed) + 1;
        let deadline = shared.options.deadline.map(|limit| (Instant::now() + limit, unix_ms(SystemTime::now() + limit)));
        Self {
            path: shared.path(&sequence.model),
            shared,
            sequence,
            cache_domain,
            tenant_weight,
            number,
            epoch: 0,
            numeric_class: None,
            generated: Vec::new(),
            attempt: None,
            lost_count: 0,
            avoided: BTreeSet::new(),
            refusal: None,
            started: false,
            ended: false,
            deadline,
            _place: place,
        }
    }

    /// Opens the first attempt, so that what fails at once fails before the caller has sent a status.
    pub(super) async fn open_first(&mut self) -> Result<(), ApiError> {
        while let Err(loss) = self.open().await {
            self.recover(loss).await?;
        }
        Ok(())
    }

    /// The next event; `None` after the last.
    pub(super) async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        while !self.ended {
            let step = match &mut self.attempt {
                Some(attempt) => {
                    let event = attempt.events.next().await;
                    self.step(event)
                }
                None => match self.open().await {
                    Ok(()) => Step::Skip,
                    Err(loss) => Step::Lost(loss),
                },
            };
            match step {
                Step::Skip => {}
                Step::HandOut(event) => {
                    self.ended = matches!(event, Event::Finished(_));
                    if self.ended {
                        self.attempt = None;
                    }
                    return Some(Ok(event));
                }
                Step::Lost(loss) => match self.recover(loss).await {
                    Ok(None) => {}
                    Ok(Some(finished)) => {
                        self.ended = true;
                        return Some(Ok(Event::Finished(finished)));
                    }
                    Err(error) => {
                        self.ended = true;
                        if !self.generated.is_empty() {
                            self.shared.lost.inc();
                        }
                        return Some(Err(error));
                    }
                },
            }
        }
        None
    }

    /// Assembles a route and calls its first executor.
    async fn open(&mut self) -> Result<(), Loss> {
        let begun = self.epoch > 0;
        // Before the first token any class will do.
        let pinned = self.numeric_class.as_deref().filter(|_| !self.generated.is_empty());
        let route = self.shared.assemble(&self.path, pinned, &self.avoided);
        let route = match route {
            Ok(route) => route,
            Err(_) if begun && self.shared.is_gone(&self.sequence.model) => return Err(Loss::gone()),
            Err(error) => return Err(Loss::not_ready(error, begun)),
        };
        if self.generated.is_empty()
            && let Some(error) = &self.refusal
            && route.executors().any(|id| self.avoided.contains(&id))
        {
            return Err(Loss { error: error.clone(), next: Next::GiveUp, blamed: BTreeSet::new() });
        }
        let admission = self.admission(&route);
        let load = Loads::add(&self.shared.loads, route.executors().collect());
        self.numeric_class = Some(route.numeric_class.clone());
        self.epoch += 1;
        let first = &route.hops[0];
        let events = match self.shared.clients.client(&ExecutorId(first.executor_id.clone()), &first.address) {
            Ok(client) => client.run(admission).await,
            Err(status) => Err(status),
        };
        match events {
            Ok(events) => {
                self.attempt = Some(Attempt { events, route, _load: load });
                Ok(())
            }
            Err(status) => {
                self.tell(&first.executor_id, &status, "failed to call an executor");
                Err(Loss::of_status(&status, &route))
            }
        }
    }

    /// Takes one event of the attempt into the journal.
    fn step(&mut self, event: Option<Result<v1::SequenceEvent, tonic::Status>>) -> Step {
        let route = &self.attempt.as_ref().expect("the event is of an attempt").route;
        match event {
            None => Step::Lost(Loss::of_end(route)),
            Some(Err(status)) => {
                self.tell(&route.hops[0].executor_id, &status, "lost an executor");
                Step::Lost(Loss::of_status(&status, route))
            }
            Some(Ok(v1::SequenceEvent { event: Some(event) })) => match event {
                Event::Token(token) => match (token.index as usize).cmp(&self.generated.len()) {
                    std::cmp::Ordering::Less => Step::Skip,
                    std::cmp::Ordering::Greater => Step::Lost(Loss::of_gap(route)),
                    std::cmp::Ordering::Equal => {
                        self.generated.push(token.token);
                        self.lost_count = 0;
                        self.refusal = None;
                        self.avoided.clear();
                        Step::HandOut(Event::Token(token))
                    }
                },
                Event::Failed(failed) => Step::Lost(Loss::of_failed(&failed, route)),
                Event::Started(_) if self.started => Step::Skip,
                Event::Started(started) => {
                    self.started = true;
                    Step::HandOut(Event::Started(started))
                }
                Event::Finished(finished) => Step::HandOut(Event::Finished(finished)),
            },
            // An event of a later version.
            Some(Ok(v1::SequenceEvent { event: None })) => Step::Skip,
        }
    }

    /// Says that an executor failed, unless that was said a moment ago.
    fn tell(&self, executor: &str, status: &tonic::Status, what: &'static str) {
        if self.shared.suspects.now().contains(&ExecutorId(executor.to_owned())) {
            tracing::debug!(executor, sequence = self.number, error = status as &dyn std::error::Error, "{what}");
        } else {
            tracing::warn!(executor, sequence = self.number, error = status as &dyn std::error::Error, "{what}");
        }
    }

    /// Prepares the next attempt, and waits until it is worth making. The end of the sequence, where only that got lost; the error,
    /// where no attempt is left.
    async fn recover(&mut self, loss: Loss) -> Result<Option<v1::Finished>, ApiError> {
        let had_begun = self.attempt.take().is_some();
        let Loss { error, next, blamed } = loss;
        if next == Next::GiveUp {
            return Err(error);
        }
        if let Some(finished) = self.finished() {
            return Ok(Some(finished));
        }
        self.lost_count += 1;
        match next {
            Next::AvoidForAll => self.shared.suspects.add(blamed),
            Next::AvoidHere => self.avoided.extend(blamed),
            Next::RefusedHere => {
                self.avoided.extend(blamed);
                self.refusal = Some(error.clone());
            }
            Next::GiveUp | Next::Again | Next::AwaitRoute => {}
        }
        let late = self.deadline.is_some_and(|(deadline, _)| Instant::now() >= deadline);
        if late || self.lost_count > self.shared.options.attempts_max {
            let message = format!("{} ({} attempts)", error.message, self.lost_count);
            return Err(if late { ApiError::new(Code::Unavailable, "the request's time is up") } else { ApiError { message, ..error } });
        }
        if had_begun && !self.generated.is_empty() {
            self.shared.resumes.inc();
            tracing::info!(
                sequence = self.number,
                request = %self.sequence.request_id,
                tenant = %self.sequence.tenant,
                epoch = self.epoch,
                generated_tokens = self.generated.len(),
                "resuming a sequence"
            );
        }
        self.wait(next).await;
        Ok(None)
    }

    /// The first new attempt comes at once: usually a replica can take it. A change of the cluster ends the wait for a route.
    async fn wait(&mut self, next: Next) {
        let wait = match self.lost_count {
            0 | 1 => Duration::ZERO,
            count => WAIT_MAX.min(WAIT_FIRST * 2u32.saturating_pow(count - 2)),
        };
        if next != Next::AwaitRoute {
            return tokio::time::sleep(wait).await;
        }
        let mut clusters = self.shared.cluster.subscribe();
        clusters.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(wait.max(WAIT_FIRST)) => {}
            _ = clusters.changed() => {}
        }
    }

    /// Whether the journal is complete and only the word of it was lost.
    fn finished(&self) -> Option<v1::Finished> {
        let stopped = self.generated.last().is_some_and(|token| self.sequence.stop_tokens.contains(token));
        let full = self.generated.len() >= self.sequence.generated_tokens_max as usize;
        let reason = match (stopped, full) {
            (true, _) => v1::FinishReason::Stop,
            (false, true) => v1::FinishReason::Length,
            (false, false) => return None,
        };
        Some(v1::Finished { reason: reason.into() })
    }

    fn admission(&self, route: &Route) -> v1::Admission {
        let sequence = &self.sequence;
        v1::Admission {
            request_id: sequence.request_id.0.clone(),
            sequence_id: self.number,
            router_id: self.shared.router.0.clone(),
            tenant: sequence.tenant.0.clone(),
            cache_domain: self.cache_domain.to_vec(),
            priority: sequence.priority,
            deadline_unix_ms: self.deadline.map_or(0, |(_, unix_ms)| unix_ms),
            epoch: self.epoch,
            numeric_class: route.numeric_class.clone(),
            seed: sequence.seed,
            choice_index: sequence.choice_index,
            plan_generation: route.plan_generation,
            route: route.hops.clone(),
            prompt: sequence.prompt.to_vec(),
            generated: self.generated.clone(),
            generated_tokens_max: sequence.generated_tokens_max,
            stop_tokens: sequence.stop_tokens.clone(),
            sampling: Some(sequence.sampling.clone()),
            traceparent: self.traceparent(),
            tenant_weight: self.tenant_weight,
        }
    }

    /// W3C trace context: one trace for a request, one span for each attempt. Both follow from ids, so that logs can be joined.
    fn traceparent(&self) -> String {
        let trace = Vec::from(blake3::hash(self.sequence.request_id.0.as_bytes()).as_bytes().as_slice());
        let span = blake3::hash(format!("{}/{}/{}", self.shared.router, self.number, self.epoch).as_bytes());
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("00-{}-{}-01", hex(&trace[..16]), hex(&span.as_bytes()[..8]))
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
