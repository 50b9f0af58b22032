//! `POST /tokenize`: a prompt or messages to token ids, in vLLM's shapes.

use std::sync::Arc;

use ashlar_wire::code::Code;
use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::io::backend::ApiError;
use crate::io::rest::Rest;
use crate::io::rest::fields::Fields;
use crate::io::rest::messages::take_messages;

const KNOWN: &[&str] = &["model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"];

#[derive(Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<Option<String>>>,
}

/// The route. A prompt is encoded as by `/v1/completions`, messages as by `/v1/chat/completions`.
pub(crate) async fn tokenize(State(rest): State<Arc<Rest>>, request: Request) -> Result<Response, ApiError> {
    let call = rest.open(request, None).await?;
    let mut fields = Fields::of_body(&call.body, KNOWN, &[])?;
    let model = rest.model(&call.tenant, &fields.require::<String>("model", "a string")?)?;
    let prompt: Option<String> = fields.take("prompt", "a string")?;
    let add_special_tokens = fields.take_flag("add_special_tokens")?.unwrap_or(prompt.is_some());
    let add_generation_prompt = fields.take_flag("add_generation_prompt")?;
    let return_token_strs = fields.take_flag("return_token_strs")?.unwrap_or(false);
    let text = match prompt {
        None => {
            let messages = take_messages(&mut fields, &rest.config.limits)?;
            rest.texts.render(&*rest.backend, &model, messages, add_generation_prompt.unwrap_or(true)).await?
        }
        Some(_) if fields.take_raw("messages").is_some() => {
            return Err(ApiError::of_param(Code::InvalidValue, "messages", "`prompt` and `messages` exclude each other"));
        }
        Some(_) if add_generation_prompt.is_some() => {
            return Err(ApiError::of_param(Code::InvalidValue, "add_generation_prompt", "`add_generation_prompt` needs `messages`"));
        }
        Some(prompt) => prompt,
    };
    fields.finish();
    let tokenizer = rest.texts.tokenizer(&*rest.backend, &model).await?;
    let tokens = rest.texts.encode(&tokenizer, &model, text, add_special_tokens, (rest.config.limits.prompt_tokens_max, "prompt")).await?;
    let token_strs = return_token_strs.then(|| tokens.iter().map(|token| tokenizer.spelling(*token)).collect());
    Ok(Json(Tokenized { count: tokens.len(), max_model_len: model.chain.context_tokens, tokens, token_strs }).into_response())
}
