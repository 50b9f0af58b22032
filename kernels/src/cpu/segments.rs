//! Segments of 64 tokens: how one is merged into what came before (docs/numerics.md, rule 6), and where they lie while several
//! threads share those of a row.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use super::attention::{Attention, seen, segments};
use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::math;
use super::memory::Shared;

/// Segments of every row and head, before they are merged: `[T, H, segments, stride]`, a row of which is the output, then
/// maximum and sum.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    pub(super) values: Shared<'a, f32>,
    /// The first of the call's segments, and how many there are.
    pub(super) first: usize,
    pub(super) count: usize,
}

/// Memory for [`Parts`], and how many runs of segments of each tile are still to come.
#[derive(Debug, Default)]
pub(super) struct Attended {
    values: Vec<f32>,
    left: Vec<AtomicUsize>,
}

impl Attended {
    /// Room for `len` elements, of any value, and `tiles` counts of `runs`.
    pub(super) fn room(&mut self, len: usize, tiles: usize, runs: usize) -> (&mut [f32], &[AtomicUsize]) {
        if self.values.len() < len {
            self.values.resize(len, 0.0);
        }
        self.left.clear();
        self.left.resize_with(tiles, || AtomicUsize::new(runs));
        (&mut self.values[..len], &self.left)
    }
}

impl<'a> Parts<'a> {
    /// Elements of one segment of one row and head.
    pub(super) fn stride(head_dim: usize) -> usize {
        (head_dim + 2).next_multiple_of(16)
    }

    /// What a segment of `place` (`row * H + head`) gives.
    ///
    /// # Safety
    /// Nobody else holds it.
    #[inline(always)]
    pub(super) unsafe fn part(&self, head_dim: usize, place: usize, segment: usize) -> (&'a mut [f32], &'a mut [f32]) {
        let stride = Self::stride(head_dim);
        debug_assert!((self.first..self.first + self.count).contains(&segment));
        let start = (place * self.count + segment - self.first) * stride;
        // SAFETY: the caller's promise.
        unsafe { self.values.part(start..start + stride) }.split_at_mut(head_dim)
    }
}

/// Merges the segments of a tile that several threads took.
pub(super) struct Merge<'a> {
    pub(super) attention: &'a Attention<'a>,
    pub(super) rows: &'a [u32],
    pub(super) heads: Range<usize>,
    pub(super) parts: Parts<'a>,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let d = self.attention.shape.kv.head_dim;
        for &row in self.rows {
            let segments = segments(seen(self.attention.queries[row as usize], self.attention.shape.window));
            for head in self.heads.clone() {
                let place = row as usize * self.attention.shape.heads + head;
                // SAFETY: this (row, head) is of one tile, whose parts are complete, and one thread merges it.
                let out = unsafe { self.attention.out.part(place * d..(place + 1) * d) };
                out.fill(0.0);
                let mut running = Running::NONE;
                for segment in segments.clone() {
                    // SAFETY: as above.
                    let (of_segment, rest) = unsafe { self.parts.part(d, place, segment) };
                    let [[old, new]] = merge(s, [&mut running], [Running { max: rest[0], sum: rest[1] }]);
                    for (out, x) in out.chunks_mut(16).zip(of_segment.chunks(16)) {
                        store_some(s, s.fma(load_some(s, x), s.splat(new), s.mul(load_some(s, out), s.splat(old))), out);
                    }
                }
                divide(s, out, running.sum);
            }
        }
    }
}

/// Outputs over the sum of their weights.
#[inline(always)]
pub(super) fn divide<S: Lanes>(s: S, out: &mut [f32], sum: f32) {
    let sum = s.splat(sum);
    for x in out.chunks_mut(16) {
        store_some(s, s.div(load_some(s, x), sum), x);
    }
}

/// The softmax of one row and head, up to some token.
#[derive(Clone, Copy)]
pub(super) struct Running {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl Running {
    pub(super) const NONE: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// Merges a segment into each of G rows and heads; the factors of what was there and of the segment.
#[inline(always)]
pub(super) fn merge<S: Lanes, const G: usize>(s: S, running: [&mut Running; G], segments: [Running; G]) -> [[f32; 2]; G] {
    // In registers: a load of what was just stored element by element would wait for all the stores.
    let mut exponents = s.splat(0.0);
    for g in 0..G {
        let (old, new) = (running[g].max, segments[g].max);
        let below = if new > old { old - new } else { new - old };
        exponents = s.select(s.range_mask(g, g + 1), s.splat(below), exponents);
    }
    // One of the two factors is exp(0), which is exactly 1.
    let mut lanes = [0.0; 16];
    s.store(math::exp(s, exponents), &mut lanes);
    let mut factors = [[1.0; 2]; G];
    for (g, running) in running.into_iter().enumerate() {
        let is_higher = segments[g].max > running.max;
        factors[g] = if is_higher { [lanes[g], 1.0] } else { [1.0, lanes[g]] };
        let [old, new] = factors[g];
        *running = Running { max: if is_higher { segments[g].max } else { running.max }, sum: running.sum * old + segments[g].sum * new };
    }
    factors
}
