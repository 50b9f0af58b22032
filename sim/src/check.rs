//! The named checkers, apart from those that stand where the fact is (`client`: tokens, order, ends). A violation ends the run.

use std::collections::BTreeMap;

use ashlar_executor::state::batch::{Batch, RowInput, RowOutput, SequenceId};
use ashlar_executor::state::engine::Engine;
use ashlar_executor::state::limits::Limits;

use crate::models::Block;

/// What was found wrong, and by which checker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) checker: &'static str,
    pub(crate) message: String,
}

/// Fails under a checker's name.
pub(crate) fn violated<T>(checker: &'static str, message: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { checker, message: message.into() })
}

/// `Ok` if it holds.
pub(crate) fn holds(checker: &'static str, holds: bool, message: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { violated(checker, message()) }
}

/// What the checkers remember of one executor.
#[derive(Debug, Default)]
pub(crate) struct Books {
    /// Page tables as they are after all batches that were planned.
    tables: BTreeMap<SequenceId, Vec<Vec<u32>>>,
    /// Pages (heads, slot) that batches in flight write to: for whom, and how many batches.
    written: BTreeMap<(usize, u32), (SequenceId, u32)>,
    /// What each batch in flight writes, oldest first.
    batches: std::collections::VecDeque<Vec<(usize, u32)>>,
}

impl Books {
    /// A batch was planned: `budgets` and `pages-in-flight`.
    pub(crate) fn planned(&mut self, limits: &Limits, batch: &Batch, blocks: &[(Block, u32)]) -> Result<(), Violation> {
        let budget = |fits: bool, what: String| holds("budgets", fits, || format!("batch {}: {what}", batch.id.0));
        let sum: u32 = batch.rows.iter().map(|rows| rows.count).sum();
        budget(batch.row_count == sum, format!("says {} rows and has {sum}", batch.row_count))?;
        budget(sum > 0 && sum <= limits.step_tokens_max, format!("{sum} rows of {}", limits.step_tokens_max))?;
        let mut known: Vec<SequenceId> = batch.rows.iter().map(|rows| rows.sequence).collect();
        known.sort_unstable();
        budget(known.windows(2).all(|pair| pair[0] != pair[1]), "has a sequence twice".to_owned())?;
        let most = limits.chunk_tokens_max;
        budget(batch.rows.iter().all(|rows| rows.count <= most), format!("has a chunk of more than {most} tokens"))?;
        let hidden = limits.hidden_slots(blocks[0].1) as u32;
        let in_bounds = |range: &std::ops::Range<u32>| batch.slots_in(range).iter().all(|slot| *slot < hidden);
        for rows in &batch.rows {
            let input = if let RowInput::Hidden(range) = &rows.input { in_bounds(range) } else { true };
            let output = if let RowOutput::Hidden(range) = &rows.output { in_bounds(range) } else { true };
            budget(input && output, format!("names a hidden row beyond {hidden}"))?;
        }
        self.update_tables(batch);
        let attention: Vec<&Block> = blocks.iter().map(|(block, _)| block).filter(|block| block.kv_heads.is_some()).collect();
        let mut writes = Vec::new();
        for rows in &batch.rows {
            let pages = (rows.start / limits.page_tokens) as usize..=((rows.start + rows.count - 1) / limits.page_tokens) as usize;
            for (i, block) in attention.iter().enumerate() {
                let heads = block.kv_heads.expect("just filtered");
                let page_bytes = block.kv_shape(limits.page_tokens).expect("just filtered").page_bytes() as u64;
                let table = self.tables.get(&rows.sequence).and_then(|tables| tables.get(rows.attention_from as usize + i));
                let Some(slots) = table.and_then(|table| table.get(pages.clone())) else {
                    return violated("budgets", format!("batch {}: sequence {:?} has no page for its rows", batch.id.0, rows.sequence));
                };
                for slot in slots {
                    let place = (heads, *slot);
                    budget(u64::from(*slot) < limits.kv_bytes / page_bytes, format!("names page {slot} beyond the pool"))?;
                    let entry = self.written.entry(place).or_insert((rows.sequence, 0));
                    entry.1 += 1;
                    let of = entry.0;
                    writes.push(place);
                    holds("pages-in-flight", of == rows.sequence, || {
                        format!(
                            "batch {} writes page {place:?} for {:?} while one in flight writes it for {of:?}",
                            batch.id.0, rows.sequence
                        )
                    })?;
                }
            }
        }
        self.batches.push_back(writes);
        let most = limits.batches_in_flight_max as usize;
        holds("in-flight", self.batches.len() <= most, || format!("{} batches in flight of {most}", self.batches.len()))
    }

    fn update_tables(&mut self, batch: &Batch) {
        for update in &batch.tables {
            let tables = self.tables.entry(update.sequence).or_default();
            let (from, to) = (update.attention_from as usize, (update.attention_from + update.attention_count) as usize);
            if tables.len() < to {
                tables.resize_with(to, Vec::new);
            }
            tables[from..to].iter_mut().for_each(|table| table.truncate(update.page as usize));
            for slots in batch.table_in(update) {
                tables[from..to].iter_mut().zip(slots).for_each(|(table, slot)| table.push(*slot));
            }
        }
    }

    /// The oldest batch was done.
    pub(crate) fn done(&mut self) {
        for place in self.batches.pop_front().expect("it was planned") {
            let entry = self.written.get_mut(&place).expect("counted when it was planned");
            entry.1 -= 1;
            if entry.1 == 0 {
                self.written.remove(&place);
            }
        }
    }

    pub(crate) fn released(&mut self, sequence: SequenceId) {
        self.tables.remove(&sequence);
    }
}

/// What holds of an engine between events: `integrity` and `budgets`; and when it has nothing to do, `idle`.
pub(crate) fn engine(name: &str, engine: &Engine, limits: &Limits) -> Result<(), Violation> {
    engine.check_integrity().or_else(|fault| violated("integrity", format!("{name}: {fault}")))?;
    let gauges = engine.gauges();
    let running = gauges.running_count;
    holds("budgets", running <= limits.sequences_max as usize, || format!("{name}: {running} sequences run of {}", limits.sequences_max))
}

/// `idle`: an engine without sequences and batches holds nothing.
pub(crate) fn idle(name: &str, engine: &Engine) -> Result<(), Violation> {
    let gauges = engine.gauges();
    let left = (gauges.running_count, gauges.waiting_count, gauges.used_pages);
    holds("idle", left == (0, 0, 0), || {
        format!("{name} is idle with {} sequences running, {} waiting, {} pages used", left.0, left.1, left.2)
    })
}
