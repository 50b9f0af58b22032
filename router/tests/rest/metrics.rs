//! `GET /metrics`.

use hyper::Method;
use serde_json::json;

use crate::support::{Server, chat};

#[tokio::test]
async fn requests_are_counted_by_model_tenant_and_code() {
    let server = Server::start().await;
    server.post("/v1/chat/completions", &chat("acme/story", json!({"max_tokens": 4}))).await;
    server.post("/v1/chat/completions", &chat("acme/breaks", json!({"stream": true}))).await;
    server.post("/v1/chat/completions", &chat("acme/unknown", json!({}))).await;
    server.post("/v1/chat/completions", &chat("acme/story", json!({"n": 0}))).await;
    server.post("/v1/chat/completions", &chat("acme/story", json!({"max_tokens": 1_000_000}))).await;
    server.send(Method::POST, "/v1/chat/completions", &[("authorization", "Bearer sk-nobody")], "{}").await;
    let response = server.open_post("/v1/chat/completions", &chat("acme/slow", json!({"stream": true}))).await;
    drop(response);
    server.wait_live(0).await;
    let reply = server.send(Method::GET, "/metrics", &[], "").await;
    assert_eq!((reply.status, reply.header("content-type")), (200, "text/plain; version=0.0.4; charset=utf-8"));
    for line in [
        r#"ashlar_requests_total{code="ok",model="acme/story",tenant="acme"} 1"#,
        r#"ashlar_requests_total{code="unavailable",model="acme/breaks",tenant="acme"} 1"#,
        r#"ashlar_requests_total{code="model_not_found",model="other",tenant="acme"} 1"#,
        r#"ashlar_requests_total{code="invalid_api_key",model="other",tenant="other"} 1"#,
        r#"ashlar_requests_total{code="invalid_value",model="acme/story",tenant="acme"} 1"#,
        r#"ashlar_requests_total{code="context_length_exceeded",model="acme/story",tenant="acme"} 1"#,
        r#"ashlar_requests_total{code="cancelled",model="acme/slow",tenant="acme"} 1"#,
        r#"ashlar_prompt_tokens_total{model="acme/story",tenant="acme"} 21"#,
        r#"ashlar_generated_tokens_total{model="acme/story",tenant="acme"} 4"#,
        r#"ashlar_time_to_first_token_seconds_count{model="acme/story"} 1"#,
        r#"ashlar_inter_token_latency_seconds_count{model="acme/story"} 3"#,
        r#"ashlar_request_duration_seconds_count{model="acme/story"} 1"#,
        r#"vllm:e2e_request_latency_seconds_count{model_name="acme/story"} 1"#,
        r#"vllm:generation_tokens_total{model_name="acme/story",tenant="acme"} 4"#,
        "ashlar_requests_in_flight 0",
    ] {
        assert!(reply.text.lines().any(|l| l == line), "{line} is not in\n{}", reply.text);
    }
}
