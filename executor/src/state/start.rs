//! Who starts: waiting sequences by priority, tenant and arrival while their pages fit, with what is cached of their tokens.

use super::Now;
use super::batch::SequenceId;
use super::claim::{Lack, Shortage};
use super::engine::{Engine, Output};
use super::sequence::Status;
use super::tenants::INPUT_WEIGHT;

impl Engine {
    /// Gives pages and a place among the running to waiting sequences while they fit. A tenant below its share does not wait for one above
    /// its share: a sequence of that one gives way. While one that runs is `short` of pages only tenants below their share start. Of those who may
    /// start, one may go a little before its turn (`affinity`).
    pub(crate) fn start_waiting(&mut self, now: Now, short: Option<Shortage>) {
        while let Some((tenant, (_, _, id))) = self.tenants.first() {
            let sequence = &self.sequences[id];
            // It gave way while tokens of it were being sampled: they stand, and are part of what it starts again with.
            if sequence.promised_tokens > 0 {
                return;
            }
            let tokens = sequence.tokens_to_start();
            match self.lacks(id, tokens) {
                None if short.is_some_and(|short| !self.may_start_beside(short, id, tokens)) => return,
                None if short.is_some() => self.start(now, id),
                None => {
                    let nearest = self.nearest(tenant, id);
                    self.start(now, nearest);
                }
                Some(Lack::Pages(_)) if self.fail_if_never_fits(id, tokens) => {}
                Some(lack) if self.claim(id, tokens, lack) => {}
                Some(_) => return,
            }
        }
    }

    /// Starts a waiting sequence whose pages are there.
    pub(crate) fn start(&mut self, now: Now, id: SequenceId) {
        let sequence = &self.sequences[id];
        let (tenant, whole) = (sequence.tenant, sequence.path.is_whole());
        let tokens = sequence.tokens_to_start();
        self.tenants.remove_waiting(tenant, sequence.turn());
        self.tenants.count_running(tenant, true);
        let steps = self.sequences[id].steps.len();
        if whole {
            self.reuse_pages(id);
        }
        // At once, so that nobody who starts next counts on the same pages. Where windows slide, what lies behind them makes room for the
        // rest of a prompt.
        for step in 0..steps {
            let sequence = &self.sequences[id];
            let slides = whole && sequence.path.steps[step].slides();
            let first = sequence.steps[step].computed + self.limits.chunk_tokens_max;
            let reserved = self.reserve_to(id, step, if slides { tokens.min(first) } else { tokens });
            assert!(reserved, "nothing that it needs was lacking");
        }
        let sequence = &mut self.sequences[id];
        sequence.status = Status::Running;
        self.holdings.start(sequence);
        sequence.moved_at = self.clock.now;
        sequence.decodes_from = if whole { sequence.tokens.len() as u32 } else { sequence.base_tokens };
        if !sequence.started {
            sequence.started = true;
            sequence.service_before = self.tenants.counter(tenant);
            let computed = sequence.prompt_tokens.saturating_sub(sequence.cached_tokens);
            let waited = now.saturating_sub(sequence.admitted_at);
            let cached_tokens = sequence.cached_tokens;
            self.outputs.push_back(Output::EmitStarted { sequence: id, waited, cached_tokens });
            self.join_line(id, computed);
            self.tenants.charge(tenant, computed, INPUT_WEIGHT);
            self.hurry(id);
        }
        self.clock.prompts.insert(self.sequences[id].prompt_place());
        self.look_at_first(id);
        self.list_giver(id);
        (0..steps).for_each(|step| self.enqueue(id, step));
    }
}
