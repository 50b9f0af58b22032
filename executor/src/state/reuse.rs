//! What a sequence that starts need not compute, because it is cached: keys and values at each step, hidden rows at forks.

use std::sync::Arc;

use super::batch::SequenceId;
use super::engine::Engine;
use super::lane::{Held, Lane, pages_behind};
use super::pages::{HandleIndex, HandleKey, PagePool, StretchIndex, TokenHash};
use super::sequence::PathStep;

/// The pages of one prompt, as far as they are cached.
struct Cached<'a> {
    pages: &'a PagePool,
    /// Of each full page before the last token.
    hashes: &'a [TokenHash],
    page_tokens: u32,
}

impl Cached<'_> {
    fn has(&self, stretch: StretchIndex, page: usize) -> bool {
        self.pages.contains(&HandleKey { tokens: self.hashes[page], stretch })
    }

    /// How many leading pages, at most `most`, steps may skip together: for each of their lanes there are all pages that the first token
    /// behind them sees. What lies behind its window is not asked for.
    fn longest(&self, steps: &[PathStep], most: usize) -> usize {
        let lanes = || steps.iter().flat_map(|step| &step.lanes);
        let all_of = |most, lane: &Lane| (0..most).take_while(|page| self.has(lane.stretch, *page)).count();
        let mut length = lanes().filter(|lane| lane.window.is_none()).fold(most, all_of);
        // What is too long for one lane may be the wrong length for another, whose window it moves.
        loop {
            let shorter = lanes().filter(|lane| lane.window.is_some()).fold(length, |length, lane| self.longest_of(lane, length));
            if shorter == length {
                return length;
            }
            length = shorter;
        }
    }

    /// The same for one lane with a window: a page that is missing is behind it, or ends what may be skipped.
    fn longest_of(&self, lane: &Lane, most: usize) -> usize {
        let mut length = most;
        loop {
            let seen_from = pages_behind(lane.window, length as u32 * self.page_tokens, self.page_tokens) as usize;
            match (seen_from..length).rev().find(|page| !self.has(lane.stretch, *page)) {
                Some(missing) => length = missing,
                None => return length,
            }
        }
    }
}

impl Engine {
    /// Takes what is cached of its tokens. With c[s] leading pages skipped by step s: the last step may skip pages that every attention
    /// block of the chain has, as far back as it sees; a step before a fork may skip more, if their hidden rows are kept at the fork and
    /// the blocks before it have their pages. At least the last known token is left to compute.
    pub(crate) fn reuse_pages(&mut self, id: SequenceId) {
        if !self.limits.prefix_cache {
            return;
        }
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[id];
        sequence.extend_hashes(page_tokens);
        let path = Arc::clone(&sequence.path);
        let most = (sequence.tokens.len() as u32 - 1) / page_tokens;
        let hashes = sequence.hashes[..most as usize].to_vec();
        let cached = Cached { pages: &self.pages, hashes: &hashes, page_tokens };
        // A chain without attention has no pages, and nothing to reuse.
        let has_pages = path.steps.iter().any(|step| !step.lanes.is_empty());
        let mut skipped = if has_pages { cached.longest(&path.steps, hashes.len()) } else { 0 };
        let skipped_by_all = skipped;
        let mut counts = vec![skipped; path.steps.len()];
        for s in (0..path.steps.len() - 1).rev() {
            if let Some(fork) = path.steps[s].fork {
                let kept = (skipped..hashes.len()).take_while(|page| cached.has(fork, *page)).count();
                if kept > 0 {
                    skipped = cached.longest(&path.steps[..=s], skipped + kept);
                }
            }
            counts[s] = skipped;
        }
        // Hidden rows at forks are as much in use as the pages that all steps skip, though nobody reads them: another model may.
        for step in path.steps.iter().rev() {
            let keys = step
                .fork
                .into_iter()
                .flat_map(|stretch| hashes[..skipped_by_all].iter().map(move |tokens| HandleKey { tokens: *tokens, stretch }));
            keys.rev().for_each(|key| self.pages.touch(&key));
        }
        let take = |pages: &mut PagePool, stretch, page: usize| {
            let handle = pages.find(&HandleKey { tokens: hashes[page], stretch });
            handle.expect("the index has it, and nothing was evicted since")
        };
        let (mut block_tokens, mut foreign_block_tokens, mut made_elsewhere) = (0, 0, 0);
        let span = self.sequences[id].span;
        let block_count = self.span(span).host.blocks.len();
        for (s, step) in path.steps.iter().enumerate() {
            for (l, lane) in step.lanes.iter().enumerate() {
                let from = pages_behind(lane.window, counts[s] as u32 * page_tokens, page_tokens);
                let handles: Vec<HandleIndex> = (from as usize..counts[s]).map(|page| take(&mut self.pages, lane.stretch, page)).collect();
                if l == 0 {
                    let is_foreign = |handle: &&HandleIndex| self.pages.maker(**handle) != span.0;
                    // Whoever made the first page that is left has made what lay behind the window.
                    let behind = if handles.first().as_ref().is_some_and(is_foreign) { from as usize } else { 0 };
                    made_elsewhere = behind + handles.iter().filter(is_foreign).count();
                }
                let tenant = self.sequences[id].tenant;
                handles.iter().for_each(|handle| self.holdings.take(tenant, *handle, self.pages.slot_counts(*handle)));
                self.sequences[id].steps[s].lanes[l] = Held { from, handles };
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
            (state.published, state.reserved, state.computed) = (counts[s] as u32, counts[s] as u32, counts[s] as u32 * page_tokens);
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
