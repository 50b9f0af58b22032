//! `POST /v1/load_lora_adapter`, `POST /v1/unload_lora_adapter`.

use ashlar_router::io::backend::NewAdapter;
use ashlar_router::io::rest::config::RestLimits;
use hyper::Method;
use serde_json::json;

use crate::support::Server;

const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

#[tokio::test]
async fn what_is_asked_reaches_the_router() {
    let server = Server::start().await;
    let reply = server.post(LOAD, &json!({"lora_name": "mail", "lora_path": "mail/v1"})).await;
    assert_eq!((reply.status, &reply.json()["id"], &reply.json()["object"]), (200, &json!("acme/tuned"), &json!("model")));
    let body = json!({"lora_name": "acme/mail", "lora_path": "mail/v2", "base_model_name": "acme/story", "load_inplace": true});
    assert_eq!(server.post(LOAD, &body).await.status, 200);
    let of = |name: &str, path: &str| NewAdapter { name: name.into(), path: path.into(), base: None, replaces: false };
    let second = NewAdapter { base: Some("acme/story".into()), replaces: true, ..of("acme/mail", "mail/v2") };
    assert_eq!(*server.backend.loaded.lock().unwrap(), [of("mail", "mail/v1"), second]);
    let reply = server.post(UNLOAD, &json!({"lora_name": "mail"})).await;
    assert_eq!(reply.json(), json!({"id": "acme/mail", "object": "model", "deleted": true}));
}

#[tokio::test]
async fn mistakes_name_their_param_and_others_are_refused() {
    let server = Server::start().await;
    for (path, body, expected) in [
        (LOAD, json!({"lora_path": "mail"}), "400 invalid_value lora_name"),
        (LOAD, json!({"lora_name": "mail"}), "400 invalid_value lora_path"),
        (LOAD, json!({"lora_name": "mail", "lora_path": 1}), "400 invalid_value lora_path"),
        (LOAD, json!({"lora_name": "mail", "lora_path": "mail", "url": "x"}), "400 unsupported_parameter url"),
        (UNLOAD, json!({}), "400 invalid_value lora_name"),
        (UNLOAD, json!({"lora_name": "mail", "lora_int_id": 1}), "400 unsupported_parameter lora_int_id"),
    ] {
        assert_eq!(server.post(path, &body).await.error(), expected, "{path} {body}");
    }
    let body = json!({"lora_name": "mail", "lora_path": "mail"}).to_string();
    let json = ("content-type", "application/json");
    for (key, expected) in [("Bearer sk-other", "403 forbidden -"), ("Bearer sk-none", "401 invalid_api_key -")] {
        let reply = server.send(Method::POST, LOAD, &[("authorization", key), json], body.clone()).await;
        assert_eq!(reply.error(), expected);
    }
    assert!(server.backend.loaded.lock().unwrap().is_empty());
}

#[tokio::test]
async fn without_a_folder_of_adapters_there_are_no_such_routes() {
    let server = Server::of(RestLimits::default(), false).await;
    for (path, body) in [(LOAD, json!({"lora_name": "mail", "lora_path": "mail"})), (UNLOAD, json!({"lora_name": "mail"}))] {
        assert_eq!(server.post(path, &body).await.error(), "404 not_found -");
    }
}
