//! Which rows run next: the deepest ready segment, all sequences that wait there, decodes before chunks of prompts.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::Now;
use super::batch::{Batch, BatchId, RowInput, RowOutput, Rows, SequenceId};
use super::engine::{Engine, Output};
use super::pages::PageKey;
use super::segments::SegmentIndex;
use super::sequence::{SpanIndex, Status};

/// Rows of one sequence that could run in the chosen segment.
struct Ready {
    sequence: SequenceId,
    step: usize,
    count: u32,
}

impl Engine {
    /// Admits what fits, then hands out at most one batch: of the first segment, in order of choice, that can run.
    pub(crate) fn plan_step(&mut self, now: Now) {
        // Pages that come back are first for those that run and lack them.
        if !std::mem::take(&mut self.pages_short) || self.segment_choices().is_empty() {
            self.start_waiting(now);
        }
        loop {
            let choices = self.segment_choices();
            if choices.is_empty() || choices.into_iter().any(|segment| self.plan_segment(segment)) {
                return;
            }
            // What is in flight may bring pages back.
            if !self.in_flight.is_empty() {
                return;
            }
            // Rows are ready and none can run: pages or hidden rows are held by sequences that wait for each other. The
            // latest gives way until the first can go on. Links are waited for, never broken.
            let Some((_, latest)) = self.preemptible().max().filter(|_| self.preemptible().count() > 1) else { return };
            self.preempt(latest);
        }
    }

    /// Hands out a batch of one segment; false if none of its rows can run.
    fn plan_segment(&mut self, segment: SegmentIndex) -> bool {
        let mut ready = self.ready_in(segment);
        // Decodes (one row to the end of what is known) first, each group in order of priority and arrival.
        ready.sort_by_key(|r| (r.count > 1, self.sequences[&r.sequence].priority, r.sequence));
        let mut budget = self.limits.step_tokens_max;
        let mut hidden_budget = self.hidden_free.len() as u32;
        let mut rows = Vec::new();
        let mut spans: BTreeSet<SpanIndex> = BTreeSet::new();
        for candidate in ready {
            // A preemption below may have taken this one's pages.
            let Some(sequence) = self.sequences.get(&candidate.sequence) else { continue };
            if sequence.status != Status::Running || budget == 0 {
                continue;
            }
            let keeps_hidden = candidate.step + 1 < sequence.path.len();
            let mut count = candidate.count.min(budget).min(self.limits.chunk_tokens_max);
            // Rows that come out of hidden slots give as many back as they take.
            if keeps_hidden && candidate.step == 0 {
                count = count.min(hidden_budget);
            }
            if count == 0 || !self.reserve_pages(candidate.sequence, candidate.step, count) {
                continue;
            }
            match (candidate.step > 0, keeps_hidden) {
                (false, true) => hidden_budget -= count,
                (true, false) => hidden_budget += count,
                (true, true) | (false, false) => {}
            }
            spans.insert(self.sequences[&candidate.sequence].span);
            rows.push((candidate.sequence, candidate.step, count));
            budget -= count;
        }
        // Preemption may have hit a sequence that was already chosen.
        rows.retain(|(id, _, _)| self.sequences[id].status == Status::Running);
        if rows.is_empty() {
            return false;
        }
        let id = self.next_batch_id();
        let rows: Vec<Rows> = rows.into_iter().map(|(sequence, step, count)| self.advance(id, sequence, step, count)).collect();
        let blocks = self.segments[segment.0 as usize].blocks.clone();
        let batch = Batch { id, segment, blocks, span_count: spans.len(), rows };
        self.counters.batch_count += 1;
        self.counters.row_count += u64::from(batch.row_count());
        self.in_flight.push_back(id);
        self.outputs.push_back(Output::RunBatch(batch));
        true
    }

