//! A backend without executors: each model plays a script of tokens.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ashlar_router::io::backend::{Administration, ApiError, Backend, ModelView, NewAdapter, NewSequence, Readiness, SequenceEvents};
use ashlar_router::state::places::Standing;
use ashlar_router::text::tokenizer::Tokenizer;
use ashlar_wire::code::Code;
use ashlar_wire::id::TenantName;
use ashlar_wire::v1;
use ashlar_wire::v1::sequence_event::Event;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Assets, Chain, Defaults, Tokens};
use bytes::Bytes;
use futures::StreamExt;

pub(crate) const STORY: &str = "the fox and the 😀 naïve bear. END of it";
pub(crate) const CONTEXT: u32 = 256;
pub(crate) const VOCAB: u32 = 269;
pub(crate) const IM_END: u32 = 1;
/// Prompt tokens that every sequence reports as cached.
pub(crate) const CACHED: u32 = 3;

pub(crate) struct ScriptedBackend {
    tokenizer: Tokenizer,
    tokenizer_bytes: Bytes,
    template: Bytes,
    pub(crate) started: Mutex<Vec<NewSequence>>,
    pub(crate) loaded: Mutex<Vec<NewAdapter>>,
    /// Sequences whose stream is not dropped.
    pub(crate) live: Arc<AtomicUsize>,
    pub(crate) ready: AtomicBool,
    pub(crate) draining: AtomicBool,
}

struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ScriptedBackend {
    pub(crate) fn new() -> Arc<Self> {
        let read = |name: &str| std::fs::read(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let tokenizer_bytes = Bytes::from(read("byte_level.json"));
        Arc::new(Self {
            tokenizer: Tokenizer::from_bytes(&tokenizer_bytes).unwrap(),
            tokenizer_bytes,
            template: Bytes::from(read("chatml.jinja")),
            started: Mutex::default(),
            loaded: Mutex::default(),
            live: Arc::default(),
            ready: AtomicBool::new(true),
            draining: AtomicBool::new(false),
        })
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, false).unwrap()
    }

    fn view(&self, name: &str) -> Option<Arc<ModelView>> {
        let names = ["bare", "breaks", "late", "not-ready", "panics", "slow", "story", "tuned"];
        if !names.contains(&name) {
            return None;
        }
        let template = (name != "bare").then(|| Digest::of(&self.template));
        let tuned = name == "tuned";
        let defaults = Defaults { temperature: Some(0.5), top_p: Some(0.75), top_k: Some(40), repetition_penalty: Some(1.25) };
        let chain = Chain {
            format: 1,
            architecture: "scripted".to_owned(),
            width: 8,
            vocab: VOCAB,
            context_tokens: CONTEXT,
            blocks: Vec::new(),
            adapters: Vec::new(),
            assets: Assets { tokenizer: Some(Digest::of(&self.tokenizer_bytes)), chat_template: template, card: None },
            tokens: Tokens {
                bos: Some(2),
                eos: vec![IM_END, 2],
                bos_text: Some("<|endoftext|>".into()),
                eos_text: Some("<|im_end|>".into()),
            },
            defaults: if tuned { defaults } else { Defaults::default() },
            licence: None,
            source: "test".to_owned(),
        };
        Some(Arc::new(ModelView {
            id: format!("acme/{name}"),
            root: tuned.then(|| "acme/story".to_owned()),
            parent: tuned.then(|| "acme/story".to_owned()),
            created_s: 1_700_000_000,
            chain: Arc::new(chain),
            chain_digest: Digest::of(name.as_bytes()),
        }))
    }

    /// Choice k says `k:` and the story, then ends itself; with `ignore_eos` it begins again.
    fn token(&self, script: &[u32], sequence: &NewSequence, index: u32) -> v1::TokenEvent {
        let token = script[index as usize % script.len()];
        let sampling = &sequence.sampling;
        let logprob = if sampling.logprobs { -(index as f32 + 1.0) / 8.0 } else { 0.0 };
        let top =
            (0..sampling.top_logprobs).map(|k| v1::TokenLogprob { token: (token + k) % VOCAB, logprob: logprob - k as f32 }).collect();
        v1::TokenEvent { index, token, logprob, top }
    }
}

