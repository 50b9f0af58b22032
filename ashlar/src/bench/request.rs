//! One request: its body, and the times of what comes back. Latencies count from the moment when the schedule wanted it sent.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::bench::prompts::Prompt;
use crate::bench::schedule::Planned;
use crate::client::{Client, ClientError, Usage};

/// The route to drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// What every body says beside its prompt.
#[derive(Debug, Clone)]
pub(crate) struct BodyOptions {
    /// The route.
    pub(crate) endpoint: Endpoint,
    /// 0 is greedy.
    pub(crate) temperature: f64,
    /// Of the run; a sampled request gets this plus its index.
    pub(crate) seed: u64,
    /// Go on after the model's end token.
    pub(crate) ignore_eos: bool,
    /// Ask for the server's count of tokens.
    pub(crate) usage: bool,
    /// Further fields, as given.
    pub(crate) extra: Map<String, Value>,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    /// Intended send to the first chunk with text.
    pub(crate) ttft_ms: f64,
    /// Intended send to the end of the stream.
    pub(crate) e2e_ms: f64,
    /// First chunk with text to the last one.
    pub(crate) decode_ms: f64,
    /// Between each two chunks with text.
    pub(crate) gaps_ms: Vec<f32>,
    /// The server's count, if it told.
    pub(crate) usage: Option<Usage>,
    /// Of the text.
    pub(crate) text_hash: blake3::Hash,
}

impl Answer {
    /// Generated tokens: the server's count, else the chunks with text.
    pub(crate) fn output_tokens(&self) -> u64 {
        self.usage.map_or(self.gaps_ms.len() as u64 + 1, |usage| usage.completion_tokens)
    }

    /// Mean time of a token after the first; none for an answer of one token.
    pub(crate) fn tpot_ms(&self) -> Option<f64> {
        let after_first = self.output_tokens().saturating_sub(1);
        (after_first > 0 && !self.gaps_ms.is_empty()).then(|| self.decode_ms / after_first as f64)
    }
}

/// Why a request counts as failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// The client says why.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No whole answer in time.
    #[error("no whole answer within {0:?}")]
    Timeout(Duration),
    /// A proper end, and no text before it.
    #[error("the answer has no text")]
    Empty,
    /// The bench's own bound.
    #[error("not sent: {0} requests were under way already")]
    Crowded(usize),
}

/// The body of a request.
pub(crate) fn body(options: &BodyOptions, model: &str, prompt: &Prompt, planned: &Planned) -> Bytes {
    let mut body = json!({"model": model, "max_tokens": planned.output_tokens, "temperature": options.temperature, "stream": true});
    match prompt {
        Prompt::Text(text) => body["prompt"] = json!(text),
        Prompt::Messages(messages) => body["messages"] = messages.clone(),
    }
    if options.temperature > 0.0 {
        // Servers take signed seeds.
        body["seed"] = json!(options.seed.wrapping_add(u64::from(planned.index)) & i64::MAX as u64);
    }
    if options.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    if options.usage {
        body["stream_options"] = json!({"include_usage": true});
    }
    for (name, value) in &options.extra {
        body[name] = value.clone();
    }
    Bytes::from(body.to_string())
}

/// Sends a request and reads its whole answer.
pub(crate) async fn ask(client: &Client, endpoint: Endpoint, body: Bytes, intended: Instant, timeout: Duration) -> Result<Answer, Failure> {
    match tokio::time::timeout_at(intended + timeout, read(client, endpoint, body, intended)).await {
        Ok(answer) => answer,
        Err(_) => Err(Failure::Timeout(timeout)),
    }
}

async fn read(client: &Client, endpoint: Endpoint, body: Bytes, intended: Instant) -> Result<Answer, Failure> {
    let mut hasher = blake3::Hasher::new();
    let (mut first, mut last): (Option<Instant>, Option<Instant>) = (None, None);
    let mut gaps_ms = Vec::new();
    let usage = follow(client, endpoint, body, |now, text| {
        hasher.update(text.as_bytes());
        if let Some(last) = last {
            gaps_ms.push((now - last).as_secs_f32() * 1e3);
        }
        first = first.or(Some(now));
        last = Some(now);
    })
    .await?;
    let (Some(first), Some(last)) = (first, last) else { return Err(Failure::Empty) };
    Ok(Answer {
        ttft_ms: milliseconds(first - intended),
        e2e_ms: milliseconds(Instant::now() - intended),
        decode_ms: milliseconds(last - first),
        gaps_ms,
        usage,
        text_hash: hasher.finalize(),
    })
}

/// Sends a request and hands over each chunk with text as it comes; gives the server's count when the stream has ended properly.
pub(crate) async fn follow(
    client: &Client,
    endpoint: Endpoint,
    body: Bytes,
    mut on_text: impl FnMut(Instant, &str),
) -> Result<Option<Usage>, Failure> {
    let mut stream = client.stream(endpoint.path(), body).await?;
    let mut usage = None;
    while let Some(chunk) = stream.next().await? {
        usage = chunk.usage.or(usage);
        if !chunk.text.is_empty() {
            on_text(Instant::now(), &chunk.text);
        }
    }
    Ok(usage)
}

/// A duration as a report has it.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
