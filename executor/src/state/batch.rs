//! What one step computes: rows of several sequences, perhaps of several models, through one segment.

use super::segments::{BlockIndex, SegmentIndex};

/// A sequence inside one executor, in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A batch inside one executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);

/// Where the rows of one sequence come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowInput {
    /// The segment begins with `embed`: token ids.
    Tokens(Vec<u32>),
    /// The segment begins with `embed`: one row, of the token that the device samples (or has sampled) for this sequence at
    /// position `Rows::start`, in an earlier batch. Nobody else need know it yet.
    Sampled,
    /// Hidden rows kept on the device, by slot.
    Hidden(Vec<u32>),
    /// Hidden rows that came over a link, taken from the inbox of the sequence in order.
    Link,
}

/// Where the rows of one sequence go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowOutput {
    /// Kept on the device for the next segment.
    Hidden(Vec<u32>),
    /// To the executor that owns the next span.
    Link,
    /// The segment ends with `head`; logits of the last row are sampled if set, for the token at `position`.
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
    /// Where they come from.
    pub input: RowInput,
    /// Where they go.
    pub output: RowOutput,
    /// For each attention block of the segment, the slots of pages `0..=(start + count - 1) / page_tokens`.
    pub tables: Vec<Vec<u32>>,
}

/// One step's work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// Through which segment.
    pub segment: SegmentIndex,
    /// The segment's blocks, in order.
    pub blocks: Vec<BlockIndex>,
    /// Hosted spans (models, nearly) that meet in it.
    pub span_count: usize,
    /// Rows by sequence; at most one entry a sequence.
    pub rows: Vec<Rows>,
}

impl Batch {
    /// Rows in all.
    pub fn row_count(&self) -> u32 {
        self.rows.iter().map(|rows| rows.count).sum()
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
