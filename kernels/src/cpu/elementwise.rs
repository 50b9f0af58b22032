//! Ops without neighbours: gate, activation, addition, soft cap, scaling. Limited by memory, and by the polynomials where
//! there is an exp.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::math;
use super::memory::Shared;
use crate::ops::Activation;

/// What happens to each element of a buffer.
#[derive(Clone, Copy)]
pub(super) enum Map<'a> {
    Activate(Activation),
    /// `x += other`.
    Add(&'a [f32]),
    /// `cap * tanh(x / cap)`.
    Softcap(f32),
}

/// Maps elements `range` in place.
pub(super) struct MapElements<'a> {
    pub(super) map: Map<'a>,
    pub(super) x: Shared<'a, f32>,
    pub(super) range: Range<usize>,
}

impl Kernel for MapElements<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        // SAFETY: units have disjoint ranges.
        let x = unsafe { self.x.part(self.range.clone()) };
        let mut at = self.range.start;
        let (chunks, tail) = x.as_chunks_mut::<16>();
        for chunk in chunks {
            let value = self.map.apply(s, s.load(chunk), at, 16);
            s.store(value, chunk);
            at += 16;
        }
        if !tail.is_empty() {
            let value = self.map.apply(s, load_some(s, tail), at, tail.len());
            store_some(s, value, tail);
        }
    }
}

impl Map<'_> {
    /// `len` elements (at most 16) that begin at element `at`.
    #[inline(always)]
    fn apply<S: Lanes>(&self, s: S, x: S::F, at: usize, len: usize) -> S::F {
        match *self {
            Self::Activate(activation) => math::activate(s, x, activation),
            Self::Add(other) => s.add(x, load_some(s, &other[at..at + len])),
            Self::Softcap(cap) => math::softcap(s, x, cap),
        }
    }
}

/// `out[t, j] = act(gate_up[t, j]) * gate_up[t, width + j]` for `rows`.
pub(super) struct Gate<'a> {
    pub(super) out: Shared<'a, f32>,
    pub(super) gate_up: &'a [f32],
    pub(super) width: usize,
    pub(super) activation: Activation,
    pub(super) rows: Range<usize>,
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for row in self.rows {
            // SAFETY: units have disjoint rows.
            let out = unsafe { self.out.part(row * self.width..(row + 1) * self.width) };
            let (gate, up) = self.gate_up[row * 2 * self.width..][..2 * self.width].split_at(self.width);
            for ((out, gate), up) in out.chunks_mut(16).zip(gate.chunks(16)).zip(up.chunks(16)) {
                let value = math::activate(s, load_some(s, gate), self.activation);
                store_some(s, s.mul(value, load_some(s, up)), out);
            }
        }
    }
}

/// Rotates heads of `rows` in place: docs/numerics.md, rule 5.
pub(super) struct Rope<'a> {
    pub(super) buffer: Shared<'a, f32>,
    pub(super) columns: crate::ops::Columns,
    pub(super) head_dim: usize,
    pub(super) half: usize,
    /// `[cos | sin]` of each row.
    pub(super) rope_rows: &'a [f32],
    pub(super) rows: Range<usize>,
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for row in self.rows {
            let (cos, sin) = self.rope_rows[row * 2 * self.half..][..2 * self.half].split_at(self.half);
            let start = row * self.columns.stride + self.columns.offset;
            // SAFETY: units have disjoint rows.
            let row = unsafe { self.buffer.part(start..start + self.columns.width) };
            for head in row.chunks_exact_mut(self.head_dim) {
                let (first, second) = head[..2 * self.half].split_at_mut(self.half);
                for (((first, second), cos), sin) in first.chunks_mut(16).zip(second.chunks_mut(16)).zip(cos.chunks(16)).zip(sin.chunks(16))
                {
                    let (a, b) = (load_some(s, first), load_some(s, second));
                    let (cos, sin) = (load_some(s, cos), load_some(s, sin));
                    store_some(s, s.sub(s.mul(a, cos), s.mul(b, sin)), first);
                    store_some(s, s.add(s.mul(b, cos), s.mul(a, sin)), second);
                }
            }
        }
    }
}
