//! Linear layers with bf16 weights and activations rounded to bf16, two products at a time.
//!
//! Formula (docs/numerics.md, rule 9): inside a slice of 512, by ascending pair of k, `acc = fma(x[odd], w[odd], acc)` and then
//! `acc = fma(x[even], w[even], acc)`, subnormal numbers being zeros; lanes are 16 n.
//! Weights: see `pack`. Activations: see `rounded`; a pair is broadcast to all 16 columns.
//! Tiles: as `linear_float`: 8 rows x 3 panels with 32 registers, 4 x 1 with 16, 1 row x 4 panels. Tolerance against the reference:
//! none, equal bits.

use std::ops::Range;

use super::isa::PairKernel;
use super::lanes::Lanes;
use super::linear::{Output, PASS, PREFETCH_BYTES, Panels};
use super::pack::{LANES, PairWeights};
use super::pairs::{F, Pairs, careful_sum, may_vanish};
use super::rounded::Rounded;
use crate::SLICE;

/// One unit: rows `rows` by panels `panels`.
pub(super) struct PairTiles<'a> {
    pub(super) x: &'a Rounded,
    pub(super) weights: &'a PairWeights,
    /// Of all units that read these weights.
    pub(super) first_row: usize,
    pub(super) rows: Range<usize>,
    pub(super) panels: Panels,
    /// Where in `output` each panel's sums go.
    pub(super) places: Panels,
    pub(super) output: Output<'a>,
}

impl PairKernel for PairTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<P: Pairs>(self, p: P) {
        match self.panels.streams {
            4 => self.streams::<P, 4>(p),
            3 => self.streams::<P, 3>(p),
            _ => {
                let mut step = 0;
                while P::S::WIDE && step + 3 <= self.panels.count {
                    self.columns::<P, 3>(p, step);
                    step += 3;
                }
                while step < self.panels.count {
                    self.columns::<P, 1>(p, step);
                    step += 1;
                }
            }
        }
    }
}

