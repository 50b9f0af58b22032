//! A modelled device whose KV is a hash of position and history, and what it should give: a wrong page, a lost chunk or a
//! mixed-up row changes the tokens.

use std::collections::BTreeMap;

use ashlar_kernels::ops::{KvFormat, KvShape};

use crate::state::batch::{Batch, RowInput, RowOutput, Sample, SampledToken, SequenceId};
use crate::state::segments::BlockIndex;
use crate::state::sequence::SpanIndex;
use crate::state::span::HostSpan;

pub(super) const PAGE: u32 = 16;
pub(super) const SHAPE: KvShape = KvShape { kv_heads: 1, head_dim: 4, page_tokens: PAGE as usize, format: KvFormat::F32 };
/// Blocks below this are attention blocks.
pub(super) const ATTENTION_BELOW: u32 = 1000;

/// Attention blocks from here on have a window.
pub(super) const WINDOW_FROM: u32 = 500;

/// Tokens that an attention block sees; None: all.
pub(super) fn window(block: u32) -> Option<u32> {
    (WINDOW_FROM..ATTENTION_BELOW).contains(&block).then(|| [5, 17, 33, 48][block as usize % 4])
}

/// The first position that a block sees from a later one.
fn seen_from(block: u32, position: u32) -> u32 {
    window(block).map_or(0, |window| (position + 1).saturating_sub(window))
}

pub(super) fn mix(values: &[u64]) -> u64 {
    values.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, value| (hash ^ value).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29))
}

/// A device whose hidden state is one number. An attention block's output mixes its own rows of the pages, as far back as it sees.
#[derive(Default)]
pub(super) struct ModelDevice {
    /// What each (class is one, so) block and slot holds: one number a token.
    pub(super) pages: BTreeMap<u32, [u64; PAGE as usize]>,
    pub(super) hidden: BTreeMap<u32, u64>,
    /// Page table by sequence and attention block of its span.
    pub(super) tables: BTreeMap<(SequenceId, u32), Vec<u32>>,
    /// Adapters by span and place in it.
    pub(super) adapters: BTreeMap<(SpanIndex, u32), u64>,
    /// Position and token that was sampled last, by sequence.
    pub(super) sampled: BTreeMap<SequenceId, (u32, u32)>,
}

impl ModelDevice {
    pub(super) fn run(
        &mut self,
        batch: &Batch,
        link_rows: &BTreeMap<SequenceId, Vec<u64>>,
    ) -> (Vec<Sample>, Vec<(SequenceId, u32, Vec<u64>)>) {
        for update in &batch.tables {
            for (page, slots) in batch.table_in(update).enumerate() {
                for (block, slot) in slots.iter().enumerate() {
                    let table = self.tables.entry((update.sequence, update.attention_from + block as u32)).or_default();
                    assert!(table.len() >= update.page as usize + page, "no page is left out");
                    table.truncate(update.page as usize + page);
                    table.push(*slot);
                }
            }
        }
        let mut state: Vec<Vec<u64>> = Vec::new();
        for (strand, rows) in batch.strands().flat_map(|(strand, rows)| rows.iter().map(move |rows| (strand, rows))) {
            let mut values: Vec<u64> = match &rows.input {
                RowInput::Tokens(tokens) => batch.tokens_in(tokens).iter().map(|token| u64::from(*token)).collect(),
                RowInput::Hidden(slots) => batch.slots_in(slots).iter().map(|slot| self.hidden[slot]).collect(),
                RowInput::Link => link_rows[&rows.sequence].clone(),
                RowInput::Sampled => {
                    let (position, token) = self.sampled[&rows.sequence];
                    assert_eq!(position, rows.start, "a row takes the token sampled last");
                    vec![u64::from(token)]
                }
            };
            assert_eq!(values.len(), rows.count as usize);
            let mut attention = 0;
            for (place, block) in (rows.block_from..).zip(strand.blocks.iter()) {
                let adapter = self.adapters.get(&(rows.span, place));
                for (i, value) in values.iter_mut().enumerate() {
                    let position = rows.start + i as u32;
                    *value = through(block.0, adapter.copied(), u64::from(position), *value);
                }
                if block.0 >= ATTENTION_BELOW {
                    continue;
                }
                let table = &self.tables[&(rows.sequence, rows.attention_from + attention)];
                attention += 1;
                for (i, value) in values.iter_mut().enumerate() {
                    let position = rows.start + i as u32;
                    self.pages.entry(table[(position / PAGE) as usize]).or_default()[(position % PAGE) as usize] = *value;
                    let row = |p: u32| self.pages[&table[(p / PAGE) as usize]][(p % PAGE) as usize];
                    let history: Vec<u64> = (seen_from(block.0, position)..=position).map(row).collect();
                    *value = mix(&history);
                }
            }
            state.push(values);
        }
        let (mut samples, mut links) = (Vec::new(), Vec::new());
        for (rows, values) in batch.rows.iter().zip(&state) {
            match &rows.output {
                RowOutput::Hidden(slots) => batch.slots_in(slots).iter().zip(values).for_each(|(slot, value)| {
                    self.hidden.insert(*slot, *value);
                }),
                RowOutput::Link => links.push((rows.sequence, rows.start, values.clone())),
                RowOutput::Sample(None) => {}
                RowOutput::Sample(Some(position)) => {
                    let token = (values.last().expect("at least one row") % 97) as u32;
                    self.sampled.insert(rows.sequence, (*position, token));
                    samples.push(Sample {
                        sequence: rows.sequence,
                        position: *position,
                        token: Ok(SampledToken { token, logprob: 0.0, top: Vec::new() }),
                    });
                }
            }
        }
        (samples, links)
    }
}

