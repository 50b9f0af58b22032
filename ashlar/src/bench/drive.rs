//! Sends a schedule and collects what came of each request. Open loop: every request starts at its time, however many are under
//! way. Closed loop: clients take the next request as they become free.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::bench::prompts::Prompts;
use crate::bench::request::{self, Answer, BodyOptions, Failure, milliseconds};
use crate::bench::schedule::{Arrivals, Planned, WeightedModel};
use crate::client::Client;

/// Requests under way at once in an open loop; a request beyond it fails unsent. Also the most clients of a closed loop.
pub(crate) const IN_FLIGHT_MAX: usize = 4096;

/// All that sending needs.
pub(crate) struct Job {
    /// The endpoint of each model, in the order of `models`.
    pub(crate) clients: Vec<Client>,
    /// What bodies say.
    pub(crate) options: BodyOptions,
    /// What the planned requests index.
    pub(crate) models: Vec<WeightedModel>,
    /// What is said.
    pub(crate) prompts: Prompts,
    /// The schedule.
    pub(crate) requests: Vec<Planned>,
    /// When requests start.
    pub(crate) arrivals: Arrivals,
    /// Client k of n in a closed loop takes requests k, k + n and so on, not the next one that is left.
    pub(crate) in_turn: bool,
    /// A closed loop starts no request later than this.
    pub(crate) duration: Option<Duration>,
    /// Of one request, from its intended send.
    pub(crate) timeout: Duration,
    /// Requests that have come to their end, for whoever shows progress.
    pub(crate) ended_count: AtomicUsize,
}

/// What came of one request.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// The request.
    pub(crate) planned: Planned,
    /// How much later than intended it was sent; large values mean that the client was too slow to believe the rest.
    pub(crate) lag_ms: f64,
    /// Its answer.
    pub(crate) result: Result<Answer, Failure>,
}

impl Job {
    /// Sends one request that should have gone out at `intended`.
    pub(crate) async fn send(&self, planned: Planned, intended: Instant) -> Outcome {
        let prompt = self.prompts.of(&planned, self.options.endpoint);
        let body = request::body(&self.options, &self.models[planned.model].name, &prompt, &planned);
        let lag_ms = milliseconds(Instant::now() - intended);
        let result = request::ask(&self.clients[planned.model], self.options.endpoint, body, intended, self.timeout).await;
        self.ended_count.fetch_add(1, Ordering::Relaxed);
        Outcome { planned, lag_ms, result }
    }
}

/// Sends the whole schedule. Outcomes are in the order of the schedule.
pub(crate) async fn drive(job: &Arc<Job>) -> Vec<Outcome> {
    let mut outcomes = match job.arrivals {
        Arrivals::Poisson { .. } => open_loop(job).await,
        Arrivals::Closed { concurrency } => closed_loop(job, concurrency).await,
    };
    outcomes.sort_by_key(|outcome| outcome.planned.index);
    outcomes
}

async fn open_loop(job: &Arc<Job>) -> Vec<Outcome> {
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut outcomes = Vec::with_capacity(job.requests.len());
    for planned in job.requests.iter().copied() {
        let intended = start + planned.at;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(intended) => break,
                Some(outcome) = running.join_next() => outcomes.push(outcome.expect("a request does not panic")),
            }
        }
        if running.len() >= IN_FLIGHT_MAX {
            let lag_ms = milliseconds(Instant::now() - intended);
            outcomes.push(Outcome { planned, lag_ms, result: Err(Failure::Crowded(IN_FLIGHT_MAX)) });
            continue;
        }
        let job = job.clone();
        running.spawn(async move { job.send(planned, intended).await });
    }
    while let Some(outcome) = running.join_next().await {
        outcomes.push(outcome.expect("a request does not panic"));
    }
    outcomes
}

async fn closed_loop(job: &Arc<Job>, concurrency: usize) -> Vec<Outcome> {
    let start = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for client in 0..concurrency {
        let (job, next) = (job.clone(), next.clone());
        clients.spawn(async move {
            let mut outcomes = Vec::new();
            let mut own = (client..).step_by(concurrency);
            while job.duration.is_none_or(|duration| start.elapsed() < duration) {
                let place = if job.in_turn { own.next() } else { Some(next.fetch_add(1, Ordering::Relaxed)) };
                let Some(planned) = place.and_then(|place| job.requests.get(place)) else { break };
                outcomes.push(job.send(*planned, Instant::now()).await);
            }
            outcomes
        });
    }
    clients.join_all().await.into_iter().flatten().collect()
}
