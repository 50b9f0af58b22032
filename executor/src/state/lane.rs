//! Lanes: the attention blocks of a step that look back equally far. A handle covers one lane for one run of tokens, so that blocks with a
//! sliding window give back what lies behind it while those without one, or with a wider one, keep theirs. Most models have one lane in
//! each step. Who may skip what is cached in a lane is in `reuse`.

use std::collections::BTreeMap;

use super::batch::{NO_PAGE, SequenceId};
use super::canary::Canary;
use super::engine::{Engine, Leaving};
use super::pages::{HandleIndex, PagePool, StretchIndex};
use super::sequence::{PathStep, Sequence};
use super::span::SpanAttention;

/// The attention blocks of a step that have one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lane {
    /// Tokens that they see, the query's own among them; None: all.
    pub(crate) window: Option<u32>,
    /// What its handles cover.
    pub(crate) stretch: StretchIndex,
}

/// The pages that a sequence holds in one lane, one after another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    /// The first page; those before it lie behind the window.
    pub(crate) from: u32,
    /// A handle for each page, oldest first.
    pub(crate) handles: Vec<HandleIndex>,
}

impl Held {
    /// One past the last page.
    pub(crate) fn to(&self) -> u32 {
        self.from + self.handles.len() as u32
    }

    pub(crate) fn get(&self, page: u32) -> Option<HandleIndex> {
        self.handles.get(page.checked_sub(self.from)? as usize).copied()
    }
}

/// The lanes of attention blocks that follow each other, in order of their windows: without one first.
pub(crate) fn lanes(attention: &[SpanAttention], pages: &mut PagePool) -> Vec<Lane> {
    let mut blocks: BTreeMap<Option<u32>, Vec<_>> = BTreeMap::new();
    attention.iter().for_each(|block| blocks.entry(block.window).or_default().push((block.lineage, block.class)));
    let lane = |(window, blocks): (_, Vec<_>)| Lane { window, stretch: pages.stretch(&blocks).expect("not empty") };
    blocks.into_iter().map(lane).collect()
}

/// Leading pages that no token from `position` on sees.
pub(crate) fn pages_behind(window: Option<u32>, position: u32, page_tokens: u32) -> u32 {
    window.map_or(0, |window| (position + 1).saturating_sub(window) / page_tokens)
}

/// The most pages that a lane needs at one time for chunks of at most `chunk_tokens`, however long the sequence.
pub(crate) fn pages_most(window: Option<u32>, chunk_tokens: u32, page_tokens: u32) -> u32 {
    window.map_or(u32::MAX, |window| (window - 1).saturating_add(chunk_tokens).div_ceil(page_tokens) + 1)
}

/// Appends the entries of a page to a page table: one for each attention block of a step, in order.
pub(crate) fn append_entries(at: &PathStep, held: &[Held], page: u32, attention: &[SpanAttention], pages: &PagePool, table: &mut Vec<u32>) {
    let slots = |held: &Held| held.get(page).map(|handle| pages.slots(handle));
    if let [held] = held {
        match slots(held) {
            Some(slots) => table.extend_from_slice(slots),
            None => table.extend(std::iter::repeat_n(NO_PAGE, attention.len())),
        }
        return;
    }
    let mut lanes: Vec<_> = held.iter().map(|held| slots(held).map(|slots| slots.iter())).collect();
    for block in attention {
        let lane = at.lane_of(block.window).expect("a step has a lane for each of its blocks");
        table.push(lanes[lane].as_mut().map_or(NO_PAGE, |slots| *slots.next().expect("a handle has a page in each block")));
    }
}

impl Sequence {
    /// The first page that a sequence keeps in a lane of a step: the first that its next token there sees. Pages that are to be found by
    /// others are kept until they can be.
    pub(crate) fn kept_from(&self, window: Option<u32>, step: usize, page_tokens: u32, prefix_cache: bool) -> u32 {
        let state = &self.steps[step];
        let behind = pages_behind(window, state.computed, page_tokens);
        if prefix_cache && self.path.is_whole() { behind.min(state.published) } else { behind }
    }
}

impl Engine {
    /// Gives back the pages of a step that lie behind the windows of its blocks. Batches in flight may still write to them, so they wait
    /// for the last of these.
    pub(crate) fn slide(&mut self, id: SequenceId, step: usize) {
        let (page_tokens, prefix_cache) = (self.limits.page_tokens, self.limits.prefix_cache);
        let early = if self.canary == Canary::FreesInWindow { page_tokens } else { 0 };
        let sequence = &mut self.sequences[id];
        let mut handles = Vec::new();
        for lane in (0..sequence.path.steps[step].lanes.len()).rev() {
            let Some(window) = sequence.path.steps[step].lanes[lane].window else { continue };
            let from = sequence.kept_from(Some(window - early.min(window - 1)), step, page_tokens, prefix_cache);
            let held = &mut sequence.steps[step].lanes[lane];
            if from > held.from {
                handles.extend(held.handles.drain(..(from - held.from) as usize).rev());
                held.from = from;
            }
        }
        if handles.is_empty() {
            return;
        }
        let (last_batch, tenant) = (sequence.last_batch, sequence.tenant);
        handles.iter().for_each(|handle| self.holdings.leave(tenant, *handle, self.pages.slot_counts(*handle)));
        if self.is_in_flight(last_batch) {
            self.behind.push(Leaving { sequence: id, last_batch, handles });
        } else {
            handles.into_iter().for_each(|handle| self.pages.release(handle));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept for the next chunk is never more than `pages_most`, and never less than what its tokens see.
    #[test]
    fn a_window_keeps_the_pages_that_are_seen_and_no_more() {
        for page_tokens in [16, 32] {
            for window in 1..70 {
                for (position, chunk) in (0..200).flat_map(|position| [1, 5, 16, 33].map(|chunk| (position, chunk))) {
                    let from = pages_behind(Some(window), position, page_tokens);
                    let seen = (position + 1).saturating_sub(window);
                    assert!(from * page_tokens <= seen && seen < (from + 1) * page_tokens);
                    let pages = (position + chunk).div_ceil(page_tokens) - from;
                    assert!(pages <= pages_most(Some(window), chunk, page_tokens), "{window} {position} {chunk}");
                }
            }
        }
        assert_eq!((pages_behind(None, 1 << 20, 16), pages_most(None, 1, 16)), (0, u32::MAX));
    }
}
