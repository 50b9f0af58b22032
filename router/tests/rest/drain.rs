//! Shutting down: what runs finishes, what is new is refused, what never ends is cut.

use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::json;

use crate::support::{Server, chat};

const PATH: &str = "/v1/chat/completions";

#[tokio::test]
async fn running_requests_finish_and_new_ones_are_refused() {
    let mut server = Server::start().await;
    let running = server.open_post(PATH, &chat("acme/slow", json!({"stream": true, "max_tokens": 20}))).await;
    server.wait_live(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let refused = server.post(PATH, &chat("acme/story", json!({}))).await;
    assert_eq!(refused.error(), "503 draining -");
    assert_eq!(refused.header("connection"), "close");
    let text = running.into_body().collect().await.unwrap().to_bytes();
    assert!(text.ends_with(b"data: [DONE]\n\n"));
    tokio::time::timeout(Duration::from_secs(5), server.served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn drain_is_bounded() {
    let mut server = Server::with(|limits| limits.drain_ms = 100).await;
    let endless = chat("acme/slow", json!({"stream": true, "ignore_eos": true}));
    let response = server.open_post(PATH, &endless).await;
    server.wait_live(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(2), &mut server.served).await.unwrap().unwrap().unwrap();
    server.wait_live(0).await;
    drop(response);
}

#[tokio::test]
async fn what_has_not_arrived_yet_delays_no_stop() {
    for sent in ["GET /hea", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-acme\r\ncontent-length: 9\r\n\r\n{"]
    {
        let mut server = Server::start().await;
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, sent.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.stop.take().unwrap().send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(5), &mut server.served).await.expect(sent).unwrap().unwrap();
    }
}

#[tokio::test]
async fn backend_may_drain_first() {
    let server = Server::start().await;
    server.backend.draining.store(true, Ordering::SeqCst);
    assert_eq!(server.get("/v1/models").await.error(), "503 draining -");
}
