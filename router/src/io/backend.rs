//! The seam between REST and the rest of the router: what a route needs to know of tenants, models and executors. REST
//! owns this file; `dispatch` implements it, and the tests have a scripted one. It does no IO itself.

use std::fmt;
use std::sync::Arc;

use ashlar_wire::code::Code;
use ashlar_wire::id::{RequestId, TenantName};
use ashlar_wire::v1;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::Chain;
use bytes::Bytes;
use futures::stream::BoxStream;

use crate::state::places::Standing;

/// What a caller is told when a request fails: becomes OpenAI's error object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// Stable code; decides the HTTP status and the error's type.
    pub code: Code,
    /// A sentence for people. It never holds a key or another tenant's data.
    pub message: String,
    /// The request's parameter at fault, where there is one.
    pub param: Option<String>,
}

impl ApiError {
    /// An error that no single parameter caused.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None }
    }

    /// An error of one parameter.
    pub fn of_param(code: Code, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: Some(param.into()) }
    }
}

/// A model as REST needs it: an immutable picture of a name at the time of asking.
#[derive(Debug, Clone)]
pub struct ModelView {
    /// `tenant/name`.
    pub id: String,
    /// The model at the root of its family, where known.
    pub root: Option<String>,
    /// The model it was tuned from, where known.
    pub parent: Option<String>,
    /// Unix time at which the name began to point to this chain, in seconds.
    pub created_s: u64,
    /// The chain it points to.
    pub chain: Arc<Chain>,
    /// The chain's identity.
    pub chain_digest: Digest,
}

/// Whether the router can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// At least one model can be served.
    Ready,
    /// Not yet; the sentence says what is missing.
    NotReady(String),
}

/// A sequence that a route wants to run. One request owns `n` of them for each prompt.
#[derive(Clone)]
pub struct NewSequence {
    /// The request it belongs to.
    pub request_id: RequestId,
    /// Who asks.
    pub tenant: TenantName,
    /// What to run.
    pub model: Arc<ModelView>,
    /// Token ids, never empty, all below the chain's `vocab`.
    pub prompt: Arc<[u32]>,
    /// Bound of generated tokens, at least 1; prompt plus this fits the chain's `context_tokens`.
    pub generated_tokens_max: u32,
    /// Generation ends after any of these (empty with `ignore_eos`).
    pub stop_tokens: Vec<u32>,
    /// Complete sampling parameters: defaults of the chain are already applied.
    pub sampling: v1::Sampling,
    /// The client's seed, or one that the route drew.
    pub seed: u64,
    /// 0 to `n - 1`.
    pub choice_index: u32,
    /// Lower runs first; 0 is usual.
    pub priority: i32,
}

impl fmt::Debug for NewSequence {
    /// Leaves out the prompt: logs hold no tenant's text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewSequence")
            .field("request_id", &self.request_id)
            .field("tenant", &self.tenant)
            .field("model", &self.model.id)
            .field("prompt_tokens", &self.prompt.len())
            .field("generated_tokens_max", &self.generated_tokens_max)
            .field("choice_index", &self.choice_index)
            .finish_non_exhaustive()
    }
}

/// Events of one sequence: any `Started`, `Token`s in order of their index from 0 without gaps or repeats (also across
/// resumes), then one `Finished` and the end; or one error and the end. `Failed` may come as an event or as an error.
pub type SequenceEvents = BoxStream<'static, Result<v1::sequence_event::Event, ApiError>>;

/// A PEFT adapter to serve under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAdapter {
    /// `tenant/name`, or a bare name: one of the tenant that asks.
    pub name: String,
    /// Its folder, within the server's folder of adapters; relative to that, or absolute.
    pub path: String,
    /// The model that it is over, as `tenant/name`; `None`: the one that its configuration names.
    pub base: Option<String>,
    /// Whether a name that was loaded before is to mean this adapter from now on.
    pub replaces: bool,
}

/// What administrators may change while the server runs.
#[async_trait::async_trait]
pub trait Administration: Send + Sync + 'static {
    /// Whether the tenant is an administrator; everyone is on a server without tenants.
    ///
    /// Fails with `forbidden`.
    fn admit(&self, tenant: &TenantName) -> Result<(), ApiError>;

    /// Adds an adapter to the zoo, and waits until it can be served. Two loads of one adapter cost one; a name that means it already is no error.
    ///
    /// Fails with `invalid_value`, `model_exists`, `model_not_found` (the base), `adapter_refused`, `unavailable`, or `model_not_ready` where it was
    /// added and no executor has loaded it within the time that a client waits.
    async fn load_adapter(&self, tenant: &TenantName, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError>;

    /// Drops the name of an adapter that was loaded. Sequences of it that run go on to their end. Returns `tenant/name`.
    ///
    /// Fails with `invalid_value`, `model_not_found`, `not_loaded` or `unavailable`.
    async fn unload_adapter(&self, tenant: &TenantName, name: &str) -> Result<String, ApiError>;
}

/// What REST asks of the router. Failures of the world are logged here, where their causes are known; REST logs only `internal_error`.
#[async_trait::async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The tenant of an API key (`None`: the request had no Authorization header).
    ///
    /// Fails with `invalid_api_key`.
    fn authenticate(&self, key: Option<&str>) -> Result<TenantName, ApiError>;

    /// What counts of a tenant where requests are more than the router takes.
    fn standing(&self, tenant: &TenantName) -> Standing;

    /// All models that the tenant may use, in order of their ids.
    fn models(&self, tenant: &TenantName) -> Vec<Arc<ModelView>>;

    /// One model, where the tenant may use it.
    fn model(&self, tenant: &TenantName, id: &str) -> Option<Arc<ModelView>>;

    /// The bytes of a tokenizer or chat template. Callers cache what they make of it by digest.
    async fn asset(&self, digest: &Digest) -> Result<Bytes, ApiError>;

    /// Starts one sequence. Dropping the stream cancels it.
    async fn start(&self, sequence: NewSequence) -> Result<SequenceEvents, ApiError>;

    /// Whether the router can serve.
    fn ready(&self) -> Readiness;

    /// Whether new requests are refused because the router is about to stop.
    fn draining(&self) -> bool;
}
