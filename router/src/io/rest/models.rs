//! `GET /v1/models` and `GET /v1/models/{id}`; ids are `tenant/name`, with a slash.

use std::sync::Arc;

use ashlar_wire::code::Code;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::{ApiError, ModelView};
use crate::io::rest::Rest;

#[derive(Serialize)]
pub(crate) struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
    root: &'a str,
    parent: Option<&'a str>,
    max_model_len: u32,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
}

impl<'a> Model<'a> {
    pub(crate) fn of(view: &'a ModelView) -> Self {
        Self {
            id: &view.id,
            object: "model",
            created: view.created_s,
            owned_by: view.id.split('/').next().unwrap_or_default(),
            root: view.root.as_deref().unwrap_or(&view.id),
            parent: view.parent.as_deref(),
            max_model_len: view.chain.context_tokens,
        }
    }
}

/// The tenant's models.
pub(crate) async fn list(State(rest): State<Arc<Rest>>, headers: HeaderMap) -> Result<Response, ApiError> {
    let tenant = rest.tenant(&headers)?;
    let models = rest.backend.models(&tenant);
    let data = models.iter().map(|view| Model::of(view)).collect();
    Ok(Json(List { object: "list", data }).into_response())
}

/// One model.
pub(crate) async fn retrieve(
    State(rest): State<Arc<Rest>>,
    headers: HeaderMap,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let tenant = rest.tenant(&headers)?;
    let Path(id) = id.map_err(|_| ApiError::of_param(Code::ModelNotFound, "model", "the model's name is not UTF-8"))?;
    let view = rest.model(&tenant, &id)?;
    Ok(Json(Model::of(&view)).into_response())
}
