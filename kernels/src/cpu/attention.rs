//! Softmax attention over pages: docs/numerics.md, rule 6.
//!
//! A query row walks the keys piece by piece (16 tokens, aligned to absolute positions), so its bits depend on its own
//! position and its pages alone. The query heads of one kv head walk together and share every read of K and V. Scores of
//! up to 4 pieces are computed ahead: their chains of fma are independent, the softmax is not.
//! Decode is limited by the bytes of K and V, a chunk by fma throughput (K and V then come from L2).

use std::ops::Range;

use super::isa::Kernel;
use super::kv::Kv;
use super::lanes::{Lanes, load_some, store_some};
use super::math;
use super::memory::Shared;
use crate::ops::{AttentionShape, PIECE_TOKENS, Query};

/// Query heads `heads` (all of one kv head) of rows `rows`.
pub(super) struct Attend<'a> {
    pub(super) out: Shared<'a, f32>,
    pub(super) qkv: &'a [f32],
    pub(super) kv: &'a Kv,
    pub(super) shape: &'a AttentionShape,
    pub(super) queries: &'a [Query],
    pub(super) tables: &'a [u32],
    pub(super) rows: Range<usize>,
    pub(super) heads: Range<usize>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for row in self.rows.clone() {
            let mut head = self.heads.start;
            while head + 4 <= self.heads.end {
                self.walk::<S, 4>(s, row, head);
                head += 4;
            }
            match self.heads.end - head {
                3 => self.walk::<S, 3>(s, row, head),
                2 => self.walk::<S, 2>(s, row, head),
                1 => self.walk::<S, 1>(s, row, head),
                _ => {}
            }
        }
    }
}

/// The running softmax of one head.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl Attend<'_> {
    /// G heads of one row from the first visible piece to the last.
    #[inline(always)]
    fn walk<S: Lanes, const G: usize>(&self, s: S, row: usize, head: usize) {
        let (shape, d) = (self.shape, self.shape.kv.head_dim);
        let query = self.queries[row];
        let position = query.position as usize;
        let first = match shape.window {
            Some(window) => (position + 1).saturating_sub(window as usize),
            None => 0,
        };
        let kv_head = head / (shape.heads / shape.kv.kv_heads);
        let mut q = [&self.qkv[..0]; G];
        for g in 0..G {
            q[g] = &self.qkv[row * shape.qkv_width() + (head + g) * d..][..d];
        }
        let start = row * shape.heads * d + head * d;
        // SAFETY: units have disjoint (row, head)s.
        let out = unsafe { self.out.part(start..start + G * d) };
        out.fill(0.0);

        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; G];
        let end = position / PIECE_TOKENS + 1;
        let mut piece = first / PIECE_TOKENS;
        while piece < end {
            let ahead = (end - piece).min(AHEAD);
            let mut keys = [&self.kv.data[..0]; AHEAD];
            let mut values = [&self.kv.data[..0]; AHEAD];
            for b in 0..ahead {
                (keys[b], values[b]) = self.piece(query, piece + b, kv_head);
            }
            let mut scores = [[s.splat(0.0); AHEAD]; G];
            if ahead == AHEAD {
                scores = products::<S, G, AHEAD>(s, q, keys);
            } else {
                for b in 0..ahead {
                    let one = products::<S, G, 1>(s, q, [keys[b]]);
                    for g in 0..G {
                        scores[g][b] = one[g][0];
                    }
                }
            }
            for b in 0..ahead {
                let base = (piece + b) * PIECE_TOKENS;
                let seen = first.saturating_sub(base)..(position + 1 - base).min(PIECE_TOKENS);
                let mut of_piece = [s.splat(0.0); G];
                for g in 0..G {
                    of_piece[g] = scores[g][b];
                }
                self.accumulate::<S, G>(s, out, &mut running, of_piece, values[b], seen);
            }
            piece += ahead;
        }
        for g in 0..G {
            let sum = s.splat(running[g].sum);
            for x in out[g * d..(g + 1) * d].chunks_mut(16) {
                store_some(s, s.div(load_some(s, x), sum), x);
            }
        }
    }

    /// Keys `[head_dim][16]` and values `[16][head_dim]` of one piece.
    #[inline(always)]
    fn piece(&self, query: Query, piece: usize, kv_head: usize) -> (&[f32], &[f32]) {
        let (page_tokens, d) = (self.shape.kv.page_tokens, self.shape.kv.head_dim);
        let token = piece * PIECE_TOKENS;
        let slot = self.tables[query.table_start as usize + token / page_tokens];
        let start = self.kv.head_start(slot, kv_head) + token % page_tokens * d;
        let size = PIECE_TOKENS * d;
        (&self.kv.data[start..][..size], &self.kv.data[start + page_tokens * d..][..size])
    }

    /// Takes one piece's products into the running softmax and the outputs of G heads.
    #[inline(always)]
    fn accumulate<S: Lanes, const G: usize>(
        &self,
        s: S,
        out: &mut [f32],
        running: &mut [Running; G],
        products: [S::F; G],
        values: &[f32],
        seen: Range<usize>,
    ) {
        let d = self.shape.kv.head_dim;
        let mask = s.range_mask(seen.start, seen.end);
        let mut p = [[0.0f32; PIECE_TOKENS]; G];
        for g in 0..G {
            let mut score = s.mul(products[g], s.splat(self.shape.scale));
            if let Some(cap) = self.shape.softcap {
                score = math::softcap(s, score, cap);
            }
            let score = s.select(mask, score, s.splat(f32::NEG_INFINITY));
            let max = running[g].max;
            let piece_max = s.max_lane(score);
            let new_max = if piece_max > max { piece_max } else { max };
            // When the maximum stays, the factor is exp(0), which is exactly 1.
            if new_max != max {
                let factor = math::exp(s, s.splat(max - new_max));
                let mut first = [0.0; 16];
                s.store(factor, &mut first);
                running[g] = Running { max: new_max, sum: running[g].sum * first[0] };
                for x in out[g * d..(g + 1) * d].chunks_mut(16) {
                    store_some(s, s.mul(load_some(s, x), factor), x);
                }
            }
            let weights = s.select(mask, math::exp(s, s.sub(score, s.splat(new_max))), s.splat(0.0));
            running[g].sum += s.halving_sum(weights);
            s.store(weights, &mut p[g]);
        }
        let mut column = 0;
        while column + 64 <= d {
            blend::<S, G, 4>(s, out, d, column, &p, values, &seen);
            column += 64;
        }
        while column < d {
            blend::<S, G, 1>(s, out, d, column, &p, values, &seen);
            column += 16;
        }
    }
}

