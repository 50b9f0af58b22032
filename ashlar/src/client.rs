//! The client's side of an OpenAI-compatible endpoint, shared by `chat` and `bench`: one POST, its server-sent events as
//! typed chunks, and every way to fail as one sentence. It measures nothing and prints nothing.

pub(crate) mod sse;
#[cfg(test)]
pub(crate) mod standin;

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use crate::client::sse::{SseError, SseParser};

/// Bytes of a response that is no stream: a list of models, an error.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Time for a connection to be made.
const CONNECT_MS: u64 = 10_000;
/// Models that an error names.
const MODELS_LISTED_MAX: usize = 32;
/// Characters of a foreign error text that are shown.
const ERROR_CHARS_MAX: usize = 400;

/// An endpoint and the right to use it. Each request has its own connection.
#[derive(Clone)]
pub(crate) struct Client {
    http: HttpClient<HttpConnector, Full<Bytes>>,
    /// Without a slash at its end and without `/v1`.
    base: String,
    authorization: Option<HeaderValue>,
}

/// Why a request got no answer, or no whole one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientError {
    /// The address is none that this client can use.
    #[error("`{url}` is not an address to connect to: {reason}")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The key cannot stand in a header.
    #[error("the API key holds characters that a header cannot")]
    Key,
    /// No connection, or it was lost before the response began.
    #[error("no answer from {base}: {reason}")]
    Connect {
        /// The endpoint.
        base: String,
        /// The innermost cause.
        reason: String,
    },
    /// The server refused, with a status or inside the stream.
    #[error("{0}")]
    Refused(Refusal),
    /// The server has none or several where one was taken for granted.
    #[error("{0}")]
    Models(String),
    /// The response broke off.
    #[error("the answer broke off: {0}")]
    Cut(String),
    /// The response is not what the API promises.
    #[error("the server's answer is not understood: {0}")]
    Malformed(String),
}

/// An error that the server told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Absent where the error came inside a stream.
    pub(crate) status: Option<u16>,
    /// The stable code, if the server has one.
    pub(crate) code: Option<String>,
    /// The server's own sentence.
    pub(crate) message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status, &self.code) {
            (Some(status), Some(code)) => write!(f, "the server answered {status} ({code}): {}", self.message),
            (Some(status), None) => write!(f, "the server answered {status}: {}", self.message),
            (None, Some(code)) => write!(f, "the server gave up ({code}): {}", self.message),
            (None, None) => write!(f, "the server gave up: {}", self.message),
        }
    }
}

/// What one event of a completion's stream says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// New text of the first choice, of an answer or of its reasoning; may be empty.
    pub(crate) text: String,
    /// Why the choice ended, in the event that says so.
    pub(crate) finish_reason: Option<String>,
    /// Counts, in the event that has them.
    pub(crate) usage: Option<Usage>,
}

/// Tokens as the server counted them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of the prompt.
    pub(crate) prompt_tokens: u64,
    /// Of them, those that it had cached; 0 where it does not tell.
    pub(crate) cached_tokens: u64,
    /// Generated.
    pub(crate) completion_tokens: u64,
}

impl Client {
    /// A client of `url` (`http://host:port`, with or without `/v1`). Nothing is connected yet.
    pub(crate) fn new(url: &str, api_key: Option<&str>) -> Result<Self, ClientError> {
        let wrong = |reason| ClientError::Url { url: url.to_owned(), reason };
        // `HOST:PORT` alone means plain http, the one scheme there is.
        let whole = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = whole.parse().map_err(|_| wrong("it is no URL"))?;
        match uri.scheme_str() {
            Some("http") => (),
            Some("https") => return Err(wrong("https is not spoken here; put a proxy before it")),
            _ => return Err(wrong("it must begin with http://")),
        }
        if uri.query().is_some() {
            return Err(wrong("it must not hold a query"));
        }
        let base = whole.trim_end_matches('/').trim_end_matches("/v1").trim_end_matches('/').to_owned();
        let authorization = match api_key.filter(|key| !key.is_empty()) {
            None => None,
            Some(key) => {
                let mut value = HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| ClientError::Key)?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_millis(CONNECT_MS)));
        // A connection for each request. With a pool, 4 of 60 requests to llama.cpp's server, one after another, met a connection that it
        // closed before answering, and counted as its failures; without one, none of 60.
        let http = HttpClient::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { http, base, authorization })
    }

    /// The endpoint, as errors and reports name it.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Names of the models that the server lists, in its order.
    pub(crate) async fn models(&self) -> Result<Vec<String>, ClientError> {
        let response = self.send(Method::GET, "/v1/models", Bytes::new()).await?;
        let body: Value = serde_json::from_slice(&read_body(response.into_body()).await?)
            .map_err(|_| ClientError::Malformed("the list of models is not JSON".into()))?;
        let models = body["data"].as_array().ok_or_else(|| ClientError::Malformed("the list of models has no `data`".into()))?;
        Ok(models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned)).collect())
    }

    /// The server's model where it has exactly one; else an error that lists them and ends with `advice`.
    pub(crate) async fn only_model(&self, advice: &str) -> Result<String, ClientError> {
        let mut models = self.models().await?;
        match models.len() {
            1 => Ok(models.remove(0)),
            0 => Err(ClientError::Models("the server has no models yet".into())),
            count => {
                let mut listed = models.iter().take(MODELS_LISTED_MAX).cloned().collect::<Vec<_>>().join(", ");
                if count > MODELS_LISTED_MAX {
                    listed += ", ...";
                }
                Err(ClientError::Models(format!("the server has {count} models ({listed}): {advice}")))
            }
        }
    }

    /// Posts `body`, which must ask for a stream, and waits for the head of the response. Dropping the stream closes its
    /// connection, which cancels the request.
    pub(crate) async fn stream(&self, path: &str, body: Bytes) -> Result<ChunkStream, ClientError> {
        let response = self.send(Method::POST, path, body).await?;
        let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("text/event-stream") {
            return Err(ClientError::Malformed(format!("expected an event stream, got `{kind}`")));
        }
        Ok(ChunkStream { body: response.into_body(), parser: SseParser::default(), chunks: VecDeque::new(), ended: false, finished: false })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let uri: Uri = format!("{}{path}", self.base)
            .parse()
            .map_err(|_| ClientError::Url { url: self.base.clone(), reason: "no path can be added to it" })?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream, application/json"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let response = self
            .http
            .request(request)
            .await
            .map_err(|error| ClientError::Connect { base: self.base.clone(), reason: innermost(&error) })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // A body that cannot be read leaves the status to tell.
        let body = read_body(response.into_body()).await.unwrap_or_default();
        Err(ClientError::Refused(refusal(status, &body)))
    }
}

