//! Sequences of one chain in lockstep, for measurements of whole steps: no scheduling, no sampling, no sharing, the same tokens in
//! each. What `ashlar bench step` times, and `profile` of one block apart.

use std::ops::Range;
use std::sync::Arc;

use ashlar_kernels::ops::{KvPlace, Ops, PackError, Query};

use super::adapter::LoadedAdapter;
use super::alone::{AloneLimits, Pools};
use super::block::LoadedBlock;
use super::forward::{AdapterRun, AttentionBatch, Forward, ForwardBatch, KvPools};
use super::outputs::total_bytes;

/// A chain and its sequences.
pub struct Steps<B: Ops> {
    ops: Arc<B>,
    blocks: Vec<LoadedBlock<B>>,
    /// For each sequence its adapters, by the block that each changes, ascending; sequences beyond have none.
    adapters: Vec<Vec<(usize, LoadedAdapter<B>)>>,
    /// Whether steps have them.
    are_adapted: bool,
    forward: Forward<B>,
    pools: Pools<B>,
    /// For each attention block the page tables of all sequences, one after another.
    tables: Vec<Vec<u32>>,
    limits: AloneLimits,
    sequence_count: usize,
    vocab: u32,
}

impl<B: Ops> Steps<B> {
    /// Room for `sequence_count` sequences of `limits.tokens_max` tokens, and steps of at most `limits.chunk_tokens_max` rows.
    /// The chain is whole, embed first and head last, or a part of one, to which [`Steps::take_hidden`] gives what comes before it.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(ops: Arc<B>, blocks: Vec<LoadedBlock<B>>, limits: AloneLimits, sequence_count: usize) -> Result<Self, PackError> {
        let mut forward = Forward::new(Arc::clone(&ops), limits.chunk_tokens_max, limits.chunk_tokens_max.min(sequence_count))?;
        blocks.iter().try_for_each(|block| forward.reserve(block))?;
        let pages = limits.tokens_max.div_ceil(limits.page_tokens) * sequence_count;
        let all = AloneLimits { tokens_max: pages * limits.page_tokens, ..limits };
        let (pools, tables) = Pools::new(&*ops, &blocks, all)?;
        let vocab = blocks.iter().find_map(LoadedBlock::vocab).unwrap_or(1) as u32;
        Ok(Self { ops, blocks, adapters: Vec::new(), are_adapted: false, forward, pools, tables, limits, sequence_count, vocab })
    }

    /// Takes adapters for the first sequences, one list each: each with the place of its block, ascending. Steps have them after
    /// [`Steps::adapt`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn take_adapters(&mut self, adapters: Vec<Vec<(usize, LoadedAdapter<B>)>>) -> Result<(), PackError> {
        adapters.iter().flatten().try_for_each(|(_, adapter)| self.forward.reserve_adapter(adapter))?;
        self.adapters = adapters;
        Ok(())
    }

    /// Whether steps from now on have the adapters that were taken.
    pub fn adapt(&mut self, are_adapted: bool) {
        self.are_adapted = are_adapted;
    }

    /// Bytes of the adapters of the first so many sequences, which every step with them reads whole.
    pub fn adapter_bytes(&self, sequences: usize) -> usize {
        self.adapters.iter().take(sequences).flatten().map(|(_, adapter)| adapter.bytes()).sum()
    }

    /// Bytes of weights on the device, but for adapters.
    pub fn weight_bytes(&self) -> usize {
        total_bytes(self.blocks.iter().map(LoadedBlock::weights)) as usize
    }

    /// Bytes of the weights that every step reads whole: all but the embedding, of which it reads a row a token.
    pub fn read_bytes(&self) -> usize {
        self.blocks.iter().filter(|block| !block.is_embed()).map(LoadedBlock::bytes).sum()
    }

    /// The next step's input, `[T, D]`, where the chain does not begin with an embed block.
    pub fn take_hidden(&mut self, rows: &[f32]) {
        self.ops.upload(self.forward.hidden_mut(), 0, rows);
    }

    /// Writes something into every page. Those that nobody has written may be one page of zeros, which a cache holds.
    ///
    /// # Errors
    /// When the device has no room for a page of rows.
    pub fn fill_pages(&mut self) -> Result<(), PackError> {
        let attention = self.blocks.iter().filter_map(|block| block.kind.attention());
        for (block, slots) in std::iter::zip(attention, &self.tables) {
            let (shape, page) = (block.shape(self.limits.pages()), self.limits.page_tokens);
            let mut rows = self.ops.buffer(page * block.qkv_width())?;
            self.ops.upload(&mut rows, 0, &noise(page * block.qkv_width()));
            for slot in slots {
                let places: Vec<KvPlace> = (0..page as u32).map(|offset| KvPlace { slot: *slot, offset }).collect();
                self.ops.kv_write(self.pools.pool(shape.kv), &rows, &shape, &places);
            }
        }
        Ok(())
    }

    /// One step: positions `at .. at + rows_each` of each of the first `sequences`, and the logits of each one's last row.
    ///
    /// # Panics
    /// When that is beyond the limits.
    pub fn step(&mut self, sequences: usize, at: usize, rows_each: usize) {
        self.step_within(0..self.blocks.len(), sequences, at, rows_each);
    }

    /// As [`Steps::step`], through some of the blocks alone.
    ///
    /// # Panics
    /// As [`Steps::step`], and when there are no such blocks.
    pub fn step_within(&mut self, blocks: Range<usize>, sequences: usize, at: usize, rows_each: usize) {
        assert!((1..=self.sequence_count).contains(&sequences), "{sequences} sequences of {}", self.sequence_count);
        assert!(at + rows_each <= self.limits.tokens_max, "{} tokens, at most {}", at + rows_each, self.limits.tokens_max);
        let page = self.limits.page_tokens;
        let table_len = self.limits.tokens_max.div_ceil(page);
        let rows: Vec<(usize, usize)> = (0..sequences).flat_map(|s| (at..at + rows_each).map(move |position| (s, position))).collect();
        let tokens: Vec<u32> = rows.iter().map(|(_, position)| (*position as u32).wrapping_mul(2_654_435_761) % self.vocab).collect();
        let positions: Vec<u32> = rows.iter().map(|(_, position)| *position as u32).collect();
        let queries: Vec<Query> =
            rows.iter().map(|(s, position)| Query { table_start: (s * table_len) as u32, position: *position as u32 }).collect();
        let attention = |blocks: &[LoadedBlock<B>]| blocks.iter().filter(|block| block.kind.attention().is_some()).count();
        let attention_from = attention(&self.blocks[..blocks.start]);
        let tables = &self.tables[attention_from..attention_from + attention(&self.blocks[blocks.clone()])];
        let places: Vec<Vec<KvPlace>> = tables
            .iter()
            .map(|table| {
                let place = |(s, position): &(usize, usize)| KvPlace {
                    slot: table[s * table_len + position / page],
                    offset: (position % page) as u32,
                };
                rows.iter().map(place).collect()
            })
            .collect();
        let attention: Vec<AttentionBatch<'_>> =
            std::iter::zip(&places, tables).map(|(places, tables)| AttentionBatch { places, queries: &queries, tables }).collect();
        let logit_rows: Vec<u32> = (0..sequences).map(|s| ((s + 1) * rows_each - 1) as u32).collect();
        let first = blocks.start;
        let within: Vec<&LoadedBlock<B>> = self.blocks[blocks.clone()].iter().collect();
        let batch =
            ForwardBatch { row_count: rows.len(), tokens: &tokens, positions: &positions, attention: &attention, logit_rows: &logit_rows };
        let mut adapters: Vec<AdapterRun<'_, B>> = Vec::new();
        for (s, of_sequence) in self.adapters.iter().take(if self.are_adapted { sequences } else { 0 }).enumerate() {
            let rows = s * rows_each..(s + 1) * rows_each;
            let of_sequence = of_sequence.iter().filter(|(block, _)| blocks.contains(block));
            adapters.extend(of_sequence.map(|(block, adapter)| AdapterRun { block: *block - first, rows: rows.clone(), adapter }));
        }
        adapters.sort_by_key(|run| run.block);
        self.forward.run(&within, &adapters, &batch, &mut self.pools);
    }
}

/// Numbers within -1 to 1, the same each time.
pub(super) fn noise(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761).cast_signed() as f32 / 2f32.powi(31)).collect()
}