/// `sum_d q[g][d] * k[d][16]` for G heads and B pieces.
#[inline(always)]
fn products<S: Lanes, const G: usize, const B: usize>(s: S, q: [&[f32]; G], keys: [&[f32]; B]) -> [[S::F; B]; G] {
    let d = q[0].len();
    let mut lanes = [keys[0].as_chunks::<PIECE_TOKENS>().0; B];
    for b in 0..B {
        lanes[b] = &keys[b].as_chunks::<PIECE_TOKENS>().0[..d];
    }
    for g in 0..G {
        assert_eq!(q[g].len(), d, "heads are of one size");
    }
    let mut acc = [[s.splat(0.0); B]; G];
    for i in 0..d {
        let mut k = [s.splat(0.0); B];
        for b in 0..B {
            // SAFETY: i < d, the length of every piece's lanes (sliced above).
            k[b] = s.load(unsafe { lanes[b].get_unchecked(i) });
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

/// `out[g][column..] += p[g][t] * values[t][column..]` over the seen t, ascending, for C times 16 columns.
#[inline(always)]
fn blend<S: Lanes, const G: usize, const C: usize>(
    s: S,
    out: &mut [f32],
    d: usize,
    column: usize,
    p: &[[f32; PIECE_TOKENS]; G],
    values: &[f32],
    seen: &Range<usize>,
) {
    let mut acc = [[s.splat(0.0); C]; G];
    for g in 0..G {
        for c in 0..C {
            let at = column + c * 16;
            acc[g][c] = load_some(s, &out[g * d + at..g * d + (at + 16).min(d)]);
        }
    }
    for t in seen.clone() {
        let mut v = [s.splat(0.0); C];
        for c in 0..C {
            let at = column + c * 16;
            v[c] = load_some(s, &values[t * d + at..t * d + (at + 16).min(d)]);
        }
        for g in 0..G {
            let weight = s.splat(p[g][t]);
            for c in 0..C {
                acc[g][c] = s.fma(weight, v[c], acc[g][c]);
            }
        }
    }
    for g in 0..G {
        for c in 0..C {
            let at = column + c * 16;
            store_some(s, acc[g][c], &mut out[g * d + at..g * d + (at + 16).min(d)]);
        }
    }
}

/// Pieces whose scores are computed together.
const AHEAD: usize = 4;
