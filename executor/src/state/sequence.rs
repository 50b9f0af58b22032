//! A sequence as the engine runs it.

use std::collections::VecDeque;

use ashlar_wire::id::SequenceKey;

use super::Now;
use super::batch::BatchId;
use super::pages::TokenHash;
use super::segments::SegmentIndex;

/// A hosted span, by its place in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpanIndex(pub u32);

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It holds no pages.
    Waiting,
    /// It holds pages and its rows may be batched.
    Running,
}

/// What the engine is told when a sequence is admitted.
#[derive(Debug, Clone)]
pub struct Admit {
    /// Its name among routers.
    pub key: SequenceKey,
    /// Grows with each resume.
    pub epoch: u32,
    /// Which hosted span it runs through here.
    pub span: SpanIndex,
    /// Prompt, then tokens generated before (when resuming).
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: u32,
    /// Generation ends when this many tokens were generated in all.
    pub generated_tokens_max: u32,
    /// Generation ends after any of these.
    pub stop_tokens: Vec<u32>,
    /// Lower runs first.
    pub priority: i32,
    /// Pages are shared within one domain (with the numeric class and KV format already mixed in).
    pub domain: TokenHash,
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A stop token.
    Stop,
    /// The number of tokens asked for.
    Length,
}

/// State of one sequence. Invariants: `computed` never increases with depth; `boundary[i]` holds one hidden row for
/// each token that step i has computed and step i + 1 has not; checked by `Engine::check_integrity`.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) key: SequenceKey,
    pub(crate) epoch: u32,
    pub(crate) span: SpanIndex,
    pub(crate) priority: i32,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) prompt_tokens: u32,
    pub(crate) generated_tokens_max: u32,
    pub(crate) domain: TokenHash,
    pub(crate) admitted_at: Now,
    pub(crate) status: Status,
    /// Whether `Started` was emitted.
    pub(crate) started: bool,
    /// Tokens of it that batches in flight sample: they follow `tokens` and are known to the device only. Zero where another
    /// executor samples or feeds the token back.
    pub(crate) promised_tokens: u32,
    /// The latest batch with rows of it: its pages are nobody else's before that one is done.
    pub(crate) last_batch: BatchId,
    /// All known tokens (spans that begin with the embedding); elsewhere the prompt and journal, for the sampler.
    pub(crate) tokens: Vec<u32>,
    /// Tokens known when it was admitted: the first token sampled here has this position.
    pub(crate) base_tokens: u32,
    /// Rows received over a link (spans that do not begin with the embedding).
    pub(crate) received: u32,
    /// Rows below this were consumed downstream (spans that do not end with the head).
    pub(crate) consumed: u32,
    /// Segments to cross, with the offset of each one's first block in the span.
    pub(crate) path: Vec<(SegmentIndex, u32)>,
    /// Tokens computed by each step of the path.
    pub(crate) computed: Vec<u32>,
    /// Hidden rows between step i and i + 1, by slot, oldest first.
    pub(crate) boundary: Vec<VecDeque<u32>>,
    /// For each attention block of the span: slots by page.
    pub(crate) pages: Vec<Vec<u32>>,
    /// For each attention block of the span: full pages already published.
    pub(crate) published: Vec<u32>,
    /// Hash chain over full pages of known tokens.
    pub(crate) hashes: Vec<TokenHash>,
    /// Prompt tokens taken from cached pages at the first start.
    pub(crate) cached_tokens: u32,
}

impl Sequence {
    /// Tokens whose input is at hand for step `i` of the path.
    pub(crate) fn input_tokens(&self, i: usize, begins_with_embed: bool) -> u32 {
        match i {
            // The last token that it may have is never computed: nothing follows it.
            0 if begins_with_embed => (self.tokens.len() as u32 + self.promised_tokens).min(self.tokens_max() - 1),
            0 => self.received,
            _ => self.computed[i - 1],
        }
    }

    /// Tokens that it has at its end, unless a stop token comes first.
    pub(crate) fn tokens_max(&self) -> u32 {
        self.prompt_tokens + self.generated_tokens_max.max(1)
    }

    /// Tokens generated so far, as far as this executor knows.
    pub(crate) fn generated_tokens(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_tokens
    }

    /// Extends the hash chain over full pages of known tokens.
    pub(crate) fn extend_hashes(&mut self, page_tokens: u32) {
        let page_tokens = page_tokens as usize;
        while (self.hashes.len() + 1) * page_tokens <= self.tokens.len() {
            let page = self.hashes.len();
            let mut hasher = blake3::Hasher::new();
            hasher.update(self.hashes.last().unwrap_or(&self.domain));
            for token in &self.tokens[page * page_tokens..(page + 1) * page_tokens] {
                hasher.update(&token.to_le_bytes());
            }
            self.hashes.push(*hasher.finalize().as_bytes());
        }
    }
}
