//! OpenAI's API over HTTP: one file a route, all over the same `Backend`. Start with `chat`; `fields` is how bodies are read, `run` how
//! sequences become text, `serve` the listener. It knows nothing of executors and placement. docs/api.md is its contract.

mod adapters;
mod body;
mod chat;
mod choice;
mod completions;
pub mod config;
mod detokenize;
mod envelope;
mod error;
mod fields;
mod generation;
mod health;
mod logprobs;
mod messages;
mod metrics;
mod models;
mod run;
mod serve;
mod sse;
mod stall;
mod texts;
mod tokenize;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ashlar_wire::code::Code;
use ashlar_wire::id::{RequestId, TenantName};
use ashlar_zoo::digest::Digest;
use axum::Router;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::sync::watch;

pub use chat::fuzz_chat_body;
pub use serve::serve;

use crate::io::backend::{ApiError, Backend, ModelView};
use crate::io::metrics::RequestMetrics;
use crate::io::rest::config::RestConfig;
use crate::io::rest::generation::Generation;
use crate::io::rest::run::{NewRun, Run};
use crate::io::rest::texts::{Texts, now_s};
use crate::state::places::{NoPlace, Places};
use crate::text::tokenizer::Tokenizer;

/// What all routes share.
pub(crate) struct Rest {
    backend: Arc<dyn Backend>,
    config: RestConfig,
    texts: Texts,
    /// One for each request that generates or tokenizes. Watchers are told when the last one ends.
    places: watch::Sender<Places>,
    /// Bodies that each tenant is sending now.
    arriving: Arc<Mutex<HashMap<TenantName, u32>>>,
    /// Set once this server stops; the backend may drain earlier.
    stopping: AtomicBool,
}

/// What a completion's response, or each of its chunks, says about itself.
pub(crate) struct Head {
    id: String,
    created: u64,
    model: String,
    system_fingerprint: String,
}

/// A request that passed the door.
pub(crate) struct Call {
    tenant: TenantName,
    body: bytes::Bytes,
    place: Place,
}

/// A request that can be run.
pub(crate) struct Ready {
    call: Call,
    model: Arc<ModelView>,
    tokenizer: Arc<Tokenizer>,
    prompts: Vec<Vec<u32>>,
    generation: Generation,
    /// Tokens to generate where the client does not say; `None`: as many as fit.
    default_tokens_max: Option<u32>,
    /// The parameter that holds the prompt.
    prompt_param: &'static str,
}

impl Rest {
    fn new(backend: Arc<dyn Backend>, config: RestConfig) -> Self {
        let places = watch::Sender::new(Places::new(config.limits.concurrent_requests_max));
        let texts = Texts::new(config.limits.tokenizers_max);
        Self { backend, config, texts, places, arriving: Arc::default(), stopping: AtomicBool::new(false) }
    }

    fn draining(&self) -> bool {
        self.stopping.load(Ordering::Relaxed) || self.backend.draining()
    }

