//! `POST /v1/completions`.

use serde_json::{Value, json};

use crate::support::backend::STORY;
use crate::support::{Server, completion};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn answer_has_openais_shape() {
    let server = Server::start().await;
    let reply = server.post(PATH, &completion("acme/story", json!({}))).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    let body = reply.json();
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(body["choices"], json!([{"index": 0, "text": format!("0:{STORY}"), "logprobs": null, "finish_reason": "stop"}]));
    assert_eq!(body["usage"]["prompt_tokens"], 3); // the beginning-of-sequence token, H, i
}

#[tokio::test]
async fn prompts_come_in_four_shapes() {
    let server = Server::start().await;
    for (prompt, expected) in [
        (json!("Hi"), vec![vec![2, 75, 108]]),
        (json!(["H", "i"]), vec![vec![2, 75], vec![2, 108]]),
        (json!([75, 108]), vec![vec![75, 108]]),
        (json!([[75], [108, 108]]), vec![vec![75], vec![108, 108]]),
    ] {
        server.backend.started.lock().unwrap().clear();
        let reply = server.post(PATH, &completion("acme/story", json!({"prompt": prompt, "n": 2, "max_tokens": 1}))).await;
        assert_eq!(reply.status, 200, "{}", reply.text);
        let started = server.backend.started.lock().unwrap();
        let prompts: Vec<Vec<u32>> = started.iter().step_by(2).map(|sequence| sequence.prompt.to_vec()).collect();
        assert_eq!(prompts, expected);
        let body = reply.json();
        let texts: Vec<&str> = body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(texts, ["0", "1"].repeat(expected.len()));
        assert_eq!(body["usage"]["prompt_tokens"], expected.concat().len());
    }
}

#[tokio::test]
async fn sixteen_tokens_are_the_default() {
    let server = Server::start().await;
    let reply = server.post(PATH, &json!({"model": "acme/story", "prompt": "Hi"})).await.json();
    assert_eq!((&reply["usage"]["completion_tokens"], &reply["choices"][0]["finish_reason"]), (&json!(16), &json!("length")));
    // The default gives way to the context; what is asked for does not.
    let long = json!({"model": "acme/story", "prompt": vec![75; 250]});
    assert_eq!(server.post(PATH, &long).await.json()["usage"]["completion_tokens"], 6);
    let asked = json!({"model": "acme/story", "prompt": vec![75; 250], "max_tokens": 7});
    let refused = server.post(PATH, &asked).await;
    assert_eq!(refused.error(), "400 context_length_exceeded prompt");
    assert!(refused.text.contains("context is 256 tokens, but 257 were asked for (250 in the prompt, 7 to generate)"), "{}", refused.text);
}

#[tokio::test]
async fn stream_has_the_same_shape() {
    let server = Server::start().await;
    let body = completion("acme/story", json!({"stream": true, "stream_options": {"include_usage": true}}));
    let reply = server.post(PATH, &body).await;
    let chunks = reply.chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, format!("0:{STORY}"));
    let end = &chunks[chunks.len() - 2]["choices"][0];
    assert_eq!(*end, json!({"index": 0, "text": "", "logprobs": null, "finish_reason": "stop"}));
    assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    assert!(chunks.last().unwrap()["usage"]["total_tokens"].as_u64().unwrap() > 10);
}

#[tokio::test]
async fn logprobs_are_parallel_lists() {
    let server = Server::start().await;
    let body = completion("acme/story", json!({"logprobs": 2, "max_tokens": 4}));
    let reply = server.post(PATH, &body).await.json();
    assert_eq!(
        reply["choices"][0]["logprobs"],
        json!({
            "text_offset": [0, 1, 2, 5],
            "token_logprobs": [-0.125, -0.25, -0.375, -0.5],
            "tokens": ["0", ":", "the", " "],
            "top_logprobs": [{"0": -0.125, "1": -1.125}, {":": -0.25, ";": -1.25}, {"the": -0.375, " the": -1.375}, {" ": -0.5, "!": -1.5}],
        })
    );
    let none = server.post(PATH, &completion("acme/story", json!({"logprobs": 0, "max_tokens": 1}))).await.json();
    assert_eq!(
        none["choices"][0]["logprobs"],
        json!({"text_offset": [0], "token_logprobs": [-0.125], "tokens": ["0"], "top_logprobs": null})
    );
    // Offsets count characters, also after wide ones and in a stream.
    let all = completion("acme/story", json!({"logprobs": 0, "stream": true, "stop": "naïve"}));
    let reply = server.post(PATH, &all).await;
    let last = reply.chunks().iter().filter_map(|c| c["choices"][0]["logprobs"]["text_offset"].as_array().cloned()).flatten().last();
    assert_eq!(last, Some(Value::from("0:the fox and the 😀".chars().count())));
}

#[tokio::test]
async fn model_without_template_still_completes() {
    let server = Server::start().await;
    assert_eq!(server.post(PATH, &completion("acme/bare", json!({"best_of": 1, "echo": false, "suffix": ""}))).await.status, 200);
}
