//! Which rows run next: a segment (whose, is for `ready` and `meeting` to say), all sequences that wait there, decodes before chunks of prompts. Only rows that are
//! ready are looked at. What a chosen row takes with it is in `advance`.

use std::sync::Arc;

use super::Now;
use super::batch::{Batch, SequenceId, Strand};
use super::claim::Shortage;
use super::clock::{InFlight, Micros, TILE_ROWS};
use super::engine::{Engine, Output};
use super::meeting::{Trial, lost_apart};
use super::ready::{Entries, Entry};
use super::segments::SegmentIndex;
use super::sequence::{PathStep, Sequence, Status};
use super::targets::ChunkTime;

/// Rows of one sequence that run in the batch that is being planned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) sequence: SequenceId,
    pub(crate) step: usize,
    /// Steps that they take, from `step` on.
    pub(crate) step_count: usize,
    pub(crate) count: u32,
    /// The strand of the batch that has them.
    pub(crate) strand: u32,
}

/// What a batch may still take.
pub(crate) struct Room {
    pub(crate) rows: u32,
    hidden_rows: u32,
    /// Rows that it has, and may have for the time that a batch may take.
    row_count: u32,
    rows_in_time: u32,
    /// Time that chunks of prompts may still add.
    chunk_time: ChunkTime,
    /// Chunks that it has.
    chunk_count: u32,
}

impl Engine {
    /// Admits what fits, then hands out at most one batch: of the first segment, in order of choice, that can run.
    pub(crate) fn plan_step(&mut self, now: Now) {
        self.tell_time(now);
        // Pages that come back are first for those that run and lack them.
        match self.pages_short.take().filter(|_| !self.ready.is_empty()) {
            Some(Shortage::WithinShare) => {}
            short => self.start_waiting(now, short),
        }
        self.break_stalls(now);
        while !self.ready.is_empty() {
            self.ready.begin_plan();
            let mut taken = std::mem::take(&mut self.taken);
            let urgent = self.clock.start() + self.pass_micros() as Micros;
            while let Some(segment) = self.take_next(urgent, &mut taken) {
                let is_planned = self.plan_segment(segment, urgent, &mut taken);
                if is_planned {
                    self.taken = taken;
                    return;
                }
            }
            self.taken = taken;
            // What is in flight may bring pages back.
            if !self.in_flight.is_empty() {
                return;
            }
            // Rows are ready and none can run: pages or hidden rows are held by sequences that wait for each other. The
            // latest gives way until the first can go on. Links are waited for, never broken.
            let Some((_, latest)) = self.preemptible().next() else { return };
            // Sequences of cut chains may lack the hidden rows that the only other one holds, and hold the pages that it lacks.
            let holds_hidden = self.sequences[latest].steps.iter().any(|step| !step.hidden.is_empty());
            if self.preemptible().nth(1).is_some() || self.hosts_cut_chains && holds_hidden {
                self.preempt(latest);
                continue;
            }
            let known = self.sequences[latest].known_tokens();
            if !self.fail_if_never_fits(latest, known) {
                return;
            }
            self.start_waiting(now, None);
        }
    }

    /// Takes the entries of the next segment to try.
    fn take_next(&mut self, urgent: Micros, taken: &mut Entries) -> Option<SegmentIndex> {
        let (costs, decoding, most) = (&self.costs, &self.clock.decoding, self.limits.step_tokens_max);
        let lost = |segment: SegmentIndex, decodes: u32, chunks: u32| lost_apart(costs, decoding, most, segment, decodes, chunks);
        self.ready.take_next(urgent, self.clock.now, lost, taken)
    }

    /// Hands out a batch of one segment from its ready rows, and puts back what it does not take; false if none of them can run.
    fn plan_segment(&mut self, segment: SegmentIndex, urgent: Micros, taken: &mut Entries) -> bool {
        let mut chosen = std::mem::take(&mut self.chosen);
        self.choices += 1;
        let rows = self.limits.step_tokens_max;
        let curve = &self.costs[segment.0 as usize];
        let mut room = Room {
            rows,
            hidden_rows: self.hidden_free.len() as u32 - self.hidden_owed,
            row_count: 0,
            rows_in_time: match self.limits.batch_ms_max {
                0 => rows,
                most if taken.chunks.is_empty() => most.max(rows),
                most => curve.rows_within(f64::from(most) * 1e3, rows),
            },
            chunk_time: if taken.chunks.is_empty() { ChunkTime::default() } else { self.chunk_time(segment) },
            chunk_count: 0,
        };
        taken.decodes.sort_unstable();
        self.sort_chunks(&mut taken.chunks);
        let trial = self.trial();
        let mut others = self.part(segment, taken, trial);
        let is_parted = !others.is_empty();
        loop {
            for (entries, decodes) in [(&mut taken.decodes, true), (&mut taken.chunks, false)] {
                for entry in entries.drain(..) {
                    self.choose(segment, entry, decodes, 0, &mut room, &mut chosen);
                }
            }
            if others.is_empty() || !chosen.is_empty() {
                break;
            }
            std::mem::swap(&mut others, &mut taken.decodes);
        }
        for entry in others {
            if self.sequences.get(entry.sequence).is_some_and(|sequence| sequence.steps[entry.step.0 as usize].queued) {
                self.ready.push(segment, entry, true, self.regroup_due());
            }
        }
        // A preemption may have hit a sequence that was already chosen.
        chosen.retain(|chosen| self.sequences[chosen.sequence].status == Status::Running);
        let is_planned = !chosen.is_empty();
        if is_planned {
            let joins = trial == Trial::None && !is_parted && self.join_abreast(segment, urgent, taken, &mut room, &mut chosen);
            let step_count = if joins { 1 } else { self.steps_through(&chosen, trial, is_parted) };
            if trial == Trial::Whole && (is_parted || step_count > 1) {
                self.tried();
            } else if trial == Trial::Whole {
                // What it would try cannot be tried yet.
                self.join_abreast(segment, urgent, taken, &mut room, &mut chosen);
            }
            chosen.iter_mut().for_each(|chosen| chosen.step_count = step_count);
            let batch = self.batch(&chosen);
            self.counters.batch_count += 1;
            self.counters.row_count += u64::from(batch.row_count);
            self.outputs.push_back(Output::RunBatch(batch));
        }
        chosen.clear();
        self.chosen = chosen;
        is_planned
    }

