//! Batches: rows of several sequences give what each gives alone.

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::format::{Dtype, dequantise};
use ashlar_kernels::ops::KvFormat;
use ashlar_kernels::reference::Reference;
use ashlar_zoo::manifest::{Block, BlockKind};
use ashlar_zoo::stitch::LinearMap;

use super::*;
use crate::model::alone::{Alone, AloneLimits, Pools};
use crate::model::outputs::Outputs;
use crate::model::testing::Memory;

const PAGE: usize = 16;
const LIMITS: AloneLimits = AloneLimits { chunk_tokens_max: 32, tokens_max: 48, page_tokens: PAGE, kv_format: KvFormat::F32 };

fn tokens(count: usize, factor: usize) -> Vec<u32> {
    (0..count).map(|i| (i * factor % 50) as u32).collect()
}

#[test]
fn mixed_batch_gives_what_each_sequence_gives_alone() {
    let ops = Arc::new(Reference::default());
    let (first, second) = (tokens(20, 7), tokens(11, 3));
    let mut alone = Alone::new(Arc::clone(&ops), Memory::default().chain(&*ops), LIMITS).unwrap();
    let first_rows = alone.feed(&first, 32, first.len());
    alone.restart();
    let second_rows = alone.feed(&second, 1, second.len());

    // One pool holds both; the second sequence's pages come after the first's.
    let blocks = Memory::default().chain(&*ops);
    let both = AloneLimits { tokens_max: 2 * LIMITS.tokens_max, ..LIMITS };
    let (mut pools, tables) = Pools::new(&*ops, &blocks, both).unwrap();
    let half = tables[0].len() / 2;
    let mut forward = Forward::new(Arc::clone(&ops), 32, 8).unwrap();
    blocks.iter().for_each(|block| forward.reserve(block).unwrap());
    let blocks: Vec<&LoadedBlock<Reference>> = blocks.iter().collect();

    // Rows as (sequence, position), the second sequence between two parts of the first's chunk.
    let steps: [Vec<(usize, usize)>; 3] = [
        (0..9).map(|p| (0, p)).chain([(1, 0)]).collect(),
        (9..15).map(|p| (0, p)).chain((1..8).map(|p| (1, p))).chain((15..19).map(|p| (0, p))).collect(),
        (8..11).map(|p| (1, p)).chain([(0, 19)]).collect(),
    ];
    for rows in steps {
        let ids: Vec<u32> = rows.iter().map(|(s, p)| if *s == 0 { first[*p] } else { second[*p] }).collect();
        let positions: Vec<u32> = rows.iter().map(|(_, p)| *p as u32).collect();
        let queries: Vec<Query> = rows.iter().map(|(s, p)| Query { table_start: (s * half) as u32, position: *p as u32 }).collect();
        let place = |table: &[u32], (s, p): (usize, usize)| KvPlace { slot: table[s * half + p / PAGE], offset: (p % PAGE) as u32 };
        let places: Vec<Vec<KvPlace>> = tables.iter().map(|table| rows.iter().map(|row| place(table, *row)).collect()).collect();
        let attention: Vec<AttentionBatch<'_>> =
            std::iter::zip(&places, &tables).map(|(places, tables)| AttentionBatch { places, queries: &queries, tables }).collect();
        let last = rows.len() as u32 - 1;
        let logit_rows = [last, 0, last / 2];
        let batch =
            ForwardBatch { row_count: rows.len(), tokens: &ids, positions: &positions, attention: &attention, logit_rows: &logit_rows };
        forward.run(&blocks, &[], &batch, &mut pools);
        for (i, row) in logit_rows.iter().enumerate() {
            let (s, p) = rows[*row as usize];
            let expected = if s == 0 { &first_rows[p] } else { &second_rows[p] };
            assert_eq!(forward.logits(i), expected.as_slice(), "sequence {s}, position {p}");
        }
    }
}

/// Three chains of one form, two of them stored in other formats, abreast: rows, logits and pages of each as alone. One of them has an adapter.
#[test]
fn strands_give_what_each_chain_gives_alone() {
    for dtype in [Dtype::F32, Dtype::Int8 { group: 16 }, Dtype::F16] {
        abreast(&Arc::new(Reference::default()), dtype);
        abreast(&Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() })), dtype);
    }
}

