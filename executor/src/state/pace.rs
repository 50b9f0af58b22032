//! When the tightest of those who decode is due, for each target for gaps, and what gaps are wanted in each segment: kept as tokens are
//! planned and come, so that no plan looks at all sequences. What follows from it is in `clock`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::batch::{BatchId, SequenceId};
use super::clock::Micros;
use super::engine::Engine;
use super::sequence::{Sequence, Status};

/// Entries of `Pace::still` beside two for each sequence, before those that no longer hold are dropped.
const STALE_MOST: usize = 16;

/// Sequences that decode and want the same gap.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    count: u32,
    /// Batches in flight, oldest first, and of how many sequences each samples the latest token planned.
    coming: VecDeque<(BatchId, u32)>,
    /// When the latest token came of a sequence that has none coming, the earliest first. What is true no longer stays until it is met.
    still: VecDeque<(Micros, SequenceId)>,
}

impl Pace {
    fn forget(&mut self, batch: BatchId) {
        if let Ok(place) = self.coming.binary_search_by_key(&batch, |(id, _)| *id) {
            self.coming[place].1 -= 1;
        }
    }

    fn plan(&mut self, batch: BatchId) {
        match self.coming.back_mut() {
            Some((id, count)) if *id == batch => *count += 1,
            _ => self.coming.push_back((batch, 1)),
        }
    }

    /// The oldest batch in flight that samples the latest token of somebody.
    pub(crate) fn first_coming(&self) -> Option<BatchId> {
        self.coming.iter().find(|(_, count)| *count > 0).map(|(id, _)| *id)
    }
}

/// What the engine knows of gaps.
#[derive(Debug, Default)]
pub(crate) struct Paces {
    by_gap: BTreeMap<Micros, Pace>,
    /// For each segment, sequences that decode there by the gap that they want.
    at: Vec<BTreeMap<Micros, u32>>,
}

impl Paces {
    /// Whether nobody who decodes has a target.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_gap.is_empty()
    }

    /// Targets in force.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Micros, &Pace)> {
        self.by_gap.iter().map(|(gap, pace)| (*gap, pace))
    }

    /// The shortest gap that somebody wants in a segment.
    pub(crate) fn shortest(&self, segment: usize) -> Option<Micros> {
        self.at[segment].keys().next().copied()
    }

    /// A batch samples a token of a sequence; of one that decoded before its latest was sampled in `before`.
    pub(crate) fn token_planned(&mut self, sequence: &Sequence, before: Option<BatchId>, batch: BatchId) {
        if sequence.gap == 0 {
            return;
        }
        let pace = self.by_gap.entry(sequence.gap).or_default();
        match before {
            Some(before) => pace.forget(before),
            None => {
                pace.count += 1;
                sequence.path.steps.iter().for_each(|step| *self.at[step.segment.0 as usize].entry(sequence.gap).or_default() += 1);
            }
        }
        pace.plan(batch);
    }

    /// A sequence that decoded no longer does.
    pub(crate) fn stop(&mut self, sequence: &Sequence) {
        let Some(pace) = self.by_gap.get_mut(&sequence.gap) else { return };
        pace.forget(sequence.sampled_in);
        pace.count -= 1;
        if pace.count == 0 {
            self.by_gap.remove(&sequence.gap);
        }
        for step in &sequence.path.steps {
            let gaps = &mut self.at[step.segment.0 as usize];
            let count = gaps.get_mut(&sequence.gap).expect("it was counted when it began to decode");
            *count -= 1;
            if *count == 0 {
                gaps.remove(&sequence.gap);
            }
        }
    }

    /// Batches up to this one are done.
    pub(crate) fn batch_done(&mut self, done: BatchId) {
        for pace in self.by_gap.values_mut() {
            while pace.coming.front().is_some_and(|(id, _)| *id <= done) {
                pace.coming.pop_front();
            }
        }
    }

    /// Counts anew what is wanted in each of so many segments.
    pub(crate) fn recount<'a>(&mut self, segment_count: usize, decoding: impl Iterator<Item = &'a Sequence>) {
        self.at = gaps_at(segment_count, decoding);
    }
}