    /// Chooses rows of one entry, or puts it back.
    pub(crate) fn choose(
        &mut self,
        segment: SegmentIndex,
        entry: Entry,
        decodes: bool,
        strand: u32,
        room: &mut Room,
        chosen: &mut Vec<Chosen>,
    ) {
        let step = entry.step.0 as usize;
        let link_rows_max = self.limits.link_rows_max;
        // A preemption for an earlier entry may have taken this one's pages, and its place in the queue.
        let Some(sequence) = self.sequences.get(entry.sequence).filter(|sequence| sequence.steps[step].queued) else { return };
        let keeps_hidden = step + 1 < sequence.steps.len();
        let mut count = sequence.ready_count(step, link_rows_max).min(room.rows).min(self.limits.chunk_tokens_max);
        // Rows that have a slot that changes hands (or are owed one) go on in it; those that enter, by a token or out of the cache, need one.
        let found = if step > 0 { sequence.steps[step - 1].found } else { 0 };
        let enters = step == 0 || found > 0;
        if found > 0 {
            count = count.min(found);
        }
        if keeps_hidden && enters {
            count = count.min(room.hidden_rows);
        }
        // Who enters behind rows that have not entered deeper down would hold the slots that those wait for.
        if enters && sequence.steps[step..].iter().any(|deeper| deeper.found > 0) {
            count = 0;
        }
        if !decodes {
            count = if count > 0 { self.bound_chunk(sequence, step, count, room) } else { 0 };
        }
        // A chain may cross a segment twice; a batch takes a sequence once, its deeper entry.
        let is_twice = sequence.chosen_in == self.choices;
        // Mostly the pages that it has will do. For those that come along nobody gives way.
        let state = &sequence.steps[step];
        let end = state.computed + count;
        let has_pages = end <= state.reserved * self.limits.page_tokens;
        let mut reserve = || match strand {
            0 => self.reserve_pages(entry.sequence, step, count),
            _ => self.reserve_to(entry.sequence, step, end),
        };
        if count == 0 || is_twice || !(has_pages || reserve()) {
            // It had its turn.
            let entry = Entry { due: entry.due.max(self.turn_due()), ..entry };
            self.ready.push(segment, entry, decodes, self.regroup_due());
            return;
        }
        match (enters, keeps_hidden) {
            (true, true) => room.hidden_rows -= count,
            (false, false) => room.hidden_rows += count,
            (false, true) | (true, false) => {}
        }
        room.rows -= count;
        room.row_count += count;
        let sequence = &mut self.sequences[entry.sequence];
        sequence.steps[step].queued = false;
        sequence.chosen_in = self.choices;
        chosen.push(Chosen { sequence: entry.sequence, step, step_count: 1, count, strand });
    }

    /// Bounds a chunk of a prompt by time: that of the batch, and where it enters the chain by what it adds for those that decode. The
    /// first chunk of a batch is at least a tile, so that prompts advance under any load.
    fn bound_chunk(&self, sequence: &Sequence, step: usize, most: u32, room: &mut Room) -> u32 {
        let floor = if room.chunk_count == 0 { TILE_ROWS } else { 0 };
        let in_time = room.rows_in_time.saturating_sub(room.row_count).max(floor);
        let mut count = most.min(in_time);
        if count < most && count > TILE_ROWS {
            count = (room.row_count + count) / TILE_ROWS * TILE_ROWS - room.row_count;
        }
        let budget = room.chunk_time.budget(sequence);
        if step == 0 && budget < f64::INFINITY {
            let price;
            (count, price) = self.chunk_within(sequence, step, room.row_count, count, budget, floor);
            room.chunk_time.spend(price);
        }
        room.chunk_count += u32::from(count > 0);
        count
    }

