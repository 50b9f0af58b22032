//! Who could run where: for each segment the rows whose input is at hand, kept as they come and go, so that no plan looks at all
//! sequences. Decodes and chunks of prompts wait apart.

use std::cmp::Reverse;

use super::batch::SequenceId;
use super::segments::SegmentIndex;

/// A step of a sequence with rows ready. They run in this order: by priority, by arrival, and of one sequence the deeper step first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) priority: i32,
    pub(crate) sequence: SequenceId,
    pub(crate) step: Reverse<u32>,
}

/// Entries by kind.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    pub(crate) decodes: Vec<Entry>,
    pub(crate) chunks: Vec<Entry>,
}

impl Entries {
    fn is_empty(&self) -> bool {
        self.decodes.is_empty() && self.chunks.is_empty()
    }
}

#[derive(Debug, Default)]
struct Queue {
    entries: Entries,
    /// Deepest place of the segment in a path.
    depth: usize,
    /// Turn in which the queue got its first entry.
    since: u64,
    /// The latest plan that tried this segment.
    tried_in: u64,
}

/// The ready queues of all segments.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    queues: Vec<Queue>,
    /// Segments with entries, by depth.
    by_depth: Vec<Vec<SegmentIndex>>,
    turn: u64,
    plan: u64,
}

impl Ready {
    /// Empties all queues; from now on segment i has depth `depths[i]`.
    pub(crate) fn reset(&mut self, depths: &[usize]) {
        self.queues.clear();
        self.queues.extend(depths.iter().map(|depth| Queue { depth: *depth, ..Queue::default() }));
        self.by_depth.clear();
        self.by_depth.resize_with(depths.iter().max().map_or(0, |deepest| deepest + 1), Vec::new);
    }

    /// Adds an entry.
    pub(crate) fn push(&mut self, segment: SegmentIndex, entry: Entry, decodes: bool) {
        let queue = &mut self.queues[segment.0 as usize];
        if queue.entries.is_empty() {
            self.turn += 1;
            queue.since = self.turn;
            self.by_depth[queue.depth].push(segment);
        }
        if decodes { queue.entries.decodes.push(entry) } else { queue.entries.chunks.push(entry) }
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, segment: SegmentIndex, sequence: SequenceId, step: u32) {
        let queue = &mut self.queues[segment.0 as usize];
        if queue.entries.is_empty() {
            return;
        }
        let others = |entry: &Entry| entry.sequence != sequence || entry.step.0 != step;
        queue.entries.decodes.retain(others);
        queue.entries.chunks.retain(others);
        if queue.entries.is_empty() {
            self.by_depth[queue.depth].retain(|known| *known != segment);
        }
    }

    /// Whether nobody is ready.
    pub(crate) fn is_empty(&self) -> bool {
        self.by_depth.iter().all(Vec::is_empty)
    }

    /// Begins a plan: every segment may be tried once.
    pub(crate) fn begin_plan(&mut self) {
        self.plan += 1;
    }

    /// Moves the entries of the next segment to try into `taken` (empty before): the deepest first, so that sequences that were parted
    /// drain to the head and meet again at the shared start; of equal depth the one that has waited longest.
    pub(crate) fn take_next(&mut self, taken: &mut Entries) -> Option<SegmentIndex> {
        let (queues, plan) = (&self.queues, self.plan);
        let (depth, place) = self.by_depth.iter().enumerate().rev().find_map(|(depth, segments)| {
            let untried = segments.iter().enumerate().filter(|(_, segment)| queues[segment.0 as usize].tried_in != plan);
            untried.min_by_key(|(_, segment)| queues[segment.0 as usize].since).map(|(place, _)| (depth, place))
        })?;
        let segment = self.by_depth[depth].swap_remove(place);
        let queue = &mut self.queues[segment.0 as usize];
        queue.tried_in = plan;
        std::mem::swap(&mut queue.entries, taken);
        Some(segment)
    }

    /// Whether an entry is there; for checks.
    pub(crate) fn contains(&self, segment: SegmentIndex, sequence: SequenceId, step: u32) -> bool {
        let entries = &self.queues[segment.0 as usize].entries;
        entries.decodes.iter().chain(&entries.chunks).any(|entry| entry.sequence == sequence && entry.step.0 == step)
    }

    /// Entries in all queues; for checks.
    pub(crate) fn entry_count(&self) -> usize {
        self.queues.iter().map(|queue| queue.entries.decodes.len() + queue.entries.chunks.len()).sum()
    }
}