/// `acme` is an administrator; whatever it loads is its `tuned`.
#[async_trait::async_trait]
impl Administration for ScriptedBackend {
    fn admit(&self, tenant: &TenantName) -> Result<(), ApiError> {
        if tenant.0 == "acme" { Ok(()) } else { Err(ApiError::new(Code::Forbidden, "the tenant is no administrator")) }
    }

    async fn load_adapter(&self, _: &TenantName, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError> {
        self.loaded.lock().unwrap().push(adapter);
        Ok(self.view("tuned").expect("it is there"))
    }

    async fn unload_adapter(&self, tenant: &TenantName, name: &str) -> Result<String, ApiError> {
        Ok(format!("{tenant}/{name}"))
    }
}

#[async_trait::async_trait]
impl Backend for ScriptedBackend {
    fn authenticate(&self, key: Option<&str>) -> Result<TenantName, ApiError> {
        match key {
            Some("sk-acme") => Ok(TenantName("acme".to_owned())),
            Some("sk-other") => Ok(TenantName("other".to_owned())),
            Some(_) => Err(ApiError::new(Code::InvalidApiKey, "the API key is not known")),
            None => Err(ApiError::new(Code::InvalidApiKey, "an API key is required")),
        }
    }

    fn standing(&self, _tenant: &TenantName) -> Standing {
        Standing { weight: 1, is_alone: false }
    }

    fn models(&self, tenant: &TenantName) -> Vec<Arc<ModelView>> {
        ["story", "tuned"].iter().filter_map(|name| self.model(tenant, &format!("acme/{name}"))).collect()
    }

    fn model(&self, tenant: &TenantName, id: &str) -> Option<Arc<ModelView>> {
        let name = id.strip_prefix("acme/").filter(|_| tenant.0 == "acme")?;
        self.view(name)
    }

    async fn asset(&self, digest: &Digest) -> Result<Bytes, ApiError> {
        let assets = [&self.tokenizer_bytes, &self.template];
        let found = assets.into_iter().find(|bytes| Digest::of(bytes) == *digest);
        found.cloned().ok_or_else(|| ApiError::new(Code::Internal, "no such asset"))
    }

    async fn start(&self, sequence: NewSequence) -> Result<SequenceEvents, ApiError> {
        self.started.lock().unwrap().push(sequence.clone());
        let name = sequence.model.id.trim_start_matches("acme/").to_owned();
        match name.as_str() {
            "not-ready" => return Err(ApiError::new(Code::ModelNotReady, "no executor holds the chain yet")),
            "panics" => panic!("this model panics"),
            _ => {}
        }
        let mut script = self.encode(&format!("{}:{STORY}", sequence.choice_index));
        script.push(IM_END);
        let mut events = vec![Ok(Event::Started(v1::Started { queue_ms: 0.5, cached_tokens: CACHED }))];
        let mut reason = v1::FinishReason::Length;
        for index in 0..sequence.generated_tokens_max {
            let token = self.token(&script, &sequence, index);
            let ends = sequence.stop_tokens.contains(&token.token) && name != "slow";
            events.push(Ok(Event::Token(token)));
            if ends {
                reason = v1::FinishReason::Stop;
                break;
            }
        }
        events.push(Ok(Event::Finished(v1::Finished { reason: reason.into() })));
        match name.as_str() {
            "breaks" => {
                events.truncate(3);
                events.push(Err(ApiError::new(Code::Unavailable, "the executor was lost")));
            }
            "late" => {
                events.truncate(1);
                let failed = v1::Failed { code: "never_fits".into(), message: "the sequence needs 9 pages of 4".into(), retry: 0 };
                events.push(Ok(Event::Failed(failed)));
            }
            _ => {}
        }
        self.live.fetch_add(1, Ordering::SeqCst);
        let live = Live(Arc::clone(&self.live));
        let pause = if name == "slow" { Duration::from_millis(20) } else { Duration::ZERO };
        let stream = futures::stream::iter(events).then(move |event| {
            let _ = &live;
            async move {
                if pause.is_zero() {
                    tokio::task::yield_now().await;
                } else {
                    tokio::time::sleep(pause).await;
                }
                event
            }
        });
        Ok(stream.boxed())
    }

    fn ready(&self) -> Readiness {
        match self.ready.load(Ordering::SeqCst) {
            true => Readiness::Ready,
            false => Readiness::NotReady("no executor is there".to_owned()),
        }
    }

    fn draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}
