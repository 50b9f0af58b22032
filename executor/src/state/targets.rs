//! First tokens on time: the targets that a deployment gives a sequence, and what they change. Priority and fairness come first: targets
//! order the sequences of one tenant, and those of tenants that had equal service. Gaps between tokens are in `clock`.

use std::collections::BTreeSet;

use super::batch::{BatchId, SequenceId};
use super::clock::{Clock, MARGIN, Micros, PASS_BATCHES, price};
use super::cost::CostCurve;
use super::engine::Engine;
use super::ready::Entry;
use super::segments::SegmentIndex;
use super::sequence::{Sequence, Status};

/// When a first token is wanted without a target, after its sequence came: later than with most targets, so that those go first, and no
/// stream of them goes first for ever.
const PATIENCE: Micros = 10_000_000;
/// Of those whose first token is due soonest for what is left to compute, how many a plan looks at.
const FIRSTS_LOOKED_AT: usize = 4;

/// What a deployment wants of the time of tokens. None: what the executor is set to. 0: no target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Targets {
    /// Milliseconds from admission to the first token.
    pub ttft_ms: Option<u32>,
    /// Milliseconds between two tokens.
    pub gap_ms: Option<u32>,
}

/// Time that chunks of prompts may add to a batch, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkTime {
    /// Before somebody's next token is late.
    gaps: f64,
    /// Before a first token is late, and when that is due: chunks of prompts whose first token is due later may take so much.
    firsts: (f64, Micros),
}

impl Default for ChunkTime {
    /// Any.
    fn default() -> Self {
        Self { gaps: f64::INFINITY, firsts: (f64::INFINITY, 0) }
    }
}

impl ChunkTime {
    /// What a chunk of a sequence may add; infinite: anything.
    pub(crate) fn budget(&self, sequence: &Sequence) -> f64 {
        let (firsts, due) = self.firsts;
        let is_later = sequence.first_due.is_none_or(|its| its > due);
        if is_later { self.gaps.min(firsts) } else { self.gaps }
    }

    /// A chunk was taken.
    pub(crate) fn spend(&mut self, price: f64) {
        self.gaps = (self.gaps - price).max(0.0);
        self.firsts.0 = (self.firsts.0 - price).max(0.0);
    }
}

impl Engine {
    /// What a sequence that is admitted now wants: the gap between tokens, when its first token is due, and its place in the line.
    pub(crate) fn wants(&mut self, targets: &Targets) -> (Micros, Option<Micros>, Micros) {
        let micros = |milliseconds: u32| Micros::from(milliseconds) * 1000;
        let gap = micros(targets.gap_ms.unwrap_or(self.limits.gap_ms));
        let ttft = micros(targets.ttft_ms.unwrap_or(self.limits.ttft_ms));
        self.counters.gap_target_count += u64::from(gap > 0);
        self.counters.ttft_target_count += u64::from(ttft > 0);
        let first_due = (ttft > 0).then_some(self.clock.now + ttft);
        (gap, first_due, first_due.unwrap_or(Micros::MAX).min(self.clock.now + PATIENCE))
    }

    /// A sequence starts whose first token has a target: it takes the place of its tenant's prompts whose first token is wanted later, and
    /// each of them the place of the next. The tenant has the places that it had.
    pub(crate) fn hurry(&mut self, id: SequenceId) {
        let new = &self.sequences[id];
        if new.first_due.is_none() {
            return;
        }
        let (tenant, priority) = (new.tenant, new.priority);
        let behind = (tenant, priority, new.wanted_at + 1, SequenceId::LEAST)..=(tenant, priority, Micros::MAX, SequenceId::MOST);
        let later = self.clock.prompts.range(behind).map(|(.., id)| &self.sequences[*id]);
        let later: Vec<SequenceId> = later.filter(|s| s.rank <= new.rank).map(|s| s.id).collect();
        let mut rank = new.rank;
        for later in later.into_iter().rev() {
            let its = self.sequences[later].rank;
            self.move_in_line(later, rank);
            rank = its;
        }
        self.move_in_line(id, rank);
    }

    /// Sorts chunks of prompts into the order in which they run: by priority, by their place on the line of prompts, by when the first token
    /// is wanted, by arrival, and of one sequence the deeper step first.
    pub(crate) fn sort_chunks(&self, chunks: &mut [Entry]) {
        if chunks.len() > 1 {
            chunks.sort_by_cached_key(|entry| {
                let sequence = &self.sequences[entry.sequence];
                (entry.priority, sequence.rank, sequence.wanted_at, entry.sequence, entry.step)
            });
        }
    }

    /// Time that chunks may add to a batch of a segment.
    pub(crate) fn chunk_time(&mut self, segment: SegmentIndex) -> ChunkTime {
        let gaps = self.chunk_budget(segment);
        let firsts = self.first_slack();
        ChunkTime { gaps, firsts }
    }

