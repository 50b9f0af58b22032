//! One step's attention of sequences that each have one new row, over pages that no cache holds any more.

use super::pseudo_random;
use crate::cpu::{Buffer, Cpu, Kv};
use crate::ops::{AttentionShape, KvFormat, KvPlace, KvShape, Ops, PackError, Query};

/// What is attended to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decode {
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// How keys and values are stored.
    pub format: KvFormat,
    /// Rows, each over pages of its own.
    pub rows: usize,
    /// Tokens that each of them sees.
    pub tokens: usize,
}

/// Several layers' worth of pages, one of which is read at each step. Pages of the sequences alternate, as they do
/// when sequences grow together.
pub(super) struct Pages {
    shape: AttentionShape,
    kv: Kv,
    qkv: Buffer,
    out: Buffer,
    queries: Vec<Query>,
    /// For each layer.
    tables: Vec<Vec<u32>>,
    next: usize,
    /// Bytes of keys and values that a step reads.
    pub(super) step_bytes: usize,
}

impl Pages {
    pub(super) fn new(cpu: &Cpu, decode: Decode, rotate_bytes: usize) -> Result<Self, PackError> {
        let Decode { heads, kv_heads, head_dim, format, rows, tokens } = decode;
        let kv_shape = KvShape { kv_heads, head_dim, page_tokens: PAGE_TOKENS, format };
        let shape = AttentionShape { heads, kv: kv_shape, scale: (head_dim as f32).powf(-0.5), softcap: None, window: None };
        let pages = tokens.div_ceil(PAGE_TOKENS);
        let layer_slots = pages * rows;
        let layers = rotate_bytes.div_ceil(layer_slots * kv_shape.page_bytes()).max(1);
        let mut kv = cpu.kv(kv_shape, layers * layer_slots)?;

        let width = shape.qkv_width();
        let mut qkv = cpu.buffer(rows.max(PAGE_TOKENS) * width)?;
        cpu.upload(&mut qkv, 0, &pseudo_random(rows.max(PAGE_TOKENS) * width));
        for slot in 0..(layers * layer_slots) as u32 {
            let places: Vec<KvPlace> = (0..PAGE_TOKENS as u32).map(|offset| KvPlace { slot, offset }).collect();
            cpu.kv_write(&mut kv, &qkv, &shape, &places);
        }
        let slot = |layer, row, page| (layer * layer_slots + page * rows + row) as u32;
        let table = |layer| (0..rows).flat_map(|s| (0..pages).map(move |page| slot(layer, s, page))).collect();
        let query = |row| Query { table_start: (row * pages) as u32, position: tokens as u32 - 1 };
        Ok(Self {
            shape,
            kv,
            qkv,
            out: cpu.buffer(rows * heads * head_dim)?,
            queries: (0..rows).map(query).collect(),
            tables: (0..layers).map(table).collect(),
            next: 0,
            step_bytes: tokens * rows * kv_shape.page_bytes() / PAGE_TOKENS,
        })
    }

    /// The attention of one layer.
    pub(super) fn step(&mut self, cpu: &Cpu) {
        self.next = (self.next + 1) % self.tables.len();
        cpu.attend(&mut self.out, &self.qkv, &self.kv, &self.shape, &self.queries, &self.tables[self.next]);
    }
}

const PAGE_TOKENS: usize = 16;
