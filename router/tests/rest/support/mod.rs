//! A server on a port of its own, and a client that sees status, headers and frames as they are.

pub(crate) mod backend;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ashlar_router::io::metrics::RouterMetrics;
use ashlar_router::io::rest::config::{RestConfig, RestLimits};
use ashlar_router::io::rest::serve;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use backend::ScriptedBackend;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) backend: Arc<ScriptedBackend>,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) served: JoinHandle<std::io::Result<()>>,
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name}")).to_str().unwrap()
    }

    /// `status code param`, the gist of an error.
    pub(crate) fn error(&self) -> String {
        let error = &self.json()["error"];
        format!("{} {} {}", self.status, error["code"].as_str().unwrap(), error["param"].as_str().unwrap_or("-"))
    }

    /// The chunks of a stream, which must be framed exactly and end with `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), "text/event-stream; charset=utf-8");
        let events = self.text.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no end in {}", self.text));
        let mut chunks = Vec::new();
        for event in events.split_inclusive("\n\n") {
            let data = event.strip_suffix("\n\n").and_then(|event| event.strip_prefix("data: "));
            let data = data.unwrap_or_else(|| panic!("no event: {event:?}"));
            assert!(!data.contains('\n'));
            chunks.push(serde_json::from_str(data).unwrap());
        }
        chunks
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut RestLimits)) -> Self {
        let mut limits = RestLimits::default();
        change(&mut limits);
        Self::of(limits, true).await
    }

    pub(crate) async fn of(limits: RestLimits, is_administered: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = ScriptedBackend::new();
        let administration = is_administered.then(|| Arc::clone(&backend) as _);
        let config = RestConfig { limits, metrics: RouterMetrics::new().unwrap(), registries: Vec::new(), administration };
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let served = tokio::spawn(serve(listener, Arc::clone(&backend) as _, config, shutdown));
        Self { address, backend, stop: Some(stop), served }
    }

    pub(crate) async fn open(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "test");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap()
    }

    pub(crate) async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        let response = self.open(method, path, headers, body).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Reply { status: head.status.as_u16(), headers: head.headers, text: String::from_utf8(body.to_vec()).unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[("authorization", "Bearer sk-acme")], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<Bytes>) -> Reply {
        let headers = [("authorization", "Bearer sk-acme"), ("content-type", "application/json")];
        self.send(Method::POST, path, &headers, body).await
    }

    pub(crate) async fn open_post(&self, path: &str, body: &Value) -> Response<Incoming> {
        let headers = [("authorization", "Bearer sk-acme"), ("content-type", "application/json")];
        self.open(Method::POST, path, &headers, body.to_string()).await
    }

    /// Waits until that many sequences live.
    pub(crate) async fn wait_live(&self, count: usize) {
        for _ in 0..500 {
            if self.backend.live.load(Ordering::SeqCst) == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{} sequences live, not {count}", self.backend.live.load(Ordering::SeqCst));
    }
}

/// A chat body with more parameters.
pub(crate) fn chat(model: &str, more: Value) -> Value {
    merge(json!({"model": model, "messages": [{"role": "user", "content": "Hi"}]}), more)
}

/// A completion body with more parameters.
pub(crate) fn completion(model: &str, more: Value) -> Value {
    merge(json!({"model": model, "prompt": "Hi", "max_tokens": 100}), more)
}

fn merge(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}
