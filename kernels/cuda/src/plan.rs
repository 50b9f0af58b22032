//! In which order the rows of a call of attention are taken, and which of them together. Bits do not depend on it (docs/numerics.md, rule 6): it is a question of
//! speed alone.

use std::cmp::Reverse;
use std::ops::Range;

use ashlar_kernels::ops::{AttentionShape, Query, SEGMENT_TOKENS};

use crate::chunk::{LINES, group};
use crate::decode::{SPLIT_BYTES_MAX, segments, split_bytes};
use crate::shared;

/// Rows that are taken together at least, and (row, head)s: with fewer a tile computes more in vain than it saves of reading. To be tuned on a card.
const ROWS_MIN: usize = 4;
const LINES_MIN: usize = 16;
/// Words of a query, as attend.cu has them, and of a tile, as chunk.cu has it.
const QUERY_WORDS: usize = 4;
const TILE_WORDS: usize = 8;

/// What is taken together, where there are kernels for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Together {
    Nothing,
    Chunks,
    ChunksAndPrefixes,
}

/// Rows that share prefixes, as many as scratch holds the segments of.
#[derive(Debug)]
pub(crate) struct Pass {
    /// Of the plan's queries.
    pub(crate) rows: Range<usize>,
    /// Of the plan's tiles; they count rows from the pass's first.
    pub(crate) tiles: Range<usize>,
    /// Segments that are shared, at least and at most.
    pub(crate) shared: Range<usize>,
    /// Of the longest row.
    pub(crate) segments: usize,
}

/// The rows of a call in the order in which they are taken: those of tiles, those of passes, those that are taken alone.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Four words a row, as attend.cu has them.
    pub(crate) queries: Vec<u32>,
    /// Eight words each, `Tile` of chunk.cu: those that take all that their rows see, the longest first, so that no cta is left with one in the end; then those of passes.
    pub(crate) tiles: Vec<u32>,
    pub(crate) whole_tiles: usize,
    pub(crate) passes: Vec<Pass>,
    /// Those that are taken alone.
    pub(crate) alone: Vec<Query>,
}

impl Plan {
    pub(crate) fn of(shape: &AttentionShape, queries: &[Query], tables: &[u32], together: Together) -> Self {
        let (mut plan, mut tiles, mut alone, mut row) = (Self::default(), Vec::new(), Vec::new(), 0);
        // Under a window positions must follow each other: what lies between the windows of two others may be no page.
        let alike = |a: &Query, b: &Query| a.table_start == b.table_start && (shape.window.is_none() || a.position + 1 == b.position);
        for run in queries.chunk_by(alike) {
            let run: Vec<(Query, u32)> = run.iter().copied().zip(row..).collect();
            row += run.len() as u32;
            if together == Together::Nothing || !is_enough(shape, run.len()) {
                alone.extend(run);
                continue;
            }
            for rows in evenly(shape, &run) {
                tiles.push(tile(shape, plan.rows(), rows));
                plan.push(rows, 0);
            }
        }
        tiles.sort_by_key(|[_, _, begin, end, ..]| Reverse(end - begin));
        plan.whole_tiles = tiles.len();
        plan.tiles = tiles.concat();
        if together == Together::ChunksAndPrefixes && shape.window.is_none() && is_enough(shape, alone.len()) {
            alone = plan.share(shape, &alone, tables);
        }
        plan.push(&alone, 0);
        plan.alone = alone.into_iter().map(|(query, _)| query).collect();
        plan
    }

