//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Duration;

use ashlar_wire::code::Code;
use ashlar_wire::id::RequestId;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;

use crate::io::backend::{ApiError, ModelView};
use crate::io::metrics::RequestMetrics;
use crate::io::rest::choice::Choice;
use crate::io::rest::config::RestLimits;
use crate::io::rest::fields::{Fields, Off};
use crate::io::rest::generation::{self, Generation};
use crate::io::rest::logprobs::ChatLogprobs;
use crate::io::rest::messages::take_messages;
use crate::io::rest::run::{Run, Usage};
use crate::io::rest::sse::{self, Chunks, Events};
use crate::io::rest::{Head, Ready, Rest, with_origin};
use crate::text::template::Message;
use crate::text::tokenizer::Tokenizer;

const KNOWN: &[&str] = &["model", "messages", "max_completion_tokens", "logprobs", "top_logprobs"];
/// What OpenAI defines and we do not have, with the values that mean "off".
const OFF: &[Off] = &[
    ("audio", &[]),
    ("function_call", &["\"none\""]),
    ("functions", &["[]"]),
    ("metadata", &["{}"]),
    ("modalities", &["[\"text\"]"]),
    ("moderation", &[]),
    ("parallel_tool_calls", &["true", "false"]),
    ("prediction", &[]),
    ("reasoning_effort", &["\"none\""]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("service_tier", &["\"auto\"", "\"default\""]),
    ("store", &["false"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("tools", &["[]"]),
    ("verbosity", &["\"medium\""]),
];

/// A body, read and checked.
struct ChatBody {
    model: Arc<ModelView>,
    messages: Vec<Message>,
    generation: Generation,
}

impl ChatBody {
    fn read(body: &[u8], limits: &RestLimits, model: impl FnOnce(&str) -> Result<Arc<ModelView>, ApiError>) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body, &[KNOWN, generation::KNOWN].concat(), OFF)?;
        let model = model(&fields.require::<String>("model", "a string")?)?;
        let messages = take_messages(&mut fields, limits)?;
        let mut generation = Generation::take(&mut fields, limits, &model.chain)?;
        if let Some(tokens) = fields.take_integer("max_completion_tokens", 1..=i64::from(u32::MAX))? {
            let tokens = tokens as u32;
            if generation.generated_tokens_max.is_some_and(|other| other != tokens) {
                let message = "`max_tokens` and `max_completion_tokens` differ";
                return Err(ApiError::of_param(Code::InvalidValue, "max_tokens", message));
            }
            generation.generated_tokens_max = Some(tokens);
        }
        generation.sampling.logprobs = fields.take_flag("logprobs")?.unwrap_or(false);
        let top = fields.take_integer("top_logprobs", 0..=i64::from(limits.top_logprobs_max))?.unwrap_or(0);
        if top > 0 && !generation.sampling.logprobs {
            return Err(ApiError::of_param(Code::InvalidValue, "top_logprobs", "`top_logprobs` needs `logprobs: true`"));
        }
        generation.sampling.top_logprobs = top as u32;
        fields.finish();
        Ok(Self { model, messages, generation })
    }
}

/// Reads a body as the route does and forgets it: for fuzzing.
pub fn fuzz_chat_body(data: &[u8]) {
    let chain = ashlar_zoo::manifest::Chain {
        format: 1,
        architecture: "fuzz".to_owned(),
        width: 1,
        vocab: 256,
        context_tokens: 128,
        blocks: Vec::new(),
        adapters: Vec::new(),
        assets: Default::default(),
        tokens: Default::default(),
        defaults: Default::default(),
        licence: None,
        source: String::new(),
    };
    let chain_digest = ashlar_zoo::digest::Digest([0; 32]);
    let model = ModelView { id: "fuzz/fuzz".to_owned(), root: None, parent: None, created_s: 0, chain: Arc::new(chain), chain_digest };
    let _ = ChatBody::read(data, &RestLimits::default(), |_| Ok(Arc::new(model)));
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
    let (logprobs, tokenizer) = (ready.generation.sampling.logprobs, Arc::clone(&ready.tokenizer));
    let head = Rest::head("chatcmpl", &id, &ready.model);
    let chain = ready.model.chain_digest;
    let mut run = rest.start(id, ready, metrics).await?;
    let limits = &rest.config.limits;
    let response = if stream {
        run.first_token(Duration::from_millis(limits.first_token_ms)).await?;
        let chunks = ChatChunks { head, logprobs, include_usage, tokenizer };
        sse::response(run, chunks, include_usage, Duration::from_millis(limits.keep_alive_ms))
    } else {
        run.complete().await?;
        Json(Completion::of(&head, &run, logprobs, &tokenizer)).into_response()
    };
    Ok(with_origin(response, seed, &chain))
}

async fn prepare(rest: &Arc<Rest>, request: Request, metrics: &mut RequestMetrics) -> Result<Ready, ApiError> {
    let call = rest.open(request, Some(metrics)).await?;
    let model = |id: &str| rest.model(&call.tenant, id).inspect(|model| metrics.set_model(&model.id, &call.tenant.0));
    let read = ChatBody::read(&call.body, &rest.config.limits, model)?;
    let ChatBody { model, messages, generation } = read;
    let tokenizer = rest.texts.tokenizer(&*rest.backend, &model).await?;
    let text = rest.texts.render(&*rest.backend, &model, messages, true).await?;
    // The template has written the special tokens itself.
    let prompt = rest.texts.encode(&tokenizer, &model, text, false, (rest.prompt_tokens_max(&model), "messages")).await?;
    Ok(Ready { call, model, tokenizer, prompts: vec![prompt], generation, default_tokens_max: None, prompt_param: "messages" })
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice<'a>>,
    usage: Usage,
    system_fingerprint: &'a str,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: usize,
    message: AssistantMessage<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct AssistantMessage<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

impl<'a> Completion<'a> {
    fn of(head: &'a Head, run: &'a Run, logprobs: bool, tokenizer: &'a Tokenizer) -> Self {
        let choice = |(index, choice): (usize, &'a Choice)| CompletionChoice {
            index,
            message: AssistantMessage { role: "assistant", content: &choice.text, refusal: None },
            logprobs: logprobs.then(|| ChatLogprobs::of(choice.ready(), tokenizer)),
            finish_reason: choice.finish_reason(),
        };
        Self {
            id: &head.id,
            object: "chat.completion",
            created: head.created,
            model: &head.model,
            choices: run.choices.iter().enumerate().map(choice).collect(),
            usage: run.usage(),
            system_fingerprint: &head.system_fingerprint,
        }
    }
}

/// The streaming form.
struct ChatChunks {
    head: Head,
    logprobs: bool,
    include_usage: bool,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [ChunkChoice<'a>],
    /// Absent unless asked for, then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChatChunks {
    fn push(&self, out: &mut Events, choices: &[ChunkChoice<'_>], usage: Option<Usage>) {
        let Head { id, created, model, system_fingerprint } = &self.head;
        let usage = self.include_usage.then_some(usage);
        out.push(&Chunk { id, object: "chat.completion.chunk", created: *created, model, system_fingerprint, choices, usage });
    }
}

impl Chunks for ChatChunks {
    fn write_opening(&self, out: &mut Events, index: usize) {
        let delta = Delta { role: Some("assistant"), content: Some("") };
        self.push(out, &[ChunkChoice { index, delta, logprobs: None, finish_reason: None }], None);
    }

    fn write_delta(&mut self, out: &mut Events, index: usize, choice: &Choice) {
        let delta = Delta { role: None, content: Some(&choice.text) };
        let logprobs = self.logprobs.then(|| ChatLogprobs::of(choice.ready(), &self.tokenizer));
        self.push(out, &[ChunkChoice { index, delta, logprobs, finish_reason: None }], None);
    }

    fn write_end(&self, out: &mut Events, index: usize, reason: &'static str) {
        let delta = Delta { role: None, content: None };
        self.push(out, &[ChunkChoice { index, delta, logprobs: None, finish_reason: Some(reason) }], None);
    }

    fn write_usage(&self, out: &mut Events, usage: Usage) {
        self.push(out, &[], Some(usage));
    }
}
