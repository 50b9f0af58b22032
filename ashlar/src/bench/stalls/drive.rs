//! The clients of `bench stalls`: streams that never end, and long prompts at fixed times. They write down when each text came;
//! what it means is `account.rs`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::account::{LongPrompt, Phase, Record, StreamRequest};
use crate::bench::prompts::Prompts;
use crate::bench::request::{self, BodyOptions, Failure, milliseconds};
use crate::bench::schedule::Planned;
use crate::client::Client;

/// Requests of one stream: its prompts are numbered from here to the next stream's.
const STREAM_REQUESTS_MAX: u32 = 1 << 16;
/// Number of the first long prompt of the disturbed phase, and of the first that is alone.
const LONG_INDEX: u32 = 1 << 30;
const ALONE_INDEX: u32 = 1 << 31;
/// Between all streams having begun and the undisturbed phase.
const SETTLE: Duration = Duration::from_millis(500);
/// A stream's next try after a request that failed.
const RETRY: Duration = Duration::from_millis(200);

/// What to send, and when.
#[derive(Debug, Clone)]
pub(super) struct Load {
    /// Steady streams.
    pub(super) streams: usize,
    /// Of each request of a stream.
    pub(super) stream_prompt_tokens: u32,
    /// Of each answer of a stream; the first ones are shorter, so that streams do not end together.
    pub(super) stream_output_tokens: u32,
    /// Of a long prompt.
    pub(super) long_prompt_tokens: u32,
    /// Of the answer to one.
    pub(super) long_output_tokens: u32,
    /// Between long prompts.
    pub(super) every: Duration,
    /// Long prompts of the disturbed phase.
    pub(super) long_count: u32,
    /// Long prompts that are measured alone.
    pub(super) alone_count: u32,
    /// Time of the undisturbed phase.
    pub(super) undisturbed: Duration,
    /// Of a long prompt, from when it was to be sent; also for all streams to begin.
    pub(super) timeout: Duration,
}

/// Whom to send it to.
pub(super) struct Target {
    pub(super) client: Client,
    pub(super) options: BodyOptions,
    pub(super) model: String,
    pub(super) prompts: Prompts,
}

/// What came of it.
pub(super) struct Driven {
    /// All times.
    pub(super) record: Record,
    /// Of the texts of all long prompts, in the order of their numbers.
    pub(super) output_hash: blake3::Hash,
    /// Why requests failed, in the order in which they did.
    pub(super) failures: Vec<String>,
}

/// Times and text of one request, as they come.
struct Followed {
    texts: Vec<Duration>,
    text: String,
    outcome: Result<Option<crate::client::Usage>, Failure>,
}

