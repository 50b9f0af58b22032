//! `GET /metrics`: Prometheus text of the router and of whatever else runs in this process. It needs no key.

use std::sync::Arc;

use ashlar_wire::code::Code;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::io::backend::ApiError;
use crate::io::metrics::render;
use crate::io::rest::Rest;

/// The route.
pub(crate) async fn metrics(State(rest): State<Arc<Rest>>) -> Result<Response, ApiError> {
    let mut registries = vec![rest.config.metrics.registry().clone()];
    registries.extend(rest.config.registries.iter().cloned());
    let text = render(&registries).map_err(|error| ApiError::new(Code::Internal, format!("write metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
