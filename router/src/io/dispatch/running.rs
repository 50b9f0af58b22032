//! One sequence on its way: the calls that its journal (`state::journal`) asks for, and the waits between them. The journal decides what
//! follows when an attempt is lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ashlar_registry::record::DeploymentRecord;
use ashlar_wire::code::Code;
use ashlar_wire::id::ExecutorId;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;
use futures::StreamExt;
use tokio::time::Instant;
use tonic::Status;

use super::super::backend::{ApiError, NewSequence};
use super::super::grpc::RunEvents;
use super::Shared;
use super::books::{Load, Loads, Place};
use crate::state::assembly::{ChainPath, Route};
use crate::state::journal::{Ends, Journal, Step, Then};
use crate::state::loss::Loss;

/// What the registry says of who asks, and of what is asked; it holds for all attempts.
pub(super) struct Caller {
    pub(super) cache_domain: [u8; 32],
    pub(super) weight: u32,
    pub(super) deployment: DeploymentRecord,
}

/// A sequence that has not ended.
pub(super) struct Running {
    shared: Arc<Shared>,
    sequence: NewSequence,
    path: ChainPath,
    caller: Caller,
    number: u64,
    journal: Journal,
    attempt: Option<Attempt>,
    ended: bool,
    deadline: Option<(Instant, u64)>,
    _place: Place,
}

struct Attempt {
    events: RunEvents,
    _load: Load,
}

