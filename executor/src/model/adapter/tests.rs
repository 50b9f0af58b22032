//! Adapters over random blocks: rows of one batch have the bits that each has alone, whatever adapters the others have; and what an adapter
//! adds is what merging it adds.

use std::sync::Arc;

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::{Bf16Compute, KvFormat, KvPlace, Query};
use ashlar_kernels::reference::Reference;
use ashlar_zoo::adapter::AdapterError;

use super::*;
use crate::model::alone::{Alone, AloneLimits, Pools};
use crate::model::block::LoadedBlock;
use crate::model::forward::{AdapterRun, AttentionBatch, Forward, ForwardBatch};
use crate::model::outputs::Outputs;
use crate::model::testing::Memory;

const PAGE: usize = 16;
const LIMITS: AloneLimits = AloneLimits { chunk_tokens_max: 32, tokens_max: 48, page_tokens: PAGE, kv_format: KvFormat::F32 };
const ATTENTION: &[&str] = &["q.weight", "k.weight", "v.weight", "o.weight"];
const GATED: &[&str] = &["gate.weight", "up.weight", "down.weight"];

/// A chain, and adapters over it: the first model has none.
struct Model {
    memory: Memory,
    blocks: Vec<Block>,
    models: Vec<Vec<(usize, Adapter)>>,
}

impl Model {
    /// Blocks 1 and 3 are attention blocks, 2 and 4 feed forward, 3 and 4 have a norm behind, 4 has no gate.
    fn new(dtype: Option<Dtype>) -> Self {
        let mut memory = Memory::default();
        let blocks = memory.blocks(dtype);
        let mut adapter =
            |block: usize, roles: &[&str], rank, scale, dtype| (block, memory.adapter(&blocks[block], roles, rank, scale, dtype));
        let (f32, bf16, f16) = (Dtype::F32, Dtype::Bf16, Dtype::F16);
        let mut models = vec![
            vec![],
            [1, 3].map(|block| adapter(block, &["q.weight", "v.weight"], 4, 2.0, f32)).into(),
            vec![
                adapter(1, ATTENTION, 8, 0.5, f32),
                adapter(2, GATED, 8, 0.5, f32),
                adapter(3, ATTENTION, 8, 0.5, f32),
                adapter(4, &["up.weight", "down.weight"], 8, 0.5, f32),
            ],
            // Scaled as rsLoRA does: alpha over the root of the rank.
            vec![
                adapter(1, &["k.weight", "o.weight"], 3, 2.0 / 3f32.sqrt(), bf16),
                adapter(2, &["up.weight"], 3, 2.0 / 3f32.sqrt(), f16),
                adapter(4, &["down.weight"], 5, 2.0 / 5f32.sqrt(), bf16),
            ],
            vec![],
        ];
        // One-bit deltas alone, and beside factors in the rows of one projection: before, between and behind them.
        let mut one_bit = |block: usize, signs: &[&str], factors: &[&str]| {
            let adapter = memory.adapter(&blocks[block], factors, 3, 0.5, bf16);
            (block, memory.with_signs(&blocks[block], signs, adapter))
        };
        models[4] = vec![
            one_bit(1, &["q.weight", "v.weight", "o.weight"], &["k.weight"]),
            one_bit(2, &["up.weight"], &["down.weight"]),
            one_bit(3, ATTENTION, &[]),
            one_bit(4, &["down.weight"], &[]),
        ];
        Self { memory, blocks, models }
    }

    fn blocks<B: Ops>(&self, ops: &B) -> Vec<LoadedBlock<B>> {
        self.blocks.iter().map(|block| LoadedBlock::load(ops, block, &self.memory, &Outputs::default()).unwrap()).collect()
    }

    fn adapters<B: Ops>(&self, ops: &B, model: usize) -> Vec<(usize, LoadedAdapter<B>)> {
        let load =
            |(block, adapter): &(usize, Adapter)| (*block, LoadedAdapter::load(ops, &self.blocks[*block], adapter, &self.memory).unwrap());
        self.models[model].iter().map(load).collect()
    }

    fn alone<B: Ops>(&self, ops: &Arc<B>, model: usize) -> Alone<B> {
        Alone::new(Arc::clone(ops), self.blocks(&**ops), LIMITS).unwrap().adapted(self.adapters(&**ops, model)).unwrap()
    }

