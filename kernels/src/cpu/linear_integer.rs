//! Linear layers with codes of up to 8 bits, by int8 dot products.
//!
//! Formula, by ascending group of a slice of 512: `isum = dot(code + offset, a) - offset * asum` exactly in i32, then
//! `acc = fma(f32(isum), s_a * s_w, acc)`, and with a minimum `acc = fma(f32(asum), s_a * m_w, acc)`.
//! Weights: see `pack`. Activations: see `activations`; 4 codes are broadcast to all 16 columns.
//! Tiles: 8 rows x 2 panels with 32 registers (16 integer accumulators: the instruction has a latency of 5 and two start in
//! a cycle, 12 leave no slack; the float ones spill to L1 between groups), 2 x 1 with 16 registers, 1 row x 4 panels.
//! Tolerance against the reference: none, equal bits.

use std::ops::Range;

use super::activations::Activations;
use super::isa::{Kernel, Proven};
use super::lanes::Lanes;
use super::linear::{Output, PASS, PREFETCH_BYTES, Panels};
use super::pack::{CodeWidth, IntegerWeights, Scales};
use super::scales::{HalfScales, ScaleTable, TwoLevelScales};
use crate::SLICE;

/// One unit: rows `rows` by panels `panels`.
pub(super) struct IntegerTiles<'a> {
    pub(super) x: &'a Activations,
    pub(super) weights: &'a IntegerWeights,
    /// Of all units that read these weights.
    pub(super) first_row: usize,
    pub(super) rows: Range<usize>,
    pub(super) panels: Panels,
    /// Where in `output` each panel's sums go.
    pub(super) places: Panels,
    pub(super) output: Output<'a>,
}

impl<'a> IntegerTiles<'a> {
    /// Runs the code for this layer's kind of codes, scales and minima: there is code for what a format has, no more.
    pub(super) fn dispatch(self, proven: Proven) {
        let (weights, none) = (self.weights, HalfScales(&[]));
        match (&weights.scales, &weights.minima) {
            (Scales::F16(scales), None) => {
                let scales = HalfScales::new(scales);
                match weights.width {
                    CodeWidth::Bit => self.run::<Bits, _, _, false>(proven, scales, none),
                    CodeWidth::Nibble => self.run::<Nibbles, _, _, false>(proven, scales, none),
                    CodeWidth::Byte => self.run::<Bytes, _, _, false>(proven, scales, none),
                    CodeWidth::WholeByte => self.run::<WholeBytes, _, _, false>(proven, scales, none),
                }
            }
            (Scales::F16(scales), Some(Scales::F16(minima))) => {
                let (scales, minima) = (HalfScales::new(scales), HalfScales::new(minima));
                match weights.width {
                    CodeWidth::Bit => unreachable!("no format has bits and minima"),
                    CodeWidth::Nibble => self.run::<Nibbles, _, _, true>(proven, scales, minima),
                    CodeWidth::Byte => self.run::<Bytes, _, _, true>(proven, scales, minima),
                    CodeWidth::WholeByte => self.run::<WholeBytes, _, _, true>(proven, scales, minima),
                }
            }
            (Scales::F16(supers), Some(Scales::Zeros(zeros))) => {
                assert_eq!(weights.width, CodeWidth::Nibble, "codes of the formats with zero points");
                // A minimum is a zero point times its group's own scale.
                self.run::<Nibbles, _, _, true>(proven, HalfScales::new(supers), TwoLevelScales::<1>::new(zeros, supers));
            }
            (Scales::TwoLevel { subs, supers, block_groups: 16 }, None) => {
                assert_eq!(weights.width, CodeWidth::Byte, "q6_k's codes");
                let scales = TwoLevelScales::<16>::new(subs, supers);
                self.run::<Bytes, _, _, false>(proven, scales, scales);
            }
            (Scales::TwoLevel { subs, supers, block_groups: 8 }, Some(Scales::TwoLevel { subs: sub_minima, supers: super_minima, .. })) => {
                let (scales, minima) = (TwoLevelScales::<8>::new(subs, supers), TwoLevelScales::<8>::new(sub_minima, super_minima));
                match weights.width {
                    CodeWidth::Nibble => self.run::<Nibbles, _, _, true>(proven, scales, minima),
                    CodeWidth::Byte => self.run::<Bytes, _, _, true>(proven, scales, minima),
                    CodeWidth::Bit | CodeWidth::WholeByte => unreachable!("no format has such codes and blocks"),
                }
            }
            _ => unreachable!("scales and minima are packed alike"),
        }
    }

