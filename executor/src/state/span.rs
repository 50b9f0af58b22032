//! A hosted span: what the engine is told of it, and what it keeps.

use std::sync::Arc;

use ashlar_kernels::ops::KvShape;

use super::batch::BatchId;
use super::pages::{ClassIndex, LineageIndex};
use super::segments::BlockIndex;
use super::sequence::Path;

/// What the engine is told when a span is ready to run: all its blocks are on the device.
#[derive(Debug, Clone)]
pub struct HostSpan {
    /// Blocks in order.
    pub blocks: Vec<BlockIndex>,
    /// For each block: lineage (any digest) and, for attention blocks, the KV shape.
    pub lineages: Vec<[u8; 32]>,
    /// KV shape of attention blocks; None for others.
    pub kv_shapes: Vec<Option<KvShape>>,
    /// Width of hidden rows.
    pub width: u32,
    /// Whether the first block is the embedding.
    pub begins_with_embed: bool,
    /// Whether the last block is the head.
    pub ends_with_head: bool,
}

/// An attention block of a hosted span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpanAttention {
    /// Offset of the block in the span.
    pub(crate) offset: u32,
    pub(crate) class: ClassIndex,
    pub(crate) lineage: LineageIndex,
}

/// A span and its path under the present cut.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) host: HostSpan,
    pub(crate) attention: Vec<SpanAttention>,
    /// Pages of each class that one page of tokens takes.
    pub(crate) pages: Vec<(ClassIndex, usize)>,
    pub(crate) path: Arc<Path>,
    pub(crate) hosted: bool,
    /// Sequences that have not ended.
    pub(crate) sequence_count: usize,
    /// The latest batch with rows of it.
    pub(crate) last_batch: BatchId,
}

impl Span {
    /// Attention blocks within blocks [from, to) of the span, by their place in `attention`.
    pub(crate) fn attention_in(&self, from: u32, to: u32) -> std::ops::Range<usize> {
        let begin = self.attention.partition_point(|a| a.offset < from);
        let end = self.attention.partition_point(|a| a.offset < to);
        begin..end
    }
}
