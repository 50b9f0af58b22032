//! Linear layers with f32, f16, bf16 or fp8 weights.
//!
//! Formula: inside a slice of 512 `acc[r][n] = fma(x[r][k], w[n][k], acc[r][n])` by ascending k; lanes are 16 n.
//! Weights of fp8 are `w = code * scale` first, rounded once, with a scale for each group of k.
//! Weights: panels `[K][16]`; activations: rows `[K]`, broadcast.
//! Tiles: 8 rows x 3 panels with 32 registers (24 accumulators hide the fma's latency; 11 loads for 24 fma), 4 x 1 with
//! 16 registers, 1 row x 4 panels (four streams keep the memory busy). Tolerance against the reference: none, equal bits.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::Lanes;
use super::linear::{Output, PASS, PREFETCH_BYTES, Panels};
use super::memory::Element;
use super::pack::LANES;
use crate::SLICE;
use crate::ops::Columns;

/// How a float is stored in a panel.
pub(super) trait FloatFormat {
    type Element: Element;
    /// Whether elements are multiplied with scales.
    const SCALED: bool = false;
    fn load<S: Lanes>(s: S, x: &[Self::Element; 16]) -> S::F;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
/// Divided by 256; scales make up for it.
pub(super) struct Fp8;

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

impl FloatFormat for Fp8 {
    type Element = u8;
    const SCALED: bool = true;
    #[inline(always)]
    fn load<S: Lanes>(s: S, x: &[u8; 16]) -> S::F {
        s.load_fp8(x)
    }
}

/// Scales of elements, `[panels][groups][16]`; none for formats that are not `SCALED`.
#[derive(Clone, Copy)]
pub(super) struct ElementScales<'a> {
    pub(super) all: &'a [[f32; LANES]],
    /// K of a group, a divisor of a slice.
    pub(super) group: usize,
}

impl ElementScales<'_> {
    pub(super) const NONE: Self = Self { all: &[], group: SLICE };
}

/// One unit: rows `rows` by panels `panels`.
pub(super) struct FloatTiles<'a, W: FloatFormat> {
    pub(super) x: &'a [f32],
    /// Where a row's inputs are.
    pub(super) x_at: Columns,
    /// K.
    pub(super) inputs: usize,
    /// `[panels][K][16]`.
    pub(super) weights: &'a [W::Element],
    pub(super) scales: ElementScales<'a>,
    /// Of all units that read these weights.
    pub(super) first_row: usize,
    pub(super) rows: Range<usize>,
    pub(super) panels: Panels,
    /// Where in `output` each panel's sums go.
    pub(super) places: Panels,
    pub(super) output: Output<'a>,
}

impl<W: FloatFormat> Kernel for FloatTiles<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        match self.panels.streams {
            4 => self.streams::<S, 4>(s),
            3 => self.streams::<S, 3>(s),
            _ => {
                let mut step = 0;
                while S::WIDE && step + 3 <= self.panels.count {
                    self.columns::<S, 3>(s, step);
                    step += 3;
                }
                while step < self.panels.count {
                    self.columns::<S, 1>(s, step);
                    step += 1;
                }
            }
        }
    }
}

