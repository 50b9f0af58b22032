//! Softmax attention over pages: docs/numerics.md, rule 6.
//!
//! A query row takes the keys segment by segment (64 tokens, aligned to absolute positions) and merges the segments in
//! order, so its bits depend on its own position and its pages alone. What is shared is only the reading: a tile of
//! (row, head)s of one kv head goes through the segments one by one, and those whose tables name the same pages in a
//! segment take them from the first cache and from registers. So it does not matter to a bit which rows meet in a tile;
//! `tiles` brings those together that share. Nor which thread takes which segments: with few rows several threads share
//! the segments of one, and who is last merges. Decode is limited by the bytes of K and V, a chunk by fma throughput.

use std::marker::PhantomData;
use std::ops::Range;

use super::blend::{Step, blend_all};
use super::isa::Kernel;
use super::kv::{Kv, Piece, Stored};
use super::lanes::Lanes;
use super::memory::Shared;
use super::scores::{products, weigh};
use super::segments::{Parts, Running, divide, merge};
use crate::ops::{AttentionShape, PIECE_TOKENS, Query, SEGMENT_TOKENS};

/// (row, head)s of a tile at most: their q and outputs stay in the first cache beside a block of K and V.
pub(super) const TILE: usize = 32;

/// One call's inputs and outputs.
pub(super) struct Attention<'a> {
    /// `[T, H*d]`.
    pub(super) out: Shared<'a, f32>,
    /// `[T, qkv_width]`.
    pub(super) qkv: &'a [f32],
    pub(super) kv: &'a Kv,
    pub(super) shape: &'a AttentionShape,
    /// `[T]`.
    pub(super) queries: &'a [Query],
    pub(super) tables: &'a [u32],
}

/// Query heads `heads` (of one kv head, or all heads of some) of the rows in `rows`, at most [`TILE`] together. `T` is what the
/// pages hold.
pub(super) struct Attend<'a, T> {
    pub(super) attention: &'a Attention<'a>,
    pub(super) rows: &'a [u32],
    pub(super) heads: Range<usize>,
    /// The segments to take: all that the rows see, or a part of them if others take the rest.
    pub(super) segments: Range<usize>,
    /// Where each segment goes if others take the rest.
    pub(super) parts: Option<Parts<'a>>,
    /// Row, kv head and segment that this thread takes next, probably: its keys are asked for at the end.
    pub(super) next: Option<(u32, usize, usize)>,
    pub(super) stored: PhantomData<T>,
}

impl<T: Stored> Kernel for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        assert!(self.rows.len() * self.heads.len() <= TILE, "{} rows of {} heads", self.rows.len(), self.heads.len());
        assert_eq!(self.attention.kv.shape.format, T::FORMAT, "pages hold what is read");
        let count = self.rows.len() * self.heads.len();
        let mut walkers = [Walker { place: 0, q: 0, seen: (0, 0), running: Running::NONE }; TILE];
        for (of_row, &row) in walkers.chunks_mut(self.heads.len()).zip(self.rows) {
            let seen = seen(self.attention.queries[row as usize], self.attention.shape.window);
            for (walker, head) in of_row.iter_mut().zip(self.heads.clone()) {
                walker.place = row as usize * self.attention.shape.heads + head;
                walker.q = row as usize * self.attention.shape.qkv_width() + head * self.attention.shape.kv.head_dim;
                walker.seen = (seen.start, seen.end);
            }
        }
        if self.parts.is_none() {
            walkers[..count].iter().for_each(|walker| self.out(walker).fill(0.0));
        }
        let group = self.attention.shape.heads / self.attention.shape.kv.kv_heads;
        let kv_heads = self.heads.start / group..self.heads.end.div_ceil(group);
        for segment in self.segments.clone() {
            let at = self.at(segment);
            // The heads of a page lie one after another.
            for kv_head in kv_heads.clone() {
                let ahead = if kv_head + 1 < kv_heads.end {
                    self.keys(self.rows[0], segment, kv_head + 1)
                } else if segment + 1 < self.segments.end {
                    self.keys(self.rows[0], segment + 1, kv_heads.start)
                } else if let Some((row, kv_head, segment)) = self.next {
                    self.keys(row, segment, kv_head)
                } else {
                    [&[] as &[_]; PIECES]
                };
                let heads = (kv_head * group).max(self.heads.start)..((kv_head + 1) * group).min(self.heads.end);
                let heads = heads.start - self.heads.start..heads.end - self.heads.start;
                let mut row = 0;
                while row < self.rows.len() {
                    row = self.segment(s, segment, &at, kv_head, heads.clone(), row, &ahead, &mut walkers);
                }
            }
        }
        if self.parts.is_none() {
            for walker in &walkers[..count] {
                divide(s, self.out(walker), walker.running.sum);
            }
        }
    }
}

/// A row of the tile with one of its heads.
#[derive(Clone, Copy)]
struct Walker {
    /// Its number among all rows and heads of the call.
    place: usize,
    /// Where its q begins.
    q: usize,
    /// The first position that it sees, and the first after those.
    seen: (usize, usize),
    running: Running,
}