impl PairTiles<'_> {
    /// One row, C streams.
    #[inline(always)]
    fn streams<P: Pairs, const C: usize>(&self, p: P) {
        for step in 0..self.panels.count {
            let (at, places) = (self.panels.at::<C>(step, self.panels.distance), self.places.at::<C>(step, self.places.distance));
            for pass in self.passes() {
                self.rows::<P, 1, C>(p, &mut self.rows.start.clone(), at, places, &pass);
            }
        }
    }

    /// K in passes, in slices.
    #[inline(always)]
    fn passes(&self) -> impl Iterator<Item = Range<usize>> {
        let slices = self.x.inputs.div_ceil(SLICE);
        (0..slices).step_by(PASS / SLICE).map(move |start| start..(start + PASS / SLICE).min(slices))
    }

    /// All rows of C neighbouring panels.
    #[inline(always)]
    fn columns<P: Pairs, const C: usize>(&self, p: P, step: usize) {
        let (at, places) = (self.panels.at::<C>(step, 1), self.places.at::<C>(step, 1));
        for pass in self.passes() {
            let mut row = self.rows.start;
            if P::S::WIDE {
                self.rows::<P, 8, C>(p, &mut row, at, places, &pass);
            }
            self.rows::<P, 4, C>(p, &mut row, at, places, &pass);
            self.rows::<P, 2, C>(p, &mut row, at, places, &pass);
            self.rows::<P, 1, C>(p, &mut row, at, places, &pass);
        }
    }

    /// As many rows, R at a time, as there are; `pass` is in slices.
    #[inline(always)]
    fn rows<P: Pairs, const R: usize, const C: usize>(
        &self,
        p: P,
        row: &mut usize,
        at: [usize; C],
        places: [usize; C],
        pass: &Range<usize>,
    ) {
        let s = p.lanes();
        let slices = self.x.inputs.div_ceil(SLICE);
        while *row + R <= self.rows.end {
            if R > 1 {
                for r in 0..R {
                    for c in 0..C {
                        self.output.prefetch(s, *row + r, places[c]);
                    }
                }
            }
            let mut totals = [[s.splat(0.0); C]; R];
            if pass.start != 0 {
                for r in 0..R {
                    for c in 0..C {
                        // SAFETY: units have disjoint rows and panels, and this one is ours.
                        totals[r][c] = unsafe { self.output.load(s, *row + r, places[c]) };
                    }
                }
            }
            for slice in pass.clone() {
                let sums = self.tile::<P, R, C>(p, *row, at, slice);
                for r in 0..R {
                    for c in 0..C {
                        totals[r][c] = if slice == 0 { sums[r][c] } else { s.add(totals[r][c], sums[r][c]) };
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    // SAFETY: as above.
                    unsafe { self.output.store(s, totals[r][c], *row + r, at[c], places[c], pass.end == slices) };
                }
            }
            *row += R;
        }
    }

    /// Sums of one slice for R rows and C panels.
    #[inline(always)]
    fn tile<P: Pairs, const R: usize, const C: usize>(&self, p: P, row: usize, at: [usize; C], slice: usize) -> [[F<P>; C]; R] {
        let (row_pairs, slices) = (self.x.inputs.div_ceil(2), self.x.inputs.div_ceil(SLICE));
        let range = slice * (SLICE / 2)..((slice + 1) * (SLICE / 2)).min(row_pairs);
        // A block of R rows: see `rounded`.
        let (block, _) = self.x.pairs[row * row_pairs..][..row_pairs * R].as_chunks::<R>();
        let x = &block[range.clone()];
        let (all, _) = self.weights.pairs.as_chunks::<LANES>();
        let mut w = [&all[..0]; C];
        for c in 0..C {
            w[c] = &all[at[c] * row_pairs..][range.clone()];
        }
        // Several rows go through the panels once for each tile: the first one asks for the next panels meanwhile.
        let next_bytes = C * row_pairs * size_of::<[u32; LANES]>();
        let ahead = if R == 1 { Some(PREFETCH_BYTES) } else { (row == self.first_row).then_some(next_bytes) };
        let mut sums = plain::<P, R, C>(p, x, w, ahead);
        if !P::FLUSHES {
            let exponents = &self.x.exponents[row * slices..][slice * R..][..R];
            for c in 0..C {
                let of_panel = self.weights.exponents[at[c] * slices + slice];
                for r in 0..R {
                    if may_vanish(exponents[r], of_panel) {
                        sums[r][c] = careful_sum(p.lanes(), &x.as_flattened()[r..], R, w[c]);
                    }
                }
            }
        }
        sums
    }
}

/// Sums as the instruction gives them, or as those that cannot vanish are; asks for the weights that lie `ahead` bytes further.
#[inline(always)]
fn plain<P: Pairs, const R: usize, const C: usize>(p: P, x: &[[u32; R]], w: [&[[u32; LANES]]; C], ahead: Option<usize>) -> [[F<P>; C]; R] {
    let s = p.lanes();
    for c in 0..C {
        assert_eq!(w[c].len(), x.len(), "panels of one slice");
    }
    let mut acc = [[s.splat(0.0); C]; R];
    for k in 0..x.len() {
        let mut weights = [p.load(&[0; LANES]); C];
        for c in 0..C {
            if let Some(ahead) = ahead {
                s.prefetch(w[c].as_ptr().wrapping_add(k).cast::<u8>().wrapping_add(ahead));
            }
            // SAFETY: k < x.len(), which is every slice's length (asserted above).
            weights[c] = p.load(unsafe { w[c].get_unchecked(k) });
        }
        for r in 0..R {
            // SAFETY: as above.
            let input = p.splat(unsafe { x.get_unchecked(k)[r] });
            for c in 0..C {
                acc[r][c] = p.dot(acc[r][c], weights[c], input);
            }
        }
    }
    acc
}
