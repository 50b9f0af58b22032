//! A hosted span: what the engine is told of it, and what it keeps.

use std::sync::Arc;

use ashlar_kernels::ops::KvShape;

use super::batch::BatchId;
use super::cost::CostCurve;
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
    /// For each block the tokens that it sees back from a query, the query's own among them; None for blocks that see all, or none.
    pub windows: Vec<Option<u32>>,
    /// For each block a number: blocks of equal numbers (and equal shape and window) are alike in all but their weights, so that rows through one and
    /// rows through another may be computed in the same calls.
    pub forms: Vec<u32>,
    /// Width of the hidden rows that each block takes, and at the end of those that the last one gives.
    pub widths: Vec<u32>,
    /// For each block what it was profiled to cost on a device like this one, where it was: what a segment costs before it has run.
    pub costs: Vec<Option<Arc<CostCurve>>>,
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
    pub(crate) window: Option<u32>,
}

/// Pages of one class that a span takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SpanPages {
    pub(crate) class: ClassIndex,
    /// Attention blocks of equal windows: the most pages that one needs at one time, and how many there are.
    pub(crate) blocks: Vec<(u32, usize)>,
}

/// A span and its path under the present cut.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) host: HostSpan,
    pub(crate) attention: Vec<SpanAttention>,
    /// Pages that it takes, by class.
    pub(crate) pages: Vec<SpanPages>,
    pub(crate) path: Arc<Path>,
    pub(crate) hosted: bool,
    /// Sequences that have not ended.
    pub(crate) sequence_count: usize,
    /// The latest batch with rows of it, and the latest strand of that.
    pub(crate) last_batch: (BatchId, usize),
}

impl Span {
    /// Pages of each class that a sequence of so many tokens needs at one time.
    pub(crate) fn pages_for(&self, tokens: u32, page_tokens: u32) -> impl Iterator<Item = (ClassIndex, usize)> {
        let pages = tokens.div_ceil(page_tokens);
        let of_blocks = move |(most, count): &(u32, usize)| pages.min(*most) as usize * count;
        self.pages.iter().map(move |of_class| (of_class.class, of_class.blocks.iter().map(of_blocks).sum()))
    }

    /// Attention blocks within blocks [from, to) of the span, by their place in `attention`.
    pub(crate) fn attention_in(&self, from: u32, to: u32) -> std::ops::Range<usize> {
        let begin = self.attention.partition_point(|a| a.offset < from);
        let end = self.attention.partition_point(|a| a.offset < to);
        begin..end
    }
}