    fn run<B: CodeFormat, W: ScaleTable, M: ScaleTable, const MINIMUM: bool>(self, proven: Proven, scales: W, minima: M) {
        let codes = B::chunks(&self.weights.codes);
        proven.run(Tiles::<B, W, M, MINIMUM> { unit: self, codes, scales, minima });
    }
}

/// How 8 codes of 16 columns lie in chunks.
trait CodeFormat {
    /// Bytes that are loaded at once.
    type Chunk;
    /// Chunks of 8 codes.
    const CHUNKS: usize;
    /// Packed codes as chunks.
    fn chunks(codes: &[u8]) -> &[Self::Chunk];
    /// Codes 0..4 and 4..8. `at` is the first chunk.
    ///
    /// # Safety
    /// `at + CHUNKS` chunks are there.
    unsafe fn load<S: Lanes>(s: S, chunks: &[Self::Chunk], at: usize) -> [S::Codes; 2];
    /// See [`Lanes::dot_start`].
    #[inline(always)]
    fn start<S: Lanes>(s: S, value: i32) -> S::Dot {
        s.dot_start(value)
    }
    /// See [`Lanes::dot`].
    #[inline(always)]
    fn dot<S: Lanes>(s: S, acc: S::Dot, codes: S::Codes, quad: S::Quad) -> S::Dot {
        s.dot(acc, codes, quad)
    }
}

struct WholeBytes;
struct Bytes;
struct Nibbles;
struct Bits;

impl CodeFormat for WholeBytes {
    type Chunk = [u8; 64];
    const CHUNKS: usize = Bytes::CHUNKS;
    fn chunks(codes: &[u8]) -> &[[u8; 64]] {
        Bytes::chunks(codes)
    }
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        unsafe { Bytes::load(s, chunks, at) }
    }
    #[inline(always)]
    fn start<S: Lanes>(s: S, value: i32) -> S::Dot {
        s.dot_start_whole(value)
    }
    #[inline(always)]
    fn dot<S: Lanes>(s: S, acc: S::Dot, codes: S::Codes, quad: S::Quad) -> S::Dot {
        s.dot_whole(acc, codes, quad)
    }
}

impl CodeFormat for Bytes {
    type Chunk = [u8; 64];
    const CHUNKS: usize = 2;
    fn chunks(codes: &[u8]) -> &[[u8; 64]] {
        codes.as_chunks().0
    }
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        unsafe { [s.load_codes(chunks.get_unchecked(at)), s.load_codes(chunks.get_unchecked(at + 1))] }
    }
}

impl CodeFormat for Nibbles {
    type Chunk = [u8; 64];
    const CHUNKS: usize = 1;
    fn chunks(codes: &[u8]) -> &[[u8; 64]] {
        codes.as_chunks().0
    }
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[u8; 64]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        s.load_nibbles(unsafe { chunks.get_unchecked(at) }).into()
    }
}

impl CodeFormat for Bits {
    type Chunk = [[u8; 8]; 2];
    const CHUNKS: usize = 1;
    fn chunks(codes: &[u8]) -> &[[[u8; 8]; 2]] {
        codes.as_chunks().0.as_chunks().0
    }
    #[inline(always)]
    unsafe fn load<S: Lanes>(s: S, chunks: &[[[u8; 8]; 2]], at: usize) -> [S::Codes; 2] {
        // SAFETY: the caller's promise.
        let chunk = unsafe { chunks.get_unchecked(at) };
        [s.load_bits(&chunk[0]), s.load_bits(&chunk[1])]
    }
}

struct Tiles<'a, B: CodeFormat, W: ScaleTable, M: ScaleTable, const MINIMUM: bool> {
    unit: IntegerTiles<'a>,
    /// `[panels][K'/8][CHUNKS]`.
    codes: &'a [B::Chunk],
    scales: W,
    /// Read if `MINIMUM`.
    minima: M,
}