/// Runs all phases: long prompts alone, streams alone, both.
///
/// # Errors
/// When a long prompt that is alone gets no answer, or not all streams begin in time.
pub(super) async fn drive(target: Arc<Target>, load: &Load, tell: impl Fn(&str)) -> Result<Driven, Failure> {
    let start = Instant::now();
    let mut hasher = blake3::Hasher::new();
    let (mut alone_ms, mut alone_usage) = (Vec::new(), Vec::new());
    tell("long prompts, one after another");
    // The first one warms the server up.
    for number in 0..=load.alone_count {
        let sent = Instant::now();
        let followed = long(&target, load, ALONE_INDEX + number, sent, start).await;
        let usage = followed.outcome?;
        let first = *followed.texts.first().ok_or(Failure::Empty)?;
        hasher.update(followed.text.as_bytes());
        if number > 0 {
            alone_ms.push(milliseconds(start + first - sent));
            alone_usage.extend(usage);
        }
    }

    tell("streams");
    let logs: Vec<Arc<Mutex<Vec<StreamRequest>>>> = (0..load.streams).map(|_| Arc::default()).collect();
    let failures: Arc<Mutex<Vec<String>>> = Arc::default();
    let mut streams = JoinSet::new();
    for (number, log) in logs.iter().enumerate() {
        streams.spawn(stream(target.clone(), load.clone(), number, start, log.clone(), failures.clone()));
    }
    let begun = |log: &Arc<Mutex<Vec<StreamRequest>>>| locked(log).iter().any(|request| !request.texts.is_empty());
    let until = Instant::now() + load.timeout;
    while !logs.iter().all(begun) {
        if Instant::now() > until {
            return Err(Failure::Timeout(load.timeout));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(SETTLE).await;
    let undisturbed_from = start.elapsed();
    tokio::time::sleep(load.undisturbed).await;

    tell("streams and long prompts");
    let disturbed_from = Instant::now();
    let mut prompts = JoinSet::new();
    for number in 0..load.long_count {
        let (target, load) = (target.clone(), load.clone());
        prompts.spawn(async move {
            let sent = disturbed_from + load.every * number;
            tokio::time::sleep_until(sent).await;
            let followed = long(&target, &load, LONG_INDEX + number, sent, start).await;
            (number, sent - start, start.elapsed(), followed)
        });
    }
    // Streams go on until the last prompt is answered, and until the phase is over: a server that answers early is not at rest.
    let disturbed_to = disturbed_from + load.every * load.long_count;
    let ((), mut answered) = tokio::join!(tokio::time::sleep_until(disturbed_to), prompts.join_all());
    let end = start.elapsed();
    streams.shutdown().await;

    answered.sort_by_key(|(number, ..)| *number);
    let mut record = Record {
        streams: logs.iter().map(|log| std::mem::take(&mut *locked(log))).collect(),
        alone_ms,
        alone_usage,
        long: Vec::new(),
        undisturbed: Phase { from: undisturbed_from, to: disturbed_from - start },
        disturbed: Phase { from: disturbed_from - start, to: disturbed_to - start },
        end,
        stream_prompt_tokens: load.stream_prompt_tokens,
        long_prompt_tokens: load.long_prompt_tokens,
    };
    let mut failures = std::mem::take(&mut *locked(&failures));
    for (_, sent, ended, Followed { texts, text, outcome }) in answered {
        hasher.update(text.as_bytes());
        let failure = outcome.as_ref().err().cloned().or_else(|| texts.is_empty().then_some(Failure::Empty));
        record.long.push(LongPrompt { sent, texts, ended, usage: outcome.ok().flatten(), failed: failure.is_some() });
        failures.extend(failure.map(|failure| format!("long prompt: {failure}")));
    }
    Ok(Driven { record, output_hash: hasher.finalize(), failures })
}

/// Asks one long prompt.
async fn long(target: &Target, load: &Load, index: u32, sent: Instant, start: Instant) -> Followed {
    let (mut texts, mut all) = (Vec::new(), String::new());
    let asked = target.follow(index, load.long_prompt_tokens, load.long_output_tokens, |now, text| {
        texts.push(now - start);
        all += text;
    });
    let outcome = match tokio::time::timeout_at(sent + load.timeout, asked).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::Timeout(load.timeout)),
    };
    Followed { texts, text: all, outcome }
}

/// One answer after another, until it is dropped.
async fn stream(
    target: Arc<Target>,
    load: Load,
    number: usize,
    start: Instant,
    log: Arc<Mutex<Vec<StreamRequest>>>,
    failures: Arc<Mutex<Vec<String>>>,
) {
    for request in 0..STREAM_REQUESTS_MAX {
        // The first answers end one after another, and so do all later ones: streams begin anew at different times.
        let output_tokens = match request {
            0 => (u64::from(load.stream_output_tokens) * (number as u64 + 1)).div_ceil(load.streams as u64) as u32,
            _ => load.stream_output_tokens,
        };
        locked(&log).push(StreamRequest { sent: start.elapsed(), ..StreamRequest::default() });
        let index = number as u32 * STREAM_REQUESTS_MAX + request;
        let on_text = |now: Instant, _: &str| {
            if let Some(request) = locked(&log).last_mut() {
                request.texts.push(now - start);
            }
        };
        let mut outcome = target.follow(index, load.stream_prompt_tokens, output_tokens, on_text).await;
        if let Some(request) = locked(&log).last_mut() {
            request.ended = true;
            request.usage = outcome.as_ref().ok().copied().flatten();
            if outcome.is_ok() && request.texts.is_empty() {
                outcome = Err(Failure::Empty);
            }
        }
        if let Err(failure) = outcome {
            locked(&failures).push(format!("stream: {failure}"));
            tokio::time::sleep(RETRY).await;
        }
    }
}

impl Target {
    async fn follow(
        &self,
        index: u32,
        prompt_tokens: u32,
        output_tokens: u32,
        on_text: impl FnMut(Instant, &str),
    ) -> Result<Option<crate::client::Usage>, Failure> {
        let planned = Planned { index, at: Duration::ZERO, model: 0, prompt_tokens, output_tokens };
        let prompt = self.prompts.of(&planned, self.options.endpoint);
        let body = request::body(&self.options, &self.model, &prompt, &planned);
        request::follow(&self.client, self.options.endpoint, body, on_text).await
    }
}

/// Nobody panics with a log in hand, and a log is whole at any time.
fn locked<T>(log: &Mutex<T>) -> MutexGuard<'_, T> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
