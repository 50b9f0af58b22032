//! Linear layers with int8 or int4 codes, by int8 dot products.
//!
//! Formula, by ascending group of a slice of 512: `isum = dot(code + offset, a) - offset * asum` exactly in i32, then
//! `acc = fma(f32(isum), s_a * s_w, acc)`, and with a minimum `acc = fma(f32(asum), s_a * m_w, acc)`.
//! Weights: see `pack`. Activations: see `activations`; 4 codes are broadcast to all 16 columns.
//! Tiles: 6 rows x 2 panels with 32 registers (12 integer and 12 float accumulators), 2 x 1 with 16, 1 row x 4 panels.
//! Tolerance against the reference: none, equal bits.

use std::marker::PhantomData;
use std::ops::Range;

use super::activations::Activations;
use super::isa::{Kernel, Proven};
use super::lanes::Lanes;
use super::linear::{ONE_ROW_PANELS, Output};
use super::linear_float::{F16, F32, FloatFormat};
use super::pack::{IntegerWeights, LANES, Scales};
use crate::SLICE;

/// One unit: rows `rows` by panels `panels`.
pub(super) struct IntegerTiles<'a> {
    pub(super) x: &'a Activations,
    pub(super) weights: &'a IntegerWeights,
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
    pub(super) output: Output<'a>,
}

impl<'a> IntegerTiles<'a> {
    /// Runs the code for this layer's kind of codes and scales.
    pub(super) fn dispatch(self, proven: Proven) {
        let weights = self.weights;
        match (&weights.scales, &weights.minima) {
            (Scales::F16(scales), None) => self.with_codes::<F16, false>(proven, scales, &[]),
            (Scales::F16(scales), Some(Scales::F16(minima))) => self.with_codes::<F16, true>(proven, scales, minima),
            (Scales::F32(scales), None) => self.with_codes::<F32, false>(proven, scales, &[]),
            (Scales::F32(scales), Some(Scales::F32(minima))) => self.with_codes::<F32, true>(proven, scales, minima),
            _ => unreachable!("scales and minima are packed alike"),
        }
    }

    fn with_codes<W: FloatFormat, const MINIMUM: bool>(self, proven: Proven, scales: &'a [W::Element], minima: &'a [W::Element]) {
        let (scales, _) = scales.as_chunks();
        let (minima, _) = minima.as_chunks();
        let (codes, _) = self.weights.codes.as_chunks();
        if self.weights.nibbles {
            proven.run(Tiles::<Nibbles, W, MINIMUM> { unit: self, codes, scales, minima, kind: PhantomData });
        } else {
            proven.run(Tiles::<Bytes, W, MINIMUM> { unit: self, codes, scales, minima, kind: PhantomData });
        }
    }
}

/// How 8 codes of 16 columns lie in 64-byte chunks.
trait CodeFormat {
    /// Chunks of 8 codes.
    const CHUNKS: usize;
    /// Codes 0..4 and 4..8. `at` is the first chunk.
    ///
    /// # Safety
    /// `at + CHUNKS` chunks are there.
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2];
}

struct Bytes;
struct Nibbles;

impl CodeFormat for Bytes {
    const CHUNKS: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        unsafe { [s.load_codes(chunks.get_unchecked(at)), s.load_codes(chunks.get_unchecked(at + 1))] }
    }
}

impl CodeFormat for Nibbles {
    const CHUNKS: usize = 1;
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        s.load_nibbles(unsafe { chunks.get_unchecked(at) }).into()
    }
}

struct Tiles<'a, B, W: FloatFormat, const MINIMUM: bool> {
    unit: IntegerTiles<'a>,
    /// `[panels][K'/8][CHUNKS]`.
    codes: &'a [[u8; 64]],
    /// `[panels][groups]`.
    scales: &'a [[W::Element; LANES]],
    /// Like `scales`, or empty.
    minima: &'a [[W::Element; LANES]],
    kind: PhantomData<B>,
}

impl<B: CodeFormat, W: FloatFormat, const MINIMUM: bool> Kernel for Tiles<'_, B, W, MINIMUM> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let mut panel = self.unit.panels.start;
        if self.unit.rows.len() == 1 {
            self.columns::<S, ONE_ROW_PANELS>(s, &mut panel);
        } else if S::WIDE {
            self.columns::<S, 2>(s, &mut panel);
        }
        self.columns::<S, 1>(s, &mut panel);
    }
}

