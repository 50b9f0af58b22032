//! Who starts: waiting sequences by priority and arrival while their pages fit, with what is cached of their tokens.

use super::Now;
use super::batch::SequenceId;
use super::engine::{Engine, Output};
use super::pages::HandleKey;
use super::sequence::Status;

impl Engine {
    /// Gives pages and a place among the running to waiting sequences, by priority and arrival, while they fit.
    pub(crate) fn start_waiting(&mut self, now: Now) {
        while let Some(&(priority, id)) = self.waiting.first() {
            let running = self.sequences.len() - self.waiting.len();
            if running >= self.limits.sequences_max as usize {
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
            let tokens = if whole { sequence.tokens.len() as u32 + 1 } else { sequence.prompt_tokens + sequence.generated_tokens_max };
            if !self.pages_suffice(self.span(sequence.span), tokens) {
                return;
            }
            self.waiting.remove(&(priority, id));
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
            sequence.decodes_from = if whole { sequence.tokens.len() as u32 } else { sequence.base_tokens };
            if !sequence.started {
                sequence.started = true;
                let waited = now.saturating_sub(sequence.admitted_at);
                let cached_tokens = sequence.cached_tokens;
                self.outputs.push_back(Output::EmitStarted { sequence: id, waited, cached_tokens });
            }
            self.enqueue(id, 0);
        }
    }

    /// Takes cached pages for the longest prefix that every attention block of the chain has. At least the last
    /// known token is left to compute.
    fn reuse_pages(&mut self, id: SequenceId) {
        if !self.limits.prefix_cache {
            return;
        }
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[id];
        sequence.extend_hashes(page_tokens);
        let most = (sequence.tokens.len() as u32 - 1) / page_tokens;
        let stretches = || sequence.path.steps.iter().filter_map(|step| step.stretch);
        let is_cached = |hash: &[u8; 32]| stretches().all(|stretch| self.pages.contains(&HandleKey { tokens: *hash, stretch }));
        // A chain without attention has no pages, and nothing to reuse.
        let most = if stretches().next().is_some() { most as usize } else { 0 };
        let hit = sequence.hashes.iter().take(most).take_while(|hash| is_cached(hash)).count();
        let tokens = hit as u32 * page_tokens;
        for (state, step) in sequence.steps.iter_mut().zip(&sequence.path.steps) {
            if let Some(stretch) = step.stretch {
                let handles = sequence.hashes[..hit].iter().map(|hash| self.pages.find(&HandleKey { tokens: *hash, stretch }));
                state.handles.extend(handles.map(|handle| handle.expect("the index has it, and nothing was evicted since")));
            }
            state.published = hit as u32;
            state.computed = tokens;
        }
        if !sequence.started {
            sequence.cached_tokens = tokens.min(sequence.prompt_tokens);
            self.counters.prefix_query_tokens += u64::from(sequence.prompt_tokens);
            self.counters.prefix_hit_tokens += u64::from(sequence.cached_tokens);
        }
    }
}
