//! A stand-in for an OpenAI-compatible server, in the process of the test: it answers from a script and keeps what it was
//! asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::channel::Channel;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// How the stand-in answers one request.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// A whole body.
    Whole {
        /// Of the response.
        status: u16,
        /// Of the response.
        body: String,
    },
    /// An event stream: pieces exactly as they are sent, each after its pause in milliseconds.
    Stream(Vec<(u64, String)>),
    /// The head of a stream, then nothing.
    Silence,
    /// The piece, then a connection that breaks.
    Broken(String),
}

/// One request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Of the request line.
    pub(crate) path: String,
    /// The `authorization` header.
    pub(crate) authorization: Option<String>,
    /// The body; null if it is no JSON.
    pub(crate) body: Value,
}

/// A running stand-in; it ends when dropped.
pub(crate) struct StandIn {
    /// Its `http://` address.
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _tasks: JoinSet<()>,
}

impl StandIn {
    /// Serves what `answer` says of each request.
    pub(crate) async fn start(answer: impl Fn(&Asked) -> Script + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket has an address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), asked.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("a connected socket takes the option");
                let (answer, log) = (answer.clone(), log.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request| respond(request, answer.clone(), log.clone()));
                    // A client that goes away is part of the tests.
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { url, asked, _tasks: tasks }
    }

    /// What it was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no test panics while it holds the lock").clone()
    }
}

/// A chunk of `/v1/completions` with this text.
pub(crate) fn text(text: &str) -> String {
    event(&json!({"choices": [{"index": 0, "text": text, "finish_reason": null}]}))
}

/// A chunk of `/v1/chat/completions` with this text.
pub(crate) fn delta(text: &str) -> String {
    event(&json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": null}]}))
}

/// The end of a stream: finish reason, usage if it is to be told, `[DONE]`.
pub(crate) fn end(usage: Option<(u64, u64)>) -> String {
    let mut end = event(&json!({"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]}));
    if let Some((prompt_tokens, completion_tokens)) = usage {
        end += &event(&json!({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}));
    }
    end + "data: [DONE]\n\n"
}

/// Any value as one event.
pub(crate) fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

type Body = BoxBody<Bytes, BrokenOff>;

/// What breaks a connection on purpose.
#[derive(Debug, thiserror::Error)]
#[error("broken on purpose")]
struct BrokenOff;

async fn respond<A: Fn(&Asked) -> Script>(
    request: Request<Incoming>,
    answer: Arc<A>,
    log: Arc<Mutex<Vec<Asked>>>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let authorization = request.headers().get("authorization").map(|value| value.to_str().expect("ASCII").to_owned());
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let asked = Asked { path, authorization, body: serde_json::from_slice(&body).unwrap_or_default() };
    let script = answer(&asked);
    log.lock().expect("no test panics while it holds the lock").push(asked);
    let response = Response::builder();
    Ok(match script {
        Script::Whole { status, body } => {
            response.status(status).body(Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed())
        }
        Script::Stream(pieces) => response.header("content-type", "text/event-stream; charset=utf-8").body(stream(pieces, After::End)),
        Script::Silence => response.header("content-type", "text/event-stream").body(stream(Vec::new(), After::Silence)),
        Script::Broken(piece) => response.header("content-type", "text/event-stream").body(stream(vec![(0, piece)], After::Break)),
    }
    .expect("the parts of a response are valid"))
}

#[derive(PartialEq)]
enum After {
    End,
    Silence,
    Break,
}

fn stream(pieces: Vec<(u64, String)>, after: After) -> Body {
    let (mut sender, body) = Channel::<Bytes, BrokenOff>::new(1);
    tokio::spawn(async move {
        for (pause_ms, piece) in pieces {
            if pause_ms > 0 {
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            }
            if sender.send_data(Bytes::from(piece)).await.is_err() {
                return;
            }
        }
        match after {
            After::End => (),
            After::Silence => tokio::time::sleep(Duration::from_secs(3600)).await,
            After::Break => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                sender.abort(BrokenOff);
            }
        }
    });
    body.boxed()
}