    /// Logits of all rows of one sequence of each model, in batches of rows of all of them.
    fn together<B: Ops>(&self, ops: &Arc<B>, prompts: &[Vec<u32>], steps: &[Vec<(usize, usize)>]) -> Vec<Vec<Vec<f32>>> {
        let (blocks, count) = (self.blocks(&**ops), self.models.len());
        let adapters: Vec<_> = (0..count).map(|model| self.adapters(&**ops, model)).collect();
        let all = AloneLimits { tokens_max: count * LIMITS.tokens_max, ..LIMITS };
        let (mut pools, tables) = Pools::new(&**ops, &blocks, all).unwrap();
        let table_len = LIMITS.tokens_max / PAGE;
        let rows_max = steps.iter().map(Vec::len).max().unwrap();
        let mut forward = Forward::new(Arc::clone(ops), rows_max, rows_max).unwrap();
        blocks.iter().for_each(|block| forward.reserve(block).unwrap());
        adapters.iter().flatten().for_each(|(_, adapter)| forward.reserve_adapter(adapter).unwrap());
        let blocks: Vec<&LoadedBlock<B>> = blocks.iter().collect();
        let mut logits: Vec<Vec<Vec<f32>>> = vec![Vec::new(); count];
        for rows in steps {
            let ids: Vec<u32> = rows.iter().map(|(model, position)| prompts[*model][*position]).collect();
            let positions: Vec<u32> = rows.iter().map(|(_, position)| *position as u32).collect();
            let query = |(model, position): &(usize, usize)| Query { table_start: (model * table_len) as u32, position: *position as u32 };
            let queries: Vec<Query> = rows.iter().map(query).collect();
            let place = |table: &[u32], (model, position): (usize, usize)| KvPlace {
                slot: table[model * table_len + position / PAGE],
                offset: (position % PAGE) as u32,
            };
            let places: Vec<Vec<KvPlace>> = tables.iter().map(|table| rows.iter().map(|row| place(table, *row)).collect()).collect();
            let attention: Vec<AttentionBatch<'_>> =
                std::iter::zip(&places, &tables).map(|(places, tables)| AttentionBatch { places, queries: &queries, tables }).collect();
            let mut runs: Vec<AdapterRun<'_, B>> = Vec::new();
            for block in 0..blocks.len() {
                for (row, (model, _)) in rows.iter().enumerate() {
                    let mine = adapters[*model].iter().find(|(adapted, _)| *adapted == block);
                    runs.extend(mine.map(|(_, adapter)| AdapterRun { block, rows: row..row + 1, adapter }));
                }
            }
            // Rows that lie next to each other are one run.
            runs.dedup_by(|next, run| {
                let joins = next.block == run.block && next.rows.start == run.rows.end && std::ptr::eq(next.adapter, run.adapter);
                run.rows.end = if joins { next.rows.end } else { run.rows.end };
                joins
            });
            let logit_rows: Vec<u32> = (0..rows.len() as u32).collect();
            let batch =
                ForwardBatch { row_count: rows.len(), tokens: &ids, positions: &positions, attention: &attention, logit_rows: &logit_rows };
            forward.run(&blocks, &runs, &batch, &mut pools);
            rows.iter().enumerate().for_each(|(row, (model, _))| logits[*model].push(forward.logits(row).to_vec()));
        }
        logits
    }
}

fn prompts() -> Vec<Vec<u32>> {
    (0..5).map(|model| (0..20).map(|i| (i * 7 + model * 11) % 50).collect()).collect()
}

/// Each model's rows in chunks that change from step to step, in another order each time.
fn steps() -> Vec<Vec<(usize, usize)>> {
    let span = |model, from: usize, to: usize| (from..to).map(move |position| (model, position));
    vec![
        span(2, 0, 9).chain(span(0, 0, 1)).chain(span(1, 0, 3)).chain(span(3, 0, 2)).collect(),
        span(1, 3, 4).chain(span(3, 2, 12)).chain(span(4, 0, 1)).chain(span(2, 9, 10)).chain(span(0, 1, 17)).collect(),
        (0..5).flat_map(|model| span(model, [17, 4, 10, 12, 1][model], [18, 5, 11, 13, 2][model])).collect(),
        (0..5).rev().flat_map(|model| span(model, [18, 5, 11, 13, 2][model], 20)).collect(),
    ]
}

