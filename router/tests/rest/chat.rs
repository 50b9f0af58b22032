//! `POST /v1/chat/completions`.

use ashlar_zoo::digest::Digest;
use serde_json::{Value, json};

use crate::support::backend::{CACHED, IM_END, STORY};
use crate::support::{Reply, Server, chat};

const PATH: &str = "/v1/chat/completions";
/// `<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n` in the small tokenizer.
const PROMPT_TOKENS: u64 = 21;

fn content(reply: &Reply) -> String {
    let choices = reply.chunks().into_iter().filter_map(|chunk| chunk["choices"].get(0).cloned());
    choices.map(|choice| choice["delta"]["content"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
async fn answer_has_openais_shape() {
    let server = Server::start().await;
    let reply = server.post(PATH, &chat("acme/story", json!({"seed": -7, "user": "u"}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let body = reply.json();
    let story = format!("0:{STORY}");
    let tokens = server.backend.encode(&story).len() as u64 + 1; // and the stop token
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "message": {"role": "assistant", "content": story, "refusal": null}, "logprobs": null, "finish_reason": "stop"}])
    );
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens,
               "prompt_tokens_details": {"cached_tokens": CACHED}})
    );
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("acme/story")));
    assert_eq!(reply.header("x-ashlar-seed"), "-7");
    let chain = Digest::of(b"story").to_string();
    assert_eq!(reply.header("x-ashlar-chain"), chain);
    assert_eq!(body["system_fingerprint"], format!("fp_{}", &chain[..12]));
    let number = reply.header("x-request-id").strip_prefix("req_").unwrap();
    assert_eq!(body["id"], format!("chatcmpl-{number}"));
}

#[tokio::test]
async fn prompt_is_the_rendered_template() {
    let server = Server::start().await;
    let messages = json!([
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "c", "refusal": null, "tool_calls": [], "annotations": [], "audio": null, "function_call": null},
        {"role": "user", "content": "d"},
    ]);
    let reply = server.post(PATH, &chat("acme/story", json!({"messages": messages}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let expected = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n\
                    <|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n";
    let started = server.backend.started.lock().unwrap();
    assert_eq!(started[0].prompt.to_vec(), server.backend.encode(expected));
    assert_eq!(started[0].generated_tokens_max as usize, 256 - started[0].prompt.len());
}

#[tokio::test]
async fn stream_says_the_same_in_chunks() {
    let server = Server::start().await;
    let reply = server.post(PATH, &chat("acme/story", json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    let chunks = reply.chunks();
    let choice = |at: usize| chunks[at]["choices"][0].clone();
    assert_eq!(choice(0), json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}));
    assert_eq!(choice(1), json!({"index": 0, "delta": {"content": "0"}, "logprobs": null, "finish_reason": null}));
    assert_eq!(choice(chunks.len() - 1), json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"}));
    assert_eq!(content(&reply), format!("0:{STORY}"));
    for chunk in &chunks {
        assert_eq!((&chunk["object"], &chunk["id"]), (&json!("chat.completion.chunk"), &chunks[0]["id"]));
        assert!(chunk.get("usage").is_none());
    }
    // Bytes of one character wait for each other.
    assert!(chunks.iter().any(|chunk| chunk["choices"][0]["delta"]["content"] == "😀"));
}

#[tokio::test]
async fn stream_ends_with_usage_when_asked() {
    let server = Server::start().await;
    let body = chat("acme/story", json!({"stream": true, "stream_options": {"include_usage": true}, "max_tokens": 4}));
    let reply = server.post(PATH, &body).await;
    let chunks = reply.chunks();
    let (last, rest) = chunks.split_last().unwrap();
    assert!(rest.iter().all(|chunk| chunk["usage"] == Value::Null && chunk.get("usage").is_some()));
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 4);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], CACHED);
    assert_eq!(rest.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn stop_strings_are_cut_and_not_leaked() {
    let server = Server::start().await;
    for (stop, expected) in [
        (json!("END"), "0:the fox and the 😀 naïve bear. "),
        (json!([" naïve b", "zzz"]), "0:the fox and the 😀"),
        (json!(["😀", "fox and the 😀"]), "0:the "),
        (json!([]), "0:the fox and the 😀 naïve bear. END of it"),
    ] {
        let whole = server.post(PATH, &chat("acme/story", json!({"stop": stop, "logprobs": true}))).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], expected);
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], CACHED, "also where the router ends it");
        let streamed = server.post(PATH, &chat("acme/story", json!({"stop": stop, "stream": true, "logprobs": true}))).await;
        assert_eq!(content(&streamed), expected);
        // Log probabilities spell the same text, whole and streamed.
        let spelled = |entries: Vec<Value>| -> Vec<u8> {
            entries.iter().flat_map(|e| e["bytes"].as_array().unwrap().clone()).map(|b| b.as_u64().unwrap() as u8).collect()
        };
        let entries = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
        assert_eq!(String::from_utf8(spelled(entries.clone())).unwrap(), expected);
        let parts = streamed.chunks().into_iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned());
        assert_eq!(parts.flatten().collect::<Vec<_>>(), entries);
    }
    server.wait_live(0).await;
}

