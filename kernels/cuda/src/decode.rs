//! Attention over bf16 pages by `kernels/cuda/attention.cu`: a cta for each row and kv head, with the bits of docs/numerics.md's rule 6. It is made for decodes, few
//! rows and long contexts; other formats and heads take `attend.cu`'s plain form.

use std::ops::Range;

use ashlar_kernels::ops::{AttentionShape, KvFormat, Query, SEGMENT_TOKENS};

use crate::Cuda;
use crate::arguments::NULL;
use crate::chunk;
use crate::driver::{Address, Argument, DriverError};
use crate::kv::Kv;

/// Warps of a cta, each with a segment of its own.
const WARPS: usize = 4;
/// Tokens of a piece, of which a page has several.
const PIECE: usize = 16;
/// With fewer ctas than this a card is not busy: rows are cut into splits, which a second kernel merges in order.
const CTAS_MIN: usize = 132;
/// Segments of a split.
const SPLIT_SEGMENTS: usize = 4;
/// What splits may leave in scratch, which is larger from the start: nothing is taken of the card while it serves.
pub(crate) const SPLIT_BYTES_MAX: usize = 32 << 20;

/// What the kernels for heads of one size and number on a kv head are called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernels {
    head_dim: usize,
    group: usize,
    /// What is defined for the unit that has them.
    define: &'static str,
    whole: &'static str,
    split: &'static str,
    merge: &'static str,
}

macro_rules! kernels {
    ($head_dim:literal, $group:literal) => {
        Kernels {
            head_dim: $head_dim,
            group: $group,
            define: concat!("HEAD=", $head_dim),
            whole: concat!("decode_d", $head_dim, "_h", $group, "_w4"),
            split: concat!("decode_split_d", $head_dim, "_h", $group, "_w4"),
            merge: concat!("decode_merge_d", $head_dim, "_h", $group),
        }
    };
}

const KERNELS: [Kernels; 7] =
    [kernels!(64, 1), kernels!(64, 3), kernels!(64, 4), kernels!(64, 7), kernels!(128, 2), kernels!(128, 4), kernels!(128, 8)];

/// All entries that may be launched, each with what is defined for its unit.
pub(crate) fn entries() -> impl Iterator<Item = (&'static str, &'static str)> {
    KERNELS.iter().flat_map(|of| [of.whole, of.split, of.merge].map(|name| (of.define, name)))
}

/// A kernel of the unit for heads of a size, if there is one.
pub(crate) fn any_of(head_dim: usize, format: KvFormat) -> Option<&'static str> {
    KERNELS.iter().find(|of| of.head_dim == head_dim && format == KvFormat::Bf16).map(|of| of.whole)
}

/// Those for a shape, if there are any and a card with so much shared memory runs them.
pub(crate) fn of(shape: &AttentionShape, shared_bytes_max: usize) -> Option<&'static Kernels> {
    let fits = |of: &&Kernels| of.head_dim == shape.kv.head_dim && of.group * shape.kv.kv_heads == shape.heads;
    KERNELS.iter().find(fits).filter(|of| shape.kv.format == KvFormat::Bf16 && of.shared_bytes() <= shared_bytes_max)
}

impl Kernels {
    /// `decode_shared_bytes` of attention.cu.
    fn shared_bytes(&self) -> usize {
        let (d, h) = (self.head_dim, self.group);
        WARPS * (SEGMENT_TOKENS * (2 * d + 16) + SEGMENT_TOKENS * 2 * d + SEGMENT_TOKENS * h * 4 + h * d * 4)
            + h * d * 4
            + 2 * WARPS * h * 4
    }

    /// Bytes of scratch that rows want: what splits leave, 0 where there are none. Rows are cut where there are too few to keep a card busy.
    pub(crate) fn scratch_bytes(&self, shape: &AttentionShape, queries: &[Query]) -> usize {
        let (segments, ctas) = (segments(queries), queries.len() * shape.kv.kv_heads);
        let bytes = split_bytes(shape, queries.len(), segments);
        if ctas < CTAS_MIN && segments > SPLIT_SEGMENTS && bytes <= SPLIT_BYTES_MAX { bytes } else { 0 }
    }

