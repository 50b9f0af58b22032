//! `POST /v1/completions`: prompts as text or as token ids, one or several.

use std::sync::Arc;
use std::time::Duration;

use ashlar_wire::code::Code;
use ashlar_wire::id::RequestId;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::io::backend::{ApiError, ModelView};
use crate::io::metrics::RequestMetrics;
use crate::io::rest::choice::Choice;
use crate::io::rest::config::RestLimits;
use crate::io::rest::fields::{Fields, Off, parse, token_ids, unsupported_value, wrong};
use crate::io::rest::generation::{self, Generation};
use crate::io::rest::logprobs::CompletionLogprobs;
use crate::io::rest::run::Usage;
use crate::io::rest::sse::{self, Chunks, Events};
use crate::io::rest::{Head, Ready, Rest, with_origin};
use crate::text::tokenizer::Tokenizer;

const KNOWN: &[&str] = &["model", "prompt", "best_of", "logprobs"];
/// What OpenAI defines and we do not have, with the values that mean "off".
const OFF: &[Off] = &[("echo", &["false"]), ("suffix", &["\"\""])];
/// OpenAI's default of `max_tokens`.
const GENERATED_TOKENS_DEFAULT: u32 = 16;
const PROMPT: &str = "a string, an array of strings, an array of token ids, or an array of arrays of token ids";

/// A body, read and checked.
struct CompletionBody {
    model: Arc<ModelView>,
    prompts: Vec<Prompt>,
    generation: Generation,
}

enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl CompletionBody {
    fn read(body: &[u8], limits: &RestLimits, model: impl FnOnce(&str) -> Result<Arc<ModelView>, ApiError>) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body, &[KNOWN, generation::KNOWN].concat(), OFF)?;
        let model = model(&fields.require::<String>("model", "a string")?)?;
        let raw = fields.take_raw("prompt").ok_or_else(|| fields.missing("prompt"))?;
        let prompts = read_prompts(raw, limits, model.chain.vocab)?;
        let mut generation = Generation::take(&mut fields, limits, &model.chain)?;
        if let Some(best_of) = fields.take_integer("best_of", 0..=i64::from(u32::MAX))?
            && best_of != i64::from(generation.choices_count)
        {
            return Err(unsupported_value("best_of", "with that of `n`"));
        }
        if let Some(top) = fields.take_integer("logprobs", 0..=i64::from(limits.top_logprobs_max))? {
            generation.sampling.logprobs = true;
            generation.sampling.top_logprobs = top as u32;
        }
        fields.finish();
        Ok(Self { model, prompts, generation })
    }
}

/// Tells the four shapes apart by their first characters.
fn read_prompts(raw: &RawValue, limits: &RestLimits, vocab: u32) -> Result<Vec<Prompt>, ApiError> {
    let text = raw.get();
    let inner = text.strip_prefix('[').map(|rest| rest.trim_start().as_bytes().first().copied());
    let tokens = |integers: Vec<i64>| token_ids(&integers, "prompt", vocab).map(Prompt::Tokens);
    let prompts: Vec<Prompt> = match inner {
        None => vec![Prompt::Text(parse(raw, "prompt", PROMPT)?)],
        Some(Some(b'"')) => parse::<Vec<String>>(raw, "prompt", PROMPT)?.into_iter().map(Prompt::Text).collect(),
        Some(Some(b'[')) => parse::<Vec<Vec<i64>>>(raw, "prompt", PROMPT)?.into_iter().map(tokens).collect::<Result<_, _>>()?,
        Some(Some(b']')) => return Err(ApiError::of_param(Code::InvalidValue, "prompt", "`prompt` must not be empty")),
        Some(_) => vec![tokens(parse(raw, "prompt", PROMPT)?)?],
    };
    if prompts.len() > limits.prompts_max as usize {
        return Err(wrong("prompt", &format!("at most {} prompts", limits.prompts_max)));
    }
    Ok(prompts)
}

