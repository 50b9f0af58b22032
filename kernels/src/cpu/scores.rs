//! The keys' half of attention: scores of some walkers over one segment, and their softmax. A walker is a row with one of its heads.

use std::ops::Range;

use super::attention::{PIECES, within};
use super::kv::{Piece, Stored};
use super::lanes::Lanes;
use super::math;
use super::segments::Running;
use crate::ops::{AttentionShape, PIECE_TOKENS, SEGMENT_TOKENS};

/// `sum_d q[g][d] * k[d][16]` for G walkers and B pieces. Asks for the pieces' values meanwhile, if it `fetches`.
#[inline(always)]
pub(super) fn products<S: Lanes, T: Stored, const G: usize, const B: usize>(
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
                s.prefetch(pieces[b].values.as_ptr().wrapping_add(i * 16).cast());
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
pub(super) fn begins_line<T>(element: usize) -> bool {
    (element * size_of::<T>()).is_multiple_of(64)
}

/// The softmax of a segment's scores, of G walkers together: one alone is a chain of operations that wait for one another. Weights,
/// and each one's maximum and sum.
#[inline(always)]
pub(super) fn weigh<S: Lanes, T: Stored, const G: usize>(
    s: S,
    shape: &AttentionShape,
    mut scores: [[S::F; PIECES]; G],
    pieces: &[Piece<'_, T>; PIECES],
    seen: &[Range<usize>; G],
    weights: &mut [[f32; SEGMENT_TOKENS]; G],
) -> [Running; G] {
    let lowest = s.splat(f32::NEG_INFINITY);
    let mut whole = true;
    for g in 0..G {
        whole &= seen[g] == (0..SEGMENT_TOKENS);
    }
    let scale = s.splat(shape.scale);
    let mut max = [0.0; G];
    for g in 0..G {
        let mut top = lowest;
        for b in 0..PIECES {
            if let Some((of_keys, _)) = pieces[b].scales {
                scores[g][b] = s.mul(scores[g][b], s.load(of_keys));
            }
            scores[g][b] = s.mul(scores[g][b], scale);
            if let Some(cap) = shape.softcap {
                scores[g][b] = math::softcap(s, scores[g][b], cap);
            }
            if !whole {
                let seen = within(&seen[g], b * PIECE_TOKENS, PIECE_TOKENS);
                scores[g][b] = s.select(s.range_mask(seen.start, seen.end), scores[g][b], lowest);
            }
            top = s.max(scores[g][b], top);
        }
        max[g] = s.max_lane(top);
    }
    let mut sums = [s.splat(0.0); G];
    for g in 0..G {
        let (chunks, _) = weights[g].as_chunks_mut::<PIECE_TOKENS>();
        for b in 0..PIECES {
            let below = s.sub(scores[g][b], s.splat(max[g]));
            let mut weights = if whole {
                math::exp(s, below)
            } else {
                let seen = within(&seen[g], b * PIECE_TOKENS, PIECE_TOKENS);
                if seen.is_empty() {
                    continue;
                }
                // What is masked goes through exp as 0: a result that underflows takes the processor a hundred cycles and more.
                let mask = s.range_mask(seen.start, seen.end);
                s.select(mask, math::exp(s, s.select(mask, below, s.splat(0.0))), s.splat(0.0))
            };
            sums[g] = s.add(sums[g], weights);
            if let Some((_, of_values)) = pieces[b].scales {
                weights = s.mul(weights, s.load(of_values));
            }
            s.store(weights, &mut chunks[b]);
        }
    }
    let mut of_segment = [Running::NONE; G];
    for g in 0..G {
        of_segment[g] = Running { max: max[g], sum: s.halving_sum(sums[g]) };
    }
    of_segment
}
