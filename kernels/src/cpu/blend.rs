//! The values' half of attention: what one segment's weights bring to the outputs of some walkers (a row with one of its heads).

use std::ops::Range;

use super::attention::{Ahead, PIECES, within};
use super::kv::{Piece, Stored};
use super::lanes::{Lanes, load_some, store_some};
use super::scores::begins_line;
use crate::ops::{PIECE_TOKENS, SEGMENT_TOKENS};

/// What one segment brings to the outputs of G walkers: `weights[t] * values[t]` over the seen t.
pub(super) struct Step<const G: usize> {
    pub(super) weights: [[f32; SEGMENT_TOKENS]; G],
    /// Within the segment.
    pub(super) seen: [Range<usize>; G],
}

/// Takes a segment into G outputs: `out = out * factors[0] + blend * factors[1]`. Asks meanwhile for the keys `ahead`.
#[inline(always)]
pub(super) fn blend_all<S: Lanes, T: Stored, const G: usize>(
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
        let together = within(&all, base, PIECE_TOKENS);
        if !keys.is_empty() {
            for t in (0..together.start).chain(together.end..PIECE_TOKENS) {
                fetch::<S, T, C>(s, keys, t * d + column);
            }
        }
        for t in together {
            if !keys.is_empty() {
                fetch::<S, T, C>(s, keys, t * d + column);
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

/// Asks for C times 16 elements of a piece's keys, from `first` on.
#[inline(always)]
fn fetch<S: Lanes, T: Stored, const C: usize>(s: S, keys: &[[T; PIECE_TOKENS]], first: usize) {
    for c in 0..C {
        let element = first + c * 16;
        if begins_line::<T>(element) {
            s.prefetch(keys.as_ptr().cast::<T>().wrapping_add(element).cast());
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