    /// Sequences that hold pages and could start over: chains that are whole here.
    fn preemptible(&self) -> impl Iterator<Item = (i32, SequenceId)> + '_ {
        self.sequences.iter().filter_map(|(id, s)| {
            let host = &self.span(s.span).host;
            let holds = s.status == Status::Running && s.pages.iter().any(|slots| !slots.is_empty());
            (holds && host.begins_with_embed && host.ends_with_head).then_some((s.priority, *id))
        })
    }

    /// Gives pages and a place among the running to waiting sequences, by priority and arrival, while they fit.
    fn start_waiting(&mut self, now: Now) {
        while let Some(&(priority, id)) = self.waiting.first() {
            let running = self.sequences.len() - self.waiting.len();
            if running >= self.limits.sequences_max as usize {
                return;
            }
            let sequence = &self.sequences[&id];
            // It gave way while tokens of it were being sampled: they stand, and are part of what it starts again with.
            if sequence.promised_tokens > 0 {
                return;
            }
            let span = self.span(sequence.span);
            let whole = span.host.begins_with_embed && span.host.ends_with_head;
            // A cut chain cannot give its pages back half-way (the other executors would not know), so it starts
            // only when all that it may need is there. Others need what they know, and one token more.
            let tokens = if whole { sequence.tokens.len() as u32 + 1 } else { sequence.prompt_tokens + sequence.generated_tokens_max };
            if !self.pages_suffice(span, tokens) {
                return;
            }
            self.waiting.remove(&(priority, id));
            if whole {
                self.reuse_pages(id);
            } else {
                let steps = self.sequences[&id].path.len();
                for step in 0..steps {
                    let reserved = self.reserve_to(id, step, tokens);
                    assert!(reserved, "pages_suffice said so");
                }
            }
            let sequence = self.sequences.get_mut(&id).expect("it was in the queue");
            sequence.status = Status::Running;
            if !sequence.started {
                sequence.started = true;
                let waited = now.saturating_sub(sequence.admitted_at);
                let cached_tokens = sequence.cached_tokens;
                self.outputs.push_back(Output::EmitStarted { sequence: id, waited, cached_tokens });
            }
        }
    }

    /// Takes cached pages for the longest prefix that every attention block of the chain has. At least the last
    /// known token is left to compute.
    fn reuse_pages(&mut self, id: SequenceId) {
        if !self.limits.prefix_cache {
            return;
        }
        let page_tokens = self.limits.page_tokens;
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        sequence.extend_hashes(page_tokens);
        let span = &self.spans[sequence.span.0 as usize];
        let most = (sequence.tokens.len() as u32 - 1) / page_tokens;
        let mut hit = 0;
        for hash in sequence.hashes.iter().take(most as usize) {
            let here = span.attention.iter().all(|a| self.pages.contains(&PageKey { lineage: a.lineage, tokens: *hash }));
            if !here {
                break;
            }
            hit += 1;
        }
        for (i, attention) in span.attention.iter().enumerate() {
            for hash in sequence.hashes.iter().take(hit) {
                let key = PageKey { lineage: attention.lineage, tokens: *hash };
                let slot = self.pages.find(attention.class, &key).expect("contains said so and nothing was evicted since");
                sequence.pages[i].push(slot);
            }
            sequence.published[i] = hit as u32;
        }
        let tokens = hit as u32 * page_tokens;
        sequence.computed.iter_mut().for_each(|computed| *computed = tokens);
        if !sequence.started {
            sequence.cached_tokens = tokens.min(sequence.prompt_tokens);
            self.counters.prefix_query_tokens += u64::from(sequence.prompt_tokens);
            self.counters.prefix_hit_tokens += u64::from(sequence.cached_tokens);
        }
    }

    /// Segments with a ready row, deepest first; among equals the one whose oldest sequence came first.
    fn segment_choices(&self) -> Vec<SegmentIndex> {
        let mut best: BTreeMap<SegmentIndex, (Reverse<usize>, (i32, SequenceId))> = BTreeMap::new();
        for (id, sequence) in self.sequences.iter().filter(|(_, s)| s.status == Status::Running) {
            for step in 0..sequence.path.len() {
                if self.ready_count(*id, step) > 0 {
                    let rank = (Reverse(step), (sequence.priority, *id));
                    best.entry(sequence.path[step].0).and_modify(|known| *known = rank.min(*known)).or_insert(rank);
                }
            }
        }
        let mut choices: Vec<_> = best.into_iter().map(|(segment, rank)| (rank, segment)).collect();
        choices.sort_unstable();
        choices.into_iter().map(|(_, segment)| segment).collect()
    }

    fn ready_in(&self, segment: SegmentIndex) -> Vec<Ready> {
        let mut ready = Vec::new();
        for (id, sequence) in self.sequences.iter().filter(|(_, s)| s.status == Status::Running) {
            // Deepest step first: a chain may cross the same segment twice, but a batch takes a sequence once.
            let step = (0..sequence.path.len()).rev().find(|&i| sequence.path[i].0 == segment && self.ready_count(*id, i) > 0);
            if let Some(step) = step {
                ready.push(Ready { sequence: *id, step, count: self.ready_count(*id, step) });
            }
        }
        ready
    }

    /// Rows whose input is at hand for a step, within what a link may have in flight.
    fn ready_count(&self, id: SequenceId, step: usize) -> u32 {
        let sequence = &self.sequences[&id];
        let host = &self.span(sequence.span).host;
        let count = sequence.input_tokens(step, host.begins_with_embed) - sequence.computed[step];
        if step + 1 == sequence.path.len() && !host.ends_with_head {
            let in_flight = sequence.computed[step] - sequence.consumed;
            return count.min(self.limits.link_rows_max.saturating_sub(in_flight));
        }
        count
    }

    /// Reserves pages so that `count` more tokens can be computed by a step, preempting later sequences if it must.
    fn reserve_pages(&mut self, id: SequenceId, step: usize, count: u32) -> bool {
        let tokens = self.sequences[&id].computed[step] + count;
        while !self.reserve_to(id, step, tokens) {
            self.pages_short = true;
            // Pages are on their way back already.
            if !self.leaving.is_empty() {
                return false;
            }
            let mine = (self.sequences[&id].priority, id);
            let victim = self.preemptible().filter(|other| *other > mine).max();
            match victim {
                Some((_, victim)) => self.preempt(victim),
                None => return false,
            }
        }
        true
    }

    /// Reserves pages up to `tokens` for the attention blocks of one step. What was reserved stays reserved on failure.
    fn reserve_to(&mut self, id: SequenceId, step: usize, tokens: u32) -> bool {
        let pages = tokens.div_ceil(self.limits.page_tokens) as usize;
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        let span = &self.spans[sequence.span.0 as usize];
        let from = sequence.path[step].1;
        let to = span.step_end(&sequence.path, step);
        for i in span.attention_in(from, to) {
            while sequence.pages[i].len() < pages {
                match self.pages.reserve(span.attention[i].class) {
                    Some(slot) => sequence.pages[i].push(slot),
                    None => return false,
                }
            }
        }
        true
    }

    /// Takes a sequence's pages away; it waits, and resumes by computing again what is not cached.
    fn preempt(&mut self, id: SequenceId) {
        self.release_all(id);
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        sequence.status = Status::Waiting;
        self.waiting.insert((sequence.priority, id));
        self.counters.preemption_count += 1;
    }

    /// Moves the counts of a sequence through a step and says what the device must do for it.
    fn advance(&mut self, batch: BatchId, id: SequenceId, step: usize, count: u32) -> Rows {
        let page_tokens = self.limits.page_tokens;
        let sequence = self.sequences.get_mut(&id).expect("it was chosen");
        let span = &self.spans[sequence.span.0 as usize];
        let start = sequence.computed[step];
        let end = start + count;
        sequence.last_batch = batch;
        let input = if step > 0 {
            let slots: Vec<u32> = sequence.boundary[step - 1].drain(..count as usize).collect();
            self.hidden_free.extend(slots.iter().rev());
            RowInput::Hidden(slots)
        } else if span.host.begins_with_embed {
            match sequence.tokens.get(start as usize..end as usize) {
                Some(tokens) => RowInput::Tokens(tokens.to_vec()),
                None => {
                    assert_eq!(
                        (count, end),
                        (1, sequence.tokens.len() as u32 + sequence.promised_tokens),
                        "the newest token alone is promised"
                    );
                    RowInput::Sampled
                }
            }
        } else {
            RowInput::Link
        };
        let last_step = step + 1 == sequence.path.len();
        let output = if !last_step {
            let at = self.hidden_free.len() - count as usize;
            let slots = self.hidden_free.split_off(at);
            sequence.boundary[step].extend(&slots);
            RowOutput::Hidden(slots)
        } else if span.host.ends_with_head {
            let samples = match span.host.begins_with_embed {
                true => end == sequence.tokens.len() as u32 + sequence.promised_tokens,
                false => end >= sequence.base_tokens,
            };
            sequence.promised_tokens += u32::from(samples && span.host.begins_with_embed);
            RowOutput::Sample(samples.then_some(end))
        } else {
            RowOutput::Link
        };
        sequence.computed[step] = end;
        let pages = end.div_ceil(page_tokens) as usize;
        let attention = span.attention_in(sequence.path[step].1, span.step_end(&sequence.path, step));
        let tables: Vec<Vec<u32>> = attention.clone().map(|i| sequence.pages[i][..pages].to_vec()).collect();
        if matches!(input, RowInput::Link) {
            self.outputs.push_back(Output::SendConsumed { sequence: id, position: end });
        }
        self.publish_pages(id);
        Rows { sequence: id, start, count, input, output, tables }
    }

    /// Makes pages findable whose tokens are all known and computed (or in a batch that is handed out: who takes them runs later).
    pub(crate) fn publish_pages(&mut self, id: SequenceId) {
        let page_tokens = self.limits.page_tokens;
        let sequence = self.sequences.get_mut(&id).expect("callers looked it up");
        let span = &self.spans[sequence.span.0 as usize];
        if !(self.limits.prefix_cache && span.host.begins_with_embed && span.host.ends_with_head) {
            return;
        }
        sequence.extend_hashes(page_tokens);
        for step in 0..sequence.path.len() {
            let full = (sequence.computed[step] / page_tokens).min(sequence.hashes.len() as u32);
            for i in span.attention_in(sequence.path[step].1, span.step_end(&sequence.path, step)) {
                for page in sequence.published[i]..full {
                    let key = PageKey { lineage: span.attention[i].lineage, tokens: sequence.hashes[page as usize] };
                    self.pages.publish(span.attention[i].class, sequence.pages[i][page as usize], key);
                }
                sequence.published[i] = sequence.published[i].max(full);
            }
        }
    }
}
