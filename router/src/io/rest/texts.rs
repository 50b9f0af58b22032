//! Tokenizers and chat templates of models: fetched as assets, made off the request threads, kept by digest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ashlar_wire::code::Code;
use ashlar_zoo::digest::Digest;

use crate::io::backend::{ApiError, Backend, ModelView};
use crate::text::cache::Cache;
use crate::text::template::{Conversation, Message, Template, on_deep_stack};
use crate::text::tokenizer::Tokenizer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Texts longer than this are encoded on a thread of their own, so that they hold up no stream.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// Texts at work at the same time, in KiB together. A tokenizer takes some 130 bytes of memory for each byte: about 1 GiB.
const WORK_KIB_MAX: u32 = 8 << 10;
/// A template may take so long. Fuel bounds its steps, but some single steps can go on for ever.
const RENDER_MAX: Duration = Duration::from_secs(5);
/// A normaliser may make a text shorter by so much: composing characters, and dropping some.
const NORMALISED_BYTES_RATIO: usize = 4;

/// The caches, and the gates of the work on texts. A gate's permit goes with the work, so that what clients leave behind is bounded.
pub(crate) struct Texts {
    tokenizers: Cache<Tokenizer>,
    templates: Cache<ModelTemplate>,
    /// One permit for each KiB of text at work.
    workers: Arc<Semaphore>,
    /// The fewest permits that a text takes, so that there are no more such threads than cores.
    text_kib_min: u32,
    /// Templates at work.
    renders: Arc<Semaphore>,
}

struct ModelTemplate {
    template: Template,
    /// It ran out of time once. Its thread cannot be ended, so it gets no second one.
    is_endless: AtomicBool,
}

impl Texts {
    pub(crate) fn new(count_max: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            tokenizers: Cache::new(count_max),
            templates: Cache::new(count_max),
            workers: Arc::new(Semaphore::new(WORK_KIB_MAX as usize)),
            text_kib_min: (WORK_KIB_MAX as usize).div_ceil(cores) as u32,
            renders: Arc::new(Semaphore::new(2 * cores)),
        }
    }

    /// The model's tokenizer.
    pub(crate) async fn tokenizer(&self, backend: &dyn Backend, model: &ModelView) -> Result<Arc<Tokenizer>, ApiError> {
        let digest = asset(model.chain.assets.tokenizer, Code::Internal, "the model has no tokenizer")?;
        let make = async || {
            let bytes = backend.asset(&digest).await?;
            let made = self.off_thread(bytes.len(), move || Tokenizer::from_bytes(&bytes)).await?;
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
            let compile = move || {
                let source = std::str::from_utf8(&bytes).map_err(|error| format!("the chat template is not UTF-8: {error}"))?;
                Template::new(source).map_err(|error| error.to_string())
            };
            let compiled = self.off_deep_thread(None, compile).await?;
            let template = compiled.map_err(|message| ApiError::new(Code::TemplateFailed, message))?;
            Ok(ModelTemplate { template, is_endless: AtomicBool::new(false) })
        };
        let template = self.templates.get(&digest, make).await?;
        let chain = Arc::clone(&model.chain);
        let now_s = now_s();
        let rendered = Arc::clone(&template);
        let render = move || {
            let tokens = &chain.tokens;
            rendered.template.render(Conversation {
                messages: &messages,
                bos_token: tokens.bos_text.as_deref(),
                eos_token: tokens.eos_text.as_deref(),
                add_generation_prompt,
                now_s,
            })
        };
        let rendered = self.off_deep_thread(Some(template), render).await?;
        rendered.map_err(|error| ApiError::of_param(Code::TemplateFailed, "messages", error.to_string()))
    }

    /// Runs work on a template, which is marked where that does not end in time.
    async fn off_deep_thread<T: Send + 'static>(
        &self,
        template: Option<Arc<ModelTemplate>>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let late = || ApiError::new(Code::TemplateFailed, format!("the model's chat template took over {} s", RENDER_MAX.as_secs()));
        let permit = permits(&self.renders, 1).await;
        if template.as_ref().is_some_and(|template| template.is_endless.load(Ordering::Relaxed)) {
            return Err(late());
        }
        let done = on_deep_stack(work).map_err(|error| ApiError::new(Code::Unavailable, format!("no thread for a template: {error}")))?;
        // A task of its own: it sees the end also when the client has left.
        let watched = tokio::spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(RENDER_MAX, done).await {
                Ok(done) => done.map_err(|_| ApiError::new(Code::TemplateFailed, "the model's chat template could not be worked on")),
                Err(_) => {
                    if let Some(template) = template
                        && !template.is_endless.swap(true, Ordering::Relaxed)
                    {
                        tracing::error!("a chat template does not end; its model takes no chats any more, and a core is lost to it");
                    }
                    Err(late())
                }
            }
        });
        watched.await.map_err(|error| ApiError::new(Code::Internal, format!("work on a template did not end: {error}")))?
    }

    /// Runs work on so many bytes of text on a thread for such work, when there is room.
    pub(crate) async fn off_thread<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).clamp(self.text_kib_min, WORK_KIB_MAX);
        let permit = permits(&self.workers, kib).await;
        let joined = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        joined.await.map_err(|error| ApiError::new(Code::Internal, format!("work on text did not end: {error}")))
    }

    /// Text to at most about `tokens_max` tokens, all of which the model knows. What is surely longer is refused unread.
    pub(crate) async fn encode(
        &self,
        tokenizer: &Arc<Tokenizer>,
        model: &ModelView,
        text: String,
        add_special_tokens: bool,
        (tokens_max, param): (u32, &str),
    ) -> Result<Vec<u32>, ApiError> {
        let bytes_max = (tokens_max as usize).saturating_mul(tokenizer.longest_bytes()).saturating_mul(NORMALISED_BYTES_RATIO);
        if text.len() > bytes_max {
            let message = format!("the text has {} bytes; no text of {tokens_max} tokens, which is the limit, has so many", text.len());
            let code = if tokens_max < model.chain.context_tokens { Code::InvalidValue } else { Code::ContextLengthExceeded };
            return Err(ApiError::of_param(code, param, message));
        }
        let encoded = if text.len() <= INLINE_BYTES_MAX {
            tokenizer.encode(&text, add_special_tokens)
        } else {
            let tokenizer = Arc::clone(tokenizer);
            self.off_thread(text.len(), move || tokenizer.encode(&text, add_special_tokens)).await?
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

async fn permits(gate: &Arc<Semaphore>, count: u32) -> OwnedSemaphorePermit {
    Arc::clone(gate).acquire_many_owned(count).await.expect("the semaphore is never closed")
}

/// Unix time in seconds.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
