//! A sequence as the engine runs it, and the path that it takes.

use std::collections::VecDeque;
use std::sync::Arc;

use ashlar_wire::id::SequenceKey;

use super::Now;
use super::batch::{BatchId, SequenceId};
use super::clock::Micros;
use super::lane::{Held, Lane};
use super::pages::{HandleIndex, StretchIndex, TokenHash};
use super::segments::SegmentIndex;
use super::targets::Targets;
use super::tenants::{TenantIndex, Turn};

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
    /// Whose it is, and what share of the service that tenant has among others; 0 is 1.
    pub tenant: String,
    /// See `tenant`.
    pub weight: u32,
    /// When its tokens are wanted.
    pub targets: Targets,
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

/// One segment on the way through a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PathStep {
    pub(crate) segment: SegmentIndex,
    /// Offset of its first block in the span.
    pub(crate) from: u32,
    /// Its first attention block and how many, counted among those of the span.
    pub(crate) attention_from: u32,
    pub(crate) attention_count: u32,
    /// These by window, those without one first; none without attention blocks.
    pub(crate) lanes: Vec<Lane>,
    /// What boundary handles at its end cover, if the lineage forks there.
    pub(crate) fork: Option<StretchIndex>,
}

impl PathStep {
    /// The place of the lane of a window, if it has one.
    pub(crate) fn lane_of(&self, window: Option<u32>) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.window == window)
    }

    /// Whether some of its blocks look back less far than to the first token.
    pub(crate) fn slides(&self) -> bool {
        self.lanes.last().is_some_and(|lane| lane.window.is_some())
    }
}

/// A page of hidden rows at the end of a step, kept for others when it is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BoundaryPage {
    pub(crate) page: u32,
    pub(crate) handle: HandleIndex,
    /// Slot of its first row.
    pub(crate) slot: u32,
}

/// The way through a span under the present cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Path {
    pub(crate) steps: Vec<PathStep>,
    /// Whether tokens go in here, and whether they are sampled here.
    pub(crate) begins_with_embed: bool,
    pub(crate) ends_with_head: bool,
}

impl Path {
    /// Whether the chain is whole here: only then may a sequence start over, and pages be shared.
    pub(crate) fn is_whole(&self) -> bool {
        self.begins_with_embed && self.ends_with_head
    }

    /// Where a sequence stands that has not started.
    pub(crate) fn fresh_steps(&self) -> Vec<StepState> {
        let fresh = |step: &PathStep| StepState { lanes: vec![Held::default(); step.lanes.len()], ..StepState::default() };
        self.steps.iter().map(fresh).collect()
    }
}

/// Where a sequence stands at one step of its path.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepState {
    /// Tokens computed (or in a batch that is handed out).
    pub(crate) computed: u32,
    /// Its pages in each lane of the step. All lanes have them up to `reserved`; so many are published, and so many are in the device's
    /// table.
    pub(crate) lanes: Vec<Held>,
    pub(crate) reserved: u32,
    pub(crate) published: u32,
    pub(crate) told: u32,
    /// Slots of hidden rows that this step has computed and the next has not, oldest first. Some may be of `boundary`.
    pub(crate) hidden: VecDeque<u32>,
    /// How many of `hidden`, from the front, it found in the cache: they have no slot yet that changes hands, and need one to go on.
    pub(crate) found: u32,
    /// Boundary pages that it holds, by page: of its prompt, until the next step has passed that.
    pub(crate) boundary: Vec<BoundaryPage>,
    /// Whether it is in the ready queue of its segment.
    pub(crate) queued: bool,
}

/// State of one sequence. Invariants: `computed` never increases with depth; `steps[i].hidden` has one row for each token that step i
/// has computed and step i + 1 has not; a step is queued exactly while it runs and has rows ready. `Engine::check_integrity` checks them.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) key: SequenceKey,
    pub(crate) epoch: u32,
    pub(crate) span: SpanIndex,
    pub(crate) priority: i32,
    pub(crate) tenant: TenantIndex,
    /// Tokens that it had computed when it gave way to another tenant, if it did.
    pub(crate) gave_way_at: Option<u32>,
    /// Whether it runs and may give way to another tenant: `Holdings` lists it.
    pub(crate) is_giver: bool,
    /// How often others went before it that were behind it in the line.
    pub(crate) passes: u32,
    /// Service that its tenant had had when it first started.
    pub(crate) service_before: u64,
    /// Its place on the line of prompts that run: of two the one with less goes first.
    pub(crate) rank: u64,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) prompt_tokens: u32,
    pub(crate) generated_tokens_max: u32,
    pub(crate) domain: TokenHash,
    pub(crate) admitted_at: Now,
    pub(crate) status: Status,
    /// When its next token is due that no batch samples yet; None without a target.
    pub(crate) due: Option<Micros>,
    /// Time between two tokens that is wanted; 0: any.
    pub(crate) gap: Micros,
    /// When its first token is due, if it has a target for that, and when it is wanted in any case: its place in the line of its tenant.
    pub(crate) first_due: Option<Micros>,
    pub(crate) wanted_at: Micros,
    /// When the rest of its prompt was to begin for a first token in time, and tokens of that rest, when somebody looked last; None where
    /// that does not count: no target, late already, or a token is there. `Firsts` lists it.
    pub(crate) begins_by: Option<(Micros, u32)>,
    /// Whether a token of it was sampled, or is being, since it last started; the latest batch that samples one; when the latest came.
    pub(crate) is_decoding: bool,
    pub(crate) sampled_in: BatchId,
    pub(crate) token_at: Micros,
    /// When rows of it were planned last, or came, or it started.
    pub(crate) moved_at: Micros,
    /// Whether `Started` was emitted.
    pub(crate) started: bool,
    /// Tokens of it that batches in flight sample: they follow `tokens` and are known to the device only. Zero where another
    /// executor samples or feeds the token back.
    pub(crate) promised_tokens: u32,
    /// The latest batch with rows of it: its pages are nobody else's before that one is done.
    pub(crate) last_batch: BatchId,
    /// The latest choice of rows for a batch that has taken some of it (`Engine::choices`).
    pub(crate) chosen_in: u64,
    /// All known tokens (spans that begin with the embedding); elsewhere the prompt and journal, for the sampler.
    pub(crate) tokens: Vec<u32>,
    /// Tokens known when it was admitted: the first token sampled here has this position.
    pub(crate) base_tokens: u32,
    /// Rows of tokens from here on are decodes: all before it were known when it last started.
    pub(crate) decodes_from: u32,
    /// Rows received over a link (spans that do not begin with the embedding).
    pub(crate) received: u32,
    /// Rows below this were consumed downstream (spans that do not end with the head).
    pub(crate) consumed: u32,
    /// Segments to cross, and where it stands at each.
    pub(crate) path: Arc<Path>,
    pub(crate) steps: Vec<StepState>,
    /// Hash chain over full pages of known tokens.
    pub(crate) hashes: Vec<TokenHash>,
    /// Prompt tokens taken from cached pages at the first start.
    pub(crate) cached_tokens: u32,
}

