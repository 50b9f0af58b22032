//! Who runs together, where chains do: whether a segment is worth a batch that waits for siblings, or whole models are better batched. Decided from
//! what segments cost (`cost`) and what a batch costs for its own sake, which a few batches that are otherwise than they would be teach.

use std::collections::BTreeSet;

use super::cost::CostCurve;
use super::engine::Engine;
use super::planner::Chosen;
use super::ready::{Entries, Entry};
use super::segments::SegmentIndex;

/// Of so many batches one is of a whole model, where that may be better; sixteen times as many until so few have run.
const TRIAL_BATCHES: u64 = 256;
const JOINED_LEAST: u64 = 8;
/// One batch of so many stops where it could go on, so that curves follow what segments cost.
const STEPWISE_BATCHES: u64 = 31;

/// How a batch is not as it would be, for once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trial {
    /// It is as it would be.
    None,
    /// It stops at the end of its segment.
    Step,
    /// It has those who go one way only, and goes on with them as far as it is known what that costs alone.
    Whole,
}

impl Engine {
    /// Takes those of the decodes that wait at a segment out that go on another way than the one that should run first, where each way in a batch of its
    /// own, from here on, costs less than this segment together: sharing does not pay, and whole models are batched.
    pub(crate) fn part(&self, segment: SegmentIndex, taken: &mut Entries, trial: Trial) -> Vec<Entry> {
        let decodes = &mut taken.decodes;
        let most = (decodes.len() as u32).saturating_sub(1);
        let way = |entry: &Entry| {
            let sequence = &self.sequences[entry.sequence];
            sequence.path.steps.get(entry.step.0 as usize + 1).map(|step| step.segment)
        };
        let meets = |rows, groups| match trial {
            Trial::Whole => self.is_surely_worth_meeting(segment, rows, most + 1 - rows, groups),
            Trial::None | Trial::Step => self.is_worth_meeting(segment, rows, most + 1 - rows, groups),
        };
        if most == 0 || !taken.chunks.is_empty() || way(&decodes[0]).is_none() || meets(1, 1) {
            return Vec::new();
        }
        let ways: BTreeSet<_> = decodes.iter().map(way).collect();
        let first = decodes.iter().min_by_key(|entry| (entry.due, entry.sequence)).map(way);
        let rows = decodes.iter().filter(|entry| Some(way(entry)) == first).count() as u32;
        if ways.len() < 2 || meets(rows, ways.len() as u32 - 1) {
            return Vec::new();
        }
        decodes.extract_if(.., |entry| Some(way(entry)) != first).collect()
    }

    /// The steps that chosen rows take in one batch: on from their segment while all of them go the same way and nobody is worth waiting for
    /// there. So who meets nobody runs as an unshared model does. Rows of prompts stop at each border.
    pub(crate) fn steps_through(&mut self, chosen: &[Chosen], trial: Trial, is_parted: bool) -> usize {
        let mut step_count = 1;
        while trial != Trial::Step && self.go_on(chosen, step_count, trial == Trial::Whole, is_parted) {
            step_count += 1;
        }
        step_count
    }

