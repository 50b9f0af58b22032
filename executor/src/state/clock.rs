//! Time in plans: when each row is due, what is under way costs, and how much of a prompt may ride along without making anybody late.
//! Where nobody has a target there is no such budget, and rows take turns. First tokens are in `targets`.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Now;
use super::batch::{BatchId, SequenceId};
use super::cost::{CostCurve, largest};
use super::engine::Engine;
use super::pace::{Pace, Paces};
use super::prompts::PromptLine;
use super::segments::SegmentIndex;
use super::sequence::{PathStep, Sequence};
use super::targets::Firsts;
use super::tenants::TenantIndex;

/// Rows of a batch are kept to multiples of it where a chunk is cut short: the GEMMs' tile.
pub(crate) const TILE_ROWS: u32 = 8;
/// Share of the slack that prompts may take.
pub(crate) const MARGIN: f64 = 0.8;
/// Batches after which the cost of a pass is summed again though nobody came or went.
pub(crate) const PASS_BATCHES: u64 = 64;

/// Passes that a row lets siblings catch up, at most. In one each of them comes by once; the half is for what batches cost for their own
/// sake, and for prompts between them.
pub(crate) const REGROUP_PASSES: f64 = 1.5;

/// Share of a new observation in what a batch more costs, and microseconds that it may grow by beside what it was.
const OVERHEAD_RATE: f64 = 0.05;
const BETWEEN_STEP: f64 = 20.0;
/// A share beyond which what segments took abreast is a pause of the machine.
const ABREAST_MOST: f64 = 2.0;

/// Time since the executor started, in microseconds.
pub(crate) type Micros = u64;

/// A batch that the device has.
#[derive(Debug, Clone)]
pub(crate) struct InFlight {
    pub(crate) id: BatchId,
    /// Its segments, each with the rows that cross it, one after another, or abreast.
    pub(crate) parts: Vec<(SegmentIndex, u32)>,
    pub(crate) is_abreast: bool,
    /// Whether the number of a segment of it is another one's by now, so that nothing is to be learned.
    pub(crate) is_stale: bool,
    /// When it was planned, and the time that it is expected to take.
    pub(crate) planned_at: Micros,
    pub(crate) predicted: Micros,
}

/// What the engine knows of time.
#[derive(Debug)]
pub(crate) struct Clock {
    /// The latest time that it was told.
    pub(crate) now: Micros,
    /// When the device is expected to have done all that it has.
    pub(crate) busy_until: Micros,
    /// When the device was done with the latest batch that it has done.
    done_at: Micros,
    /// Microseconds that one batch more costs: between two batches, and within one whatever it computes. The latter is learned from batches of several
    /// segments, of which there were so many.
    pub(crate) between: f64,
    pub(crate) within: f64,
    pub(crate) joined_count: u64,
    /// What segments take abreast, as a share of what they take one after another, learned from so many batches.
    pub(crate) abreast: f64,
    pub(crate) abreast_count: u64,
    /// The next batch that may be of a whole model for once.
    pub(crate) trial_from: u64,
    /// For each segment: sequences that decode and cross it.
    pub(crate) decoding: Vec<u32>,
    /// Of these, those that have a target for gaps.
    pub(crate) paces: Paces,
    /// Sequences that run and have no token yet since they last started: of each tenant and priority by when their first one is wanted.
    pub(crate) prompts: BTreeSet<(TenantIndex, i32, Micros, SequenceId)>,
    /// Those that never gave way, in the order in which they run.
    pub(crate) line: PromptLine,
    /// Those whose first token has a target and is not late, by when the rest of the prompt has to begin to be in time.
    pub(crate) firsts: Firsts,
    /// For each segment: microseconds of a batch of all that decode there, and the shortest gap that one of them wants.
    parts: Vec<(f64, Micros)>,
    /// Passes that a row lets siblings catch up, at most: `REGROUP_PASSES`.
    pub(crate) regroup_passes: f64,
    /// Time of a pass: each decoding sequence advances by one token. In microseconds, and when it was summed.
    pass_micros: f64,
    summed_at: Option<BatchId>,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            now: 0,
            busy_until: 0,
            done_at: 0,
            between: 0.0,
            within: 0.0,
            joined_count: 0,
            abreast: 1.0,
            abreast_count: 0,
            trial_from: 0,
            decoding: Vec::new(),
            paces: Paces::default(),
            prompts: BTreeSet::new(),
            line: PromptLine::default(),
            firsts: Firsts::default(),
            parts: Vec::new(),
            regroup_passes: REGROUP_PASSES,
            pass_micros: 0.0,
            summed_at: None,
        }
    }
}

impl Clock {
    /// When a batch that is planned now would begin.
    pub(crate) fn start(&self) -> Micros {
        self.now.max(self.busy_until)
    }
}

impl Engine {
    /// Takes the time from an event.
    pub(crate) fn tell_time(&mut self, now: Now) {
        self.clock.now = self.clock.now.max(now.as_micros() as Micros);
    }