impl Sequence {
    /// Its pages in the lane of a window at step `i`, if that has one.
    pub(crate) fn held(&self, i: usize, window: Option<u32>) -> Option<&Held> {
        self.path.steps[i].lane_of(window).map(|lane| &self.steps[i].lanes[lane])
    }

    /// Tokens whose input is at hand for step `i` of the path.
    fn input_tokens(&self, i: usize) -> u32 {
        match i {
            // The last token that it may have is never computed: nothing follows it.
            0 if self.path.begins_with_embed => self.known_tokens().min(self.tokens_max() - 1),
            0 => self.received,
            _ => self.steps[i - 1].computed,
        }
    }

    /// Rows whose input is at hand for a step, within the `link_rows_max` that a link may have in flight. No step runs further ahead than the
    /// last one may: its hidden rows would be held until the other executor goes on, and others here would lack them.
    pub(crate) fn ready_count(&self, i: usize, link_rows_max: u32) -> u32 {
        let count = self.input_tokens(i) - self.steps[i].computed;
        if !self.path.ends_with_head {
            let in_flight = self.steps[i].computed - self.consumed;
            return count.min(link_rows_max.saturating_sub(in_flight));
        }
        count
    }

    /// Whether it holds pages at all.
    pub(crate) fn has_pages(&self) -> bool {
        self.steps.iter().flat_map(|step| &step.lanes).any(|held| !held.handles.is_empty())
    }

    /// Its place among the prompts that run.
    pub(crate) fn prompt_place(&self) -> (TenantIndex, i32, Micros, SequenceId) {
        (self.tenant, self.priority, self.wanted_at, self.id)
    }

    /// Whether it ran before, here or elsewhere.
    pub(crate) fn has_begun(&self) -> bool {
        self.started || self.base_tokens > self.prompt_tokens
    }

    /// Tokens that it knows and the first step has not computed.
    pub(crate) fn rest_tokens(&self) -> u32 {
        self.known_tokens().saturating_sub(self.steps[0].computed)
    }

    /// Its place in the line of its tenant while it waits.
    pub(crate) fn turn(&self) -> Turn {
        (self.priority, self.wanted_at, self.id)
    }

    /// Whether the next row of a step is a decode: a token made here, not one of a prompt or of what is computed again.
    pub(crate) fn decodes(&self, i: usize) -> bool {
        self.steps[i].computed >= self.decodes_from
    }

    /// Tokens that it has, with those that only the device knows yet.
    pub(crate) fn known_tokens(&self) -> u32 {
        self.tokens.len() as u32 + self.promised_tokens
    }

    /// Tokens that it has at its end, unless a stop token comes first.
    pub(crate) fn tokens_max(&self) -> u32 {
        self.prompt_tokens + self.generated_tokens_max.max(1)
    }

    /// Tokens whose pages it needs to start: what it knows, and one more; where the chain is cut over executors all that it may come to, as
    /// the others would not know if it gave its pages back half-way.
    pub(crate) fn tokens_to_start(&self) -> u32 {
        if self.path.is_whole() { (self.tokens.len() as u32 + 1).min(self.tokens_max()) } else { self.tokens_max() }
    }

    /// Tokens generated so far, as far as this executor knows.
    pub(crate) fn generated_tokens(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_tokens
    }

    /// Why it has ended, if it has.
    pub(crate) fn end_reason(&self) -> Option<Reason> {
        if !self.path.begins_with_embed || self.generated_tokens() == 0 {
            return None;
        }
        if self.stop_tokens.contains(self.tokens.last()?) {
            return Some(Reason::Stop);
        }
        (self.generated_tokens() >= self.generated_tokens_max).then_some(Reason::Length)
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