    /// Who asks.
    fn tenant(&self, headers: &HeaderMap) -> Result<TenantName, ApiError> {
        let key = match headers.get(header::AUTHORIZATION) {
            None => None,
            Some(value) => {
                let bearer = value.to_str().ok().and_then(|text| text.split_once(' '));
                let key = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim());
                Some(key.ok_or_else(|| ApiError::new(Code::InvalidApiKey, "the Authorization header must be `Bearer KEY`"))?)
            }
        };
        let tenant = self.backend.authenticate(key)?;
        tracing::Span::current().record("tenant.id", tracing::field::display(&tenant));
        Ok(tenant)
    }

    /// A model by its name.
    fn model(&self, tenant: &TenantName, id: &str) -> Result<Arc<ModelView>, ApiError> {
        self.backend.model(tenant, id).ok_or_else(|| {
            let id: String = id.chars().take(200).collect();
            ApiError::of_param(Code::ModelNotFound, "model", format!("the model `{id}` does not exist"))
        })
    }

    /// Key, body and place of a request that will do work. The place comes last: who sends slowly takes none from others.
    async fn open(self: &Arc<Self>, request: axum::extract::Request, metrics: Option<&mut RequestMetrics>) -> Result<Call, ApiError> {
        let tenant = self.tenant(request.headers())?;
        if let Some(metrics) = metrics {
            metrics.set_tenant(&tenant.0);
        }
        let limit = self.config.limits.concurrent_requests_max;
        let body = {
            let _arriving = Arriving::enter(&self.arriving, &tenant, limit)?;
            body::read(request, &self.config.limits).await?
        };
        let place = Place::enter(self, &tenant)?;
        Ok(Call { tenant, body, place })
    }

    /// Checks that the prompts fit, and starts their sequences.
    async fn start(&self, id: RequestId, ready: Ready, mut metrics: RequestMetrics) -> Result<Run, ApiError> {
        let fitted = self.fit(&ready).inspect_err(|error| metrics.set_code(error.code.as_str()))?;
        metrics.set_timed();
        tracing::Span::current().record("model", ready.model.id.as_str());
        let prompts = ready.prompts.into_iter().map(Arc::from).zip(fitted).collect();
        let Call { tenant, place, .. } = ready.call;
        let (model, tokenizer, generation) = (ready.model, ready.tokenizer, ready.generation);
        Run::start(&*self.backend, NewRun { request_id: id, tenant, model, tokenizer, prompts, generation, metrics, place }).await
    }

    fn prompt_tokens_max(&self, model: &ModelView) -> u32 {
        self.config.limits.prompt_tokens_max.min(model.chain.context_tokens)
    }

    /// How many tokens may follow each prompt.
    fn fit(&self, ready: &Ready) -> Result<Vec<u32>, ApiError> {
        let (limits, param) = (&self.config.limits, ready.prompt_param);
        let sequences = ready.prompts.len() * ready.generation.choices_count as usize;
        if sequences > limits.sequences_max as usize {
            let message = format!("prompts times `n` are {sequences}, over the limit of {}", limits.sequences_max);
            return Err(ApiError::of_param(Code::InvalidValue, "n", message));
        }
        let fit = |prompt: &Vec<u32>| {
            if prompt.is_empty() {
                return Err(ApiError::of_param(Code::InvalidValue, param, format!("`{param}` must make at least one token")));
            }
            if prompt.len() > limits.prompt_tokens_max as usize {
                let message = format!("the prompt has {} tokens, over the limit of {}", prompt.len(), limits.prompt_tokens_max);
                return Err(ApiError::of_param(Code::InvalidValue, param, message));
            }
            ready.generation.generated_tokens_max(prompt.len(), &ready.model.chain, ready.default_tokens_max, param)
        };
        ready.prompts.iter().map(fit).collect()
    }

    /// How the response to a request speaks of itself. The fingerprint names the chain: equal fingerprint and seed, equal tokens.
    fn head(prefix: &str, id: &RequestId, model: &ModelView) -> Head {
        let number = id.0.trim_start_matches("req_");
        Head {
            id: format!("{prefix}-{number}"),
            created: now_s(),
            model: model.id.clone(),
            system_fingerprint: format!("fp_{}", model.chain_digest.short()),
        }
    }
}

/// A request's place at the door, given back when dropped.
struct Place {
    rest: Arc<Rest>,
    tenant: TenantName,
}

impl Place {
    fn enter(rest: &Arc<Rest>, tenant: &TenantName) -> Result<Self, ApiError> {
        let standing = rest.backend.standing(tenant);
        let mut entered = Ok(());
        rest.places.send_if_modified(|places| {
            entered = places.enter(tenant, standing);
            false
        });
        // It tells the tenant of itself alone, not of what others do.
        let why = |why| match why {
            NoPlace::ShareTaken { held } => {
                format!("tenant {tenant} has {held} requests running, its share of this router while others ask; try again")
            }
            NoPlace::AllTaken { held } => {
                format!("this router runs as many requests as it may, {held} of them of tenant {tenant}; try again")
            }
        };
        entered.map_err(|no_place| ApiError::new(Code::TooManyRequests, why(no_place)))?;
        Ok(Self { rest: Arc::clone(rest), tenant: tenant.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.rest.places.send_if_modified(|places| {
            places.leave(&self.tenant);
            places.taken() == 0
        });
    }
}

/// A body that is on its way; a tenant may have so many at a time as may run in all.
struct Arriving {
    counts: Arc<Mutex<HashMap<TenantName, u32>>>,
    tenant: TenantName,
}

impl Arriving {
    fn enter(counts: &Arc<Mutex<HashMap<TenantName, u32>>>, tenant: &TenantName, limit: u32) -> Result<Self, ApiError> {
        let mut by_tenant = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = by_tenant.entry(tenant.clone()).or_default();
        if *count >= limit {
            let message = format!("tenant {tenant} is sending {limit} requests at once, which is the limit; try again");
            return Err(ApiError::new(Code::TooManyRequests, message));
        }
        *count += 1;
        Ok(Self { counts: Arc::clone(counts), tenant: tenant.clone() })
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let mut by_tenant = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_tenant.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                by_tenant.remove(&self.tenant);
            }
        }
    }
}

/// Names in a response the seed, as the client may send it back, and the chain that served it: the model's own, or one that the deployment's policy
/// allows in its place.
fn with_origin(mut response: Response, seed: u64, chain: &Digest) -> Response {
    response.headers_mut().insert("x-ashlar-seed", HeaderValue::from(seed as i64));
    let chain = HeaderValue::from_str(&chain.to_string()).expect("a digest is hexadecimal");
    response.headers_mut().insert("x-ashlar-chain", chain);
    response
}

/// All routes.
fn router(rest: Arc<Rest>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(detokenize::detokenize))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .fallback(envelope::not_found)
        .method_not_allowed_fallback(envelope::method_not_allowed)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&rest), envelope::envelope))
        .with_state(rest)
}