/// Positions that a query sees.
#[inline(always)]
pub(super) fn seen(query: Query, window: Option<u32>) -> Range<usize> {
    let end = query.position as usize + 1;
    window.map_or(0, |window| end.saturating_sub(window as usize))..end
}

/// The segments that hold positions `seen`.
#[inline(always)]
pub(super) fn segments(seen: Range<usize>) -> Range<usize> {
    seen.start / SEGMENT_TOKENS..seen.end.div_ceil(SEGMENT_TOKENS)
}

/// The part of `range` in `count` tokens from `base` on, counted from there; empty as `0..0`.
#[inline(always)]
pub(super) fn within(range: &Range<usize>, base: usize, count: usize) -> Range<usize> {
    let (start, end) = (range.start.saturating_sub(base), range.end.saturating_sub(base).min(count));
    if start < end { start..end } else { 0..0 }
}

impl<'a, T: Stored> Attend<'a, T> {
    /// Output of a walker.
    #[inline(always)]
    fn out(&self, walker: &Walker) -> &'a mut [f32] {
        let d = self.attention.shape.kv.head_dim;
        // SAFETY: tiles have disjoint (row, head)s, a tile is one thread's, and it takes an output for one use at a time:
        // in `run`, or in `group`, whose walkers differ.
        unsafe { self.attention.out.part(walker.place * d..(walker.place + 1) * d) }
    }

    /// Where the pieces of a segment are, in any table.
    #[inline(always)]
    fn at(&self, segment: usize) -> [At; PIECES] {
        let page_tokens = self.attention.shape.kv.page_tokens;
        let token = segment * SEGMENT_TOKENS;
        let mut next = At { page: token / page_tokens, piece: token % page_tokens / PIECE_TOKENS };
        let mut at = [next; PIECES];
        for at in &mut at {
            *at = next;
            next.piece += 1;
            if next.piece * PIECE_TOKENS == page_tokens {
                next = At { page: next.page + 1, piece: 0 };
            }
        }
        at
    }

    /// The slots of a segment's pieces, as far as a row that sees `seen` does; else [`UNSEEN`].
    #[inline(always)]
    fn slots(&self, table_start: u32, seen: (usize, usize), segment: usize, at: &[At; PIECES]) -> [u32; PIECES] {
        let mut slots = [UNSEEN; PIECES];
        for b in 0..PIECES {
            let token = segment * SEGMENT_TOKENS + b * PIECE_TOKENS;
            if token < seen.1 && token + PIECE_TOKENS > seen.0 {
                slots[b] = self.attention.tables[table_start as usize + at[b].page];
            }
        }
        slots
    }

    /// Pieces of a segment in these slots.
    #[inline(always)]
    fn pieces(&self, slots: [u32; PIECES], at: &[At; PIECES], kv_head: usize) -> [Piece<'a, T>; PIECES] {
        let mut pieces = [Piece::NONE; PIECES];
        for b in 0..PIECES {
            if slots[b] != UNSEEN {
                pieces[b] = self.attention.kv.piece::<T>(slots[b], kv_head, at[b].piece);
            }
        }
        pieces
    }

    /// The keys of a segment as far as a row sees it, to be asked for.
    #[inline(always)]
    fn keys(&self, row: u32, segment: usize, kv_head: usize) -> Ahead<'a, T> {
        let (query, at) = (self.attention.queries[row as usize], self.at(segment));
        let seen = seen(query, self.attention.shape.window);
        let pieces = self.pieces(self.slots(query.table_start, (seen.start, seen.end), segment, &at), &at, kv_head);
        [pieces[0].keys, pieces[1].keys, pieces[2].keys, pieces[3].keys]
    }

    /// Takes one segment of a kv head into `heads` (counted from the tile's first) of the rows from `row` on, as far as they agree
    /// in its pages. Returns the first row beyond.
    #[inline(always)]
    fn segment<S: Lanes>(
        &self,
        s: S,
        segment: usize,
        at: &[At; PIECES],
        kv_head: usize,
        heads: Range<usize>,
        row: usize,
        ahead: &Ahead<'a, T>,
        walkers: &mut [Walker; TILE],
    ) -> usize {
        let mut slots = [UNSEEN; PIECES];
        let mut seeing = [0; TILE];
        let (mut count, mut end) = (0, row);
        while end < self.rows.len() {
            let table_start = self.attention.queries[self.rows[end] as usize].table_start;
            let own = self.slots(table_start, walkers[end * self.heads.len()].seen, segment, at);
            let mut agrees = true;
            for b in 0..PIECES {
                agrees &= own[b] == UNSEEN || slots[b] == UNSEEN || own[b] == slots[b];
            }
            if !agrees {
                break;
            }
            let mut sees = false;
            for b in 0..PIECES {
                sees |= own[b] != UNSEEN;
                slots[b] = if own[b] == UNSEEN { slots[b] } else { own[b] };
            }
            if sees {
                for head in heads.clone() {
                    seeing[count] = end * self.heads.len() + head;
                    count += 1;
                }
            }
            end += 1;
        }
        if count == 0 {
            return end;
        }
        let pieces = self.pieces(slots, at, kv_head);
        // Whoever comes first asks for what is read next: the processor's own prefetchers stop at each 4 KiB.
        let mut ahead = Some(ahead);
        let mut left = &seeing[..count];
        while left.len() >= 4 {
            left = self.first::<S, 4>(s, segment, left, &pieces, ahead.take(), walkers);
        }
        match left.len() {
            3 => left = self.first::<S, 3>(s, segment, left, &pieces, ahead, walkers),
            2 => left = self.first::<S, 2>(s, segment, left, &pieces, ahead, walkers),
            1 => left = self.first::<S, 1>(s, segment, left, &pieces, ahead, walkers),
            _ => {}
        }
        debug_assert!(left.is_empty(), "all walkers have been taken");
        end
    }

    /// Takes one segment's pieces into the outputs of the first G of these walkers; the others.
    #[inline(always)]
    fn first<'t, S: Lanes, const G: usize>(
        &self,
        s: S,
        segment: usize,
        of_tile: &'t [usize],
        pieces: &[Piece<'a, T>; PIECES],
        ahead: Option<&Ahead<'a, T>>,
        walkers: &mut [Walker; TILE],
    ) -> &'t [usize] {
        let (first, left) = of_tile.split_first_chunk::<G>().expect("there are as many");
        self.group(s, segment, first, pieces, ahead, walkers);
        left
    }

    /// As [`Attend::first`], of exactly G walkers.
    #[inline(always)]
    fn group<S: Lanes, const G: usize>(
        &self,
        s: S,
        segment: usize,
        of_tile: &[usize; G],
        pieces: &[Piece<'a, T>; PIECES],
        ahead: Option<&Ahead<'a, T>>,
        walkers: &mut [Walker; TILE],
    ) {
        let d = self.attention.shape.kv.head_dim;
        let mut q = [&self.attention.qkv[..0]; G];
        let mut step = Step { weights: [[0.0; SEGMENT_TOKENS]; G], seen: [const { 0..0 }; G] };
        for g in 0..G {
            let walker = &walkers[of_tile[g]];
            q[g] = &self.attention.qkv[walker.q..walker.q + d];
            step.seen[g] = within(&(walker.seen.0..walker.seen.1), segment * SEGMENT_TOKENS, SEGMENT_TOKENS);
        }
        let mut scores = [[s.splat(0.0); PIECES]; G];
        let (mut count, mut some) = (0, pieces[0]);
        for piece in pieces {
            if !piece.keys.is_empty() {
                (count, some) = (count + 1, *piece);
            }
        }
        if S::WIDE && count > 1 {
            // Fewer than all have too few chains of sums to be faster alone: where a piece is not there another is taken, for nothing.
            let mut together = *pieces;
            for piece in &mut together {
                if piece.keys.is_empty() {
                    *piece = some;
                }
            }
            scores = products::<S, T, G, PIECES>(s, q, &together, ahead.is_some());
        } else {
            for b in 0..PIECES {
                if !pieces[b].keys.is_empty() {
                    let one = products::<S, T, G, 1>(s, q, &[pieces[b]], ahead.is_some());
                    for g in 0..G {
                        scores[g][b] = one[g][0];
                    }
                }
            }
        }
        let of_segment = weigh(s, self.attention.shape, scores, pieces, &step.seen, &mut step.weights);

        let mut out = [const { [].as_mut_slice() }; G];
        let mut factors = [[0.0, 1.0]; G];
        if let Some(parts) = self.parts {
            for g in 0..G {
                // SAFETY: tiles have disjoint (row, head)s, walkers of a group differ, and one thread takes a segment of a tile.
                let (values, rest) = unsafe { parts.part(d, walkers[of_tile[g]].place, segment) };
                // Adding 0 would turn a sum of -0, of products too small for f32, into +0.
                values.fill(-0.0);
                (rest[0], rest[1]) = (of_segment[g].max, of_segment[g].sum);
                out[g] = values;
            }
        } else {
            let mut own = [Running::NONE; G];
            for g in 0..G {
                own[g] = walkers[of_tile[g]].running;
                out[g] = self.out(&walkers[of_tile[g]]);
            }
            factors = merge(s, own.each_mut(), of_segment);
            for g in 0..G {
                walkers[of_tile[g]].running = own[g];
            }
        }
        blend_all::<S, T, G>(s, out, &step, factors, pieces, ahead);
    }
}

/// A piece in a sequence's pages.
#[derive(Clone, Copy)]
struct At {
    /// Index in the page table.
    page: usize,
    /// Within the page.
    piece: usize,
}

/// Keys of the pieces of a segment that will be read; empty where there are none.
pub(super) type Ahead<'a, T> = [&'a [[T; PIECE_TOKENS]]; PIECES];

/// Pieces of a segment: their chains of fma are independent.
pub(super) const PIECES: usize = SEGMENT_TOKENS / PIECE_TOKENS;

/// No slot: the row does not see the piece.
const UNSEEN: u32 = u32::MAX;
