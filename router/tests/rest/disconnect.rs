//! A client that goes away frees its sequences.

use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::{Server, chat};

#[tokio::test]
async fn dropped_stream_cancels_all_its_sequences() {
    let server = Server::start().await;
    let mut response = server.open_post("/v1/chat/completions", &chat("acme/slow", json!({"stream": true, "n": 3}))).await;
    response.frame().await.unwrap().unwrap();
    server.wait_live(3).await;
    drop(response);
    server.wait_live(0).await;
}

#[tokio::test]
async fn client_that_waits_for_a_whole_answer_may_go_too() {
    let server = Server::start().await;
    let body = chat("acme/slow", json!({})).to_string();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer sk-acme\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    server.wait_live(1).await;
    drop(stream);
    server.wait_live(0).await;
}

#[tokio::test]
async fn stop_string_ends_its_sequence_while_others_run() {
    let server = Server::start().await;
    let response = server.open_post("/v1/chat/completions", &chat("acme/slow", json!({"stream": true, "n": 2, "stop": "0:"}))).await;
    server.wait_live(1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.wait_live(1).await;
    drop(response);
    server.wait_live(0).await;
}
