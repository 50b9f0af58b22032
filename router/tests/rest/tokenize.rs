//! `POST /tokenize`, `POST /detokenize`.

use serde_json::json;

use crate::support::Server;

#[tokio::test]
async fn prompt_and_messages_are_encoded_as_the_routes_do() {
    let server = Server::start().await;
    let plain = server.post("/tokenize", &json!({"model": "acme/story", "prompt": "the b", "return_token_strs": true})).await;
    assert_eq!(
        plain.json(),
        json!({"count": 3, "max_model_len": 256, "tokens": [2, 260, 267], "token_strs": ["<|endoftext|>", "the", "Ġb"]})
    );
    let bare = server.post("/tokenize", &json!({"model": "acme/story", "prompt": "the b", "add_special_tokens": false})).await;
    assert_eq!(bare.json(), json!({"count": 2, "max_model_len": 256, "tokens": [260, 267], "token_strs": null}));
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let chat = server.post("/tokenize", &json!({"model": "acme/story", "messages": messages, "add_generation_prompt": false})).await;
    assert_eq!(chat.json()["tokens"], json!(server.backend.encode("<|im_start|>user\nHi<|im_end|>\n")));
}

#[tokio::test]
async fn tokens_are_decoded_with_special_ones() {
    let server = Server::start().await;
    let reply = server.post("/detokenize", &json!({"model": "acme/story", "tokens": [2, 260, 267, 1]})).await;
    assert_eq!(reply.json(), json!({"prompt": "<|endoftext|>the b<|im_end|>"}));
    assert_eq!(server.post("/detokenize", &json!({"model": "acme/story", "tokens": []})).await.json(), json!({"prompt": ""}));
}

#[tokio::test]
async fn mistakes_name_their_param() {
    let server = Server::start().await;
    for (path, body, expected) in [
        ("/tokenize", json!({"model": "acme/story"}), "400 invalid_value messages"),
        (
            "/tokenize",
            json!({"model": "acme/story", "prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
            "400 invalid_value messages",
        ),
        (
            "/tokenize",
            json!({"model": "acme/story", "prompt": "a", "add_generation_prompt": true}),
            "400 invalid_value add_generation_prompt",
        ),
        ("/tokenize", json!({"model": "acme/story", "prompt": 1}), "400 invalid_value prompt"),
        ("/tokenize", json!({"model": "acme/bare", "messages": [{"role": "user", "content": "b"}]}), "400 no_chat_template -"),
        ("/detokenize", json!({"model": "acme/story", "tokens": [269]}), "400 invalid_value tokens"),
        ("/detokenize", json!({"model": "acme/story", "tokens": [-1]}), "400 invalid_value tokens"),
        ("/detokenize", json!({"model": "acme/none", "tokens": []}), "404 model_not_found model"),
    ] {
        assert_eq!(server.post(path, &body).await.error(), expected, "{path} {body}");
    }
}