    /// Rows that share prefixes become passes; gives the others back.
    fn share(&mut self, shape: &AttentionShape, alone: &[(Query, u32)], tables: &[u32]) -> Vec<(Query, u32)> {
        let queries: Vec<Query> = alone.iter().map(|(query, _)| *query).collect();
        let mut shares = vec![false; alone.len()];
        for shared in shared::prefixes(&queries, tables, shape.kv.page_tokens) {
            let members: Vec<(Query, u32)> = shared.rows.iter().map(|place| alone[*place]).collect();
            let longest = segments(members.iter().map(|(query, _)| query));
            let fits = |rows: usize, segments: usize| split_bytes(shape, rows, segments) <= SPLIT_BYTES_MAX;
            if !is_enough(shape, members.len()) || !fits(LINES / group(shape), longest) {
                continue;
            }
            shared.rows.iter().for_each(|place| shares[*place] = true);
            for rows in evenly(shape, &members) {
                let open = self.passes.last().filter(|pass| fits(pass.rows.len() + rows.len(), pass.segments.max(longest)));
                if open.is_none() {
                    let (rows, tiles) = (self.rows(), self.tiles.len() / TILE_WORDS);
                    self.passes.push(Pass { rows: rows..rows, tiles: tiles..tiles, shared: shared.segments..shared.segments, segments: 0 });
                }
                let pass = self.passes.last_mut().expect("one was pushed where none was open");
                let [first, count, ..] = tile(shape, pass.rows.len(), rows);
                let (end, to) = (shared.segments, shared.segments * SEGMENT_TOKENS);
                let all_to = rows.iter().map(|(query, _)| query.position as usize + 1).min().unwrap_or(0).min(to);
                self.tiles.extend([first, count, 0, end as u32, 0, to as u32, 0, all_to as u32]);
                pass.rows.end += rows.len();
                pass.tiles.end += 1;
                pass.shared = pass.shared.start.min(end)..pass.shared.end.max(end);
                pass.segments = pass.segments.max(longest);
                self.push(rows, end as u32);
            }
        }
        std::iter::zip(alone, shares).filter(|(_, shares)| !shares).map(|(row, _)| *row).collect()
    }

    fn push(&mut self, rows: &[(Query, u32)], alone_from: u32) {
        self.queries.extend(rows.iter().flat_map(|(query, row)| [query.table_start, query.position, *row, alone_from]));
    }

    /// Rows that were pushed.
    fn rows(&self) -> usize {
        self.queries.len() / QUERY_WORDS
    }

    /// Where those begin that are taken alone.
    pub(crate) fn first_alone(&self) -> usize {
        self.rows() - self.alone.len()
    }

    /// Bytes of scratch that passes want.
    pub(crate) fn scratch_bytes(&self, shape: &AttentionShape) -> usize {
        self.passes.iter().map(|pass| split_bytes(shape, pass.rows.len(), pass.segments)).max().unwrap_or(0)
    }
}

/// Bytes before a query.
pub(crate) fn query_bytes(queries: usize) -> usize {
    queries * QUERY_WORDS * size_of::<u32>()
}

/// Bytes before a tile.
pub(crate) fn tile_bytes(tiles: usize) -> usize {
    tiles * TILE_WORDS * size_of::<u32>()
}

fn is_enough(shape: &AttentionShape, rows: usize) -> bool {
    rows >= ROWS_MIN && rows * group(shape) >= LINES_MIN
}

/// In as few tiles as hold the rows, as even as they can be.
fn evenly<'a>(shape: &AttentionShape, rows: &'a [(Query, u32)]) -> std::slice::Chunks<'a, (Query, u32)> {
    let count = rows.len().div_ceil(LINES / group(shape));
    rows.chunks(rows.len().div_ceil(count))
}

/// Rows of one table, of which the kernel finds the first at `first`.
fn tile(shape: &AttentionShape, first: usize, rows: &[(Query, u32)]) -> [u32; TILE_WORDS] {
    let bounds = |of: &dyn Fn(u32) -> u32| {
        rows.iter().map(|(query, _)| of(query.position)).fold((u32::MAX, 0), |(least, most), value| (least.min(value), most.max(value)))
    };
    let first_seen = |position: u32| shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let ((from, all_from), (all_to, to)) = (bounds(&first_seen), bounds(&|position| position + 1));
    let segment = SEGMENT_TOKENS as u32;
    [first as u32, rows.len() as u32, from / segment, to.div_ceil(segment), from, to, all_from, all_to]
}

#[cfg(test)]
mod tests {
    use ashlar_kernels::ops::{KvFormat, KvShape};

    use super::*;

    fn shape(window: Option<u32>) -> AttentionShape {
        let kv = KvShape { kv_heads: 2, head_dim: 64, page_tokens: 64, format: KvFormat::Bf16 };
        AttentionShape { heads: 8, kv, scale: 1.0, softcap: None, window }
    }

