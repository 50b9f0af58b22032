//! Who starts: waiting sequences by priority, tenant and arrival while their pages fit, with what is cached of their tokens.

use super::Now;
use super::batch::SequenceId;
use super::engine::{Engine, Output};
use super::sequence::Status;
use super::tenants::{INPUT_WEIGHT, TenantIndex};

impl Engine {
    /// Gives pages and a place among the running to waiting sequences while they fit. A tenant below its share of the places does not wait
    /// for one above its share: a sequence of that one gives way.
    pub(crate) fn start_waiting(&mut self, now: Now) {
        while let Some((tenant, (priority, _, id))) = self.tenants.first() {
            let running = self.sequences.len() - self.tenants.waiting_count();
            if running >= self.limits.sequences_max as usize {
                if self.claim(tenant, priority) {
                    continue;
                }
                return;
            }
            let sequence = &self.sequences[id];
            // It gave way while tokens of it were being sampled: they stand, and are part of what it starts again with.
            if sequence.promised_tokens > 0 {
                return;
            }
            let whole = sequence.path.is_whole();
            // A cut chain cannot give its pages back half-way (the other executors would not know), so it starts
            // only when all that it may need is there. Others need what they know, and one token more.
            let tokens = if whole { sequence.tokens.len() as u32 + 1 } else { sequence.tokens_max() };
            if !self.pages_suffice(self.span(sequence.span), tokens) {
                if self.fail_if_never_fits(id, tokens) {
                    continue;
                }
                if self.claim(tenant, priority) {
                    continue;
                }
                return;
            }
            self.start(now, id);
        }
    }

    /// Starts a waiting sequence whose pages are there.
    pub(crate) fn start(&mut self, now: Now, id: SequenceId) {
        let sequence = &self.sequences[id];
        let (tenant, whole) = (sequence.tenant, sequence.path.is_whole());
        let tokens = sequence.tokens_max();
        self.tenants.remove_waiting(tenant, sequence.turn());
        self.tenants.count_running(tenant, true);
        let steps = self.sequences[id].steps.len();
        if whole {
            self.reuse_pages(id);
        } else {
            for step in 0..steps {
                let reserved = self.reserve_to(id, step, tokens);
                assert!(reserved, "pages_suffice said so");
            }
        }
        let sequence = &mut self.sequences[id];
        sequence.status = Status::Running;
        sequence.moved_at = self.clock.now;
        sequence.decodes_from = if whole { sequence.tokens.len() as u32 } else { sequence.base_tokens };
        if !sequence.started {
            sequence.started = true;
            sequence.rank = self.tenants.counter(tenant);
            let computed = sequence.prompt_tokens.saturating_sub(sequence.cached_tokens);
            self.tenants.charge(tenant, computed, INPUT_WEIGHT);
            let waited = now.saturating_sub(sequence.admitted_at);
            let cached_tokens = sequence.cached_tokens;
            self.outputs.push_back(Output::EmitStarted { sequence: id, waited, cached_tokens });
            self.hurry(id);
        }
        (0..steps).for_each(|step| self.enqueue(id, step));
    }

    /// Has the latest sequence of the tenant that is most above its share give way, for a tenant below its own; never one of higher
    /// priority, and none twice. True if one did whose pages are back already.
    fn claim(&mut self, tenant: TenantIndex, priority: i32) -> bool {
        let places = self.limits.sequences_max;
        // What gave way before comes back first.
        if !self.leaving.is_empty() || !self.tenants.is_short(tenant, places) {
            return false;
        }
        // One that had less service would only come back first.
        let is_ahead = |above: &TenantIndex| self.tenants.counter(*above) >= self.tenants.counter(tenant);
        let Some(above) = self.tenants.most_above(places).filter(is_ahead) else { return false };
        let may = |id: SequenceId| self.sequences[id].tenant == above && !self.sequences[id].gave_way;
        let victim = self.preemptible().filter(|(of, id)| *of >= priority && may(*id)).max();
        if let Some((_, victim)) = victim {
            self.preempt(victim);
            self.sequences[victim].gave_way = true;
        }
        victim.is_some() && self.leaving.is_empty()
    }
}
