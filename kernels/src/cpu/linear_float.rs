//! Linear layers with f32, f16 or bf16 weights.
//!
//! Formula: inside a slice of 512 `acc[r][n] = fma(x[r][k], w[n][k], acc[r][n])` by ascending k; lanes are 16 n.
//! Weights: panels `[K][16]`; activations: rows `[K]`, broadcast.
//! Tiles: 8 rows x 3 panels with 32 registers (24 accumulators hide the fma's latency; 11 loads for 24 fma), 4 x 1 with
//! 16 registers, 1 row x 4 panels (four streams keep the memory busy). Tolerance against the reference: none, equal bits.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::Lanes;
use super::linear::{ONE_ROW_PANELS, Output};
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
            self.columns::<S, ONE_ROW_PANELS>(s, &mut panel);
        } else if S::WIDE {
            self.columns::<S, 3>(s, &mut panel);
        }
        self.columns::<S, 1>(s, &mut panel);
    }
}

impl<W: FloatFormat> FloatTiles<'_, W> {
    /// All rows of as many panels, C at a time, as there are.
    #[inline(always)]
    fn columns<S: Lanes, const C: usize>(&self, s: S, panel: &mut usize) {
        while *panel + C <= self.panels.end {
            for start in (0..self.inputs).step_by(SLICE) {
                let slice = start..(start + SLICE).min(self.inputs);
                let mut row = self.rows.start;
                if C != ONE_ROW_PANELS {
                    if S::WIDE {
                        self.rows::<S, 8, C>(s, &mut row, *panel, &slice);
                    }
                    self.rows::<S, 4, C>(s, &mut row, *panel, &slice);
                    self.rows::<S, 2, C>(s, &mut row, *panel, &slice);
                }
                self.rows::<S, 1, C>(s, &mut row, *panel, &slice);
            }
            *panel += C;
        }
    }

    /// As many rows, R at a time, as there are.
    #[inline(always)]
    fn rows<S: Lanes, const R: usize, const C: usize>(&self, s: S, row: &mut usize, panel: usize, slice: &Range<usize>) {
        while *row + R <= self.rows.end {
            let mut x = [&self.x[..0]; R];
            for r in 0..R {
                x[r] = &self.x[(*row + r) * self.inputs..][slice.clone()];
            }
            let (all, _) = self.weights.as_chunks::<LANES>();
            let mut w = [&all[..0]; C];
            for c in 0..C {
                w[c] = &all[(panel + c) * self.inputs..][slice.clone()];
            }
            let sums = tile::<S, W, R, C>(s, x, w);
            for r in 0..R {
                for c in 0..C {
                    // SAFETY: units have disjoint rows and panels, and this one is ours.
                    unsafe { self.output.add_slice(s, sums[r][c], *row + r, panel + c, slice.start == 0, slice.end == self.inputs) };
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
