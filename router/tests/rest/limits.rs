//! Each limit, provoked.

use std::time::Duration;

use ashlar_router::io::rest::config::RestLimits;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Server, chat, completion};

async fn check(change: impl FnOnce(&mut RestLimits), path: &str, body: Value, expected: &str) {
    let server = Server::with(change).await;
    assert_eq!(server.post(path, &body).await.error(), expected, "{body}");
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn counts_and_lengths() {
    let story = |more| chat("acme/story", more);
    let two = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    check(|l| l.messages_max = 1, CHAT, story(json!({"messages": two})), "400 invalid_value messages").await;
    check(|l| l.choices_max = 2, CHAT, story(json!({"n": 3})), "400 invalid_value n").await;
    check(|l| l.stops_max = 1, CHAT, story(json!({"stop": ["a", "b"]})), "400 invalid_value stop").await;
    check(|l| l.stop_bytes_max = 3, CHAT, story(json!({"stop": "abcd"})), "400 invalid_value stop").await;
    check(|l| l.logit_bias_max = 1, CHAT, story(json!({"logit_bias": {"1": 1, "2": 1}})), "400 invalid_value logit_bias").await;
    check(|l| l.top_logprobs_max = 2, CHAT, story(json!({"logprobs": true, "top_logprobs": 3})), "400 invalid_value top_logprobs").await;
    check(|l| l.prompt_tokens_max = 5, CHAT, story(json!({})), "400 invalid_value messages").await;
    let complete = |more| completion("acme/story", more);
    check(|l| l.prompts_max = 1, COMPLETIONS, complete(json!({"prompt": ["a", "b"]})), "400 invalid_value prompt").await;
    check(|l| l.sequences_max = 5, COMPLETIONS, complete(json!({"prompt": ["a", "b"], "n": 3})), "400 invalid_value n").await;
    check(|l| l.top_logprobs_max = 2, COMPLETIONS, complete(json!({"logprobs": 3})), "400 invalid_value logprobs").await;
    check(|l| l.prompt_tokens_max = 5, COMPLETIONS, complete(json!({"prompt": [9, 9, 9, 9, 9, 9]})), "400 invalid_value prompt").await;
}

#[tokio::test]
async fn body_is_bounded_announced_or_not() {
    let server = Server::with(|limits| limits.body_bytes_max = 100).await;
    let body = chat("acme/story", json!({"user": "x".repeat(100)}));
    let announced = server.post(CHAT, &body).await;
    assert_eq!(announced.error(), "413 body_too_large -");
    assert_eq!(announced.header("connection"), "close");
    let chunked = exchange(&server, "transfer-encoding: chunked", &format!("{:x}\r\n{}\r\n0\r\n\r\n", 200, "x".repeat(200))).await;
    assert!(chunked.starts_with("HTTP/1.1 413 "), "{chunked}");
}

/// Sends a raw chat request and reads until the server closes.
async fn exchange(server: &Server, header: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer sk-acme\r\n{header}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut reply)).await.unwrap().unwrap();
    String::from_utf8(reply).unwrap()
}

#[tokio::test]
async fn slow_bodies_and_heads_are_given_up() {
    let server = Server::with(|limits| {
        limits.body_read_ms = 50;
        limits.header_read_ms = 100;
    })
    .await;
    let slow = exchange(&server, "content-length: 10", "{").await;
    assert!(slow.starts_with("HTTP/1.1 408 "), "{slow}");
    assert!(slow.contains(r#""code":"request_timeout""#), "{slow}");
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"GET /health HT").await.unwrap();
    let mut reply = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut reply)).await.expect("the server closes").ok();
}

#[tokio::test]
async fn concurrent_requests_are_bounded_and_room_comes_back() {
    let server = Server::with(|limits| limits.concurrent_requests_max = 1).await;
    let running = server.open_post(CHAT, &chat("acme/slow", json!({"stream": true}))).await;
    let refused = server.post(CHAT, &chat("acme/story", json!({}))).await;
    assert_eq!(refused.error(), "429 too_many_requests -");
    assert_eq!(refused.header("retry-after"), "1");
    drop(running);
    server.wait_live(0).await;
    assert_eq!(server.post(CHAT, &chat("acme/story", json!({}))).await.status, 200);
}

#[tokio::test]
async fn one_tenants_requests_leave_places_for_another() {
    let server = Server::with(|limits| limits.concurrent_requests_max = 4).await;
    let mut running = Vec::new();
    for _ in 0..3 {
        running.push(server.open_post(CHAT, &chat("acme/slow", json!({"stream": true}))).await);
    }
    let refused = server.post(CHAT, &chat("acme/story", json!({}))).await;
    assert_eq!(refused.error(), "429 too_many_requests -");
    assert_eq!(refused.header("retry-after"), "1");
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "tenant acme has 3 requests running, its share of this router while others ask; try again");
    let other = [("authorization", "Bearer sk-other")];
    let let_in = server.open(hyper::Method::POST, CHAT, &other, chat("acme/story", json!({})).to_string()).await;
    assert_eq!(let_in.status(), 404, "let in, and not shown another's model");
    let reply = server.send(hyper::Method::GET, "/metrics", &[], "").await;
    let line = r#"ashlar_requests_total{code="too_many_requests",model="other",tenant="acme"} 1"#;
    assert!(reply.text.lines().any(|l| l == line), "{line} is not in\n{}", reply.text);
}

#[tokio::test]
async fn slow_senders_take_no_room_from_others() {
    let server = Server::with(|limits| limits.concurrent_requests_max = 1).await;
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer sk-acme\r\ncontent-length: 100\r\n\r\n{{");
    slow.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let refused = server.post(CHAT, &chat("acme/story", json!({}))).await;
    assert_eq!(refused.error(), "429 too_many_requests -", "the same tenant has its limit of bodies on their way");
    let other =
        server.open(hyper::Method::POST, CHAT, &[("authorization", "Bearer sk-other")], chat("acme/story", json!({})).to_string()).await;
    assert_eq!(other.status(), 404, "let in, and not shown another's model");
}

#[tokio::test]
async fn text_that_cannot_fit_is_refused_unread() {
    let server = Server::start().await;
    let long = "a".repeat(2 << 20);
    let refused = server.post(COMPLETIONS, &completion("acme/story", json!({"prompt": long}))).await;
    assert_eq!(refused.error(), "400 context_length_exceeded prompt");
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("2097152 bytes"), "{}", refused.json());
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let server = Server::with(|limits| limits.connections_max = 1).await;
    let held = TcpStream::connect(server.address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut waits = Box::pin(server.get("/health"));
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut waits).await.is_err());
    drop(held);
    assert_eq!(tokio::time::timeout(Duration::from_secs(5), waits).await.unwrap().status, 200);
}
