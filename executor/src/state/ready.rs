//! Who could run where: for each segment the rows whose input is at hand, kept as they come and go, so that no plan looks at all
//! sequences. Decodes and chunks of prompts wait apart.

use std::cmp::Reverse;

use super::batch::SequenceId;
use super::clock::Micros;
use super::segments::SegmentIndex;

/// A step of a sequence with rows ready. They run in this order: by priority, by place on the line of prompts, by arrival, and of one sequence
/// the deeper step first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) priority: i32,
    pub(crate) rank: u64,
    pub(crate) sequence: SequenceId,
    pub(crate) step: Reverse<u32>,
    /// When it should run.
    pub(crate) due: Micros,
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
    /// Number of the family: segments that a chain crosses both are of one.
    family: usize,
    /// Number of its form, if another segment has the same.
    form: Option<usize>,
    /// Turn in which the queue got its first entry, and the earliest time at which one should run.
    since: u64,
    due: Micros,
    /// Until when its first entry lets others go first, so that siblings run with it.
    waits_until: Micros,
    /// The latest plan that tried this segment.
    tried_in: u64,
}

impl Queue {
    /// Whether this queue of a family is to be tried before another one, where each loses so much if siblings run apart.
    fn goes_before(&self, lost: f64, other: &Self, other_lost: f64, urgent: Micros) -> bool {
        match (self.due <= urgent, other.due <= urgent) {
            (true, true) if self.due != other.due => self.due < other.due,
            (true, false) => true,
            (false, true) => false,
            (false, false) if lost != other_lost => lost < other_lost,
            _ if self.depth != other.depth => self.depth > other.depth,
            _ => self.since < other.since,
        }
    }
}

/// Segments that chains tie together.
#[derive(Debug, Default)]
struct Family {
    /// Those with entries.
    segments: Vec<SegmentIndex>,
    /// The earliest time at which one of its entries should run, and the turn of that one's queue.
    first: (Micros, u64),
}

/// The ready queues of all segments.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    queues: Vec<Queue>,
    families: Vec<Family>,
    /// For each form the segments that have it, and entries.
    forms: Vec<Vec<SegmentIndex>>,
    /// Whether the present plan has tried a segment.
    has_tried: bool,
    turn: u64,
    plan: u64,
}

impl Ready {
    /// Empties all queues; from now on segment i has depth and family `places[i]`, and form `forms[i]`.
    pub(crate) fn reset(&mut self, places: &[(usize, usize)], forms: &[Option<usize>]) {
        self.queues.clear();
        let queue = |((depth, family), form): (&(usize, usize), &Option<usize>)| Queue {
            depth: *depth,
            family: *family,
            form: *form,
            ..Queue::default()
        };
        self.queues.extend(places.iter().zip(forms).map(queue));
        self.forms.clear();
        self.forms.resize_with(forms.iter().flatten().map(|form| form + 1).max().unwrap_or(0), Vec::new);
        self.families.clear();
        self.families.resize_with(places.iter().map(|(_, family)| family + 1).max().unwrap_or(0), Family::default);
    }

    /// Adds an entry. It lets siblings catch up until `waits_until`.
    pub(crate) fn push(&mut self, segment: SegmentIndex, entry: Entry, decodes: bool, waits_until: Micros) {
        let queue = &mut self.queues[segment.0 as usize];
        if queue.entries.is_empty() {
            self.turn += 1;
            (queue.since, queue.due, queue.waits_until) = (self.turn, entry.due, waits_until);
            let family = &mut self.families[queue.family];
            family.first = if family.segments.is_empty() { (entry.due, queue.since) } else { family.first };
            family.segments.push(segment);
            if let Some(form) = queue.form {
                self.forms[form].push(segment);
            }
        }
        if entry.due < queue.due {
            queue.due = entry.due;
        }
        let family = &mut self.families[queue.family];
        if entry.due < family.first.0 {
            family.first = (entry.due, queue.since);
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
            self.families[queue.family].segments.retain(|known| *known != segment);
            if let Some(form) = queue.form {
                self.forms[form].retain(|known| *known != segment);
            }
        }
    }

    /// Whether nobody is ready.
    pub(crate) fn is_empty(&self) -> bool {
        self.families.iter().all(|family| family.segments.is_empty())
    }

    /// Begins a plan: every segment may be tried once.
    pub(crate) fn begin_plan(&mut self) {
        self.plan += 1;
        self.has_tried = false;
    }

