//! `GET /health`, `GET /ready`.

use std::sync::atomic::Ordering;

use hyper::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::Server;

#[tokio::test]
async fn probes_need_no_key_and_tell_what_is_missing() {
    let server = Server::start().await;
    let probe = async |path: &str| {
        let reply = server.send(Method::GET, path, &[], "").await;
        (reply.status, reply.json())
    };
    assert_eq!(probe("/health").await, (200, json!({"status": "ok"})));
    assert_eq!(probe("/ready").await, (200, json!({"status": "ready"})));
    server.backend.ready.store(false, Ordering::SeqCst);
    assert_eq!(probe("/ready").await, (503, json!({"status": "not_ready", "reason": "no executor is there"})));
    server.backend.draining.store(true, Ordering::SeqCst);
    assert_eq!(probe("/ready").await, (503, json!({"status": "draining"})));
    assert_eq!(probe("/health").await, (200, json!({"status": "ok"})));
}

#[tokio::test]
async fn connection_serves_one_request_after_the_other() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for _ in 0..3 {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n").await.unwrap();
        let mut reply = [0; 1024];
        let count = stream.read(&mut reply).await.unwrap();
        assert!(reply[..count].starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
}