#[test]
fn rows_of_one_batch_have_the_bits_of_each_alone_whatever_adapters_the_others_have() {
    let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<u32>>();
    for dtype in [None, Some(Dtype::Bf16), Some(Dtype::Int8 { group: 32 })] {
        for bf16_compute in [Bf16Compute::F32, Bf16Compute::Bf16] {
            let model = Model::new(dtype);
            let (reference, prompts) = (Arc::new(Reference { bf16_compute }), prompts());
            let cpu = Arc::new(Cpu::new(CpuOptions { threads: 2, isa: None, bf16_compute }));
            let together = [model.together(&reference, &prompts, &steps()), model.together(&cpu, &prompts, &steps())];
            let mut alone = Vec::new();
            for (i, prompt) in prompts.iter().enumerate() {
                let rows = model.alone(&reference, i).feed(prompt, 32, prompt.len());
                assert_eq!(bits(&model.alone(&cpu, i).feed(prompt, 3, prompt.len())), bits(&rows), "{dtype:?}, model {i} alone");
                together.iter().for_each(|together| assert_eq!(bits(&together[i]), bits(&rows), "{dtype:?}, {bf16_compute:?}, model {i}"));
                alone.push(rows);
            }
            // What is compared differs.
            let base = Alone::new(Arc::clone(&reference), model.blocks(&*reference), LIMITS).unwrap().feed(&prompts[1], 32, 20);
            assert_ne!(bits(&base), bits(&alone[1]));
        }
    }
}

#[test]
fn an_adapter_adds_what_merging_it_adds() {
    let mut model = Model::new(None);
    let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
    for i in 1..model.models.len() {
        let mut blocks = model.blocks.clone();
        for (block, adapter) in &model.models[i] {
            blocks[*block] = model.memory.merged(&blocks[*block], adapter);
        }
        let merged: Vec<_> =
            blocks.iter().map(|block| LoadedBlock::load(&*ops, block, &model.memory, &Outputs::default()).unwrap()).collect();
        let mut merged = Alone::new(Arc::clone(&ops), merged, LIMITS).unwrap();
        let prompt = &prompts()[i];
        let (apart, expected) = (model.alone(&ops, i).greedy(prompt, 12, 32), merged.greedy(prompt, 12, 32));
        assert_eq!(apart.tokens, expected.tokens, "model {i}");
        let difference = apart.rows.iter().flatten().zip(expected.rows.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("model {i}: largest difference of a logit {difference:.2e}");
        // Activations that meet one-bit deltas are quantised to 8 bits.
        let tolerance = if i == 4 { 0.05 } else { 1e-3 };
        assert!(difference < tolerance, "model {i}: {difference}");
    }
}

#[test]
fn a_factor_takes_no_more_than_it_must() {
    let mut memory = Memory::default();
    let block = memory.blocks(None).swap_remove(2);
    let ops = Reference::default();
    let mut bytes = |scale, dtype| {
        let adapter = memory.adapter(&block, GATED, 4, scale, dtype);
        LoadedAdapter::load(&ops, &block, &adapter, &memory).unwrap().bytes()
    };
    // Gate and up are [48, 32], down is [32, 48].
    let (a, b) = (4 * (32 + 32 + 48), 4 * (48 + 48 + 32));
    assert_eq!(bytes(0.3, Dtype::F32), 4 * (a + b));
    assert_eq!([bytes(1.0, Dtype::Bf16), bytes(2.0, Dtype::Bf16), bytes(0.25, Dtype::F16)], [2 * (a + b); 3]);
    assert_eq!(bytes(0.3, Dtype::Bf16), 2 * a + 4 * b);
}

#[test]
fn an_adapter_of_another_block_is_refused_by_role() {
    let mut memory = Memory::default();
    let blocks = memory.blocks(None);
    let ops = Reference::default();
    let adapter = memory.adapter(&blocks[2], &["up.weight"], 4, 1.0, Dtype::F32);
    let refusal =
        |block: usize, adapter: &Adapter, source: &Memory| LoadedAdapter::load(&ops, &blocks[block], adapter, source).unwrap_err();
    // Block 4 has an up of another shape, block 1 none.
    assert!(matches!(refusal(4, &adapter, &memory), LoadError::Adapter(AdapterError::Shape { role, .. }) if role == "up.weight"));
    assert!(matches!(refusal(1, &adapter, &memory), LoadError::Adapter(AdapterError::Absent(role)) if role == "up.weight"));
    assert!(matches!(refusal(0, &adapter, &memory), LoadError::Adapter(AdapterError::Absent(_))));
    assert!(matches!(refusal(2, &adapter, &Memory::default()), LoadError::Source { role, .. } if role == "up.weight.a"));
    let nothing = Adapter { changes: Default::default() };
    let signs = memory.with_signs(&blocks[2], &["up.weight"], nothing.clone());
    assert!(matches!(refusal(2, &signs, &Memory::default()), LoadError::Source { role, .. } if role == "up.weight.signs"));
    assert!(matches!(refusal(4, &signs, &memory), LoadError::Adapter(AdapterError::Shape { role, .. }) if role == "up.weight"));
    assert!(matches!(refusal(2, &nothing, &memory), LoadError::Adapter(AdapterError::Empty)));
}
