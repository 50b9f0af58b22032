//! `GET /health`: the process lives. `GET /ready`: it can serve. Neither needs a key.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::Readiness;
use crate::io::rest::Rest;

#[derive(Serialize)]
struct Status<'a> {
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

/// Liveness.
pub(crate) async fn health() -> Response {
    Json(Status { status: "ok", reason: None }).into_response()
}

/// Readiness: 503 with a reason while there is nothing to serve, or while draining.
pub(crate) async fn ready(State(rest): State<Arc<Rest>>) -> Response {
    let not_ready = |status, reason| {
        let body = Json(Status { status, reason });
        (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    };
    match rest.backend.ready() {
        _ if rest.draining() => not_ready("draining", None),
        Readiness::NotReady(reason) => not_ready("not_ready", Some(reason.as_str())),
        Readiness::Ready => Json(Status { status: "ready", reason: None }).into_response(),
    }
}
