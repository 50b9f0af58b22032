//! Error bodies, as clients see them: tests/data/errors.txt is the contract. `UPDATE_GOLDENS=1` rewrites it.

use std::fmt::Write as _;

use ashlar_router::io::rest::config::RestLimits;
use ashlar_wire::code::Code;
use hyper::Method;
use serde_json::json;

use crate::support::{Server, chat, completion};

const CHAT: &str = "/v1/chat/completions";
const KEY: (&str, &str) = ("authorization", "Bearer sk-acme");
const JSON: (&str, &str) = ("content-type", "application/json");

#[tokio::test]
async fn error_bodies_are_those_of_the_golden() {
    let server = Server::start().await;
    let mut picture = String::new();
    let mut show = async |what: &str, method: Method, path: &str, headers: &[(&str, &str)], body: String| {
        let reply = server.send(method.clone(), path, headers, body.clone()).await;
        assert!(reply.header("x-request-id").starts_with("req_"));
        let body = if body.len() > 160 { format!("{}... ({} bytes)", &body[..60], body.len()) } else { body };
        writeln!(picture, "# {what}\n{method} {path} {body}\n----\n{} {}\n", reply.status, reply.text).unwrap();
    };

    show("no key", Method::GET, "/v1/models", &[], String::new()).await;
    show("wrong key", Method::GET, "/v1/models", &[("authorization", "Bearer sk-wrong")], String::new()).await;
    show("wrong scheme", Method::GET, "/v1/models", &[("authorization", "Basic YTpi")], String::new()).await;
    show("no route", Method::GET, "/v1/nothing", &[KEY], String::new()).await;
    show("wrong verb", Method::GET, CHAT, &[KEY], String::new()).await;
    show("wrong verb on a wildcard", Method::DELETE, "/v1/models/acme/story", &[KEY], String::new()).await;
    show("wrong media type", Method::POST, CHAT, &[KEY, ("content-type", "text/plain")], "{}".to_owned()).await;

    let deep = format!("{{\"model\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for (what, body) in [
        ("empty body", ""),
        ("cut off", r#"{"model":"#),
        ("no object", "[]"),
        ("deep nesting", deep.as_str()),
        ("lone surrogate", r#"{"model":"acme/story","messages":[{"role":"user","content":"\ud800"}]}"#),
        ("lone surrogate in the model", r#"{"model":"\udfff"}"#),
        ("number out of range", r#"{"model":"acme/story","messages":[{"role":"user","content":"x"}],"temperature":1e999}"#),
        ("no model", r#"{"messages":[]}"#),
        ("model of a wrong type", r#"{"model":1,"messages":[]}"#),
        ("unknown model", r#"{"model":"acme/none","messages":[]}"#),
    ] {
        show(what, Method::POST, CHAT, &[KEY, JSON], body.to_owned()).await;
    }
    let message = |message: serde_json::Value| json!({"messages": [{"role": "user", "content": "a"}, message]});
    for (what, more) in [
        ("unknown parameter", json!({"best_off": 1})),
        ("tools", json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
        ("response format", json!({"response_format": {"type": "json_object"}})),
        ("store", json!({"store": true})),
        ("no messages", json!({"messages": []})),
        ("messages of a wrong type", json!({"messages": "Hi"})),
        ("message of a wrong type", message(json!("Hi"))),
        ("no role", message(json!({"content": "a"}))),
        ("unknown role", message(json!({"role": "king", "content": "a"}))),
        ("tool role", message(json!({"role": "tool", "content": "a", "tool_call_id": "1"}))),
        ("no content", message(json!({"role": "user", "content": null}))),
        ("content of a wrong type", message(json!({"role": "user", "content": 5}))),
        ("image part", message(json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}))),
        ("part without text", message(json!({"role": "user", "content": [{"type": "text"}]}))),
        ("unknown field of a message", message(json!({"role": "user", "content": "a", "weight": 1}))),
        ("tool calls", message(json!({"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}))),
        ("template refuses", message(json!({"role": "system", "content": "late"}))),
        ("temperature too high", json!({"temperature": 2.1})),
        ("temperature of a wrong type", json!({"temperature": "hot"})),
        ("top_p negative", json!({"top_p": -0.1})),
        ("top_k fraction", json!({"top_k": 1.5})),
        ("min_p too high", json!({"min_p": 2})),
        ("zero tokens", json!({"max_tokens": 0})),
        ("negative tokens", json!({"max_completion_tokens": -5})),
        ("two bounds", json!({"max_completion_tokens": 5, "max_tokens": 6})),
        ("seed fraction", json!({"seed": 0.5})),
        ("seed too large", json!({"seed": 18446744073709551615u64})),
        ("n zero", json!({"n": 0})),
        ("empty stop", json!({"stop": ""})),
        ("stop of a wrong type", json!({"stop": [1]})),
        ("presence penalty", json!({"presence_penalty": 3})),
        ("frequency penalty", json!({"frequency_penalty": -3})),
        ("repetition penalty", json!({"repetition_penalty": 0})),
        ("bias too large", json!({"logit_bias": {"1": 101}})),
        ("bias of no token", json!({"logit_bias": {"269": 1}})),
        ("bias of an id in another spelling", json!({"logit_bias": {"+5": 1}})),
        ("bias of a wrong type", json!({"logit_bias": [1]})),
        ("logprobs of a wrong type", json!({"logprobs": 3})),
        ("top_logprobs alone", json!({"top_logprobs": 3})),
        ("top_logprobs too many", json!({"logprobs": true, "top_logprobs": 21})),
        ("stream of a wrong type", json!({"stream": "yes"})),
        ("stream options without a stream", json!({"stream_options": {"include_usage": true}})),
        ("unknown stream option", json!({"stream": true, "stream_options": {"include_all": true}})),
        ("user of a wrong type", json!({"user": 1})),
        ("over the context", json!({"max_tokens": 300})),
        ("prompt over the context", json!({"messages": [{"role": "user", "content": "x".repeat(300)}]})),
    ] {
        show(what, Method::POST, CHAT, &[KEY, JSON], chat("acme/story", more).to_string()).await;
    }
    show("no chat template", Method::POST, CHAT, &[KEY, JSON], chat("acme/bare", json!({})).to_string()).await;
    for (what, more) in [
        ("no prompt", json!({"prompt": null})),
        ("empty prompts", json!({"prompt": []})),
        ("empty token prompt", json!({"prompt": [[]]})),
        ("mixed prompts", json!({"prompt": ["a", 1]})),
        ("token out of range", json!({"prompt": [269]})),
        ("negative token", json!({"prompt": [-1]})),
        ("token of more than 32 bits", json!({"prompt": [[1],[4_294_967_297_u64]]})),
        ("echo", json!({"echo": true})),
        ("suffix", json!({"suffix": "end"})),
        ("best_of", json!({"best_of": 2})),
        ("logprobs of chat", json!({"logprobs": true})),
        ("prompt over the context", json!({"prompt": vec![9; 256]})),
        ("messages", json!({"messages": []})),
    ] {
        show(what, Method::POST, "/v1/completions", &[KEY, JSON], completion("acme/story", more).to_string()).await;
    }

    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/errors.txt");
    if std::env::var_os("UPDATE_GOLDENS").is_some() {
        std::fs::write(path, &picture).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    for (index, (seen, expected)) in picture.lines().zip(golden.lines()).enumerate() {
        assert_eq!(seen, expected, "line {} of tests/data/errors.txt", index + 1);
    }
    assert_eq!(picture.lines().count(), golden.lines().count());
}

/// What the documentation must name, so that it stays true.
#[test]
fn documentation_names_each_code_and_limit() {
    let documentation = include_str!("../../../docs/api.md");
    for code in Code::ALL.iter().filter(|code| code.http_status() != 409) {
        let rows = documentation.lines().filter(|line| line.starts_with('|') && line.contains(&code.http_status().to_string()));
        assert!(rows.into_iter().any(|row| row.contains(&format!("`{code}`"))), "{code} is not in the table of errors");
    }
    let limits = serde_json::to_value(RestLimits::default()).unwrap();
    for name in limits.as_object().unwrap().keys() {
        assert!(documentation.contains(&format!("`{name}`")), "{name} is not in the table of limits");
    }
}

#[tokio::test]
async fn server_survives_bodies_of_noise() {
    let server = Server::start().await;
    let base = chat("acme/story", json!({"stop": ["a"], "logit_bias": {"1": 2}, "max_tokens": 2})).to_string().into_bytes();
    let mut state = 1u64;
    for _ in 0..300 {
        let mut body = base.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) as usize % body.len();
            body[at] = (state >> 20) as u8;
        }
        ashlar_router::io::rest::fuzz_chat_body(&body);
        let reply = server.post_text(CHAT, body).await;
        assert!(matches!(reply.status, 200 | 400 | 404), "{} {}", reply.status, reply.text);
    }
}