/// What becomes of a row in a block, before it looks at others.
fn through(block: u32, adapter: Option<u64>, position: u64, value: u64) -> u64 {
    let value = mix(&[u64::from(block), position, value]);
    adapter.map_or(value, |adapter| mix(&[adapter, value]))
}

/// Tokens of a chain run alone, straight from the definition, with no engine.
pub(super) fn oracle(blocks: &[u32], prompt: &[u32], count: usize) -> Vec<u32> {
    oracle_with(blocks, &[], prompt, count)
}

/// The same for a chain with adapters, by place.
pub(super) fn oracle_with(blocks: &[u32], adapters: &[(u32, u64)], prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    let mut history: Vec<Vec<u64>> = vec![Vec::new(); blocks.len()];
    let mut computed = 0;
    for _ in 0..count {
        let mut last = 0;
        for position in computed..tokens.len() {
            let mut value = u64::from(tokens[position]);
            for (b, block) in blocks.iter().enumerate() {
                let adapter = adapters.iter().find(|(place, _)| *place as usize == b).map(|(_, adapter)| *adapter);
                value = through(*block, adapter, position as u64, value);
                if *block < ATTENTION_BELOW {
                    history[b].push(value);
                    value = mix(&history[b][seen_from(*block, position as u32) as usize..]);
                }
            }
            last = value;
        }
        computed = tokens.len();
        tokens.push((last % 97) as u32);
    }
    tokens.split_off(prompt.len())
}

pub(super) fn host(blocks: &[u32], from: usize, to: usize) -> HostSpan {
    host_with(blocks, &[], from, to)
}

/// The same for a chain with adapters, by place.
pub(super) fn host_with(blocks: &[u32], adapters: &[(u32, u64)], from: usize, to: usize) -> HostSpan {
    let mut lineage = [0u8; 32];
    let mut lineages = Vec::new();
    for (b, block) in blocks.iter().enumerate() {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&lineage).update(&block.to_le_bytes());
        for (_, adapter) in adapters.iter().filter(|(place, _)| *place as usize == b) {
            hasher.update(&adapter.to_le_bytes());
        }
        lineage = *hasher.finalize().as_bytes();
        lineages.push(lineage);
    }
    HostSpan {
        blocks: blocks[from..to].iter().map(|block| BlockIndex(*block)).collect(),
        lineages: lineages[from..to].to_vec(),
        kv_shapes: blocks[from..to].iter().map(|block| (*block < ATTENTION_BELOW).then_some(SHAPE)).collect(),
        windows: blocks[from..to].iter().map(|block| window(*block)).collect(),
        forms: blocks[from..to].to_vec(),
        widths: vec![4; to - from + 1],
        costs: vec![None; to - from],
        begins_with_embed: from == 0,
        ends_with_head: to == blocks.len(),
    }
}