/// The route.
pub(crate) async fn create(
    State(rest): State<Arc<Rest>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut metrics = rest.config.metrics.request();
    let ready = prepare(&rest, request, &mut metrics).await;
    let ready = ready.inspect_err(|error| metrics.set_code(error.code.as_str()))?;
    let (stream, include_usage, seed) = (ready.generation.stream, ready.generation.include_usage, ready.generation.seed);
    let sampling = &ready.generation.sampling;
    let logprobs = sampling.logprobs.then_some(sampling.top_logprobs);
    let chunks =
        CompletionChunks { head: Rest::head("cmpl", &id, &ready.model), logprobs, include_usage, tokenizer: Arc::clone(&ready.tokenizer) };
    let chain = ready.model.chain_digest;
    let mut run = rest.start(id, ready, metrics).await?;
    let limits = &rest.config.limits;
    let response = if stream {
        run.first_token(Duration::from_millis(limits.first_token_ms)).await?;
        sse::response(run, chunks, include_usage, Duration::from_millis(limits.keep_alive_ms))
    } else {
        run.complete().await?;
        let choices: Vec<CompletionChoice<'_>> =
            run.choices.iter().enumerate().map(|(index, choice)| chunks.choice(index, choice, choice.finish_reason())).collect();
        Json(chunks.completion(&choices, Some(Some(run.usage())))).into_response()
    };
    Ok(with_origin(response, seed, &chain))
}

async fn prepare(rest: &Arc<Rest>, request: Request, metrics: &mut RequestMetrics) -> Result<Ready, ApiError> {
    let call = rest.open(request, Some(metrics)).await?;
    let model = |id: &str| rest.model(&call.tenant, id).inspect(|model| metrics.set_model(&model.id, &call.tenant.0));
    let read = CompletionBody::read(&call.body, &rest.config.limits, model)?;
    let CompletionBody { model, prompts, generation } = read;
    let tokenizer = rest.texts.tokenizer(&*rest.backend, &model).await?;
    let mut encoded = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        encoded.push(match prompt {
            Prompt::Tokens(tokens) => tokens,
            Prompt::Text(text) => {
                let bound = (rest.prompt_tokens_max(&model), "prompt");
                rest.texts.encode(&tokenizer, &model, text, true, bound).await?
            }
        });
    }
    let default_tokens_max = Some(GENERATED_TOKENS_DEFAULT);
    Ok(Ready { call, model, tokenizer, prompts: encoded, generation, default_tokens_max, prompt_param: "prompt" })
}

/// The response, whole or in chunks: the shape is the same.
struct CompletionChunks {
    head: Head,
    /// Asked for, and how many alternatives.
    logprobs: Option<u32>,
    include_usage: bool,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [CompletionChoice<'a>],
    /// In a stream: absent unless asked for, then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

impl CompletionChunks {
    fn completion<'a>(&'a self, choices: &'a [CompletionChoice<'a>], usage: Option<Option<Usage>>) -> Completion<'a> {
        let Head { id, created, model, system_fingerprint } = &self.head;
        Completion { id, object: "text_completion", created: *created, model, system_fingerprint, choices, usage }
    }

    fn choice<'a>(&'a self, index: usize, choice: &'a Choice, finish_reason: Option<&'static str>) -> CompletionChoice<'a> {
        let logprobs = self.logprobs.map(|top| CompletionLogprobs::of(choice.ready(), &self.tokenizer, top > 0));
        CompletionChoice { index, text: &choice.text, logprobs, finish_reason }
    }
}

impl Chunks for CompletionChunks {
    fn write_opening(&self, _out: &mut Events, _index: usize) {}

    fn write_delta(&mut self, out: &mut Events, index: usize, choice: &Choice) {
        let choices = [self.choice(index, choice, None)];
        out.push(&self.completion(&choices, self.include_usage.then_some(None)));
    }

    fn write_end(&self, out: &mut Events, index: usize, reason: &'static str) {
        let choices = [CompletionChoice { index, text: "", logprobs: None, finish_reason: Some(reason) }];
        out.push(&self.completion(&choices, self.include_usage.then_some(None)));
    }

    fn write_usage(&self, out: &mut Events, usage: Usage) {
        out.push(&self.completion(&[], Some(Some(usage))));
    }
}