    fn batch(&mut self, chosen: &[Chosen]) -> Batch {
        let mut batch = Batch::reuse(self.spare.pop(), self.next_batch_id());
        let mut parts = Vec::with_capacity(chosen.last().map_or(0, |last| last.strand as usize) + chosen[0].step_count);
        let mut predicted = 0.0;
        let strands = || chosen.chunk_by(|one, next| one.strand == next.strand);
        for strand in strands() {
            let (rows, steps) = (strand.iter().map(|chosen| chosen.count).sum(), strand[0].step..strand[0].step + strand[0].step_count);
            let steps = &self.sequences[strand[0].sequence].path.steps[steps];
            parts.extend(steps.iter().map(|step| (step.segment, rows)));
            predicted += self.predict(steps.iter().map(|step| step.segment), rows);
        }
        let is_abreast = chosen.last().is_some_and(|last| last.strand > 0);
        predicted *= if is_abreast { self.clock.abreast } else { 1.0 };
        let (id, planned_at, predicted) = (batch.id, self.clock.now, predicted as Micros);
        self.clock.busy_until = self.clock.start() + predicted;
        self.in_flight.push_back(InFlight { id, parts, is_abreast, is_stale: false, planned_at, predicted });
        batch.rows.reserve(chosen.len());
        for strand in strands() {
            self.begin_strand(&strand[0], &mut batch);
            strand.iter().for_each(|chosen| self.advance(chosen, &mut batch));
        }
        batch
    }

    /// Begins the strand of a batch that has the segments of a chosen row; its rows are to come.
    fn begin_strand(&self, chosen: &Chosen, batch: &mut Batch) {
        let steps = &self.sequences[chosen.sequence].path.steps[chosen.step..chosen.step + chosen.step_count];
        let blocks_of = |step: &PathStep| &self.segments[step.segment.0 as usize].blocks;
        let blocks = match steps {
            [step] => Arc::clone(blocks_of(step)),
            _ => steps.iter().flat_map(|step| blocks_of(step).iter().copied()).collect(),
        };
        let (from, rows) = (batch.segments.len() as u32, batch.rows.len() as u32);
        batch.segments.extend(steps.iter().map(|step| step.segment));
        let segments = from..batch.segments.len() as u32;
        batch.strands.push(Strand { segments, blocks, rows: rows..rows, row_count: 0, span_count: 0 });
    }

    /// Sequences that hold pages and could start over: chains that are whole here. Of the lowest priority and latest first.
    pub(crate) fn preemptible(&self) -> impl Iterator<Item = (i32, SequenceId)> {
        self.holdings.whole().filter(|(_, id)| self.sequences[*id].has_pages())
    }

    /// Reserves pages so that `count` more tokens can be computed by a step, preempting later sequences if it must.
    fn reserve_pages(&mut self, id: SequenceId, step: usize, count: u32) -> bool {
        let tokens = self.sequences[id].steps[step].computed + count;
        while !self.reserve_to(id, step, tokens) {
            let shortage = self.shortage(id, step);
            self.pages_short = self.pages_short.max(Some(shortage));
            // Pages are on their way back already: those of sequences that went, or its own behind its windows.
            if !self.leaving.is_empty() || self.behind.iter().any(|behind| behind.sequence == id) {
                return false;
            }
            match self.page_victim(id, step) {
                Some(victim) => self.preempt(victim),
                None => return false,
            }
        }
        true
    }

    /// Reserves pages up to `tokens` for one step, in all its lanes. Pages that all lanes have stay reserved on failure.
    pub(crate) fn reserve_to(&mut self, id: SequenceId, step: usize, tokens: u32) -> bool {
        let pages = tokens.div_ceil(self.limits.page_tokens);
        let sequence = &mut self.sequences[id];
        let tenant = sequence.tenant;
        let (lanes, state) = (&sequence.path.steps[step].lanes, &mut sequence.steps[step]);
        while state.reserved < pages {
            for (l, lane) in lanes.iter().enumerate() {
                let Some(handle) = self.pages.reserve(lane.stretch) else {
                    let others = state.lanes[..l].iter_mut().filter_map(|held| held.handles.pop());
                    for handle in others {
                        self.holdings.leave(tenant, handle, self.pages.slot_counts(handle));
                        self.pages.release(handle);
                    }
                    return false;
                };
                self.holdings.take(tenant, handle, self.pages.slot_counts(handle));
                state.lanes[l].handles.push(handle);
            }
            state.reserved += 1;
        }
        true
    }

    /// Takes a sequence's pages away; it waits, and resumes by computing again what is not cached.
    pub(crate) fn preempt(&mut self, id: SequenceId) {
        self.release_all(id);
        self.stop_running(id);
        let sequence = &mut self.sequences[id];
        sequence.status = Status::Waiting;
        // In this order: a tenant whose only sequence gives way has not been away.
        self.tenants.add_waiting(sequence.tenant, sequence.turn());
        self.tenants.count_running(sequence.tenant, false);
        self.counters.preemption_count += 1;
    }
}