    /// Attends for rows that are taken alone. `queries_at` and `tables_at` are what `queries` are on the card, `partial` where splits may leave
    /// [`Kernels::scratch_bytes`].
    pub(crate) fn run(
        &self,
        cuda: &Cuda,
        partial: Address,
        (out, rows, kv): (Address, Address, &Kv),
        shape: &AttentionShape,
        queries: &[Query],
        at: [Address; 2],
    ) -> Result<(), DriverError> {
        let segments = segments(queries);
        if self.scratch_bytes(shape, queries) > 0 {
            return self.run_split(cuda, partial, (out, rows, kv), shape, (queries.len(), 0..segments), at);
        }
        let arguments = attend(out, (rows, kv), shape, segments, at);
        let grid = [shape.kv.kv_heads as u32, queries.len() as u32, 1];
        cuda.launch(self.whole, grid, 32 * WARPS, self.shared_bytes(), &arguments)
    }

    /// Attends for so many rows in splits, which a second kernel merges. Each row says which of its segments are in `partial` already, those before `segments` at least;
    /// that range ends with the longest row.
    pub(crate) fn run_split(
        &self,
        cuda: &Cuda,
        partial: Address,
        (out, rows, kv): (Address, Address, &Kv),
        shape: &AttentionShape,
        (row_count, segments): (usize, Range<usize>),
        at: [Address; 2],
    ) -> Result<(), DriverError> {
        let grid = [shape.kv.kv_heads as u32, row_count as u32, segments.len().div_ceil(SPLIT_SEGMENTS) as u32];
        let arguments = attend(partial, (rows, kv), shape, segments.end, at);
        cuda.launch(self.split, grid, 32 * WARPS, self.shared_bytes(), &arguments)?;
        let merged = [partial.into(), NULL, out.into(), words(shape, segments.end, at[0])];
        cuda.launch(self.merge, [shape.heads as u32, row_count as u32, 1], self.head_dim, 0, &merged)
    }
}

/// Arguments of the kernels that attend.
fn attend(
    to: Address,
    (rows, kv): (Address, &Kv),
    shape: &AttentionShape,
    segments: usize,
    [queries, tables]: [Address; 2],
) -> [Argument; 7] {
    let [keys, values, ..] = kv.sections().map(Argument::Address);
    [rows.into(), keys, values, tables.into(), NULL, to.into(), words(shape, segments, queries)]
}

/// `DecodeShape` of attention.cu.
fn words(shape: &AttentionShape, segments: usize, queries_at: Address) -> Argument {
    let words = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Argument::Words([
        words(shape.kv.kv_heads as u32, (segments * SEGMENT_TOKENS / PIECE) as u32),
        words(chunk::window(shape).cast_unsigned(), shape.scale.to_bits()),
        words(shape.softcap.unwrap_or(0.0).to_bits(), SPLIT_SEGMENTS as u32),
        words((shape.kv.page_tokens / PIECE) as u32, shape.qkv_width() as u32),
        queries_at.0,
    ])
}

/// What splits of rows leave: for each row, head and segment an output, m and l.
pub(crate) fn split_bytes(shape: &AttentionShape, rows: usize, segments: usize) -> usize {
    rows * shape.heads * segments * (shape.kv.head_dim + 2) * size_of::<f32>()
}

/// Segments of the longest row.
pub(crate) fn segments<'a>(queries: impl IntoIterator<Item = &'a Query>) -> usize {
    queries.into_iter().map(|query| query.position as usize / SEGMENT_TOKENS + 1).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::ops::KvShape;

    use super::*;

    #[test]
    fn few_long_rows_are_cut_and_never_beyond_scratch() {
        let kv = KvShape { kv_heads: 8, head_dim: 128, page_tokens: 32, format: KvFormat::Bf16 };
        let shape = AttentionShape { heads: 64, kv, scale: 1.0, softcap: None, window: None };
        let kernels = of(&shape, 227 << 10).unwrap();
        let bytes = |rows: usize, position: u32| kernels.scratch_bytes(&shape, &vec![Query { table_start: 0, position }; rows]);
        assert_eq!((bytes(1, 255), bytes(17, 4095)), (0, 0), "four segments, and enough ctas");
        assert_eq!(bytes(1, 320), 8 * 6 * 8 * 130 * 4);
        assert_eq!(bytes(16, 131_071), 0, "two thousand segments of sixteen rows would be a gigabyte");
        assert!(of(&shape, 99 << 10).is_none(), "a card with less shared memory takes the plain form");
    }
}