impl<B: CodeFormat, W: ScaleTable, M: ScaleTable, const MINIMUM: bool> Kernel for Tiles<'_, B, W, M, MINIMUM> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let count = self.unit.panels.count;
        let mut step = 0;
        match self.unit.panels.streams {
            4 => self.streams::<S, 4>(s),
            3 => self.streams::<S, 3>(s),
            _ => {
                while S::WIDE && step + 2 <= count {
                    self.columns::<S, 2>(s, step);
                    step += 2;
                }
                while step < count {
                    self.columns::<S, 1>(s, step);
                    step += 1;
                }
            }
        }
    }
}

impl<B: CodeFormat, W: ScaleTable, M: ScaleTable, const MINIMUM: bool> Tiles<'_, B, W, M, MINIMUM> {
    /// One row, C streams.
    #[inline(always)]
    fn streams<S: Lanes, const C: usize>(&self, s: S) {
        let Self { unit, .. } = self;
        for step in 0..unit.panels.count {
            let (at, places) = (unit.panels.at::<C>(step, unit.panels.distance), unit.places.at::<C>(step, unit.places.distance));
            for pass in self.passes() {
                self.rows::<S, 1, C>(s, &mut unit.rows.start.clone(), at, places, &pass);
            }
        }
    }

    /// K in passes, in groups.
    #[inline(always)]
    fn passes(&self) -> impl Iterator<Item = Range<usize>> {
        let groups = self.unit.weights.groups;
        let pass_groups = PASS / groups.group;
        (0..groups.count).step_by(pass_groups).map(move |start| start..(start + pass_groups).min(groups.count))
    }

    /// All rows of C neighbouring panels.
    #[inline(always)]
    fn columns<S: Lanes, const C: usize>(&self, s: S, step: usize) {
        let (at, places) = (self.unit.panels.at::<C>(step, 1), self.unit.places.at::<C>(step, 1));
        for pass in self.passes() {
            let mut row = self.unit.rows.start;
            if S::WIDE {
                self.rows::<S, 8, C>(s, &mut row, at, places, &pass);
                self.rows::<S, 4, C>(s, &mut row, at, places, &pass);
            }
            self.rows::<S, 2, C>(s, &mut row, at, places, &pass);
            self.rows::<S, 1, C>(s, &mut row, at, places, &pass);
        }
    }

    /// As many rows, R at a time, as there are; `pass` is in groups.
    #[inline(always)]
    fn rows<S: Lanes, const R: usize, const C: usize>(
        &self,
        s: S,
        row: &mut usize,
        at: [usize; C],
        places: [usize; C],
        pass: &Range<usize>,
    ) {
        let groups = self.unit.weights.groups;
        let slice_groups = SLICE / groups.group;
        while *row + R <= self.unit.rows.end {
            if R > 1 {
                for r in 0..R {
                    for c in 0..C {
                        self.unit.output.prefetch(s, *row + r, places[c]);
                    }
                }
            }
            let mut totals = [[s.splat(0.0); C]; R];
            if pass.start != 0 {
                for r in 0..R {
                    for c in 0..C {
                        // SAFETY: units have disjoint rows and panels, and this one is ours.
                        totals[r][c] = unsafe { self.unit.output.load(s, *row + r, places[c]) };
                    }
                }
            }
            let mut start = pass.start;
            while start < pass.end {
                let slice = start..(start + slice_groups).min(pass.end);
                let sums = self.tile::<S, R, C>(s, *row, at, &slice);
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
                    unsafe { self.unit.output.store(s, totals[r][c], *row + r, at[c], places[c], pass.end == groups.count) };
                }
            }
            *row += R;
        }
    }

    /// Sums of one slice for R rows and C panels.
    #[inline(always)]
    fn tile<S: Lanes, const R: usize, const C: usize>(&self, s: S, row: usize, at: [usize; C], slice: &Range<usize>) -> [[S::F; C]; R] {
        let (input, groups) = (self.unit.x, self.unit.weights.groups);
        // Steps of 8 codes: of a whole group, and up to the end of the row.
        let (group_steps, row_steps) = (groups.padded_group() / 8, groups.padded_inputs() / 8);

        let (all_quads, _) = input.codes.as_chunks::<4>();
        // A block of R rows: see `activations`.
        let (quads, _) = all_quads[row * (input.stride / 4)..][..row_steps * 2 * R].as_chunks::<R>();
        let of_groups = row * groups.count..(row + R) * groups.count;
        let (scales, _) = input.scales[of_groups.clone()].as_chunks::<R>();
        let (sums, _) = input.sums[of_groups.clone()].as_chunks::<R>();
        let (corrections, _) = input.corrections[of_groups].as_chunks::<R>();
        let mut codes = [&self.codes[..0]; C];
        let mut weight_scales = [self.scales; C];
        let mut weight_minima = [self.minima; C];
        for c in 0..C {
            codes[c] = &self.codes[at[c] * row_steps * B::CHUNKS..][..row_steps * B::CHUNKS];
            weight_scales[c] = self.scales.panel(at[c], groups.count);
            if MINIMUM {
                weight_minima[c] = self.minima.panel(at[c], groups.count);
            }
        }

        // A unit goes through its panels once for each tile: all of its tiles together ask for the next panels, each for every `tiles`th
        // line, as the memory would hold up one that asked for them alone.
        let unit_rows = &self.unit.rows;
        let (tile, tiles) = ((row - unit_rows.start) / R, (unit_rows.len() / R).max(1));
        let fetches = R > 1 && unit_rows.start == self.unit.first_row;
        let panel_bytes = C * row_steps * B::CHUNKS * size_of::<B::Chunk>();
        let group_bytes = group_steps * B::CHUNKS * size_of::<B::Chunk>();
        let mut acc = [[s.splat(0.0); C]; R];
        assert!(slice.end <= groups.count, "a slice within the row");
        for g in slice.clone() {
            let mut dot = [[s.dot_start(0); C]; R];
            for r in 0..R {
                // SAFETY: g < groups.count, the length of every slice by group taken above.
                let start = B::start(s, unsafe { corrections.get_unchecked(g)[r] });
                for c in 0..C {
                    dot[r][c] = start;
                }
            }
            if fetches {
                for c in 0..C {
                    let next = codes[c].as_ptr().cast::<u8>().wrapping_add(panel_bytes + g * group_bytes);
                    let mut line = tile;
                    while line * 64 < group_bytes {
                        s.prefetch(next.wrapping_add(line * 64));
                        line += tiles;
                    }
                    if tile == 0 {
                        s.prefetch(weight_scales[c].address(C * groups.count + g));
                        if MINIMUM {
                            s.prefetch(weight_minima[c].address(C * groups.count + g));
                        }
                    }
                }
            }
            for step in g * group_steps..((g + 1) * group_steps).min(row_steps) {
                let mut loaded = [[s.load_codes(&[0; 64]); 2]; C];
                for c in 0..C {
                    if R == 1 {
                        for chunk in 0..B::CHUNKS {
                            let ahead = codes[c].as_ptr().wrapping_add(step * B::CHUNKS + chunk);
                            s.prefetch(ahead.cast::<u8>().wrapping_add(PREFETCH_BYTES));
                        }
                    }
                    // SAFETY: step < row_steps, and a panel's codes are row_steps * CHUNKS.
                    loaded[c] = unsafe { B::load(s, codes[c], step * B::CHUNKS) };
                }
                for half in 0..2 {
                    for r in 0..R {
                        // SAFETY: step < row_steps, and a block's quads are row_steps * 2.
                        let quad = s.quad(unsafe { quads.get_unchecked(step * 2 + half)[r] });
                        for c in 0..C {
                            dot[r][c] = B::dot(s, dot[r][c], loaded[c][half], quad);
                        }
                    }
                }
            }
            for c in 0..C {
                // SAFETY: g < groups.count, as above.
                let scale = unsafe { weight_scales[c].load(s, g) };
                for r in 0..R {
                    // SAFETY: as above.
                    let x_scale = s.splat(unsafe { scales.get_unchecked(g)[r] });
                    acc[r][c] = s.fma(s.dot_finish(dot[r][c]), s.mul(x_scale, scale), acc[r][c]);
                }
                if MINIMUM {
                    // SAFETY: as above.
                    let minimum = unsafe { weight_minima[c].load(s, g) };
                    for r in 0..R {
                        // SAFETY: as above.
                        let (sum, x_scale) = unsafe { (s.splat(sums.get_unchecked(g)[r]), s.splat(scales.get_unchecked(g)[r])) };
                        acc[r][c] = s.fma(sum, s.mul(x_scale, minimum), acc[r][c]);
                    }
                }
            }
        }
        acc
    }
}