    /// Moves the entries of the next segment to try into `taken` (empty before). Of unrelated families the one with the row that should run
    /// first. Within a family the segment that loses least if those who are ready run now and their siblings later (`lost`, of a segment and its
    /// decodes and chunks), so that sequences that were parted meet wherever their chains do; of equals the deepest; then who has waited longest.
    /// But a segment with a row that should run before `urgent` comes first, the earliest of them, and who has let siblings catch up until `now` loses nothing.
    pub(crate) fn take_next(
        &mut self,
        urgent: Micros,
        now: Micros,
        lost: impl Fn(SegmentIndex, u32, u32) -> f64,
        taken: &mut Entries,
    ) -> Option<SegmentIndex> {
        let (queues, plan) = (&self.queues, self.plan);
        let is_tried = |segment: &SegmentIndex| queues[segment.0 as usize].tried_in == plan;
        let mut chosen: Option<(usize, (Micros, u64))> = None;
        for (number, family) in self.families.iter().enumerate().filter(|(_, family)| !family.segments.is_empty()) {
            let is_over = self.has_tried && family.segments.iter().all(is_tried);
            if !is_over && chosen.is_none_or(|(_, first)| family.first < first) {
                chosen = Some((number, family.first));
            }
        }
        let family = &mut self.families[chosen?.0];
        let mut best: Option<(usize, &Queue, f64)> = None;
        for (place, segment) in family.segments.iter().enumerate().filter(|(_, segment)| !is_tried(segment)) {
            let queue = &queues[segment.0 as usize];
            // Not even if it lost nothing.
            if best.is_some_and(|(_, best, least)| !queue.goes_before(0.0, best, least, urgent)) {
                continue;
            }
            let entries = &queue.entries;
            let waits = queue.waits_until > now;
            let lost = if waits { lost(*segment, entries.decodes.len() as u32, entries.chunks.len() as u32) } else { 0.0 };
            if best.is_none_or(|(_, best, least)| queue.goes_before(lost, best, least, urgent)) {
                best = Some((place, queue, lost));
            }
        }
        let (place, ..) = best?;
        let segment = family.segments[place];
        self.take(segment, taken);
        Some(segment)
    }

    /// Moves the entries of a segment into `taken` (empty before); it counts as tried.
    pub(crate) fn take(&mut self, segment: SegmentIndex, taken: &mut Entries) {
        let queue = &mut self.queues[segment.0 as usize];
        queue.tried_in = self.plan;
        self.has_tried = true;
        std::mem::swap(&mut queue.entries, taken);
        let (queues, form) = (&self.queues, self.queues[segment.0 as usize].form);
        let family = &mut self.families[queues[segment.0 as usize].family];
        family.segments.swap_remove(family.segments.iter().position(|known| *known == segment).expect("it had entries"));
        let rest = family.segments.iter().map(|segment| (queues[segment.0 as usize].due, queues[segment.0 as usize].since));
        family.first = rest.min().unwrap_or_default();
        if let Some(form) = form {
            let twins = &mut self.forms[form];
            twins.swap_remove(twins.iter().position(|known| *known == segment).expect("it had entries"));
        }
    }

    /// Segments with entries whose rows may run abreast with those of `segment`, in no order of meaning; none that was tried in this plan.
    pub(crate) fn twins(&self, segment: SegmentIndex) -> impl Iterator<Item = SegmentIndex> {
        let form = self.queues[segment.0 as usize].form;
        let twins = form.map_or(&[][..], |form| &self.forms[form]);
        twins.iter().copied().filter(|twin| self.queues[twin.0 as usize].tried_in != self.plan)
    }

    /// Until when the rows of a segment let others go first, so that siblings run with them.
    pub(crate) fn waits_until(&self, segment: SegmentIndex) -> Micros {
        self.queues[segment.0 as usize].waits_until
    }

    /// Decodes and chunks of prompts that are ready at a segment.
    pub(crate) fn counts(&self, segment: SegmentIndex) -> (u32, u32) {
        let entries = &self.queues[segment.0 as usize].entries;
        (entries.decodes.len() as u32, entries.chunks.len() as u32)
    }

    /// The earliest time at which a row of a segment should run that is ready there.
    pub(crate) fn due(&self, segment: SegmentIndex) -> Option<Micros> {
        let queue = &self.queues[segment.0 as usize];
        (!queue.entries.is_empty()).then_some(queue.due)
    }

    /// The earliest time at which a decode that is ready should have run; for tests.
    #[cfg(test)]
    pub(crate) fn earliest_decode(&self) -> Option<Micros> {
        self.queues.iter().flat_map(|queue| &queue.entries.decodes).map(|entry| entry.due).min()
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
