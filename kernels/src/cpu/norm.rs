//! RMSNorm and LayerNorm: docs/numerics.md, rule 4. Limited by the bytes of one read and one write of a row in L1.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::{Lanes, load_some, store_some};
use super::memory::Shared;
use crate::ops::NormKind;

/// How a row is normed.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) kind: NormKind,
    pub(super) eps: f32,
    pub(super) weight: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
}

/// Norms rows `rows` of `src` into `dst`, both dense.
pub(super) struct NormRows<'a> {
    pub(super) norm: Norm<'a>,
    pub(super) src: &'a [f32],
    pub(super) dst: Shared<'a, f32>,
    pub(super) width: usize,
    pub(super) rows: Range<usize>,
}

impl Kernel for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for row in self.rows {
            let range = row * self.width..(row + 1) * self.width;
            let src = &self.src[range.clone()];
            let (mean, inverse) = self.norm.statistics(s, src);
            // SAFETY: units have disjoint rows.
            let dst = unsafe { self.dst.part(range) };
            for (index, (dst, src)) in dst.chunks_mut(16).zip(src.chunks(16)).enumerate() {
                let x = load_some(s, src);
                store_some(s, self.norm.element(s, x, mean, inverse, index), dst);
            }
        }
    }
}

/// Norms heads of `rows`, in place: `columns` of each row hold consecutive heads.
pub(super) struct NormHeads<'a> {
    pub(super) norm: Norm<'a>,
    pub(super) buffer: Shared<'a, f32>,
    pub(super) columns: crate::ops::Columns,
    pub(super) head_dim: usize,
    pub(super) rows: Range<usize>,
}

impl Kernel for NormHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        for row in self.rows {
            let start = row * self.columns.stride + self.columns.offset;
            // SAFETY: units have disjoint rows.
            let row = unsafe { self.buffer.part(start..start + self.columns.width) };
            for head in row.chunks_exact_mut(self.head_dim) {
                let (mean, inverse) = self.norm.statistics(s, head);
                for (index, x) in head.chunks_mut(16).enumerate() {
                    let value = load_some(s, x);
                    store_some(s, self.norm.element(s, value, mean, inverse, index), x);
                }
            }
        }
    }
}

impl Norm<'_> {
    /// The mean (0 for RMSNorm) and `1 / sqrt(variance + eps)`.
    #[inline(always)]
    fn statistics<S: Lanes>(&self, s: S, x: &[f32]) -> (Option<S::F>, S::F) {
        let count = x.len() as f32;
        let (chunks, tail) = x.as_chunks::<16>();
        let mut mean = None;
        if self.kind == NormKind::Layer {
            let mut sum = s.splat(0.0);
            for chunk in chunks {
                sum = s.add(sum, s.load(chunk));
            }
            // Lanes beyond the tail add +0.0, which leaves a sum that began at +0.0 as it is.
            sum = s.add(sum, load_some(s, tail));
            mean = Some(s.splat(s.halving_sum(sum) / count));
        }
        let mut squares = s.splat(0.0);
        for chunk in chunks {
            let centred = centre(s, s.load(chunk), mean);
            squares = s.fma(centred, centred, squares);
        }
        let centred = centre(s, load_some(s, tail), mean);
        let centred = s.select(s.range_mask(0, tail.len()), centred, s.splat(0.0));
        squares = s.fma(centred, centred, squares);
        let inverse = 1.0 / (s.halving_sum(squares) / count + self.eps).sqrt();
        (mean, s.splat(inverse))
    }

    /// Up to 16 elements, those from `16 * index` on.
    #[inline(always)]
    fn element<S: Lanes>(&self, s: S, x: S::F, mean: Option<S::F>, inverse: S::F, index: usize) -> S::F {
        let columns = index * 16..(index * 16 + 16).min(self.weight.len());
        let mut w = load_some(s, &self.weight[columns.clone()]);
        if let NormKind::Rms { weight_offset } = self.kind
            && weight_offset != 0.0
        {
            w = s.add(s.splat(weight_offset), w);
        }
        let y = s.mul(s.mul(centre(s, x, mean), inverse), w);
        match self.bias {
            Some(bias) => s.add(y, load_some(s, &bias[columns])),
            None => y,
        }
    }
}

#[inline(always)]
fn centre<S: Lanes>(s: S, x: S::F, mean: Option<S::F>) -> S::F {
    match mean {
        Some(mean) => s.sub(x, mean),
        None => x,
    }
}