    /// The time by which a row that becomes ready now has had to wait for others long enough.
    pub(crate) fn turn_due(&self) -> Micros {
        self.clock.now + Micros::from(self.limits.row_wait_ms) * 1000
    }

    /// Until when a row that becomes ready now lets others go first, so that siblings run with it: no longer than it takes all of them to
    /// come by.
    pub(crate) fn regroup_due(&self) -> Micros {
        let most = Micros::from(self.limits.regroup_wait_ms) * 1000;
        self.clock.now + most.min((self.clock.pass_micros * self.clock.regroup_passes) as Micros)
    }

    /// A token of a sequence came: the next one is due a gap later, unless one is under way already.
    pub(crate) fn token_came(&mut self, id: SequenceId) {
        let now = self.clock.now;
        let sequence = &mut self.sequences[id];
        sequence.token_at = now;
        if sequence.is_decoding && sequence.promised_tokens == 0 {
            sequence.due = (sequence.gap > 0).then_some(now + sequence.gap);
        }
        let sampled_in = sequence.sampled_in;
        if sequence.is_decoding && sequence.gap > 0 && !self.is_in_flight(sampled_in) {
            self.stands_still(id);
        }
    }

    /// A batch that is being planned samples a token of a sequence: it will be there when the device has done all that it has.
    pub(crate) fn token_planned(&mut self, id: SequenceId, batch: BatchId) {
        let at = self.clock.busy_until;
        let sequence = &mut self.sequences[id];
        sequence.due = (sequence.gap > 0).then_some(at + sequence.gap);
        let was_decoding = std::mem::replace(&mut sequence.is_decoding, true);
        let before = std::mem::replace(&mut sequence.sampled_in, batch);
        self.clock.paces.token_planned(sequence, was_decoding.then_some(before), batch);
        if !was_decoding {
            self.clock.forget_prompt(sequence);
            sequence.path.steps.iter().for_each(|step| self.clock.decoding[step.segment.0 as usize] += 1);
            self.clock.summed_at = None;
        }
    }

    /// A sequence no longer decodes: it has ended, or gave way.
    pub(crate) fn stop_decoding(&mut self, id: SequenceId) {
        let sequence = &mut self.sequences[id];
        if std::mem::take(&mut sequence.is_decoding) {
            sequence.path.steps.iter().for_each(|step| self.clock.decoding[step.segment.0 as usize] -= 1);
            self.clock.paces.stop(sequence);
            self.clock.summed_at = None;
        } else {
            self.clock.forget_prompt(sequence);
        }
    }

    /// Counts decoding sequences anew under a new cut.
    pub(crate) fn count_decoding(&mut self) {
        self.clock.decoding.clear();
        self.clock.decoding.resize(self.segments.len(), 0);
        self.costs.resize_with(self.segments.len(), Default::default);
        for sequence in self.sequences.iter().filter(|sequence| sequence.is_decoding) {
            sequence.path.steps.iter().for_each(|step| self.clock.decoding[step.segment.0 as usize] += 1);
        }
        self.clock.paces.recount(self.segments.len(), self.sequences.iter().filter(|sequence| sequence.is_decoding));
        self.clock.summed_at = None;
    }

    /// Learns from the time that a batch took: what its segment costs, or, if it has several, what one batch less saves.
    pub(crate) fn observe(&mut self, batch: &InFlight, elapsed: Duration) {
        let began = std::mem::replace(&mut self.clock.done_at, self.clock.now).max(batch.planned_at);
        let micros = elapsed.as_secs_f64() * 1e6;
        // A pause of the machine is no rule.
        let between = ((self.clock.now - began) as f64 - micros).clamp(0.0, 2.0 * self.clock.between + BETWEEN_STEP);
        self.clock.between += OVERHEAD_RATE * (between - self.clock.between);
        if batch.is_stale {
            return;
        }
        if let [(segment, rows)] = *batch.parts {
            self.costs[segment.0 as usize].observe(rows, elapsed);
            return;
        }
        let alone = || batch.parts.iter().map(|(segment, rows)| self.costs[segment.0 as usize].predict(*rows).unwrap_or(0.0));
        if !batch.parts.iter().all(|(segment, rows)| self.costs[segment.0 as usize].is_known(*rows)) {
            return;
        }
        if batch.is_abreast {
            let share = (micros / alone().sum::<f64>().max(1.0)).clamp(0.0, ABREAST_MOST);
            self.clock.abreast_count += 1;
            self.clock.abreast += OVERHEAD_RATE.max(1.0 / self.clock.abreast_count as f64) * (share - self.clock.abreast);
            return;
        }
        let saved = (alone().sum::<f64>() - micros) / (batch.parts.len() - 1) as f64;
        let within = saved.clamp(0.0, alone().fold(f64::INFINITY, f64::min));
        self.clock.joined_count += 1;
        self.clock.within += OVERHEAD_RATE.max(1.0 / self.clock.joined_count as f64) * (within - self.clock.within);
    }

