//! What one step computes: rows of several sequences, perhaps of several models, through one segment, or through several that are alike, abreast.
//! A batch says what is new only: the device keeps each sequence's page tables and is told what is appended to them.

use std::ops::Range;
use std::sync::Arc;

use super::segments::{BlockIndex, SegmentIndex};
use super::sequence::SpanIndex;

/// A sequence inside one executor, in order of arrival. Its low bits are its place among those that are known at one time, so
/// that nobody has to search for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

impl SequenceId {
    /// Sequences that may be known at one time.
    pub const PLACES_MAX: usize = 1 << 20;
    /// Below and above all, for ranges.
    pub(crate) const LEAST: Self = Self(0);
    pub(crate) const MOST: Self = Self(u64::MAX);

    /// The id of the `number`th sequence to arrive, at `place`.
    pub(crate) fn new(number: u64, place: usize) -> Self {
        assert!(place < Self::PLACES_MAX, "limits are checked at start");
        Self(number << 20 | place as u64)
    }

    /// Its place: below the number of sequences that are known at one time, and taken by another one when it has ended.
    pub fn place(self) -> usize {
        (self.0 & (Self::PLACES_MAX as u64 - 1)) as usize
    }
}

/// An entry of a page table for a page that is not there, as it lies behind the window of its block. The sequence had it once, or never
/// did: it began behind it.
pub const NO_PAGE: u32 = u32::MAX;

/// A batch inside one executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);

/// Where the rows of one sequence come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowInput {
    /// The batch begins with `embed`: these of [`Batch::tokens`].
    Tokens(Range<u32>),
    /// The batch begins with `embed`: one row, of the token that the device samples (or has sampled) for this sequence at
    /// position `Rows::start`, in an earlier batch. Nobody else need know it yet.
    Sampled,
    /// Hidden rows kept on the device, in these of [`Batch::slots`].
    Hidden(Range<u32>),
    /// Hidden rows that came over a link, taken from the inbox of the sequence in order.
    Link,
}

/// Where the rows of one sequence go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowOutput {
    /// Kept on the device for the next segment, in these of [`Batch::slots`].
    Hidden(Range<u32>),
    /// To the executor that owns the next span.
    Link,
    /// The batch ends with `head`; logits of the last row are sampled if set, for the token at `position`.
    Sample(Option<u32>),
}

/// Consecutive tokens of one sequence in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    /// Whose.
    pub sequence: SequenceId,
    /// Position of the first.
    pub start: u32,
    /// How many, at least one.
    pub count: u32,
    /// The span of the sequence, and where in it the batch's first block is: what adapters its blocks have there.
    pub span: SpanIndex,
    /// See `span`.
    pub block_from: u32,
    /// The batch's first attention block, counted among the attention blocks of the sequence's span.
    pub attention_from: u32,
    /// Where they come from.
    pub input: RowInput,
    /// Where they go.
    pub output: RowOutput,
}

/// What is new in the page tables of one sequence. The tables have an entry a page, for each attention block of the sequence's span;
/// what they had from `page` on is forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableUpdate {
    /// Whose.
    pub sequence: SequenceId,
    /// First attention block, counted among those of the sequence's span.
    pub attention_from: u32,
    /// Attention blocks.
    pub attention_count: u32,
    /// First page.
    pub page: u32,
    /// The entries in [`Batch::table_slots`]: page after page, in each one block after another; [`NO_PAGE`] where a block looks back less
    /// far.
    pub slots: Range<u32>,
}

/// Rows of a batch that run through the same blocks. Where a batch has several strands, their blocks are alike place by place
/// ([`HostSpan::forms`](super::span::HostSpan::forms)), and a device computes those of one place in one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Strand {
    /// Through which segments, one after another: these of [`Batch::segments`].
    pub segments: Range<u32>,
    /// Their blocks, in order.
    pub blocks: Arc<[BlockIndex]>,
    /// Whose rows: these of [`Batch::rows`].
    pub rows: Range<u32>,
    /// Rows in all.
    pub row_count: u32,
    /// Hosted spans (models, nearly) that meet in it.
    pub span_count: usize,
}

/// One step's work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// What runs abreast, at least one.
    pub strands: Vec<Strand>,
    /// Segments that `strands` name.
    pub segments: Vec<SegmentIndex>,
    /// Hosted spans (models, nearly) that it has rows of.
    pub span_count: usize,
    /// Rows by sequence, strand after strand; at most one entry a sequence.
    pub rows: Vec<Rows>,
    /// Rows in all.
    pub row_count: u32,
    /// Token ids that `rows` name.
    pub tokens: Vec<u32>,
    /// Slots of hidden rows that `rows` name.
    pub slots: Vec<u32>,
    /// Changes of page tables, to be made before the rows are computed.
    pub tables: Vec<TableUpdate>,
    /// Slots of pages that `tables` name.
    pub table_slots: Vec<u32>,
}

impl Batch {
    /// An empty batch, in the memory of a spare one if there is any.
    pub(crate) fn reuse(spare: Option<Self>, id: BatchId) -> Self {
        fn emptied<T>(mut values: Vec<T>) -> Vec<T> {
            values.clear();
            values
        }
        let Some(spare) = spare else {
            let (strands, segments, rows) = (Vec::new(), Vec::new(), Vec::new());
            let (tokens, slots, tables, table_slots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            return Self { id, strands, segments, span_count: 0, rows, row_count: 0, tokens, slots, tables, table_slots };
        };
        Self {
            id,
            strands: emptied(spare.strands),
            segments: emptied(spare.segments),
            span_count: 0,
            rows: emptied(spare.rows),
            row_count: 0,
            tokens: emptied(spare.tokens),
            slots: emptied(spare.slots),
            tables: emptied(spare.tables),
            table_slots: emptied(spare.table_slots),
        }
    }

    /// The strands, each with its rows.
    pub fn strands(&self) -> impl Iterator<Item = (&Strand, &[Rows])> {
        self.strands.iter().map(|strand| (strand, &self.rows[strand.rows.start as usize..strand.rows.end as usize]))
    }

    /// The segments of a strand.
    pub fn segments_of(&self, strand: &Strand) -> &[SegmentIndex] {
        &self.segments[strand.segments.start as usize..strand.segments.end as usize]
    }

    /// Those of `slots` in a range.
    pub fn slots_in(&self, range: &Range<u32>) -> &[u32] {
        &self.slots[range.start as usize..range.end as usize]
    }

    /// Those of `tokens` in a range.
    pub fn tokens_in(&self, range: &Range<u32>) -> &[u32] {
        &self.tokens[range.start as usize..range.end as usize]
    }

    /// The page table entries of an update: for each page, one for each attention block.
    pub fn table_in(&self, update: &TableUpdate) -> impl Iterator<Item = &[u32]> {
        self.table_slots[update.slots.start as usize..update.slots.end as usize].chunks(update.attention_count as usize)
    }
}

/// What was sampled for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// For whom.
    pub sequence: SequenceId,
    /// Position of the token.
    pub position: u32,
    /// The token, or why there is none (logits that are not numbers).
    pub token: Result<SampledToken, String>,
}

/// A sampled token with what the client asked to know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Token id.
    pub token: u32,
    /// Its log probability.
    pub logprob: f32,
    /// The most likely tokens, if asked for.
    pub top: Vec<(u32, f32)>,
}