impl<W: FloatFormat> FloatTiles<'_, W> {
    /// One row, C streams.
    #[inline(always)]
    fn streams<S: Lanes, const C: usize>(&self, s: S) {
        for step in 0..self.panels.count {
            let (at, places) = (self.panels.at::<C>(step, self.panels.distance), self.places.at::<C>(step, self.places.distance));
            for pass in self.passes() {
                self.rows::<S, 1, C>(s, &mut self.rows.start.clone(), at, places, &pass);
            }
        }
    }

    /// K in passes.
    #[inline(always)]
    fn passes(&self) -> impl Iterator<Item = Range<usize>> {
        let inputs = self.inputs;
        (0..inputs).step_by(PASS).map(move |start| start..(start + PASS).min(inputs))
    }

    /// All rows of C neighbouring panels.
    #[inline(always)]
    fn columns<S: Lanes, const C: usize>(&self, s: S, step: usize) {
        let (at, places) = (self.panels.at::<C>(step, 1), self.places.at::<C>(step, 1));
        for pass in self.passes() {
            let mut row = self.rows.start;
            if S::WIDE {
                self.rows::<S, 8, C>(s, &mut row, at, places, &pass);
            }
            self.rows::<S, 4, C>(s, &mut row, at, places, &pass);
            self.rows::<S, 2, C>(s, &mut row, at, places, &pass);
            self.rows::<S, 1, C>(s, &mut row, at, places, &pass);
        }
    }

    /// As many rows, R at a time, as there are.
    #[inline(always)]
    fn rows<S: Lanes, const R: usize, const C: usize>(
        &self,
        s: S,
        row: &mut usize,
        at: [usize; C],
        places: [usize; C],
        pass: &Range<usize>,
    ) {
        let (all, _) = self.weights.as_chunks::<LANES>();
        // Several rows go through the panels once for each tile: the first one asks for the next panels meanwhile.
        let next_bytes = C * self.inputs * size_of::<[W::Element; LANES]>();
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
            let ahead = if R == 1 { Some(PREFETCH_BYTES) } else { (*row == self.first_row).then_some(next_bytes) };
            let mut start = pass.start;
            while start < pass.end {
                let slice = start..(start + SLICE).min(pass.end);
                let mut x = [&self.x[..0]; R];
                for r in 0..R {
                    x[r] = &self.x[(*row + r) * self.x_at.stride + self.x_at.offset..][slice.clone()];
                }
                let mut w = [&all[..0]; C];
                for c in 0..C {
                    w[c] = &all[at[c] * self.inputs..][slice.clone()];
                }
                let mut scales = [&self.scales.all[..0]; C];
                if W::SCALED {
                    let group = self.scales.group;
                    for c in 0..C {
                        scales[c] = &self.scales.all[at[c] * self.inputs.div_ceil(group)..][slice.start / group..slice.end.div_ceil(group)];
                    }
                }
                let sums = tile::<S, W, R, C>(s, x, w, scales, self.scales.group, ahead);
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
                    unsafe { self.output.store(s, totals[r][c], *row + r, at[c], places[c], pass.end == self.inputs) };
                }
            }
            *row += R;
        }
    }
}

/// Sums of one slice for R rows and C panels; asks for the weights that lie `ahead` bytes further.
#[inline(always)]
fn tile<S: Lanes, W: FloatFormat, const R: usize, const C: usize>(
    s: S,
    x: [&[f32]; R],
    w: [&[[W::Element; 16]]; C],
    scales: [&[[f32; LANES]]; C],
    group: usize,
    ahead: Option<usize>,
) -> [[S::F; C]; R] {
    let len = x[0].len();
    for r in 0..R {
        assert_eq!(x[r].len(), len, "rows of one slice");
    }
    for c in 0..C {
        assert_eq!(w[c].len(), len, "panels of one slice");
    }
    let mut acc = [[s.splat(0.0); C]; R];
    let mut scale = [s.splat(0.0); C];
    for k in 0..len {
        if W::SCALED && k % group == 0 {
            for c in 0..C {
                scale[c] = s.load(&scales[c][k / group]);
            }
        }
        let mut weights = [s.splat(0.0); C];
        for c in 0..C {
            if let Some(ahead) = ahead {
                s.prefetch(w[c].as_ptr().wrapping_add(k).cast::<u8>().wrapping_add(ahead));
            }
            // SAFETY: k < len, which is every slice's length (asserted above).
            weights[c] = W::load(s, unsafe { w[c].get_unchecked(k) });
            if W::SCALED {
                weights[c] = s.mul(weights[c], scale[c]);
            }
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