fn gaps_at<'a>(segment_count: usize, decoding: impl Iterator<Item = &'a Sequence>) -> Vec<BTreeMap<Micros, u32>> {
    let mut at = vec![BTreeMap::new(); segment_count];
    for sequence in decoding.filter(|sequence| sequence.gap > 0) {
        sequence.path.steps.iter().for_each(|step| *at[step.segment.0 as usize].entry(sequence.gap).or_default() += 1);
    }
    at
}

impl Engine {
    /// Whether a sequence decodes, has no token coming, and its latest came at this time.
    fn is_still(&self, at: Micros, id: SequenceId) -> bool {
        let is = |sequence: &Sequence| sequence.is_decoding && sequence.token_at == at && !self.is_in_flight(sequence.sampled_in);
        self.sequences.get(id).is_some_and(is)
    }

    /// A token of a sequence came, and none is coming.
    pub(crate) fn stands_still(&mut self, id: SequenceId) {
        let (gap, at) = (self.sequences[id].gap, self.sequences[id].token_at);
        let Some(pace) = self.clock.paces.by_gap.get_mut(&gap) else { return };
        pace.still.push_back((at, id));
        if pace.still.len() > 2 * pace.count as usize + STALE_MOST {
            let mut still = std::mem::take(&mut pace.still);
            still.retain(|(at, id)| self.is_still(*at, *id));
            let pace = self.clock.paces.by_gap.get_mut(&gap).expect("it was there");
            pace.still = still;
        }
    }

    /// Drops what no longer holds of those who stand still, as far as somebody looks.
    pub(crate) fn settle_paces(&mut self) {
        let mut paces = std::mem::take(&mut self.clock.paces.by_gap);
        for pace in paces.values_mut() {
            while pace.still.front().is_some_and(|(at, id)| !self.is_still(*at, *id)) {
                pace.still.pop_front();
            }
        }
        self.clock.paces.by_gap = paces;
    }

    /// When the token came that came first of the latest ones of those who have none coming.
    pub(crate) fn first_still(&self, pace: &Pace) -> Option<Micros> {
        pace.still.iter().find(|(at, id)| self.is_still(*at, *id)).map(|(at, _)| *at)
    }

    /// Whether what is kept here is what all sequences say.
    pub(crate) fn check_paces(&self) -> Result<(), String> {
        let decoding = || self.sequences.iter().filter(|sequence| sequence.is_decoding);
        if self.clock.paces.at != gaps_at(self.segments.len(), decoding()) {
            return Err("gaps that are wanted in segments are not those of the sequences that decode there".to_owned());
        }
        let mut wanted: BTreeMap<Micros, (u32, Option<BatchId>, Option<Micros>)> = BTreeMap::new();
        for sequence in decoding().filter(|sequence| sequence.gap > 0) {
            let (count, coming, still) = wanted.entry(sequence.gap).or_default();
            *count += 1;
            if self.is_in_flight(sequence.sampled_in) {
                *coming = Some(coming.map_or(sequence.sampled_in, |first| first.min(sequence.sampled_in)));
            } else {
                *still = Some(still.map_or(sequence.token_at, |first| first.min(sequence.token_at)));
            }
        }
        let kept = self.clock.paces.iter().map(|(gap, pace)| (gap, (pace.count, pace.first_coming(), self.first_still(pace)))).collect();
        if wanted != kept {
            return Err(format!("of gaps (sequences, first batch, first token) are {wanted:?}, kept as {kept:?}"));
        }
        let is_prompt = |sequence: &&Sequence| sequence.status == Status::Running && !sequence.is_decoding;
        let prompts: BTreeSet<_> = self.sequences.iter().filter(is_prompt).map(Sequence::prompt_place).collect();
        if prompts != self.clock.prompts {
            return Err(format!("{} prompts run, {} are listed, or others", prompts.len(), self.clock.prompts.len()));
        }
        self.check_line()?;
        self.check_firsts()
    }
}
