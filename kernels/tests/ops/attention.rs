//! Attention: equal bits over page tables, windows, soft caps and page sizes; a chunk equals its tokens one by one.

use super::values::Random;
use super::{Case, assert_same, backends, check, download, upload};
use ashlar_kernels::ops::{AttentionShape, KvPlace, KvShape, Ops, PIECE_TOKENS, Query};
use proptest::prelude::*;

/// Several sequences whose tokens are all computed in one chunk.
struct Chunk {
    shape: AttentionShape,
    slot_count: usize,
    qkv: Vec<f32>,
    places: Vec<KvPlace>,
    queries: Vec<Query>,
    tables: Vec<u32>,
}

impl Chunk {
    fn random(random: &mut Random) -> Self {
        let (heads, kv_heads) = random.pick(&[(1, 1), (2, 1), (3, 1), (9, 3), (8, 2), (5, 1), (4, 4), (14, 2)]);
        let head_dim = random.pick(&[2, 8, 16, 20, 64, 80, 96, 128]);
        let page_tokens = random.pick(&[16, 32, 48]);
        let shape = AttentionShape {
            heads,
            kv: KvShape { kv_heads, head_dim, page_tokens },
            scale: (head_dim as f32).powf(-0.5),
            softcap: random.pick(&[None, Some(50.0), Some(0.5)]),
            window: random.pick(&[None, Some(1), Some(5), Some(16), Some(33), Some(1000)]),
        };
        let lengths: Vec<usize> = (0..1 + random.below(3)).map(|_| random.pick(&[1, 2, 15, 16, 17, 40, 65, 100])).collect();
        let page_count: usize = lengths.iter().map(|length| length.div_ceil(page_tokens)).sum();
        let slot_count = page_count + 3;
        let mut slots: Vec<u32> = (0..slot_count as u32).collect();
        for i in (1..slots.len()).rev() {
            slots.swap(i, random.below(i + 1));
        }
        let (mut places, mut queries, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for length in lengths {
            let table_start = tables.len();
            tables.extend((0..length.div_ceil(page_tokens)).map(|_| slots.pop().expect("a slot for each page")));
            for position in 0..length {
                places.push(KvPlace { slot: tables[table_start + position / page_tokens], offset: (position % page_tokens) as u32 });
                queries.push(Query { table_start: table_start as u32, position: position as u32 });
            }
        }
        let magnitude = random.pick(&[0.1, 1.0, 8.0]);
        let qkv = random.tame(queries.len() * shape.qkv_width()).iter().map(|x| x * magnitude).collect();
        Self { shape, slot_count, qkv, places, queries, tables }
    }

    fn width(&self) -> usize {
        self.shape.heads * self.shape.kv.head_dim
    }

    /// Each token alone, sequences in turn; table entries behind the window are overwritten.
    fn one_by_one<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let mut kv = ops.kv(self.shape.kv, self.slot_count).unwrap();
        let (qkv_width, width) = (self.shape.qkv_width(), self.width());
        let mut result = vec![0.0; self.queries.len() * width];
        for (t, query) in self.queries.iter().enumerate() {
            let qkv = upload(ops, &self.qkv[t * qkv_width..][..qkv_width]);
            ops.kv_write(&mut kv, &qkv, &self.shape, &self.places[t..=t]);
            let mut table = self.tables[query.table_start as usize..].to_vec();
            if let Some(window) = self.shape.window {
                let first = (query.position + 1).saturating_sub(window) as usize / PIECE_TOKENS * PIECE_TOKENS;
                table[..first / self.shape.kv.page_tokens].fill(u32::MAX);
            }
            let mut out = upload(ops, &vec![f32::NAN; width]);
            ops.attend(&mut out, &qkv, &kv, &self.shape, &[Query { table_start: 0, ..*query }], &table);
            result[t * width..][..width].copy_from_slice(&download(ops, &out, width));
        }
        result
    }
}

impl Case for Chunk {
    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let mut kv = ops.kv(self.shape.kv, self.slot_count).unwrap();
        let qkv = upload(ops, &self.qkv);
        ops.kv_write(&mut kv, &qkv, &self.shape, &self.places);
        let mut out = upload(ops, &vec![f32::NAN; self.queries.len() * self.width()]);
        ops.attend(&mut out, &qkv, &kv, &self.shape, &self.queries, &self.tables);
        download(ops, &out, self.queries.len() * self.width())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_has_the_reference_bits(seed in any::<u64>()) {
        check(&Chunk::random(&mut Random(seed)));
    }

    #[test]
    fn a_chunk_equals_its_tokens_one_by_one(seed in any::<u64>()) {
        let chunk = Chunk::random(&mut Random(seed));
        for cpu in backends() {
            assert_same(&cpu.describe(), &chunk.run(cpu), &chunk.one_by_one(cpu));
        }
    }
}

#[test]
fn page_size_changes_no_bit() {
    let mut random = Random(3);
    let mut chunk = Chunk::random(&mut random);
    let length = 77;
    chunk.shape = AttentionShape {
        heads: 6,
        kv: KvShape { kv_heads: 2, head_dim: 64, page_tokens: 16 },
        scale: 0.125,
        softcap: None,
        window: Some(40),
    };
    chunk.qkv = random.tame(length * chunk.shape.qkv_width());
    chunk.queries = (0..length as u32).map(|position| Query { table_start: 0, position }).collect();
    let mut results = Vec::new();
    for page_tokens in [16, 32, 64, 128] {
        chunk.shape.kv.page_tokens = page_tokens;
        chunk.slot_count = length.div_ceil(page_tokens);
        chunk.tables = (0..chunk.slot_count as u32).rev().collect();
        chunk.places = (0..length).map(|t| KvPlace { slot: chunk.tables[t / page_tokens], offset: (t % page_tokens) as u32 }).collect();
        results.push(check(&chunk));
    }
    for result in &results {
        assert_same("another page size", &results[0], result);
    }
}

#[test]
fn uniform_values_are_their_own_average() {
    let mut random = Random(4);
    let mut chunk = Chunk::random(&mut random);
    let d = chunk.shape.kv.head_dim;
    let kv = chunk.shape.kv.kv_heads * d;
    let width = chunk.shape.qkv_width();
    for row in chunk.qkv.chunks_mut(width) {
        row[width - kv..].fill(2.5);
    }
    let result = check(&chunk);
    assert!(result.iter().all(|x| (x - 2.5).abs() < 1e-5));
}