    /// Microseconds that rows are expected to take through the segments of a batch.
    pub(crate) fn predict(&self, segments: impl Iterator<Item = SegmentIndex>, rows: u32) -> f64 {
        let cost = |segment: SegmentIndex| self.costs[segment.0 as usize].predict(rows).unwrap_or(0.0);
        let (all, count) = segments.fold((0.0, 0), |(all, count), segment| (all + cost(segment), count + 1));
        (all - self.clock.within * (f64::from(count) - 1.0)).max(0.0)
    }

    /// Microseconds of a pass, as they are known.
    pub(crate) fn pass_micros(&mut self) -> f64 {
        let latest = self.latest_batch();
        if self.clock.summed_at.is_none_or(|at| latest.0 >= at.0 + PASS_BATCHES) {
            let cost = |(count, costs): (&u32, &CostCurve)| if *count == 0 { 0.0 } else { costs.predict(*count).unwrap_or(0.0) };
            self.clock.parts.clear();
            let parts = self.clock.decoding.iter().zip(&self.costs).enumerate();
            let paces = &self.clock.paces;
            self.clock.parts.extend(parts.map(|(i, part)| (cost(part), paces.shortest(i).unwrap_or(Micros::MAX))));
            self.clock.pass_micros = self.clock.parts.iter().map(|(cost, _)| cost).sum();
            self.clock.summed_at = Some(latest);
        }
        self.clock.pass_micros
    }

    /// Microseconds of what will run before a token that is due, of a sequence that wants one every `gap`: a token for everybody who decodes
    /// where one wants as many or more, where rows wait that should run before it, and in the segment that is being planned.
    fn pass_before(&self, gap: Micros, due: Micros, planned: SegmentIndex) -> f64 {
        let runs_before = |segment: usize, pace: Micros| {
            pace <= gap || segment == planned.0 as usize || self.ready.due(SegmentIndex(segment as u32)).is_some_and(|at| at <= due)
        };
        let parts = self.clock.parts.iter().enumerate().filter(|(_, (cost, _))| *cost > 0.0);
        parts.filter(|(segment, (_, pace))| runs_before(*segment, *pace)).map(|(_, (cost, _))| cost).sum()
    }

    /// Microseconds that chunks of prompts may add in a segment before somebody's next token is late. Of each target for gaps: the slack of
    /// the tightest sequence that has it, less what runs before its token; where that alone takes the whole gap, chunks may take as long.
    /// Infinite where nobody who decodes has a target.
    pub(crate) fn chunk_budget(&mut self, planned: SegmentIndex) -> f64 {
        if self.clock.paces.is_empty() {
            return f64::INFINITY;
        }
        self.pass_micros();
        self.settle_paces();
        // A token under way comes when its batch ends, as far as that is known by now.
        let coming = |sampled_in: BatchId| {
            let before = self.in_flight.iter().take_while(|batch| batch.id <= sampled_in);
            let predicted: Micros = before.map(|batch| batch.predicted).sum();
            self.clock.busy_until.saturating_sub(self.in_flight.iter().map(|batch| batch.predicted).sum()) + predicted
        };
        let latest = |pace: &Pace| self.first_still(pace).into_iter().chain(pace.first_coming().map(coming)).min();
        let budget = |(gap, pace): (Micros, &Pace)| {
            let due = latest(pace).expect("whoever decodes has a token, or one that is coming") + gap;
            let pass = self.pass_before(gap, due, planned);
            let slack = due.saturating_sub(self.clock.start()) as f64;
            if pass >= gap as f64 { pass } else { ((slack - pass) * MARGIN).max(0.0) }
        };
        self.clock.paces.iter().map(budget).fold(f64::INFINITY, f64::min)
    }

    /// Microseconds that `count` tokens of a prompt add. See `price`.
    pub(crate) fn chunk_price(&self, sequence: &Sequence, step: usize, rows: u32, count: u32) -> f64 {
        price(sequence, step, rows, count, &self.clock, &self.costs)
    }

    /// The most tokens of a prompt, up to `most`, whose price is within `budget`, keeping the rows of the batch to whole tiles; at least
    /// `floor`. With their price.
    pub(crate) fn chunk_within(&self, sequence: &Sequence, step: usize, rows: u32, most: u32, budget: f64, floor: u32) -> (u32, f64) {
        let price = |count| self.chunk_price(sequence, step, rows, count);
        let mut count = largest(most, |count| price(count) <= budget);
        if count < most {
            count = ((rows + count) / TILE_ROWS * TILE_ROWS).saturating_sub(rows);
        }
        count = count.max(floor.min(most));
        (count, price(count))
    }
}

/// Microseconds that `count` tokens add in every segment that they have still to cross, on top of the rows that are there anyway:
/// `rows` in this segment, and those that decode in the deeper ones.
pub(crate) fn price(sequence: &Sequence, step: usize, rows: u32, count: u32, clock: &Clock, costs: &[CostCurve]) -> f64 {
    let price = |(i, at): (usize, &PathStep)| {
        let segment = at.segment.0 as usize;
        let there = if i == step { rows } else { clock.decoding[segment] };
        let cost = |rows| costs[segment].predict(rows).unwrap_or(0.0);
        cost(there + count) - cost(there)
    };
    sequence.path.steps.iter().enumerate().skip(step).map(price).sum()
}
