//! Linear layers with f32, f16 or bf16 weights.
//!
//! Formula: inside a slice of 512 `acc[r][n] = fma(x[r][k], w[n][k], acc[r][n])` by ascending k; lanes are 16 n.
//! Weights: panels `[K][16]`; activations: rows `[K]`, broadcast.
//! Tiles: 8 rows x 3 panels with 32 registers (24 accumulators hide the fma's latency; 11 loads for 24 fma), 4 x 1 with
//! 16 registers, 1 row x 4 panels (four streams keep the memory busy). Tolerance against the reference: none, equal bits.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::Lanes;
use super::linear::{ONE_ROW_PANELS, Output, PASS, PREFETCH_BYTES};
use super::memory::Element;
use super::pack::LANES;
use crate::SLICE;

/// How a float is stored in a panel.
pub(super) trait FloatFormat {
    type Element: Element;
    fn load<S: Lanes>(s: S, x: &[Self::Element; 16]) -> S::F;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl FloatFormat for F32 {
    type Element = f32;
    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[f32; 16]) -> S::F {
        s.load(x)
    }
}

impl FloatFormat for F16 {
    type Element = u16;
    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[u16; 16]) -> S::F {
        s.load_f16(x)
    }
}

impl FloatFormat for Bf16 {
    type Element = u16;
    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[u16; 16]) -> S::F {
        s.load_bf16(x)
    }
}

/// One unit: rows `rows` by panels `panels`.
pub(super) struct FloatTiles<'a, W: FloatFormat> {
    /// `[.., K]`.
    pub(super) x: &'a [f32],
    pub(super) inputs: usize,
    /// `[panels][K][16]`.
    pub(super) weights: &'a [W::Element],
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) output: Output<'a>,
}

impl<W: FloatFormat> Kernel for FloatTiles<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let mut panel = self.panels.start;
        if self.rows.len() == 1 {
            // Stream i reads the i-th quarter of the unit, so that each runs on through its panels.
            let height = self.panels.len() / ONE_ROW_PANELS;
            for _ in 0..height {
                self.columns::<S, ONE_ROW_PANELS>(s, panel, height);
                panel += 1;
            }
            panel = self.panels.start + height * ONE_ROW_PANELS;
        } else if S::WIDE {
            while panel + 3 <= self.panels.end {
                self.columns::<S, 3>(s, panel, 1);
                panel += 3;
            }
        }
        while panel < self.panels.end {
            self.columns::<S, 1>(s, panel, 1);
            panel += 1;
        }
    }
}

impl<W: FloatFormat> FloatTiles<'_, W> {
    /// All rows of panels `panel`, `panel + step`, ...: C of them.
    #[inline(always)]
    fn columns<S: Lanes, const C: usize>(&self, s: S, panel: usize, step: usize) {
        for start in (0..self.inputs).step_by(PASS) {
            let pass = start..(start + PASS).min(self.inputs);
            let mut row = self.rows.start;
            if C != ONE_ROW_PANELS {
                if S::WIDE {
                    self.rows::<S, 8, C>(s, &mut row, panel, step, &pass);
                }
                self.rows::<S, 4, C>(s, &mut row, panel, step, &pass);
                self.rows::<S, 2, C>(s, &mut row, panel, step, &pass);
            }
            self.rows::<S, 1, C>(s, &mut row, panel, step, &pass);
        }
    }

    /// As many rows, R at a time, as there are.
    #[inline(always)]
    fn rows<S: Lanes, const R: usize, const C: usize>(&self, s: S, row: &mut usize, panel: usize, step: usize, pass: &Range<usize>) {
        let (all, _) = self.weights.as_chunks::<LANES>();
        while *row + R <= self.rows.end {
            if R > 1 {
                for r in 0..R {
                    for c in 0..C {
                        self.output.prefetch(s, *row + r, panel + c * step);
                    }
                }
            }
            let mut totals = [[s.splat(0.0); C]; R];
            if pass.start != 0 {
                for r in 0..R {
                    for c in 0..C {
                        // SAFETY: units have disjoint rows and panels, and this one is ours.
                        totals[r][c] = unsafe { self.output.load(s, *row + r, panel + c * step) };
                    }
                }
            }
            let mut start = pass.start;
            while start < pass.end {
                let slice = start..(start + SLICE).min(pass.end);
                let mut x = [&self.x[..0]; R];
                for r in 0..R {
                    x[r] = &self.x[(*row + r) * self.inputs..][slice.clone()];
                }
                let mut w = [&all[..0]; C];
                for c in 0..C {
                    w[c] = &all[(panel + c * step) * self.inputs..][slice.clone()];
                }
                let sums = tile::<S, W, R, C>(s, x, w);
                for r in 0..R {
                    for c in 0..C {
                        totals[r][c] = if start == 0 { sums[r][c] } else { s.add(totals[r][c], sums[r][c]) };
                    }
                }
                start = slice.end;
            }
            for r in 0..R {
                for c in 0..C {
                    // SAFETY: as above.
                    unsafe { self.output.store(s, totals[r][c], *row + r, panel + c * step, pass.end == self.inputs) };
                }
            }
            *row += R;
        }
    }
}

/// Sums of one slice for R rows and C panels.
#[inline(always)]
fn tile<S: Lanes, W: FloatFormat, const R: usize, const C: usize>(s: S, x: [&[f32]; R], w: [&[[W::Element; 16]]; C]) -> [[S::F; C]; R] {
    let len = x[0].len();
    for r in 0..R {
        assert_eq!(x[r].len(), len, "rows of one slice");
    }
    for c in 0..C {
        assert_eq!(w[c].len(), len, "panels of one slice");
    }
    let mut acc = [[s.splat(0.0); C]; R];
    for k in 0..len {
        let mut weights = [s.splat(0.0); C];
        for c in 0..C {
            if R == 1 {
                s.prefetch(w[c].as_ptr().wrapping_add(k).cast::<u8>().wrapping_add(PREFETCH_BYTES));
            }
            // SAFETY: k < len, which is every slice's length (asserted above).
            weights[c] = W::load(s, unsafe { w[c].get_unchecked(k) });
        }
        for r in 0..R {
            // SAFETY: as above.
            let x = s.splat(unsafe { *x[r].get_unchecked(k) });
            for c in 0..C {
                acc[r][c] = s.fma(x, weights[c], acc[r][c]);
            }
        }
    }
    acc
}
