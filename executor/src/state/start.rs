//! Who starts: waiting sequences by priority, tenant and arrival while their pages fit, with what is cached of their tokens.

use super::Now;
use super::batch::SequenceId;
use super::engine::{Engine, Output};
use super::pages::{HandleIndex, HandleKey, PagePool};
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

    /// Takes what is cached of its tokens. With c[s] leading pages skipped by step s: the last step may skip pages that every attention
    /// block of the chain has; a step before a fork may skip more, if their hidden rows are kept at the fork and the blocks before it
    /// have their pages. At least the last known token is left to compute.
    fn reuse_pages(&mut self, id: SequenceId) {
        if !self.limits.prefix_cache {
            return;
        }
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[id];
        sequence.extend_hashes(page_tokens);
        let path = std::sync::Arc::clone(&sequence.path);
        let most = (sequence.tokens.len() as u32 - 1) / page_tokens;
        let hashes = sequence.hashes[..most as usize].to_vec();
        let is_cached = |pages: &PagePool, stretch, page: usize| pages.contains(&HandleKey { tokens: hashes[page], stretch });
        // Leading pages that every attention block up to and with a step has.
        let mut lengths = Vec::with_capacity(path.steps.len());
        let mut length = hashes.len();
        for step in &path.steps {
            if let Some(stretch) = step.stretch {
                length = (0..length).take_while(|page| is_cached(&self.pages, stretch, *page)).count();
            }
            lengths.push(length);
        }
        // A chain without attention has no pages, and nothing to reuse.
        let mut skipped = if path.steps.iter().all(|step| step.stretch.is_none()) { 0 } else { length };
        let mut counts = vec![skipped; path.steps.len()];
        for s in (0..path.steps.len() - 1).rev() {
            if let Some(fork) = path.steps[s].fork {
                skipped += (skipped..lengths[s]).take_while(|page| is_cached(&self.pages, fork, *page)).count();
            }
            counts[s] = skipped;
        }
        let take = |pages: &mut PagePool, stretch, page: usize| {
            let handle = pages.find(&HandleKey { tokens: hashes[page], stretch });
            handle.expect("the index has it, and nothing was evicted since")
        };
        let (mut block_tokens, mut foreign_block_tokens, mut made_elsewhere) = (0, 0, 0);
        let span = self.sequences[id].span;
        let block_count = self.span(span).host.blocks.len();
        for (s, step) in path.steps.iter().enumerate() {
            if let Some(stretch) = step.stretch {
                let handles: Vec<HandleIndex> = (0..counts[s]).map(|page| take(&mut self.pages, stretch, page)).collect();
                made_elsewhere = handles.iter().filter(|handle| self.pages.maker(**handle) != span.0).count();
                self.sequences[id].steps[s].handles = handles;
            }
            let next = counts.get(s + 1).copied().unwrap_or(0);
            let blocks_to = path.steps.get(s + 1).map_or(block_count, |next| next.from as usize);
            if s + 1 == path.steps.len() {
                // Pages of the deepest attention blocks that another model has made: all below is shared with it.
                block_tokens += counts[s] * blocks_to;
                foreign_block_tokens += made_elsewhere.min(counts[s]) * blocks_to;
            } else if let Some(fork) = step.fork {
                for page in next..counts[s] {
                    let handle = take(&mut self.pages, fork, page);
                    let kept = self.boundary_page(page as u32, handle);
                    let state = &mut self.sequences[id].steps[s];
                    state.boundary.push(kept);
                    state.hidden.extend(kept.slot..kept.slot + page_tokens);
                    state.found += page_tokens;
                    block_tokens += blocks_to;
                    foreign_block_tokens += if self.pages.maker(handle) == span.0 { 0 } else { blocks_to };
                }
            }
            let state = &mut self.sequences[id].steps[s];
            (state.published, state.computed) = (counts[s] as u32, counts[s] as u32 * page_tokens);
        }
        let sequence = &mut self.sequences[id];
        if !sequence.started {
            let tokens = |block_pages: usize| (block_pages * page_tokens as usize / block_count) as u32;
            sequence.cached_tokens = tokens(block_tokens).min(sequence.prompt_tokens);
            self.counters.prefix_query_tokens += u64::from(sequence.prompt_tokens);
            self.counters.prefix_hit_tokens += u64::from(sequence.cached_tokens);
            self.counters.cross_model_hit_tokens += u64::from(tokens(foreign_block_tokens).min(sequence.cached_tokens));
        }
    }
}