#[tokio::test]
async fn logprobs_have_openais_shape() {
    let server = Server::start().await;
    let body = chat("acme/story", json!({"logprobs": true, "top_logprobs": 2, "max_completion_tokens": 3}));
    let reply = server.post(PATH, &body).await.json();
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["refusal"], Value::Null);
    assert_eq!(
        logprobs["content"],
        json!([
            {"token": "0", "logprob": -0.125, "bytes": [48],
             "top_logprobs": [{"token": "0", "logprob": -0.125, "bytes": [48]}, {"token": "1", "logprob": -1.125, "bytes": [49]}]},
            {"token": ":", "logprob": -0.25, "bytes": [58],
             "top_logprobs": [{"token": ":", "logprob": -0.25, "bytes": [58]}, {"token": ";", "logprob": -1.25, "bytes": [59]}]},
            {"token": "the", "logprob": -0.375, "bytes": [116, 104, 101],
             "top_logprobs": [{"token": "the", "logprob": -0.375, "bytes": [116, 104, 101]}, {"token": " the", "logprob": -1.375, "bytes": [32, 116, 104, 101]}]},
        ])
    );
}

#[tokio::test]
async fn each_choice_is_a_sequence_of_one_seed() {
    let server = Server::start().await;
    let reply = server.post(PATH, &chat("acme/story", json!({"n": 3, "max_tokens": 2}))).await;
    let body = reply.json();
    let contents: Vec<&str> = (0..3).map(|k| body["choices"][k]["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(contents, ["0:", "1:", "2:"]);
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(PROMPT_TOKENS), &json!(6)));
    let seed: u64 = reply.header("x-ashlar-seed").parse().unwrap();
    assert!(seed < 1 << 53, "every client's JSON can hold it");
    assert!(server.backend.started.lock().unwrap().iter().all(|sequence| sequence.seed == seed));

    let streamed = server.post(PATH, &chat("acme/story", json!({"n": 2, "max_tokens": 2, "stream": true}))).await;
    let mut texts = [String::new(), String::new()];
    for chunk in streamed.chunks() {
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["delta"]["content"].as_str().unwrap_or_default();
    }
    assert_eq!(texts, ["0:", "1:"]);
}

#[tokio::test]
async fn parameters_reach_the_sequence() {
    let server = Server::start().await;
    let more = json!({"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": -1, "frequency_penalty": 1.5,
        "repetition_penalty": 1.1, "logit_bias": {"12": -100, "5": 3.5}, "seed": 9, "ignore_eos": true, "max_tokens": 3,
        "tools": null, "tool_choice": "none", "response_format": {"type": "text"}, "store": false, "metadata": {}, "service_tier": "auto"});
    assert_eq!(server.post(PATH, &chat("acme/tuned", more)).await.status, 200);
    // Silence takes the checkpoint's defaults, or OpenAI's where it has none.
    assert_eq!(server.post(PATH, &chat("acme/tuned", json!({}))).await.status, 200);
    assert_eq!(server.post(PATH, &chat("acme/story", json!({"temperature": null, "top_k": -1}))).await.status, 200);
    let started = server.backend.started.lock().unwrap();
    let s = &started[0].sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.0, 0.5, 7, 0.1));
    assert_eq!((s.presence_penalty, s.frequency_penalty, s.repetition_penalty), (-1.0, 1.5, 1.1));
    assert_eq!(s.logit_bias.iter().map(|b| (b.token, b.bias)).collect::<Vec<_>>(), [(5, 3.5), (12, -100.0)]);
    assert_eq!((started[0].seed, started[0].stop_tokens.len(), started[0].generated_tokens_max), (9, 0, 3));
    let s = &started[1].sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.repetition_penalty), (0.5, 0.75, 40, 1.25));
    assert_eq!(started[1].stop_tokens, [IM_END, 2]);
    let s = &started[2].sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.repetition_penalty, s.logprobs), (1.0, 1.0, 0, 1.0, false));
}

#[tokio::test]
async fn failure_before_the_first_token_has_its_own_status() {
    let server = Server::start().await;
    for stream in [false, true] {
        let late = server.post(PATH, &chat("acme/late", json!({"stream": stream}))).await;
        assert_eq!(late.error(), "400 never_fits -");
        let not_ready = server.post(PATH, &chat("acme/not-ready", json!({"stream": stream}))).await;
        assert_eq!(not_ready.error(), "503 model_not_ready -");
        assert_eq!(not_ready.header("retry-after"), "1");
    }
}

#[tokio::test]
async fn failure_inside_a_stream_is_its_last_event() {
    let server = Server::start().await;
    let reply = server.post(PATH, &chat("acme/breaks", json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    let chunks = reply.chunks();
    assert_eq!(
        chunks.last().unwrap(),
        &json!({"error": {"message": "the executor was lost", "type": "server_error", "param": null, "code": "unavailable"}})
    );
    assert_eq!(server.post(PATH, &chat("acme/breaks", json!({}))).await.error(), "503 unavailable -");
    server.wait_live(0).await;
}

#[tokio::test]
async fn panic_is_an_internal_error_and_the_server_lives() {
    let server = Server::start().await;
    assert_eq!(server.post(PATH, &chat("acme/panics", json!({}))).await.error(), "500 internal_error -");
    assert_eq!(server.post(PATH, &chat("acme/story", json!({}))).await.status, 200);
}

#[tokio::test]
async fn silent_stream_is_kept_alive() {
    let server = Server::with(|limits| limits.keep_alive_ms = 5).await;
    let reply = server.post(PATH, &chat("acme/slow", json!({"stream": true, "max_tokens": 3}))).await;
    assert!(reply.text.contains(": keep-alive\n\n"));
}
