//! Hidden rows kept where a lineage forks, for models that go another way from there: full pages of prompts, under (lineage at the fork,
//! tokens). While the prompt passes the fork its rows lie in the boundary page itself, so nothing is copied: the next step reads them
//! there, and so does whoever finds the page later.

use super::batch::SequenceId;
use super::engine::Engine;
use super::pages::HandleKey;
use super::planner::Chosen;
use super::sequence::{BoundaryPage, StepState};

impl StepState {
    /// Its hidden rows that lie in boundary pages: in slots from `kept_from` on.
    pub(crate) fn kept_rows(&self, kept_from: u32) -> u32 {
        self.hidden.iter().filter(|slot| **slot >= kept_from).count() as u32
    }

    /// Where the hidden row of a token is kept for others, if it is.
    pub(crate) fn boundary_slot(&self, token: u32, page_tokens: u32) -> Option<u32> {
        let page = token / page_tokens;
        self.boundary.iter().rev().find(|kept| kept.page == page).map(|kept| kept.slot + token % page_tokens)
    }
}

impl Engine {
    /// Slot of the first hidden row of a boundary page.
    pub(crate) fn boundary_page(&self, page: u32, handle: super::pages::HandleIndex) -> BoundaryPage {
        let slot = self.limits.hidden_rows_max + self.pages.slots(handle)[0] * self.limits.page_tokens;
        BoundaryPage { page, handle, slot }
    }

    /// Takes boundary pages for the full pages of the prompt that the chosen rows begin, where they leave a step that ends at a fork.
    /// Pages that are cached already are not kept twice; where there is no room, rows go into slots that change hands.
    pub(crate) fn reserve_boundary(&mut self, chosen: &Chosen) {
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[chosen.sequence];
        let start = sequence.steps[chosen.step].computed;
        let Some(stretch) = sequence.path.steps[chosen.step].fork.filter(|_| start < sequence.decodes_from) else { return };
        sequence.extend_hashes(page_tokens);
        let end = (start + chosen.count).min(sequence.hashes.len() as u32 * page_tokens);
        for page in start.div_ceil(page_tokens)..end.div_ceil(page_tokens) {
            let tokens = self.sequences[chosen.sequence].hashes[page as usize];
            if self.pages.contains(&HandleKey { tokens, stretch }) {
                continue;
            }
            let Some(handle) = self.pages.reserve(stretch) else { return };
            let kept = self.boundary_page(page, handle);
            self.sequences[chosen.sequence].steps[chosen.step].boundary.push(kept);
        }
    }

    /// Makes boundary pages findable whose rows are all computed (or in a batch that is handed out: who takes them runs later).
    pub(crate) fn publish_boundary(&mut self, id: SequenceId, step: usize) {
        let page_tokens = self.limits.page_tokens;
        let sequence = &self.sequences[id];
        let state = &sequence.steps[step];
        for kept in state.boundary.iter().filter(|kept| (kept.page + 1) * page_tokens <= state.computed) {
            self.pages.publish(kept.handle, sequence.hashes[kept.page as usize], sequence.span.0);
        }
    }

    /// Gives boundary pages back when the step after the fork has passed all of the prompt's; last ones first, so that those are the first
    /// to be evicted.
    pub(crate) fn release_boundary(&mut self, id: SequenceId, step: usize) {
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[id];
        let full = sequence.decodes_from / page_tokens * page_tokens;
        if sequence.steps[step].computed >= full && sequence.steps[step + 1].computed >= full {
            sequence.steps[step].boundary.drain(..).rev().for_each(|kept| self.pages.release(kept.handle));
        }
    }
}