impl<B: CodeFormat, W: FloatFormat, const MINIMUM: bool> Tiles<'_, B, W, MINIMUM> {
    /// All rows of as many panels, C at a time, as there are.
    #[inline(always)]
    fn columns<S: Lanes, const C: usize>(&self, s: S, panel: &mut usize) {
        let groups = self.unit.weights.groups;
        let slice_groups = SLICE / groups.group;
        while *panel + C <= self.unit.panels.end {
            for start in (0..groups.count).step_by(slice_groups) {
                let slice = start..(start + slice_groups).min(groups.count);
                let mut row = self.unit.rows.start;
                if C != ONE_ROW_PANELS {
                    if S::WIDE {
                        self.rows::<S, 6, C>(s, &mut row, *panel, &slice);
                        self.rows::<S, 4, C>(s, &mut row, *panel, &slice);
                    }
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
        while *row + R <= self.unit.rows.end {
            let sums = self.tile::<S, R, C>(s, *row, panel, slice);
            let (is_first, is_last) = (slice.start == 0, slice.end == self.unit.weights.groups.count);
            for r in 0..R {
                for c in 0..C {
                    // SAFETY: units have disjoint rows and panels, and this one is ours.
                    unsafe { self.unit.output.add_slice(s, sums[r][c], *row + r, panel + c, is_first, is_last) };
                }
            }
            *row += R;
        }
    }

    /// Sums of one slice for R rows and C panels.
    #[inline(always)]
    fn tile<S: Lanes, const R: usize, const C: usize>(&self, s: S, row: usize, panel: usize, slice: &Range<usize>) -> [[S::F; C]; R] {
        let (input, groups) = (self.unit.x, self.unit.weights.groups);
        let offset = self.unit.weights.offset;
        // Steps of 8 codes: of a whole group, and up to the end of the row.
        let (group_steps, row_steps) = (groups.padded_group() / 8, groups.padded_inputs() / 8);

        let (all_quads, _) = input.codes.as_chunks::<4>();
        let mut quads = [&all_quads[..0]; R];
        let mut scales = [&input.scales[..0]; R];
        let mut sums = [&input.sums[..0]; R];
        for r in 0..R {
            quads[r] = &all_quads[(row + r) * (input.stride / 4)..][..row_steps * 2];
            scales[r] = &input.scales[(row + r) * groups.count..][..groups.count];
            sums[r] = &input.sums[(row + r) * groups.count..][..groups.count];
        }
        let mut codes = [&self.codes[..0]; C];
        let mut weight_scales = [&self.scales[..0]; C];
        let mut weight_minima = [&self.minima[..0]; C];
        for c in 0..C {
            codes[c] = &self.codes[(panel + c) * row_steps * B::CHUNKS..][..row_steps * B::CHUNKS];
            weight_scales[c] = &self.scales[(panel + c) * groups.count..][..groups.count];
            if MINIMUM {
                weight_minima[c] = &self.minima[(panel + c) * groups.count..][..groups.count];
            }
        }

        let mut acc = [[s.splat(0.0); C]; R];
        assert!(slice.end <= groups.count, "a slice within the row");
        for g in slice.clone() {
            let mut dot = [[s.dot_start(0); C]; R];
            for r in 0..R {
                // SAFETY: g < groups.count, the length of every scale, sum and minimum slice taken above.
                let start = s.dot_start(-offset * unsafe { *sums[r].get_unchecked(g) });
                for c in 0..C {
                    dot[r][c] = start;
                }
            }
            for step in g * group_steps..((g + 1) * group_steps).min(row_steps) {
                let mut loaded = [[s.load_codes(&[0; 64]); 2]; C];
                for c in 0..C {
                    // SAFETY: step < row_steps, and a panel's codes are row_steps * CHUNKS.
                    loaded[c] = unsafe { B::load(s, codes[c], step * B::CHUNKS) };
                }
                for half in 0..2 {
                    for r in 0..R {
                        // SAFETY: step < row_steps, and a row's quads are row_steps * 2.
                        let quad = s.quad(unsafe { *quads[r].get_unchecked(step * 2 + half) });
                        for c in 0..C {
                            dot[r][c] = s.dot(dot[r][c], loaded[c][half], quad);
                        }
                    }
                }
            }
            for c in 0..C {
                // SAFETY: g < groups.count, as above.
                let scale = W::load(s, unsafe { weight_scales[c].get_unchecked(g) });
                for r in 0..R {
                    // SAFETY: as above.
                    let x_scale = s.splat(unsafe { *scales[r].get_unchecked(g) });
                    acc[r][c] = s.fma(s.dot_finish(dot[r][c]), s.mul(x_scale, scale), acc[r][c]);
                }
                if MINIMUM {
                    // SAFETY: as above.
                    let minimum = W::load(s, unsafe { weight_minima[c].get_unchecked(g) });
                    for r in 0..R {
                        // SAFETY: as above.
                        let (sum, x_scale) = unsafe { (*sums[r].get_unchecked(g), s.splat(*scales[r].get_unchecked(g))) };
                        acc[r][c] = s.fma(s.splat(sum as f32), s.mul(x_scale, minimum), acc[r][c]);
                    }
                }
            }
        }
        acc
    }
}
