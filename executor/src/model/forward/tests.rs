//! Batches: rows of several sequences give what each gives alone.

use ashlar_kernels::ops::KvFormat;
use ashlar_kernels::reference::Reference;

use super::*;
use crate::model::alone::{Alone, AloneLimits, Pools};
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