    /// Microseconds that chunks may add before somebody's first token is late, and when that is due. Of those who have to begin first, a few: what is
    /// kept of the others may be off by what curves have changed since somebody looked.
    fn first_slack(&mut self) -> (f64, Micros) {
        let mut firsts = (f64::INFINITY, 0);
        if self.clock.firsts.by_begin.is_empty() {
            return firsts;
        }
        let latest = self.latest_batch();
        if self.clock.firsts.looked_at.is_none_or(|at| latest.0 >= at.0 + PASS_BATCHES) {
            self.clock.firsts.looked_at = Some(latest);
            let ids: Vec<SequenceId> = self.clock.firsts.by_begin.iter().map(|(_, id)| *id).collect();
            ids.into_iter().for_each(|id| self.look_at_first(id));
        }
        let start = self.clock.start();
        // One that is late already holds nobody up.
        let is_early = |(_, id): &&(Micros, SequenceId)| self.sequences[*id].first_due.is_some_and(|due| due > start);
        for (_, id) in self.clock.firsts.by_begin.iter().filter(is_early).take(FIRSTS_LOOKED_AT) {
            let sequence = &self.sequences[*id];
            let due = sequence.first_due.expect("only those are listed");
            let slack = ((due - start) as f64 - rest(sequence, 0, &self.clock, &self.costs)) * MARGIN;
            if slack < firsts.0 {
                firsts = (slack.max(0.0), due);
            }
        }
        firsts
    }

    /// Puts a prompt that runs where it belongs among those whose first token has a target: when it starts, when a chunk of it enters the
    /// chain, and now and then. One that is late leaves them for good.
    pub(crate) fn look_at_first(&mut self, id: SequenceId) {
        let sequence = &self.sequences[id];
        let due = sequence.first_due.filter(|due| !sequence.is_decoding && *due > self.clock.now);
        let begins_by = due.map(|due| {
            let rest = rest(sequence, 0, &self.clock, &self.costs);
            (due.saturating_sub(rest as Micros), sequence.rest_tokens())
        });
        self.clock.firsts.place(&mut self.sequences[id], begins_by);
    }

    /// Whether those are listed whose first token has a target and is not late, with what is left of their prompts.
    pub(crate) fn check_firsts(&self) -> Result<(), String> {
        let listed: BTreeSet<_> = self.sequences.iter().filter_map(|s| s.begins_by.map(|(at, _)| (at, s.id))).collect();
        if listed != self.clock.firsts.by_begin {
            return Err(format!("{} first tokens have targets, {} are listed, or others", listed.len(), self.clock.firsts.by_begin.len()));
        }
        for sequence in self.sequences.iter() {
            let is_prompt = sequence.status == Status::Running && !sequence.is_decoding;
            let has_target = is_prompt && sequence.first_due.is_some();
            let is_late = sequence.first_due.is_some_and(|due| due <= self.clock.now);
            let tokens = sequence.begins_by.map(|(_, tokens)| tokens);
            if tokens.is_some() && !has_target
                || tokens.is_none() && has_target && !is_late
                || tokens.is_some_and(|n| n != sequence.rest_tokens())
            {
                let (id, left) = (sequence.id, sequence.rest_tokens());
                return Err(format!("the first token of sequence {id:?} is listed with {tokens:?} tokens before it, {left} are left"));
            }
        }
        Ok(())
    }
}

/// Prompts that run and whose first token has a target.
#[derive(Debug, Default)]
pub(crate) struct Firsts {
    /// By `Sequence::begins_by`.
    by_begin: BTreeSet<(Micros, SequenceId)>,
    /// The batch after which all were looked at last.
    looked_at: Option<BatchId>,
}

impl Firsts {
    fn place(&mut self, sequence: &mut Sequence, begins_by: Option<(Micros, u32)>) {
        let before = std::mem::replace(&mut sequence.begins_by, begins_by);
        before.map(|(at, _)| self.by_begin.remove(&(at, sequence.id)));
        self.by_begin.extend(begins_by.map(|(at, _)| (at, sequence.id)));
    }
}

impl Clock {
    /// A sequence that ran without a token has one, or no longer runs.
    pub(crate) fn forget_prompt(&mut self, sequence: &mut Sequence) {
        self.prompts.remove(&sequence.prompt_place());
        self.line.remove(sequence.priority, sequence.rank, sequence.id);
        self.firsts.place(sequence, None);
    }
}

/// Microseconds of what is known of a sequence and not computed, from a step on.
fn rest(sequence: &Sequence, step: usize, clock: &Clock, costs: &[CostCurve]) -> f64 {
    let count = sequence.known_tokens().saturating_sub(sequence.steps[step].computed);
    price(sequence, step, 0, count, clock, costs)
}

/// When a row should run of a sequence that has no token yet: early enough for the rest of its prompt. A first token that is late already
/// claims no more than others.
pub(crate) fn first_row_due(sequence: &Sequence, step: usize, clock: &Clock, costs: &[CostCurve]) -> Micros {
    match sequence.first_due.filter(|due| *due > clock.now && !sequence.decodes(step)) {
        Some(due) => due.saturating_sub(rest(sequence, step, clock, costs) as Micros).max(clock.now),
        None => Micros::MAX,
    }
}
