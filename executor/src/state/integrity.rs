//! `check_integrity`: every page is free, cached or owned, every hidden row likewise, every ready row is queued, and counts agree. Tests
//! call it after each event.

use std::collections::BTreeMap;

use super::canary::Canary;
use super::engine::Engine;
use super::pages::HandleIndex;
use super::sequence::{Sequence, Status};

impl Engine {
    /// The first fault found, as a sentence; `Ok` when all is consistent.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut held: BTreeMap<HandleIndex, u32> = BTreeMap::new();
        let leaving = self.leaving.iter().chain(&self.behind).flat_map(|leaving| &leaving.handles);
        let steps = || self.sequences.iter().flat_map(|sequence| &sequence.steps);
        let owned = steps().flat_map(|step| &step.lanes).flat_map(|held| &held.handles);
        let kept = steps().flat_map(|step| step.boundary.iter().map(|kept| &kept.handle));
        leaving.chain(owned).chain(kept).for_each(|handle| *held.entry(*handle).or_default() += 1);
        let (mut hidden_count, mut queued_count) = (0, 0);
        for sequence in self.sequences.iter() {
            self.check_sequence(sequence)?;
            let changes_hands = |slot: &&u32| **slot < self.limits.hidden_rows_max;
            hidden_count += sequence.steps.iter().map(|step| step.hidden.iter().filter(changes_hands).count()).sum::<usize>();
            queued_count += sequence.steps.iter().filter(|step| step.queued).count();
        }
        if hidden_count + self.hidden_free.len() != self.limits.hidden_rows_max as usize {
            return Err(format!("{hidden_count} hidden rows kept, {} free, of {}", self.hidden_free.len(), self.limits.hidden_rows_max));
        }
        let kept_from = self.limits.hidden_rows_max;
        let owed: u32 = steps().map(|step| step.kept_rows(kept_from) - step.found).sum();
        if owed != self.hidden_owed || (self.hidden_free.len() as u32) < owed {
            return Err(format!("{} hidden rows are owed, {owed} should be, {} are free", self.hidden_owed, self.hidden_free.len()));
        }
        if queued_count != self.ready.entry_count() {
            return Err(format!("{queued_count} steps are queued, queues have {}", self.ready.entry_count()));
        }
        for (s, span) in self.spans.iter().enumerate() {
            let count = self.sequences.iter().filter(|sequence| sequence.span.0 as usize == s).count();
            if count != span.sequence_count {
                return Err(format!("span {s} counts {} sequences, {count} run through it", span.sequence_count));
            }
        }
        self.tenants.check(self.sequences.iter().map(|sequence| (sequence.tenant, sequence.status == Status::Running)))?;
        self.check_waiting()?;
        self.check_holdings()?;
        self.check_paces()?;
        self.pages.check(&held)
    }

    fn check_sequence(&self, sequence: &Sequence) -> Result<(), String> {
        let (id, steps) = (sequence.id, &sequence.steps);
        if sequence.path != self.span(sequence.span).path || steps.len() != sequence.path.steps.len() {
            return Err(format!("sequence {id:?} is not on the present path of its span"));
        }
        let known = sequence.known_tokens();
        if sequence.path.begins_with_embed && (known > sequence.tokens_max() || steps[0].computed > known) {
            return Err(format!("sequence {id:?} computed {} of {known} tokens, at most {}", steps[0].computed, sequence.tokens_max()));
        }
        for i in 0..steps.len() {
            let lower = steps.get(i + 1).map_or(steps[i].computed, |next| next.computed);
            if lower > steps[i].computed {
                return Err(format!("sequence {id:?} computed {lower} tokens below {}", steps[i].computed));
            }
            if steps[i].hidden.len() != (steps[i].computed - lower) as usize {
                let (kept, wanted) = (steps[i].hidden.len(), steps[i].computed - lower);
                return Err(format!("sequence {id:?} keeps {kept} hidden rows for {wanted} tokens"));
            }
            for (row, slot) in steps[i].hidden.iter().enumerate().filter(|(_, slot)| **slot >= self.limits.hidden_rows_max) {
                let token = lower + row as u32;
                if steps[i].boundary_slot(token, self.limits.page_tokens) != Some(*slot) {
                    return Err(format!("sequence {id:?} reads token {token} from a boundary page that it does not hold"));
                }
            }
            self.check_lanes(sequence, i)?;
            let runs = sequence.status == Status::Running && sequence.ready_count(i, self.limits.link_rows_max) > 0;
            let is_listed = self.ready.contains(sequence.path.steps[i].segment, id, i as u32);
            if runs != steps[i].queued || runs != is_listed {
                return Err(format!("step {i} of sequence {id:?} is ready: {runs}, queued: {}, listed: {is_listed}", steps[i].queued));
            }
        }
        Ok(())
    }

    /// A step has pages in each of its lanes: from the first that its next token sees to the last that is reserved, and none twice.
    fn check_lanes(&self, sequence: &Sequence, i: usize) -> Result<(), String> {
        let (id, state, lanes) = (sequence.id, &sequence.steps[i], &sequence.path.steps[i].lanes);
        if state.lanes.len() != lanes.len() {
            return Err(format!("step {i} of sequence {id:?} has pages in {} lanes of {}", state.lanes.len(), lanes.len()));
        }
        for (lane, held) in lanes.iter().zip(&state.lanes) {
            let from = sequence.kept_from(lane.window, i, self.limits.page_tokens, self.limits.prefix_cache);
            let is_early = self.canary == Canary::FreesInWindow;
            if (held.from, held.to()) != (from, state.reserved) && !is_early {
                let (begin, end, to) = (held.from, held.to(), state.reserved);
                return Err(format!("step {i} of sequence {id:?} keeps pages {begin} to {end} of {from} to {to} in a lane"));
            }
            if let Some(handle) = held.handles.iter().find(|handle| self.pages.stretch_of(**handle) != lane.stretch) {
                return Err(format!("step {i} of sequence {id:?} has {handle:?} in a lane of other blocks"));
            }
        }
        Ok(())
    }
}