fn abreast<B: Ops>(ops: &Arc<B>, dtype: Dtype) {
    let mut memory = Memory::default();
    let dtypes = [None, Some(dtype), Some(Dtype::Bf16)];
    let descriptors = dtypes.map(|dtype| memory.blocks(dtype));
    let adapter = memory.adapter(&descriptors[1][2], &["up.weight", "down.weight"], 3, 0.5, Dtype::F32);
    let load = |blocks: &Vec<Block>| -> Vec<LoadedBlock<B>> {
        blocks.iter().map(|block| LoadedBlock::load(&**ops, block, &memory, &Outputs::default()).unwrap()).collect()
    };
    let adapter = || LoadedAdapter::load(&**ops, &descriptors[1][2], &adapter, &memory).unwrap();
    let prompts = [tokens(12, 7), tokens(9, 3), tokens(14, 11)];
    let alone: Vec<Vec<Vec<f32>>> = (0..3)
        .map(|chain| {
            let alone = Alone::new(Arc::clone(ops), load(&descriptors[chain]), LIMITS).unwrap();
            let mut alone = if chain == 1 { alone.adapted(vec![(2, adapter())]).unwrap() } else { alone };
            alone.feed(&prompts[chain], 32, prompts[chain].len())
        })
        .collect();

    let chains: Vec<Vec<LoadedBlock<B>>> = descriptors.iter().map(load).collect();
    let all = AloneLimits { tokens_max: 3 * LIMITS.tokens_max, ..LIMITS };
    let (mut pools, tables) = Pools::new(&**ops, &chains[0], all).unwrap();
    let third = tables[0].len() / 3;
    let mut forward = Forward::new(Arc::clone(ops), 32, 32).unwrap();
    chains.iter().flatten().for_each(|block| forward.reserve(block).unwrap());
    let adapter = adapter();
    forward.reserve_adapter(&adapter).unwrap();
    let blocks: Vec<Vec<&LoadedBlock<B>>> = chains.iter().map(|chain| chain.iter().collect()).collect();

    // Chunks of each chain, one after another, the first chain also at the end: a chain may be two strands.
    let steps: [Vec<(usize, usize, usize)>; 3] =
        [vec![(0, 0, 3), (1, 0, 5), (2, 0, 1)], vec![(2, 1, 2), (0, 3, 4), (2, 2, 3)], vec![(1, 5, 9), (0, 4, 12), (2, 3, 14)]];
    for step in steps {
        let rows: Vec<(usize, usize)> = step.iter().flat_map(|(chain, from, to)| (*from..*to).map(|p| (*chain, p))).collect();
        let mut end = 0;
        let strand = |(chain, from, to): &(usize, usize, usize)| {
            let begin = end;
            end += to - from;
            Strand { rows: begin..end, blocks: &blocks[*chain] }
        };
        let strands: Vec<Strand<'_, B>> = step.iter().map(strand).collect();
        let ids: Vec<u32> = rows.iter().map(|(chain, p)| prompts[*chain][*p]).collect();
        let positions: Vec<u32> = rows.iter().map(|(_, p)| *p as u32).collect();
        let queries: Vec<Query> =
            rows.iter().map(|(chain, p)| Query { table_start: (chain * third) as u32, position: *p as u32 }).collect();
        let place =
            |table: &[u32], (chain, p): (usize, usize)| KvPlace { slot: table[chain * third + p / PAGE], offset: (p % PAGE) as u32 };
        let places: Vec<Vec<KvPlace>> = tables.iter().map(|table| rows.iter().map(|row| place(table, *row)).collect()).collect();
        let attention: Vec<AttentionBatch<'_>> =
            std::iter::zip(&places, &tables).map(|(places, tables)| AttentionBatch { places, queries: &queries, tables }).collect();
        let adapters: Vec<AdapterRun<'_, B>> = (strands.iter().zip(&step))
            .filter(|(_, (chain, ..))| *chain == 1)
            .map(|(strand, _)| AdapterRun { block: 2, rows: strand.rows.clone(), adapter: &adapter })
            .collect();
        // Every second row wants logits, and some strand may want none.
        let logit_rows: Vec<u32> = (0..rows.len() as u32).filter(|row| row % 2 == 1).collect();
        let batch =
            ForwardBatch { row_count: rows.len(), tokens: &ids, positions: &positions, attention: &attention, logit_rows: &logit_rows };
        forward.run_abreast(&strands, &adapters, &batch, &mut pools);
        for (i, row) in logit_rows.iter().enumerate() {
            let (chain, p) = rows[*row as usize];
            assert_eq!(forward.logits(i), alone[chain][p].as_slice(), "chain {chain}, position {p}, {dtype:?}");
        }
    }
}

