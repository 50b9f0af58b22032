//! Softmax attention over pages: docs/numerics.md, rule 6.
//!
//! A query row walks the keys piece by piece (16 tokens, aligned to absolute positions), so its bits depend on its own
//! position and its pages alone. What is shared is only the reading: a tile of (row, head)s of one kv head goes through
//! the pieces block by block, and those whose tables name the same pages in a block take them from the first cache and
//! from registers. So it does not matter to a bit which rows meet in a tile; `tiles` brings those together that share.
//! Decode is limited by the bytes of K and V, a chunk by fma throughput.

use std::marker::PhantomData;
use std::ops::Range;

use super::isa::Kernel;
use super::kv::{Kv, Piece, Stored};
use super::lanes::{Lanes, load_some, store_some};
use super::math;
use super::memory::Shared;
use crate::ops::{AttentionShape, PIECE_TOKENS, Query};

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
    pub(super) stored: PhantomData<T>,
}

impl<T: Stored> Kernel for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let (d, heads) = (self.attention.shape.kv.head_dim, self.heads.len());
        assert!(self.rows.len() * heads <= TILE, "{} rows of {heads} heads", self.rows.len());
        assert_eq!(self.attention.kv.shape.format, T::FORMAT, "pages hold what is read");
        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; TILE];
        let (mut first, mut end) = (usize::MAX, 0);
        for (i, &row) in self.rows.iter().enumerate() {
            let seen = seen(self.attention.queries[row as usize], self.attention.shape.window);
            (first, end) = (first.min(seen.start), end.max(seen.end));
            for h in 0..heads {
                self.out(i * heads + h).fill(0.0);
            }
        }
        for block in first / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
            let mut row = 0;
            while row < self.rows.len() {
                row = self.block(s, block, row, &mut running);
            }
        }
        for (w, running) in running[..self.rows.len() * heads].iter().enumerate() {
            let sum = s.splat(running.sum);
            debug_assert_eq!(self.out(w).len(), d);
            for x in self.out(w).chunks_mut(16) {
                store_some(s, s.div(load_some(s, x), sum), x);
            }
        }
    }
}

/// The running softmax of one row and head.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// Positions that a query sees.
#[inline(always)]
pub(super) fn seen(query: Query, window: Option<u32>) -> Range<usize> {
    let end = query.position as usize + 1;
    window.map_or(0, |window| end.saturating_sub(window as usize))..end
}

/// The part of `seen` in a piece that begins at token `base`, counted from there; empty as `0..0`.
#[inline(always)]
fn within(seen: &Range<usize>, base: usize) -> Range<usize> {
    let (start, end) = (seen.start.saturating_sub(base), seen.end.saturating_sub(base).min(PIECE_TOKENS));
    if start < end { start..end } else { 0..0 }
}

impl<'a, T: Stored> Attend<'a, T> {
    /// Output of walker `w`: row `w / heads` of the tile, head `w % heads`.
    #[inline(always)]
    fn out(&self, w: usize) -> &'a mut [f32] {
        let d = self.attention.shape.kv.head_dim;
        let (row, head) = (self.rows[w / self.heads.len()] as usize, self.heads.start + w % self.heads.len());
        let start = (row * self.attention.shape.heads + head) * d;
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