    /// Whether the chosen rows, of which `step_count` steps are planned, take the next one too; for once whoever is worth waiting for.
    fn go_on(&mut self, chosen: &[Chosen], step_count: usize, for_once: bool, is_parted: bool) -> bool {
        let path = &self.sequences[chosen[0].sequence].path;
        let (before, next) = (chosen[0].step + step_count - 1, chosen[0].step + step_count);
        let Some(segment) = path.steps.get(next).map(|step| step.segment) else { return false };
        let (rows, curve) = (chosen.len() as u32, &self.costs[segment.0 as usize]);
        let goes = |chosen: &Chosen| {
            let sequence = &self.sequences[chosen.sequence];
            let (before, next) = (chosen.step + step_count - 1, chosen.step + step_count);
            let is_clear = |step: usize| sequence.steps[step].hidden.is_empty() && sequence.steps[step].boundary.is_empty();
            chosen.count == 1
                && sequence.decodes(chosen.step)
                && sequence.path.steps.get(next).is_some_and(|step| step.segment == segment)
                && is_clear(before)
                && sequence.steps[next].boundary.is_empty()
                && sequence.steps[next].computed == sequence.steps[chosen.step].computed
        };
        if !chosen.iter().all(goes) {
            return false;
        }
        // What it costs alone is learned first.
        let before = &self.costs[path.steps[before].segment.0 as usize];
        let is_known = for_once && before.is_known(rows) && curve.is_known(rows);
        if before.least().is_none() || curve.least().is_none() || is_parted && for_once && !is_known {
            return false;
        }
        let (decodes, chunks) = self.ready.counts(segment);
        let others = match self.limits.regroup_wait_ms {
            0 => decodes + chunks,
            _ => chunks + self.clock.decoding[segment.0 as usize].saturating_sub(rows),
        };
        let groups = others.div_ceil(rows);
        let meets = self.is_worth_meeting(segment, rows, others, groups);
        if meets && (!is_known || self.is_surely_worth_meeting(segment, rows, others, groups)) {
            return false;
        }
        // Nobody gives way for it: a page that is not there is asked for at its turn.
        chosen.iter().all(|chosen| {
            let tokens = self.sequences[chosen.sequence].steps[chosen.step].computed + 1;
            self.reserve_to(chosen.sequence, chosen.step + step_count, tokens)
        })
    }

    /// Whether a segment's rows are better computed together with `others`, of so many groups, than each group in the batch that it comes or goes on
    /// with: what is read once for all must be worth a batch more.
    pub(crate) fn is_worth_meeting(&self, segment: SegmentIndex, rows: u32, others: u32, groups: u32) -> bool {
        self.is_worth_with(self.clock.within, segment, rows, others, groups)
    }

    /// The same, if a batch took as much within it as it can, whatever it computes: no more than the smallest batch that is known.
    pub(crate) fn is_surely_worth_meeting(&self, segment: SegmentIndex, rows: u32, others: u32, groups: u32) -> bool {
        let within = self.costs.iter().filter_map(CostCurve::least).fold(f64::INFINITY, f64::min);
        self.is_worth_with(within, segment, rows, others, groups)
    }

    fn is_worth_with(&self, within: f64, segment: SegmentIndex, rows: u32, others: u32, groups: u32) -> bool {
        let read = || self.costs[segment.0 as usize].apart(rows, others) - within;
        others > 0 && read() * f64::from(groups) > self.clock.between + within
    }

    /// What the batch that is planned next tries for once, so that the engine learns what it would cost otherwise.
    pub(crate) fn trial(&self) -> Trial {
        match self.latest_batch().0 + 1 {
            next if next >= self.clock.trial_from => Trial::Whole,
            next if next.is_multiple_of(STEPWISE_BATCHES) => Trial::Step,
            _ => Trial::None,
        }
    }

    /// A batch was planned that is of whole models for once.
    pub(crate) fn tried(&mut self) {
        let turns = if self.clock.joined_count < JOINED_LEAST { TRIAL_BATCHES / 16 } else { TRIAL_BATCHES };
        self.clock.trial_from = self.latest_batch().0 + turns;
    }
}

/// Microseconds that are lost if so many decodes and chunks of a segment run now and whoever else decodes and crosses it comes by later, in batches
/// of so many rows at most.
pub(crate) fn lost_apart(costs: &[CostCurve], decoding: &[u32], most: u32, segment: SegmentIndex, decodes: u32, chunks: u32) -> f64 {
    let place = segment.0 as usize;
    let coming = decoding[place].saturating_sub(decodes).min(most.saturating_sub(decodes + chunks));
    if coming == 0 { 0.0 } else { costs[place].apart(decodes + chunks, coming) }
}
