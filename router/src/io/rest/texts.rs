//! Tokenizers and chat templates of models: fetched as assets, made off the request threads, kept by digest.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ashlar_wire::code::Code;
use ashlar_zoo::digest::Digest;

use crate::io::backend::{ApiError, Backend, ModelView};
use crate::text::cache::Cache;
use crate::text::template::{Conversation, Message, Template};
use crate::text::tokenizer::Tokenizer;

/// Texts longer than this are encoded on a thread of their own, so that they hold up no stream.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// The caches.
pub(crate) struct Texts {
    tokenizers: Cache<Tokenizer>,
    templates: Cache<Template>,
}

impl Texts {
    pub(crate) fn new(count_max: usize) -> Self {
        Self { tokenizers: Cache::new(count_max), templates: Cache::new(count_max) }
    }

    /// The model's tokenizer.
    pub(crate) async fn tokenizer(&self, backend: &dyn Backend, model: &ModelView) -> Result<Arc<Tokenizer>, ApiError> {
        let digest = asset(model.chain.assets.tokenizer, Code::Internal, "the model has no tokenizer")?;
        let make = async || {
            let bytes = backend.asset(&digest).await?;
            let made = off_thread(move || Tokenizer::from_bytes(&bytes)).await?;
            made.map_err(|error| ApiError::new(Code::Internal, format!("the tokenizer of {} cannot be used: {error}", model.id)))
        };
        self.tokenizers.get(&digest, make).await
    }

    /// Messages to prompt text.
    pub(crate) async fn render(
        &self,
        backend: &dyn Backend,
        model: &ModelView,
        messages: Vec<Message>,
        add_generation_prompt: bool,
    ) -> Result<String, ApiError> {
        let digest = asset(model.chain.assets.chat_template, Code::NoChatTemplate, "the model has no chat template; use /v1/completions")?;
        let make = async || {
            let bytes = backend.asset(&digest).await?;
            let source = std::str::from_utf8(&bytes)
                .map_err(|error| ApiError::new(Code::TemplateFailed, format!("the chat template is not UTF-8: {error}")))?;
            Template::new(source).map_err(|error| ApiError::new(Code::TemplateFailed, error.to_string()))
        };
        let template = self.templates.get(&digest, make).await?;
        let chain = Arc::clone(&model.chain);
        let now_s = now_s();
        let render = move || {
            let tokens = &chain.tokens;
            template.render(Conversation {
                messages: &messages,
                bos_token: tokens.bos_text.as_deref(),
                eos_token: tokens.eos_text.as_deref(),
                add_generation_prompt,
                now_s,
            })
        };
        off_thread(render).await?.map_err(|error| ApiError::of_param(Code::TemplateFailed, "messages", error.to_string()))
    }

    /// Text to tokens, all of which the model knows.
    pub(crate) async fn encode(
        &self,
        tokenizer: &Arc<Tokenizer>,
        model: &ModelView,
        text: String,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, ApiError> {
        let encoded = if text.len() <= INLINE_BYTES_MAX {
            tokenizer.encode(&text, add_special_tokens)
        } else {
            let tokenizer = Arc::clone(tokenizer);
            off_thread(move || tokenizer.encode(&text, add_special_tokens)).await?
        };
        let tokens = encoded.map_err(|error| ApiError::new(Code::Internal, error.to_string()))?;
        match tokens.iter().find(|token| **token >= model.chain.vocab) {
            None => Ok(tokens),
            Some(token) => {
                let message = format!("the tokenizer of {} made token {token}, over the vocabulary of {}", model.id, model.chain.vocab);
                Err(ApiError::new(Code::Internal, message))
            }
        }
    }
}

fn asset(digest: Option<Digest>, code: Code, message: &str) -> Result<Digest, ApiError> {
    digest.ok_or_else(|| ApiError::new(code, message))
}

/// Runs work that takes long on a thread for such work.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|error| ApiError::new(Code::Internal, format!("work on text did not end: {error}")))
}

/// Unix time in seconds.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
