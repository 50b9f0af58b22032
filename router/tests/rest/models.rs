//! `GET /v1/models`, `GET /v1/models/{id}`.

use hyper::Method;
use serde_json::json;

use crate::support::Server;

#[tokio::test]
async fn models_name_root_and_parent() {
    let server = Server::start().await;
    let tuned = json!({"id": "acme/tuned", "object": "model", "created": 1_700_000_000, "owned_by": "acme", "root": "acme/story",
        "parent": "acme/story", "max_model_len": 256});
    let story = json!({"id": "acme/story", "object": "model", "created": 1_700_000_000, "owned_by": "acme", "root": "acme/story",
        "parent": null, "max_model_len": 256});
    assert_eq!(server.get("/v1/models").await.json(), json!({"object": "list", "data": [story, tuned]}));
    assert_eq!(server.get("/v1/models/acme/tuned").await.json(), tuned);
    assert_eq!(server.get("/v1/models/acme%2Ftuned").await.json(), tuned);
}

#[tokio::test]
async fn other_tenants_models_do_not_exist() {
    let server = Server::start().await;
    let other = [("authorization", "bearer sk-other")];
    assert_eq!(server.send(Method::GET, "/v1/models/acme/story", &other, "").await.error(), "404 model_not_found model");
    assert_eq!(server.send(Method::GET, "/v1/models", &other, "").await.json()["data"], json!([]));
    assert_eq!(server.get("/v1/models/acme/none").await.error(), "404 model_not_found model");
    assert_eq!(server.get("/v1/models/%ff").await.error(), "404 model_not_found model");
}