/// The chunks of one completion.
#[derive(Debug)]
pub(crate) struct ChunkStream {
    body: Incoming,
    parser: SseParser,
    /// Parsed and not yet taken.
    chunks: VecDeque<Result<Chunk, ClientError>>,
    /// `[DONE]` was seen.
    ended: bool,
    /// A finish reason was seen; some servers send nothing after it.
    finished: bool,
}

impl ChunkStream {
    /// The next chunk, or `None` after a proper end. An end without `[DONE]` or a finish reason is `Cut`.
    pub(crate) async fn next(&mut self) -> Result<Option<Chunk>, ClientError> {
        loop {
            if let Some(chunk) = self.chunks.pop_front() {
                self.finished |= chunk.as_ref().is_ok_and(|chunk| chunk.finish_reason.is_some());
                return chunk.map(Some);
            }
            if self.ended {
                return Ok(None);
            }
            let Some(frame) = self.body.frame().await else {
                return if self.finished { Ok(None) } else { Err(ClientError::Cut("the stream ended early".into())) };
            };
            let frame = frame.map_err(|error| ClientError::Cut(innermost(&error)))?;
            let Ok(bytes) = frame.into_data() else { continue };
            let (chunks, ended) = (&mut self.chunks, &mut self.ended);
            self.parser
                .push(&bytes, |data| match data {
                    _ if *ended => (),
                    "[DONE]" => *ended = true,
                    data => chunks.push_back(chunk(data)),
                })
                .map_err(|error: SseError| ClientError::Malformed(error.to_string()))?;
        }
    }
}

/// One event's data as a chunk; both routes' shapes are understood.
fn chunk(data: &str) -> Result<Chunk, ClientError> {
    let event: Value = serde_json::from_str(data).map_err(|_| ClientError::Malformed("an event of the stream is not JSON".into()))?;
    if event.get("error").is_some_and(|error| !error.is_null()) {
        let (code, message) = told(&event).unwrap_or_else(|| (None, "it did not say why".into()));
        return Err(ClientError::Refused(Refusal { status: None, code, message }));
    }
    let choice = &event["choices"][0];
    let delta = &choice["delta"];
    let text = [&delta["reasoning_content"], &delta["content"], &choice["text"]].into_iter().filter_map(Value::as_str).collect();
    let usage = match (event["usage"]["prompt_tokens"].as_u64(), event["usage"]["completion_tokens"].as_u64()) {
        (Some(prompt_tokens), Some(completion_tokens)) => {
            let cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
            Some(Usage { prompt_tokens, cached_tokens, completion_tokens })
        }
        _ => None,
    };
    Ok(Chunk { text, finish_reason: choice["finish_reason"].as_str().map(str::to_owned), usage })
}

async fn read_body(body: Incoming) -> Result<Bytes, ClientError> {
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) => Err(ClientError::Cut(innermost(&*error))),
    }
}

fn refusal(status: StatusCode, body: &[u8]) -> Refusal {
    let told = serde_json::from_slice(body).ok().as_ref().and_then(told);
    let (code, message) = told.unwrap_or_else(|| {
        let text = one_line(&String::from_utf8_lossy(body));
        (None, if text.is_empty() { status.canonical_reason().unwrap_or("no reason given").to_owned() } else { text })
    });
    Refusal { status: Some(status.as_u16()), code, message }
}

/// Code and sentence of an error body: OpenAI's shape, and the ones that its imitators use.
fn told(body: &Value) -> Option<(Option<String>, String)> {
    let error = body.get("error").unwrap_or(body);
    let message =
        [error.get("message"), Some(error), body.get("message"), body.get("detail")].into_iter().flatten().find_map(Value::as_str)?;
    let code = error.get("code").or_else(|| error.get("type")).and_then(Value::as_str).map(str::to_owned);
    Some((code, one_line(message)))
}

/// On one line, short, and without what would move a terminal's cursor.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()).collect();
    words.join(" ").chars().take(ERROR_CHARS_MAX).collect()
}

/// The cause at the end of the chain, which is the one that says something.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests;
