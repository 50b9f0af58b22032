//! First tokens on time: the targets that a deployment gives a sequence, and what they change. Priority and fairness come first: targets
//! order the sequences of one tenant, and those of tenants that had equal service. Gaps between tokens are in `clock`.

use super::batch::SequenceId;
use super::clock::{Clock, MARGIN, Micros, price};
use super::cost::CostCurve;
use super::engine::Engine;
use super::ready::Entry;
use super::segments::SegmentIndex;
use super::sequence::Sequence;

/// When a first token is wanted without a target, after its sequence came: later than with most targets, so that those go first, and no
/// stream of them goes first for ever.
const PATIENCE: Micros = 10_000_000;

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
        let first_due = (ttft > 0).then_some(self.clock.now + ttft);
        self.clock.has_firsts |= first_due.is_some();
        (gap, first_due, first_due.unwrap_or(self.clock.now + PATIENCE))
    }

    /// A sequence starts whose first token has a target: it takes the place of its tenant's prompts whose first token is wanted later, and
    /// each of them the place of the next. The tenant has the places that it had.
    pub(crate) fn hurry(&mut self, id: SequenceId) {
        let new = &self.sequences[id];
        if new.first_due.is_none() {
            return;
        }
        let is_behind = |s: &&Sequence| (s.tenant, s.priority) == (new.tenant, new.priority) && s.rank <= new.rank;
        let later = self.clock.prompts.range((new.wanted_at + 1, SequenceId::new(0, 0))..).map(|(_, id)| &self.sequences[*id]);
        let later: Vec<SequenceId> = later.filter(is_behind).map(|s| s.id).collect();
        let mut rank = new.rank;
        for later in later.into_iter().rev() {
            std::mem::swap(&mut self.sequences[later].rank, &mut rank);
        }
        self.sequences[id].rank = rank;
    }

    /// Sorts chunks of prompts into the order in which they run: by priority, by the service that the tenant had had, by when the first token
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
        let mut firsts = (f64::INFINITY, 0);
        if self.clock.has_firsts {
            let start = self.clock.start();
            // One that is late already holds nobody up.
            for (due, id) in self.clock.prompts.range((start + 1, SequenceId::new(0, 0))..) {
                let (due, sequence) = (*due, &self.sequences[*id]);
                if sequence.first_due.is_none() {
                    continue;
                }
                let slack = ((due - start) as f64 - rest(sequence, 0, &self.clock, &self.costs)) * MARGIN;
                if slack < firsts.0 {
                    firsts = (slack.max(0.0), due);
                }
            }
        }
        ChunkTime { gaps, firsts }
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
