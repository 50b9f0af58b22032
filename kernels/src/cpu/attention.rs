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

use super::isa::Kernel;
use super::kv::{Kv, Piece, Stored};
use super::lanes::{Lanes, load_some, store_some};
use super::math;
use super::memory::Shared;
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

/// Query heads `heads` (all of one kv head) of the rows in `rows`, at most [`TILE`] together. `T` is what the pages hold.
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
        let mut running = [Running::NONE; TILE];
        let walkers = self.rows.len() * self.heads.len();
        if self.parts.is_none() {
            (0..walkers).for_each(|w| self.out(w).fill(0.0));
        }
        for segment in self.segments.clone() {
            let ahead = if segment + 1 < self.segments.end {
                self.keys(self.rows[0], segment + 1, self.kv_head())
            } else if let Some((row, kv_head, segment)) = self.next {
                self.keys(row, segment, kv_head)
            } else {
                [&[] as &[_]; PIECES]
            };
            let mut row = 0;
            while row < self.rows.len() {
                row = self.segment(s, segment, row, &ahead, &mut running);
            }
        }
        if self.parts.is_none() {
            for (w, running) in running[..walkers].iter().enumerate() {
                divide(s, self.out(w), running.sum);
            }
        }
    }
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
fn within(range: &Range<usize>, base: usize, count: usize) -> Range<usize> {
    let (start, end) = (range.start.saturating_sub(base), range.end.saturating_sub(base).min(count));
    if start < end { start..end } else { 0..0 }
}

impl<'a, T: Stored> Attend<'a, T> {
    /// Number of walker `w`, row `w / heads` of the tile and head `w % heads`, among all rows and heads of the call.
    #[inline(always)]
    fn place(&self, w: usize) -> usize {
        let (row, head) = (self.rows[w / self.heads.len()] as usize, self.heads.start + w % self.heads.len());
        row * self.attention.shape.heads + head
    }