#[test]
#[should_panic(expected = "blocks that run abreast are alike")]
fn unlike_blocks_do_not_run_abreast() {
    let ops = Arc::new(Reference::default());
    let blocks = Memory::default().chain(&*ops);
    let mut forward = Forward::new(Arc::clone(&ops), 4, 2).unwrap();
    blocks.iter().for_each(|block| forward.reserve(block).unwrap());
    let (mut pools, _) = Pools::new(&*ops, &blocks, LIMITS).unwrap();
    let batch = ForwardBatch { row_count: 2, tokens: &[], positions: &[0, 0], attention: &[], logit_rows: &[] };
    let strands = [Strand { rows: 0..1, blocks: &[&blocks[2]] }, Strand { rows: 1..2, blocks: &[&blocks[4]] }];
    forward.run_abreast(&strands, &[], &batch, &mut pools);
}

#[test]
fn run_without_logit_rows_gives_none() {
    let ops = Arc::new(Reference::default());
    let blocks = Memory::default().chain(&*ops);
    let mut forward = Forward::new(Arc::clone(&ops), 4, 2).unwrap();
    blocks.iter().for_each(|block| forward.reserve(block).unwrap());
    let (mut pools, tables) = Pools::new(&*ops, &blocks, LIMITS).unwrap();
    let place = |table: &Vec<u32>| KvPlace { slot: table[0], offset: 0 };
    let queries = [Query { table_start: 0, position: 0 }];
    let places: Vec<KvPlace> = tables.iter().map(place).collect();
    let attention: Vec<AttentionBatch<'_>> = std::iter::zip(&places, &tables)
        .map(|(place, tables)| AttentionBatch { places: std::slice::from_ref(place), queries: &queries, tables })
        .collect();
    let batch = ForwardBatch { row_count: 1, tokens: &[3], positions: &[0], attention: &attention, logit_rows: &[] };
    forward.run(&blocks.iter().collect::<Vec<_>>(), &[], &batch, &mut pools);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| forward.logits(0).len())).is_err());
}

/// A stitch from 32 to 40 elements and one to 24: what `LinearMap` says but for rounding, a row at a time or together, and the same bits on any device.
#[test]
fn a_stitch_gives_rows_of_another_width() {
    for to in [40, 24] {
        let mut memory = Memory::default();
        let block = memory.block(BlockKind::Stitch { to });
        let positions = [0, 7, 1, 100_000];
        let x: Vec<f32> = (0..4 * 32).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let together = through(&Arc::new(Reference::default()), &block, &memory, &x, &positions);
        assert_eq!(
            together,
            through(&Arc::new(Cpu::new(CpuOptions { threads: 2, ..CpuOptions::default() })), &block, &memory, &x, &positions)
        );
        let values = |role: &str| dequantise(&memory.0[&block.tensors[role].digest].view());
        let (weight, bias, position) = (values("map.weight"), values("map.bias"), values("map.position"));
        let map = LinearMap { inputs: 32, outputs: to as usize, weight, bias, position };
        for (row, (x, y)) in std::iter::zip(x.chunks(32), together.chunks(to as usize)).enumerate() {
            let alone = through(&Arc::new(Reference::default()), &block, &memory, x, &positions[row..=row]);
            assert_eq!(alone, y, "row {row}");
            let expected = map.apply(x, positions[row]);
            assert!(std::iter::zip(y, expected).all(|(y, expected)| (f64::from(*y) - expected).abs() < 1e-5), "row {row}");
        }
    }
}

fn through<B: Ops>(ops: &Arc<B>, block: &Block, memory: &Memory, x: &[f32], positions: &[u32]) -> Vec<f32> {
    let block = LoadedBlock::load(&**ops, block, memory, &Outputs::default()).unwrap();
    let mut forward = Forward::new(Arc::clone(ops), positions.len(), 1).unwrap();
    forward.reserve(&block).unwrap();
    let (mut pools, _) = Pools::new(&**ops, std::slice::from_ref(&block), LIMITS).unwrap();
    ops.upload(forward.hidden_mut(), 0, x);
    let batch = ForwardBatch { row_count: positions.len(), tokens: &[], positions, attention: &[], logit_rows: &[] };
    forward.run(&[&block], &[], &batch, &mut pools);
    let mut y = vec![0.0; positions.len() * block.output_width()];
    ops.download(forward.hidden(), 0, &mut y);
    y
}
