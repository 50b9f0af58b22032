//! What a chosen row takes with it when its batch is planned: counts, hidden rows, entries of page tables, published pages, and the next
//! place in the ready queues. Hidden rows that are kept for other models are in `boundary`.

use super::batch::{Batch, RowInput, RowOutput, Rows, SequenceId, TableUpdate};
use super::engine::{Engine, Output};
use super::lane::append_entries;
use super::planner::Chosen;
use super::sequence::PathStep;

impl Engine {
    /// Moves the counts of a sequence through the steps of a batch and says in `batch` what the device must do for it.
    pub(crate) fn advance(&mut self, chosen: &Chosen, batch: &mut Batch) {
        let Chosen { sequence: id, step, step_count, count, .. } = *chosen;
        let last = step + step_count - 1;
        let page_tokens = self.limits.page_tokens;
        self.reserve_boundary(chosen);
        let sequence = &mut self.sequences[id];
        let path = &*sequence.path;
        let is_last = last + 1 == path.steps.len();
        let (block_from, attention_from) = (path.steps[step].from, path.steps[step].attention_from);
        let of_span = sequence.span;
        let start = sequence.steps[step].computed;
        let end = start + count;
        let slots_from = batch.slots.len() as u32;
        let kept_from = self.limits.hidden_rows_max;
        let input = if step > 0 {
            let from = &mut sequence.steps[step - 1];
            batch.slots.extend(from.hidden.drain(..count as usize));
            if !from.boundary.is_empty() {
                let kept = batch.slots[slots_from as usize..].iter().filter(|slot| **slot >= kept_from).count() as u32;
                let found = from.found.min(count);
                from.found -= found;
                self.hidden_owed -= kept - found;
            }
            RowInput::Hidden(slots_from..slots_from + count)
        } else if !path.begins_with_embed {
            self.outputs.push_back(Output::SendConsumed { sequence: id, position: end });
            RowInput::Link
        } else {
            match sequence.tokens.get(start as usize..end as usize) {
                Some(tokens) => {
                    let from = batch.tokens.len() as u32;
                    batch.tokens.extend_from_slice(tokens);
                    RowInput::Tokens(from..from + count)
                }
                None => {
                    assert_eq!((count, end), (1, sequence.known_tokens()), "the newest token alone is promised");
                    RowInput::Sampled
                }
            }
        };
        // Kept rows are of prompts, which take a step at a time.
        let keeps_in = step > 0 && !sequence.steps[step - 1].boundary.is_empty();
        let mut samples_token = false;
        let output = if !is_last && (keeps_in || !sequence.steps[step].boundary.is_empty()) {
            let outputs_from = batch.slots.len() as u32;
            for row in 0..count {
                let input = (step > 0).then(|| batch.slots[(slots_from + row) as usize]).filter(|slot| *slot < kept_from);
                let slot = match sequence.steps[step].boundary_slot(start + row, page_tokens) {
                    Some(kept) => {
                        self.hidden_free.extend(input);
                        self.hidden_owed += 1;
                        kept
                    }
                    None => input.or_else(|| self.hidden_free.pop()).expect("the planner counted them"),
                };
                batch.slots.push(slot);
            }
            sequence.steps[step].hidden.extend(&batch.slots[outputs_from as usize..]);
            RowOutput::Hidden(outputs_from..outputs_from + count)
        } else if !is_last {
            // Rows that came out of hidden slots go back into them.
            if step == 0 {
                let left = self.hidden_free.len() - count as usize;
                batch.slots.extend(self.hidden_free.drain(left..));
            }
            sequence.steps[last].hidden.extend(&batch.slots[slots_from as usize..]);
            RowOutput::Hidden(slots_from..slots_from + count)
        } else {
            self.hidden_free.extend(batch.slots[slots_from as usize..].iter().rev().filter(|slot| **slot < kept_from));
            match (path.ends_with_head, path.begins_with_embed) {
                (false, _) => RowOutput::Link,
                (true, true) => {
                    let samples = end == sequence.tokens.len() as u32 + sequence.promised_tokens;
                    sequence.promised_tokens += u32::from(samples);
                    samples_token = samples;
                    RowOutput::Sample(samples.then_some(end))
                }
                (true, false) => RowOutput::Sample((end >= sequence.base_tokens).then_some(end)),
            }
        };
        let keeps_out = !sequence.steps[step].boundary.is_empty();
        sequence.last_batch = batch.id;
        sequence.moved_at = self.clock.now;
        let pages = end.div_ceil(page_tokens);
        let mut fills_page = false;
        for (state, at) in sequence.steps[step..=last].iter_mut().zip(&path.steps[step..=last]) {
            state.computed = end;
            fills_page |= (end + self.canary.early_tokens()) / page_tokens > state.published;
            if at.attention_count > 0 && pages > state.told {
                let from = batch.table_slots.len() as u32;
                let (attention_from, attention_count) = (at.attention_from, at.attention_count);
                let attention = &self.spans[sequence.span.0 as usize].attention[attention_from as usize..][..attention_count as usize];
                for page in state.told..pages {
                    append_entries(at, &state.lanes, page, attention, &self.pages, &mut batch.table_slots);
                }
                let slots = from..batch.table_slots.len() as u32;
                batch.tables.push(TableUpdate { sequence: id, attention_from, attention_count, page: state.told, slots });
                state.told = pages;
            }
        }
        let slides = path.steps[step..=last].iter().any(PathStep::slides);
        if is_last && !sequence.is_giver && sequence.may_give_way(page_tokens) {
            sequence.is_giver = true;
            self.holdings.list_giver(sequence, &self.spans[sequence.span.0 as usize].pages);
        }
        let has_more = sequence.ready_count(step, self.limits.link_rows_max) > 0;
        let span = &mut self.spans[sequence.span.0 as usize];
        let strand_number = batch.strands.len();
        let strand = batch.strands.last_mut().expect("the planner began it");
        let (before, now) = (span.last_batch, (batch.id, strand_number));
        span.last_batch = now;
        batch.span_count += usize::from(before.0 != batch.id);
        strand.span_count += usize::from(before != now);
        batch.row_count += count;
        strand.row_count += count;
        strand.rows.end += 1;
        batch.rows.push(Rows { sequence: id, start, count, span: of_span, block_from, attention_from, input, output });
        if fills_page {
            (step..=last).for_each(|step| self.publish(id, step));
        }
        if slides {
            (step..=last).for_each(|step| self.slide(id, step));
        }
        if samples_token {
            self.token_planned(id, batch.id);
        }
        if step == 0 && self.sequences[id].begins_by.is_some() {
            self.look_at_first(id);
        }
        if keeps_out {
            self.publish_boundary(id, step);
        }
        if keeps_in {
            self.release_boundary(id, step - 1);
        }
        if has_more {
            self.enqueue(id, step);
        }
        self.enqueue(id, if is_last { 0 } else { last + 1 });
    }

    /// Makes pages of a step findable whose tokens are all known and computed (or in a batch that is handed out: who takes them runs later).
    pub(crate) fn publish(&mut self, id: SequenceId, step: usize) {
        let page_tokens = self.limits.page_tokens;
        let sequence = &mut self.sequences[id];
        if !self.limits.prefix_cache || !sequence.path.is_whole() {
            return;
        }
        sequence.extend_hashes(page_tokens);
        let state = &mut sequence.steps[step];
        let full = ((state.computed + self.canary.early_tokens()) / page_tokens).min(sequence.hashes.len() as u32);
        while state.published < full {
            for handle in state.lanes.iter().filter_map(|held| held.get(state.published)) {
                self.pages.publish(handle, sequence.hashes[state.published as usize], sequence.span.0);
            }
            state.published += 1;
        }
    }
}