    /// Output of a walker.
    #[inline(always)]
    fn out(&self, w: usize) -> &'a mut [f32] {
        let d = self.attention.shape.kv.head_dim;
        let start = self.place(w) * d;
        // SAFETY: tiles have disjoint (row, head)s, a tile is one thread's, and it takes an output for one use at a time:
        // in `run`, or in `group`, whose walkers differ.
        unsafe { self.attention.out.part(start..start + d) }
    }

    /// q of walker `w`.
    #[inline(always)]
    fn q(&self, w: usize) -> &'a [f32] {
        let d = self.attention.shape.kv.head_dim;
        let (row, head) = (self.rows[w / self.heads.len()] as usize, self.heads.start + w % self.heads.len());
        &self.attention.qkv[row * self.attention.shape.qkv_width() + head * d..][..d]
    }

    #[inline(always)]
    fn kv_head(&self) -> usize {
        self.heads.start / (self.attention.shape.heads / self.attention.shape.kv.kv_heads)
    }

    /// The pages of a segment's pieces, as far as a row sees them.
    #[inline(always)]
    fn slots(&self, row: u32, segment: usize) -> [Option<u32>; PIECES] {
        let query = self.attention.queries[row as usize];
        let seen = within(&seen(query, self.attention.shape.window), segment * SEGMENT_TOKENS, SEGMENT_TOKENS);
        let mut slots = [None; PIECES];
        for b in 0..PIECES {
            if !within(&seen, b * PIECE_TOKENS, PIECE_TOKENS).is_empty() {
                let token = segment * SEGMENT_TOKENS + b * PIECE_TOKENS;
                slots[b] = Some(self.attention.tables[query.table_start as usize + token / self.attention.shape.kv.page_tokens]);
            }
        }
        slots
    }

    /// Pieces of a segment in these pages.
    #[inline(always)]
    fn pieces(&self, slots: [Option<u32>; PIECES], segment: usize, kv_head: usize) -> [Piece<'a, T>; PIECES] {
        let mut pieces = [Piece::NONE; PIECES];
        for b in 0..PIECES {
            if let Some(slot) = slots[b] {
                let token = segment * SEGMENT_TOKENS + b * PIECE_TOKENS;
                pieces[b] = self.attention.kv.piece::<T>(slot, kv_head, token % self.attention.shape.kv.page_tokens / PIECE_TOKENS);
            }
        }
        pieces
    }

    /// The keys of a segment as far as a row sees it, to be asked for.
    #[inline(always)]
    fn keys(&self, row: u32, segment: usize, kv_head: usize) -> Ahead<'a, T> {
        let pieces = self.pieces(self.slots(row, segment), segment, kv_head);
        [pieces[0].keys, pieces[1].keys, pieces[2].keys, pieces[3].keys]
    }

    /// Takes one segment into the rows from `row` on, as far as they agree in its pages. Returns the first row beyond.
    #[inline(always)]
    fn segment<S: Lanes>(&self, s: S, segment: usize, row: usize, ahead: &Ahead<'a, T>, running: &mut [Running; TILE]) -> usize {
        let heads = self.heads.len();
        let mut slots = [None; PIECES];
        let mut walkers = [0; TILE];
        let (mut count, mut end) = (0, row);
        while end < self.rows.len() {
            let own = self.slots(self.rows[end], segment);
            let mut agrees = true;
            for b in 0..PIECES {
                agrees &= own[b].is_none() || slots[b].is_none() || own[b] == slots[b];
            }
            if !agrees {
                break;
            }
            let mut sees = false;
            for b in 0..PIECES {
                sees |= own[b].is_some();
                slots[b] = own[b].or(slots[b]);
            }
            if sees {
                for h in 0..heads {
                    walkers[count] = end * heads + h;
                    count += 1;
                }
            }
            end += 1;
        }
        if count == 0 {
            return end;
        }
        let pieces = self.pieces(slots, segment, self.kv_head());
        // Whoever comes first asks for what is read next: the processor's own prefetchers stop at each 4 KiB.
        let mut ahead = Some(ahead);
        let (fours, rest) = walkers[..count].as_chunks::<4>();
        for four in fours {
            self.group::<S, 4>(s, segment, *four, &pieces, ahead.take(), running);
        }
        match *rest {
            [a, b, c] => self.group::<S, 3>(s, segment, [a, b, c], &pieces, ahead, running),
            [a, b] => self.group::<S, 2>(s, segment, [a, b], &pieces, ahead, running),
            [a] => self.group::<S, 1>(s, segment, [a], &pieces, ahead, running),
            _ => {}
        }
        end
    }

    /// Takes one segment's pieces into the outputs of G walkers.
    #[inline(always)]
    fn group<S: Lanes, const G: usize>(
        &self,
        s: S,
        segment: usize,
        walkers: [usize; G],
        pieces: &[Piece<'a, T>; PIECES],
        ahead: Option<&Ahead<'a, T>>,
        running: &mut [Running; TILE],
    ) {
        let d = self.attention.shape.kv.head_dim;
        let mut q = [&self.attention.qkv[..0]; G];
        for g in 0..G {
            q[g] = self.q(walkers[g]);
        }
        let mut scores = [[s.splat(0.0); PIECES]; G];
        let whole = pieces.iter().all(|piece| !piece.keys.is_empty());
        if S::WIDE && whole {
            scores = products::<S, T, G, PIECES>(s, q, pieces, ahead.is_some());
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

        let mut step = Step { weights: [[0.0; SEGMENT_TOKENS]; G], seen: [const { 0..0 }; G] };
        let mut of_segment = [Running::NONE; G];
        for g in 0..G {
            let row = self.rows[walkers[g] / self.heads.len()] as usize;
            let seen = seen(self.attention.queries[row], self.attention.shape.window);
            step.seen[g] = within(&seen, segment * SEGMENT_TOKENS, SEGMENT_TOKENS);
            of_segment[g] = self.weigh(s, scores[g], pieces, step.seen[g].clone(), &mut step.weights[g]);
        }

        if let Some(parts) = self.parts {
            let mut out = [const { [].as_mut_slice() }; G];
            for g in 0..G {
                // SAFETY: tiles have disjoint (row, head)s, walkers of a group differ, and one thread takes a segment of a tile.
                let (values, rest) = unsafe { parts.part(d, self.place(walkers[g]), segment) };
                values.fill(0.0);
                (rest[0], rest[1]) = (of_segment[g].max, of_segment[g].sum);
                out[g] = values;
            }
            blend_all::<S, T, G>(s, out, &step, [[0.0, 1.0]; G], pieces, ahead);
        } else {
            let mut own = [Running::NONE; G];
            for g in 0..G {
                own[g] = running[walkers[g]];
            }
            let factors = merge(s, own.each_mut(), of_segment);
            let mut out = [const { [].as_mut_slice() }; G];
            for g in 0..G {
                running[walkers[g]] = own[g];
                out[g] = self.out(walkers[g]);
            }
            blend_all::<S, T, G>(s, out, &step, factors, pieces, ahead);
        }
    }

    /// The softmax of a segment's scores: weights of one walker, their maximum and sum.
    #[inline(always)]
    fn weigh<S: Lanes>(
        &self,
        s: S,
        mut scores: [S::F; PIECES],
        pieces: &[Piece<'a, T>; PIECES],
        seen: Range<usize>,
        weights: &mut [f32; SEGMENT_TOKENS],
    ) -> Running {
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut top = lowest;
        for b in 0..PIECES {
            if let Some((of_keys, _)) = pieces[b].scales {
                scores[b] = s.mul(scores[b], s.load(of_keys));
            }
            scores[b] = s.mul(scores[b], s.splat(self.attention.shape.scale));
            if let Some(cap) = self.attention.shape.softcap {
                scores[b] = math::softcap(s, scores[b], cap);
            }
            let seen = within(&seen, b * PIECE_TOKENS, PIECE_TOKENS);
            scores[b] = s.select(s.range_mask(seen.start, seen.end), scores[b], lowest);
            top = s.max(scores[b], top);
        }
        let max = s.max_lane(top);
        let mut sum = s.splat(0.0);
        let (chunks, _) = weights.as_chunks_mut::<PIECE_TOKENS>();
        for b in 0..PIECES {
            let seen = within(&seen, b * PIECE_TOKENS, PIECE_TOKENS);
            if seen.is_empty() {
                continue;
            }
            // What is masked goes through exp as 0: a result that underflows takes the processor a hundred cycles and more.
            let mask = s.range_mask(seen.start, seen.end);
            let below = s.select(mask, s.sub(scores[b], s.splat(max)), s.splat(0.0));
            let mut weights = s.select(mask, math::exp(s, below), s.splat(0.0));
            sum = s.add(sum, weights);
            if let Some((_, of_values)) = pieces[b].scales {
                weights = s.mul(weights, s.load(of_values));
            }
            s.store(weights, &mut chunks[b]);
        }
        Running { max, sum: s.halving_sum(sum) }
    }
}

/// What one segment brings to the outputs of G walkers: `weights[t] * values[t]` over the seen t.
struct Step<const G: usize> {
    weights: [[f32; SEGMENT_TOKENS]; G],
    /// Within the segment.
    seen: [Range<usize>; G],
}

/// `sum_d q[g][d] * k[d][16]` for G walkers and B pieces. Asks for the pieces' values meanwhile, if it `fetches`.
#[inline(always)]
fn products<S: Lanes, T: Stored, const G: usize, const B: usize>(
    s: S,
    q: [&[f32]; G],
    pieces: &[Piece<'_, T>; B],
    fetches: bool,
) -> [[S::F; B]; G] {
    let d = q[0].len();
    let mut keys = [pieces[0].keys; B];
    for b in 0..B {
        keys[b] = &pieces[b].keys[..d];
    }
    for g in 0..G {
        assert_eq!(q[g].len(), d, "heads are of one size");
    }
    let mut acc = [[s.splat(0.0); B]; G];
    for i in 0..d {
        let mut k = [s.splat(0.0); B];
        for b in 0..B {
            // SAFETY: i < d, the length of every piece's keys (sliced above).
            k[b] = T::load(s, unsafe { keys[b].get_unchecked(i) });
            if fetches && begins_line::<T>(i * 16) {
                // There are as many values as keys.
                s.prefetch_far(pieces[b].values.as_ptr().wrapping_add(i * 16).cast());
            }
        }
        for g in 0..G {
            // SAFETY: i < d, the length of every head (asserted above).
            let q = s.splat(unsafe { *q[g].get_unchecked(i) });
            for b in 0..B {
                acc[g][b] = s.fma(q, k[b], acc[g][b]);
            }
        }
    }
    acc
}

/// Whether an element is the first of its cache line.
#[inline(always)]
fn begins_line<T>(element: usize) -> bool {
    (element * size_of::<T>()).is_multiple_of(64)
}

/// Takes a segment into G outputs: `out = out * factors[0] + blend * factors[1]`. Asks meanwhile for the keys `ahead`.
#[inline(always)]
fn blend_all<S: Lanes, T: Stored, const G: usize>(
    s: S,
    mut out: [&mut [f32]; G],
    step: &Step<G>,
    factors: [[f32; 2]; G],
    pieces: &[Piece<'_, T>; PIECES],
    ahead: Option<&Ahead<'_, T>>,
) {
    let d = out[0].len();
    let mut column = 0;
    if S::WIDE {
        while column + 64 <= d {
            blend::<S, T, G, 4>(s, &mut out, column, step, &factors, pieces, ahead);
            column += 64;
        }
    }
    while column + 16 <= d {
        blend::<S, T, G, 1>(s, &mut out, column, step, &factors, pieces, ahead);
        column += 16;
    }
    if column < d {
        blend_rest::<S, T, G>(s, &mut out, column, step, &factors, pieces);
    }
}

/// As [`blend_all`], for C times 16 columns.
#[inline(always)]
fn blend<S: Lanes, T: Stored, const G: usize, const C: usize>(
    s: S,
    out: &mut [&mut [f32]; G],
    column: usize,
    step: &Step<G>,
    factors: &[[f32; 2]; G],
    pieces: &[Piece<'_, T>; PIECES],
    ahead: Option<&Ahead<'_, T>>,
) {
    let d = out[0].len();
    let (mut any, mut all) = (step.seen[0].clone(), step.seen[0].clone());
    for seen in &step.seen[1..] {
        any = any.start.min(seen.start)..any.end.max(seen.end);
        all = all.start.max(seen.start)..all.end.min(seen.end);
    }
    if all.is_empty() {
        all = any.end..any.end;
    }
    let mut acc = [[s.splat(0.0); C]; G];
    for (b, piece) in pieces.iter().enumerate() {
        let base = b * PIECE_TOKENS;
        let keys = ahead.map_or(&[] as &[_], |ahead| ahead[b]);
        // At the edges of a chunk or window walkers see different tokens; adding 0 would turn -0 into +0.
        for t in within(&(any.start..all.start), base, PIECE_TOKENS) {
            blend_seen::<S, T, G, C>(s, &mut acc, step, base + t, piece.values, t * d + column);
        }
        for t in within(&all, base, PIECE_TOKENS) {
            if !keys.is_empty() {
                for c in 0..C {
                    let element = t * d + column + c * 16;
                    if begins_line::<T>(element) {
                        s.prefetch_far(keys.as_ptr().cast::<T>().wrapping_add(element).cast());
                    }
                }
            }
            let (chunks, _) = piece.values[t * d + column..][..C * 16].as_chunks::<16>();
            let mut v = [s.splat(0.0); C];
            for c in 0..C {
                v[c] = T::load(s, &chunks[c]);
            }
            for g in 0..G {
                let weight = s.splat(step.weights[g][base + t]);
                for c in 0..C {
                    acc[g][c] = s.fma(weight, v[c], acc[g][c]);
                }
            }
        }
        for t in within(&(all.end..any.end), base, PIECE_TOKENS) {
            blend_seen::<S, T, G, C>(s, &mut acc, step, base + t, piece.values, t * d + column);
        }
    }
    for g in 0..G {
        let (old, new) = (s.splat(factors[g][0]), s.splat(factors[g][1]));
        let (chunks, _) = out[g][column..][..C * 16].as_chunks_mut::<16>();
        for c in 0..C {
            let merged = s.fma(acc[g][c], new, s.mul(s.load(&chunks[c]), old));
            s.store(merged, &mut chunks[c]);
        }
    }
}

/// One token, for those walkers that see it; its values begin `at` those of its piece.
#[inline(always)]
fn blend_seen<S: Lanes, T: Stored, const G: usize, const C: usize>(
    s: S,
    acc: &mut [[S::F; C]; G],
    step: &Step<G>,
    token: usize,
    values: &[T],
    at: usize,
) {
    for g in 0..G {
        if step.seen[g].contains(&token) {
            let (chunks, _) = values[at..][..C * 16].as_chunks::<16>();
            let weight = s.splat(step.weights[g][token]);
            for c in 0..C {
                acc[g][c] = s.fma(weight, T::load(s, &chunks[c]), acc[g][c]);
            }
        }
    }
}

/// As [`blend`] for the fewer than 16 columns at the end of a head.
#[inline(always)]
fn blend_rest<S: Lanes, T: Stored, const G: usize>(
    s: S,
    out: &mut [&mut [f32]; G],
    column: usize,
    step: &Step<G>,
    factors: &[[f32; 2]; G],
    pieces: &[Piece<'_, T>; PIECES],
) {
    for g in 0..G {
        let d = out[g].len();
        let mut acc = s.splat(0.0);
        for t in step.seen[g].clone() {
            let values = &pieces[t / PIECE_TOKENS].values[t % PIECE_TOKENS * d..][..d];
            let mut padded = [T::ZERO; 16];
            padded[..d - column].copy_from_slice(&values[column..]);
            acc = s.fma(s.splat(step.weights[g][t]), T::load(s, &padded), acc);
        }
        let [old, new] = factors[g];
        let merged = s.fma(acc, s.splat(new), s.mul(load_some(s, &out[g][column..]), s.splat(old)));
        store_some(s, merged, &mut out[g][column..]);
    }
}

/// Keys of the pieces of a segment that will be read; empty where there are none.
type Ahead<'a, T> = [&'a [[T; PIECE_TOKENS]]; PIECES];

/// Pieces of a segment: their chains of fma are independent.
const PIECES: usize = SEGMENT_TOKENS / PIECE_TOKENS;