    /// Takes one block into the rows from `row` on, as far as they agree in its pages. Returns the first row beyond.
    #[inline(always)]
    fn block<S: Lanes>(&self, s: S, block: usize, row: usize, running: &mut [Running; TILE]) -> usize {
        let (heads, page_tokens) = (self.heads.len(), self.attention.shape.kv.page_tokens);
        let mut slots = [None; AHEAD];
        let mut walkers = [0; TILE];
        let (mut count, mut end) = (0, row);
        while end < self.rows.len() {
            let query = self.attention.queries[self.rows[end] as usize];
            let seen = seen(query, self.attention.shape.window);
            let mut own = slots;
            let mut agrees = true;
            let mut sees = false;
            for b in 0..AHEAD {
                let base = block * BLOCK_TOKENS + b * PIECE_TOKENS;
                if !within(&seen, base).is_empty() {
                    let slot = self.attention.tables[query.table_start as usize + base / page_tokens];
                    agrees &= own[b].is_none_or(|known| known == slot);
                    own[b] = Some(slot);
                    sees = true;
                }
            }
            if !agrees {
                break;
            }
            slots = own;
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
        let kv_head = self.heads.start / (self.attention.shape.heads / self.attention.shape.kv.kv_heads);
        let mut pieces = [Piece::NONE; AHEAD];
        for b in 0..AHEAD {
            if let Some(slot) = slots[b] {
                let token = block * BLOCK_TOKENS + b * PIECE_TOKENS;
                pieces[b] = self.attention.kv.piece::<T>(slot, kv_head, token % page_tokens / PIECE_TOKENS);
            }
        }
        let (fours, rest) = walkers[..count].as_chunks::<4>();
        for four in fours {
            self.group::<S, 4>(s, block, *four, &pieces, running);
        }
        match *rest {
            [a, b, c] => self.group::<S, 3>(s, block, [a, b, c], &pieces, running),
            [a, b] => self.group::<S, 2>(s, block, [a, b], &pieces, running),
            [a] => self.group::<S, 1>(s, block, [a], &pieces, running),
            _ => {}
        }
        end
    }

    /// Takes one block's pieces into the running softmax and the outputs of G walkers.
    #[inline(always)]
    fn group<S: Lanes, const G: usize>(
        &self,
        s: S,
        block: usize,
        walkers: [usize; G],
        pieces: &[Piece<'a, T>; AHEAD],
        running: &mut [Running; TILE],
    ) {
        let d = self.attention.shape.kv.head_dim;
        let mut q = [&self.attention.qkv[..0]; G];
        for g in 0..G {
            q[g] = self.q(walkers[g]);
        }
        let mut scores = [[s.splat(0.0); AHEAD]; G];
        let whole = pieces.iter().all(|piece| !piece.keys.is_empty());
        if S::WIDE && whole {
            let mut keys = [pieces[0].keys; AHEAD];
            for b in 0..AHEAD {
                keys[b] = pieces[b].keys;
            }
            scores = products::<S, T, G, AHEAD>(s, q, keys);
        } else {
            for b in 0..AHEAD {
                if !pieces[b].keys.is_empty() {
                    let one = products::<S, T, G, 1>(s, q, [pieces[b].keys]);
                    for g in 0..G {
                        scores[g][b] = one[g][0];
                    }
                }
            }
        }

        let mut steps: [Step<G>; AHEAD] = std::array::from_fn(|_| Step::NONE);
        for g in 0..G {
            let running = &mut running[walkers[g]];
            let row = self.rows[walkers[g] / self.heads.len()] as usize;
            let seen = seen(self.attention.queries[row], self.attention.shape.window);
            for b in 0..AHEAD {
                let base = block * BLOCK_TOKENS + b * PIECE_TOKENS;
                self.weigh(s, scores[g][b], &pieces[b], within(&seen, base), running, &mut steps[b], g);
            }
        }

        let mut out: [&mut [f32]; G] = std::array::from_fn(|g| self.out(walkers[g]));
        let mut column = 0;
        if S::WIDE {
            while column + 64 <= d {
                blend::<S, T, G, 4>(s, &mut out, column, &steps, pieces);
                column += 64;
            }
        }
        while column + 16 <= d {
            blend::<S, T, G, 1>(s, &mut out, column, &steps, pieces);
            column += 16;
        }
        if column < d {
            blend_rest::<S, T, G>(s, &mut out, column, &steps, pieces);
        }
    }

    /// The weights of one piece for walker g of a group.
    #[inline(always)]
    fn weigh<S: Lanes, const G: usize>(
        &self,
        s: S,
        products: S::F,
        piece: &Piece<'a, T>,
        seen: Range<usize>,
        running: &mut Running,
        step: &mut Step<G>,
        g: usize,
    ) {
        if seen.is_empty() {
            return;
        }
        let mask = s.range_mask(seen.start, seen.end);
        let mut score = products;
        if let Some((of_keys, _)) = piece.scales {
            score = s.mul(score, s.load(of_keys));
        }
        score = s.mul(score, s.splat(self.attention.shape.scale));
        if let Some(cap) = self.attention.shape.softcap {
            score = math::softcap(s, score, cap);
        }
        let score = s.select(mask, score, s.splat(f32::NEG_INFINITY));
        let piece_max = s.max_lane(score);
        // When the maximum stays, the factor is exp(0), which is exactly 1.
        if piece_max > running.max {
            let mut factor = [0.0; 16];
            s.store(math::exp(s, s.splat(running.max - piece_max)), &mut factor);
            *running = Running { max: piece_max, sum: running.sum * factor[0] };
            step.factor[g] = factor[0];
            step.rescales = true;
        }
        let mut weights = s.select(mask, math::exp(s, s.sub(score, s.splat(running.max))), s.splat(0.0));
        running.sum += s.halving_sum(weights);
        if let Some((_, of_values)) = piece.scales {
            weights = s.mul(weights, s.load(of_values));
        }
        s.store(weights, &mut step.weights[g]);
        step.seen[g] = seen;
    }
}

/// What one piece does to the outputs of G walkers: `out * factor`, then `+ weights[t] * values[t]` over the seen t.
struct Step<const G: usize> {
    weights: [[f32; PIECE_TOKENS]; G],
    factor: [f32; G],
    seen: [Range<usize>; G],
    /// Whether a factor is not 1.
    rescales: bool,
}

impl<const G: usize> Step<G> {
    const NONE: Self = Self { weights: [[0.0; PIECE_TOKENS]; G], factor: [1.0; G], seen: [const { 0..0 }; G], rescales: false };

    /// What all walkers see, if it is the same.
    #[inline(always)]
    fn seen_by_all(&self) -> Option<Range<usize>> {
        self.seen.iter().all(|seen| *seen == self.seen[0]).then(|| self.seen[0].clone())
    }
}

/// `sum_d q[g][d] * k[d][16]` for G walkers and B pieces.
#[inline(always)]
fn products<S: Lanes, T: Stored, const G: usize, const B: usize>(s: S, q: [&[f32]; G], mut keys: [&[[T; 16]]; B]) -> [[S::F; B]; G] {
    let d = q[0].len();
    for b in 0..B {
        keys[b] = &keys[b][..d];
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

/// Takes the steps of a block into C times 16 columns of G outputs.
#[inline(always)]
fn blend<S: Lanes, T: Stored, const G: usize, const C: usize>(
    s: S,
    out: &mut [&mut [f32]; G],
    column: usize,
    steps: &[Step<G>; AHEAD],
    pieces: &[Piece<'_, T>; AHEAD],
) {
    let d = out[0].len();
    let mut acc = [[s.splat(0.0); C]; G];
    for g in 0..G {
        let (chunks, _) = out[g][column..][..C * 16].as_chunks::<16>();
        for c in 0..C {
            acc[g][c] = s.load(&chunks[c]);
        }
    }
    for (step, piece) in steps.iter().zip(pieces) {
        if step.rescales {
            for g in 0..G {
                let factor = s.splat(step.factor[g]);
                for c in 0..C {
                    acc[g][c] = s.mul(acc[g][c], factor);
                }
            }
        }
        if let Some(seen) = step.seen_by_all() {
            for t in seen {
                let (chunks, _) = piece.values[t * d + column..][..C * 16].as_chunks::<16>();
                let mut v = [s.splat(0.0); C];
                for c in 0..C {
                    v[c] = T::load(s, &chunks[c]);
                }
                for g in 0..G {
                    let weight = s.splat(step.weights[g][t]);
                    for c in 0..C {
                        acc[g][c] = s.fma(weight, v[c], acc[g][c]);
                    }
                }
            }
        } else {
            // At the edge of a chunk or window each walker sees something else; adding 0 would turn -0 into +0.
            for t in 0..PIECE_TOKENS {
                let (chunks, _) = piece.values[t * d + column..][..C * 16].as_chunks::<16>();
                let mut v = [s.splat(0.0); C];
                for c in 0..C {
                    v[c] = T::load(s, &chunks[c]);
                }
                for g in 0..G {
                    if step.seen[g].contains(&t) {
                        let weight = s.splat(step.weights[g][t]);
                        for c in 0..C {
                            acc[g][c] = s.fma(weight, v[c], acc[g][c]);
                        }
                    }
                }
            }
        }
    }
    for g in 0..G {
        let (chunks, _) = out[g][column..][..C * 16].as_chunks_mut::<16>();
        for c in 0..C {
            s.store(acc[g][c], &mut chunks[c]);
        }
    }
}

/// As [`blend`] for the fewer than 16 columns at the end of a head.
#[inline(always)]
fn blend_rest<S: Lanes, T: Stored, const G: usize>(
    s: S,
    out: &mut [&mut [f32]; G],
    column: usize,
    steps: &[Step<G>; AHEAD],
    pieces: &[Piece<'_, T>; AHEAD],
) {
    for g in 0..G {
        let d = out[g].len();
        let mut acc = load_some(s, &out[g][column..]);
        for (step, piece) in steps.iter().zip(pieces) {
            acc = s.mul(acc, s.splat(step.factor[g]));
            for t in step.seen[g].clone() {
                let mut padded = [T::ZERO; 16];
                padded[..d - column].copy_from_slice(&piece.values[t * d + column..(t + 1) * d]);
                acc = s.fma(s.splat(step.weights[g][t]), T::load(s, &padded), acc);
            }
        }
        store_some(s, acc, &mut out[g][column..]);
    }
}

/// Pieces of a block: their chains of fma are independent, the softmax is not.
const AHEAD: usize = 4;
const BLOCK_TOKENS: usize = AHEAD * PIECE_TOKENS;
