//! Settings of the REST server: bounds by name, with their defaults and units. docs/api.md repeats them for clients.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::io::backend::Administration;
use crate::io::metrics::RouterMetrics;

/// What one request, and all of them together, may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RestLimits {
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Tokens of one prompt, whatever the model's context.
    pub prompt_tokens_max: u32,
    /// Prompts in one call of `/v1/completions`.
    pub prompts_max: u32,
    /// Messages in one call of `/v1/chat/completions`.
    pub messages_max: u32,
    /// Choices for each prompt (`n`).
    pub choices_max: u32,
    /// Sequences of one request: prompts times choices.
    pub sequences_max: u32,
    /// Stop strings.
    pub stops_max: u32,
    /// Bytes of one stop string.
    pub stop_bytes_max: u32,
    /// Entries of `logit_bias`.
    pub logit_bias_max: u32,
    /// Largest `top_logprobs` (chat) and `logprobs` (completions).
    pub top_logprobs_max: u32,
    /// Requests that generate or tokenize at the same time; more get 429. Tenants share them as `state::places` says.
    pub concurrent_requests_max: u32,
    /// Connections at the same time; more wait to be accepted.
    pub connections_max: u32,
    /// Time for a request's head to arrive, also on an idle connection, in milliseconds.
    pub header_read_ms: u64,
    /// Time for a request's body to arrive, in milliseconds.
    pub body_read_ms: u64,
    /// Time for running requests to finish once the server stops, in milliseconds.
    pub drain_ms: u64,
    /// A stream that has nothing to say sends a comment this often, in milliseconds.
    pub keep_alive_ms: u64,
    /// A stream's status waits this long for the first token, so that an early failure gets its own status, in milliseconds.
    pub first_token_ms: u64,
    /// Tokenizers, and chat templates, held in memory.
    pub tokenizers_max: usize,
}

impl Default for RestLimits {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            prompt_tokens_max: 262_144,
            prompts_max: 64,
            messages_max: 4096,
            choices_max: 16,
            sequences_max: 128,
            stops_max: 16,
            stop_bytes_max: 256,
            logit_bias_max: 1024,
            top_logprobs_max: 20,
            concurrent_requests_max: 256,
            connections_max: 4096,
            header_read_ms: 60_000,
            body_read_ms: 30_000,
            drain_ms: 30_000,
            keep_alive_ms: 15_000,
            first_token_ms: 500,
            tokenizers_max: 16,
        }
    }
}

/// What the server is started with.
#[derive(Clone)]
pub struct RestConfig {
    /// Bounds.
    pub limits: RestLimits,
    /// Where requests are counted.
    pub metrics: Arc<RouterMetrics>,
    /// Other registries that `/metrics` shows: the process's and, in one process, the executor's.
    pub registries: Vec<prometheus::Registry>,
    /// Who loads and unloads adapters; `None`: nobody does.
    pub administration: Option<Arc<dyn Administration>>,
}