    fn rows(table_start: u32, positions: Range<u32>) -> impl Iterator<Item = Query> {
        positions.map(move |position| Query { table_start, position })
    }

    #[test]
    fn rows_of_a_chunk_are_even_tiles_and_decodes_stay_alone() {
        let queries: Vec<Query> = rows(0, 9..10).chain(rows(1, 60..77)).chain(rows(9, 0..3)).chain(rows(20, 200..204)).collect();
        let plan = Plan::of(&shape(None), &queries, &[0; 24], Together::Chunks);
        let tiles = [[17, 4, 0, 4, 0, 204, 0, 201], [0, 9, 0, 2, 0, 69, 0, 61], [9, 8, 0, 2, 0, 77, 0, 70]];
        assert_eq!(plan.tiles, tiles.concat(), "seventeen rows of four heads are two tiles; the longest is first");
        let order: Vec<u32> = plan.queries.chunks(4).map(|query| query[2]).collect();
        assert_eq!(order, (1..18).chain(21..25).chain([0, 18, 19, 20]).collect::<Vec<u32>>());
        assert_eq!((plan.alone.len(), plan.first_alone(), plan.passes.len()), (4, 21, 0));
        let windowed = Plan::of(&shape(Some(70)), &queries, &[0; 24], Together::Chunks);
        assert_eq!(windowed.tiles[16..], [17, 4, 2, 4, 131, 204, 134, 201], "begins with the segment that its first row sees");
        let nothing = Plan::of(&shape(None), &queries, &[0; 24], Together::Nothing);
        assert_eq!((nothing.tiles.len(), nothing.alone.len()), (0, queries.len()));
    }

    #[test]
    fn under_a_window_rows_are_together_only_if_no_page_between_them_may_be_missing() {
        let queries: Vec<Query> = rows(0, 0..4).chain(rows(0, 300..304)).collect();
        let counts = [None, Some(8)].map(|window| Plan::of(&shape(window), &queries, &[0; 5], Together::Chunks).whole_tiles);
        assert_eq!(counts, [1, 2]);
    }

    #[test]
    fn prefixes_are_passes_that_scratch_holds() {
        // Forty rows of 400 tokens, of which 256 are shared, and one row apart.
        let queries: Vec<Query> = (0..41).map(|row| Query { table_start: 7 * row, position: 400 }).collect();
        let tables: Vec<u32> =
            (0..41).flat_map(|row| [0, 1, 2, 3, 10 + row, 60 + row, 0].map(|slot| slot + if row == 40 { 200 } else { 0 })).collect();
        let plan = Plan::of(&shape(None), &queries, &tables, Together::ChunksAndPrefixes);
        let [pass] = &plan.passes[..] else { panic!("{} passes", plan.passes.len()) };
        assert_eq!((pass.rows.clone(), pass.tiles.clone(), pass.shared.clone(), pass.segments), (0..40, 0..3, 4..4, 7));
        assert_eq!(plan.tiles[8..16], [14, 14, 0, 4, 0, 256, 0, 256]);
        assert_eq!((plan.alone.len(), plan.queries[3], plan.queries[40 * 4 + 3]), (1, 4, 0));
        assert!(plan.scratch_bytes(&shape(None)) <= SPLIT_BYTES_MAX);
        // Longer ones: sixteen rows of two hundred segments are a pass.
        let long: Vec<Query> =
            queries.iter().take(40).map(|query| Query { table_start: 0, position: 30_000 + query.table_start }).collect();
        let apart: Vec<Query> = (0..40).map(|row| Query { table_start: 500 * row, ..long[row as usize] }).collect();
        let tables: Vec<u32> = (0..40).flat_map(|_| 0..500).collect();
        let plan = Plan::of(&shape(None), &apart, &tables, Together::ChunksAndPrefixes);
        assert!(plan.passes.len() > 1 && plan.scratch_bytes(&shape(None)) <= SPLIT_BYTES_MAX, "{} passes", plan.passes.len());
        assert_eq!(plan.alone.len(), 0);
        let windowed = Plan::of(&shape(Some(1000)), &apart, &tables, Together::ChunksAndPrefixes);
        assert_eq!((windowed.passes.len(), windowed.alone.len()), (0, 40));
    }
}
