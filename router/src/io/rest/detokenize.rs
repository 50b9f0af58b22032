//! `POST /detokenize`: token ids to text, special tokens included, in vLLM's shapes.

use std::sync::Arc;

use ashlar_wire::code::Code;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::ApiError;
use crate::io::rest::Rest;
use crate::io::rest::fields::{Fields, token_ids};

#[derive(Serialize)]
struct Detokenized {
    prompt: String,
}

/// The route.
pub(crate) async fn detokenize(State(rest): State<Arc<Rest>>, request: Request) -> Result<Response, ApiError> {
    let call = rest.open(request, None).await?;
    let mut fields = Fields::of_body(&call.body, &["model", "tokens"], &[])?;
    let model = rest.model(&call.tenant, &fields.require::<String>("model", "a string")?)?;
    let tokens: Vec<i64> = fields.require("tokens", "an array of token ids")?;
    let tokens = token_ids(&tokens, "tokens", model.chain.vocab)?;
    fields.finish();
    let tokenizer = rest.texts.tokenizer(&*rest.backend, &model).await?;
    let decoded = rest.texts.off_thread(tokens.len() * 8, move || tokenizer.decode(&tokens, false)).await?;
    let prompt = decoded.map_err(|error| ApiError::new(Code::Internal, error.to_string()))?;
    Ok(Json(Detokenized { prompt }).into_response())
}