impl Running {
    pub(super) fn new(shared: Arc<Shared>, sequence: NewSequence, caller: Caller, place: Place) -> Self {
        let number = shared.sequences_drawn.fetch_add(1, Ordering::Relaxed) + 1;
        let deadline = shared.options.deadline.map(|limit| (Instant::now() + limit, unix_ms(SystemTime::now() + limit)));
        let journal = Journal::new(Ends {
            generated_tokens_max: sequence.generated_tokens_max,
            stop_tokens: sequence.stop_tokens.clone(),
            attempts_max: shared.options.attempts_max,
        });
        Self {
            path: shared.path(&sequence.model),
            shared,
            sequence,
            caller,
            number,
            journal,
            attempt: None,
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
                        if !self.journal.generated().is_empty() {
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
        let route = self.shared.assemble(&self.path, self.journal.pinned_class(), self.journal.avoided());
        let returns = self.shared.will_be_served(self.path.digest(), route.is_ok());
        let epoch = self.journal.begin(route, returns, || self.shared.is_gone(&self.sequence.model))?;
        let route = self.journal.route();
        let admission = self.admission(route, epoch);
        let load = Loads::add(&self.shared.loads, route.executors().collect());
        let first = &route.hops[0];
        let events = match self.shared.clients.client(&ExecutorId(first.executor_id.clone()), &first.address) {
            Ok(client) => client.run(admission).await,
            Err(status) => Err(status),
        };
        match events {
            Ok(events) => {
                self.attempt = Some(Attempt { events, _load: load });
                Ok(())
            }
            Err(status) => {
                self.tell(&status, "failed to call an executor");
                Err(self.broken(&status))
            }
        }
    }

    /// The first executor could not be called, or its stream broke.
    fn broken(&self, status: &Status) -> Loss {
        match status.code() {
            // The message itself is wrong.
            tonic::Code::InvalidArgument | tonic::Code::OutOfRange | tonic::Code::Unimplemented => {
                Loss::not_understood(self.journal.route())
            }
            _ => Loss::broken(self.journal.route()),
        }
    }

    /// Takes one event of the attempt into the journal.
    fn step(&mut self, event: Option<Result<v1::SequenceEvent, Status>>) -> Step {
        match event {
            None => Step::Lost(Loss::broken(self.journal.route())),
            Some(Err(status)) => {
                self.tell(&status, "lost an executor");
                Step::Lost(self.broken(&status))
            }
            Some(Ok(v1::SequenceEvent { event: Some(event) })) => self.journal.handle_event(event),
            // An event of a later version.
            Some(Ok(v1::SequenceEvent { event: None })) => Step::Skip,
        }
    }

    /// Says that the first executor failed, unless that was said a moment ago.
    fn tell(&self, status: &Status, what: &'static str) {
        let executor = &self.journal.route().hops[0].executor_id;
        if self.shared.suspects.now().contains(&ExecutorId(executor.clone())) {
            tracing::debug!(executor, sequence = self.number, error = status as &dyn std::error::Error, "{what}");
        } else {
            tracing::warn!(executor, sequence = self.number, error = status as &dyn std::error::Error, "{what}");
        }
    }

    /// Prepares the next attempt, and waits until it is worth making. The end of the sequence, where only that got lost; the error,
    /// where no attempt is left.
    async fn recover(&mut self, loss: Loss) -> Result<Option<v1::Finished>, ApiError> {
        let had_begun = self.attempt.take().is_some();
        let is_late = self.deadline.is_some_and(|(deadline, _)| Instant::now() >= deadline);
        let recovery = self.journal.handle_loss(loss, is_late);
        self.shared.suspects.add(recovery.suspects);
        let (wait, until_change) = match recovery.then {
            Then::Finished(finished) => return Ok(Some(finished)),
            Then::GiveUp(refusal) if refusal.code == Code::ModelFailed => {
                let message = format!("model {} failed to {}", self.sequence.model.id, refusal.message);
                tracing::warn!(sequence = self.number, tenant = %self.sequence.tenant, "{message}");
                return Err(ApiError::new(refusal.code, message));
            }
            Then::GiveUp(refusal) => return Err(ApiError::new(refusal.code, refusal.message)),
            Then::Again { wait, until_change } => (wait, until_change),
        };
        let generated_tokens = self.journal.generated().len();
        if had_begun && generated_tokens > 0 {
            self.shared.resumes.inc();
            tracing::info!(
                sequence = self.number,
                request = %self.sequence.request_id,
                tenant = %self.sequence.tenant,
                epoch = self.journal.epoch(),
                generated_tokens,
                "resuming a sequence"
            );
        }
        self.wait(wait, until_change).await;
        Ok(None)
    }

    async fn wait(&mut self, wait: Duration, until_change: bool) {
        if !until_change {
            return tokio::time::sleep(wait).await;
        }
        let mut clusters = self.shared.cluster.subscribe();
        clusters.mark_unchanged();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = clusters.changed() => {}
        }
    }

    fn admission(&self, route: &Route, epoch: u32) -> v1::Admission {
        let sequence = &self.sequence;
        v1::Admission {
            request_id: sequence.request_id.0.clone(),
            sequence_id: self.number,
            router_id: self.shared.router.0.clone(),
            tenant: sequence.tenant.0.clone(),
            cache_domain: self.caller.cache_domain.to_vec(),
            priority: sequence.priority,
            deadline_unix_ms: self.deadline.map_or(0, |(_, unix_ms)| unix_ms),
            epoch,
            numeric_class: route.numeric_class.clone(),
            seed: sequence.seed,
            choice_index: sequence.choice_index,
            plan_generation: route.plan_generation,
            route: route.hops.clone(),
            prompt: sequence.prompt.to_vec(),
            generated: self.journal.generated().to_vec(),
            generated_tokens_max: sequence.generated_tokens_max,
            stop_tokens: sequence.stop_tokens.clone(),
            sampling: Some(sequence.sampling.clone()),
            traceparent: self.traceparent(epoch),
            tenant_weight: self.caller.weight,
            ttft_ms: self.caller.deployment.ttft_ms,
            gap_ms: self.caller.deployment.gap_ms,
        }
    }

    /// W3C trace context: one trace for a request, one span for each attempt. Both follow from ids, so that logs can be joined.
    fn traceparent(&self, epoch: u32) -> String {
        let trace = Vec::from(blake3::hash(self.sequence.request_id.0.as_bytes()).as_bytes().as_slice());
        let span = blake3::hash(format!("{}/{}/{}", self.shared.router, self.number, epoch).as_bytes());
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("00-{}-{}-01", hex(&trace[..16]), hex(&span.as_bytes()[..8]))
    }
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
