//! Activations as int8 in groups (docs/numerics.md, rule 3), in the order in which packed codes lie.
//!
//! Rows lie in the blocks in which tiles take them ([`Blocks`]), 4 codes of one row beside the same 4 of the next: a tile
//! finds all its rows from one address. With an address for each row they do not fit the registers, and the address is
//! loaded again for each 4 codes.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::{Lanes, load_some};
use super::memory::{Aligned, Shared};
use super::pack::{Groups, IntegerWeights};
use crate::SLICE;
use crate::ops::{Columns, PackError};

/// Quantised rows; the memory is reused from call to call.
#[derive(Debug)]
pub(super) struct Activations {
    /// `[blocks][stride / 4][rows of the block][4]` codes; groups padded to multiples of 8 with code 0.
    pub(super) codes: Aligned<i8>,
    /// `[blocks][groups][rows of the block]`.
    pub(super) scales: Aligned<f32>,
    /// As `scales`: the sum of each group's codes, exact.
    pub(super) sums: Aligned<f32>,
    /// As `scales`: `-offset * sum`, where a group's dot product with unsigned codes starts.
    pub(super) corrections: Aligned<i32>,
    pub(super) groups: Groups,
    /// The column of the inputs that they begin with.
    pub(super) first_input: usize,
    /// Of the weights' codes.
    pub(super) offset: i32,
    /// Codes between rows, a multiple of 64.
    pub(super) stride: usize,
}

impl Activations {
    pub(super) fn empty() -> Self {
        let none = "no memory is asked for";
        Self {
            codes: Aligned::new(0).expect(none),
            scales: Aligned::new(0).expect(none),
            sums: Aligned::new(0).expect(none),
            corrections: Aligned::new(0).expect(none),
            groups: Groups::new(0, 1),
            first_input: 0,
            offset: 0,
            stride: 0,
        }
    }

    /// Makes room for `row_count` rows; allocates only if it never had so much.
    pub(super) fn prepare(&mut self, row_count: usize, weights: &IntegerWeights, first_input: usize) -> Result<(), PackError> {
        let groups = weights.groups;
        (self.groups, self.first_input, self.offset) = (groups, first_input, weights.offset);
        self.stride = groups.padded_inputs().next_multiple_of(64);
        if self.codes.len() < row_count * self.stride {
            self.codes = Aligned::new(row_count * self.stride)?;
        }
        if self.scales.len() < row_count * groups.count {
            self.scales = Aligned::new(row_count * groups.count)?;
            self.sums = Aligned::new(row_count * groups.count)?;
            self.corrections = Aligned::new(row_count * groups.count)?;
        }
        Ok(())
    }

    /// Whether these were quantised for such weights that read inputs from `first_input` on.
    pub(super) fn suits(&self, weights: &IntegerWeights, first_input: usize) -> bool {
        self.groups == weights.groups && self.first_input == first_input && self.offset == weights.offset
    }
}

/// Heights of tiles, the tallest first. A run's rows are cut from its first row on into as many as fit of each; who quantises and who
/// computes must agree.
#[inline(always)]
pub(super) const fn heights(wide: bool) -> &'static [usize] {
    if wide { &[8, 4, 2, 1] } else { &[2, 1] }
}

/// Rows of one run that are quantised together; a multiple of the greatest height.
pub(super) const QUANTISE_ROWS: usize = 8;

/// Quantises rows `rows` of `x`, which begin [`QUANTISE_ROWS`] or a multiple of them after their run and are as many or the run's last.
pub(super) struct QuantiseRows<'a> {
    pub(super) x: &'a [f32],
    /// Where a row's inputs are.
    pub(super) x_at: Columns,
    pub(super) rows: Range<usize>,
    pub(super) groups: Groups,
    pub(super) offset: i32,
    pub(super) stride: usize,
    pub(super) codes: Shared<'a, i8>,
    pub(super) scales: Shared<'a, f32>,
    pub(super) sums: Shared<'a, f32>,
    pub(super) corrections: Shared<'a, i32>,
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, s: S) {
        let mut row = self.rows.start;
        for &height in heights(S::WIDE) {
            while row + height <= self.rows.end {
                match height {
                    8 => self.block::<S, 8>(s, row),
                    4 => self.block::<S, 4>(s, row),
                    2 => self.block::<S, 2>(s, row),
                    _ => self.block::<S, 1>(s, row),
                }
                row += height;
            }
        }
    }
}

impl QuantiseRows<'_> {
    /// The R rows from `first` on.
    #[inline(always)]
    fn block<S: Lanes, const R: usize>(&self, s: S, first: usize) {
        let groups = self.groups;
        // SAFETY: units have disjoint rows, and so have blocks.
        let codes = unsafe { self.codes.part(first * self.stride..(first + R) * self.stride) };
        let of_groups = first * groups.count..(first + R) * groups.count;
        // SAFETY: as above.
        let scales = unsafe { self.scales.part(of_groups.clone()) };
        // SAFETY: as above.
        let sums = unsafe { self.sums.part(of_groups.clone()) };
        // SAFETY: as above.
        let corrections = unsafe { self.corrections.part(of_groups) };
        let mut of_rows = [[0; SLICE]; R];
        for g in 0..groups.count {
            let padded = groups.padded(g);
            let mut x = [&self.x[..0]; R];
            for r in 0..R {
                x[r] = &self.x[(first + r) * self.x_at.stride + self.x_at.offset..][..groups.inputs][groups.members(g)];
            }
            let (of_scales, of_sums) = quantise_group(s, x, &mut of_rows, padded);
            for r in 0..R {
                let at = g * R + r;
                (scales[at], sums[at], corrections[at]) = (of_scales[r], of_sums[r] as f32, -self.offset * of_sums[r]);
            }
            let (quads, _) = codes[g * groups.padded_group() * R..][..padded * R].as_chunks_mut::<4>();
            for (q, quads) in quads.chunks_exact_mut(R).enumerate() {
                for r in 0..R {
                    quads[r].copy_from_slice(&of_rows[r][q * 4..][..4]);
                }
            }
        }
    }
}

/// Scale and sum of one group of each of R rows; a row's first `padded` codes are the group's length rounded up to 8, and the padding
/// becomes 0. Each stage goes through all rows: a row alone is a chain of operations that wait for one another.
#[inline(always)]
fn quantise_group<S: Lanes, const R: usize>(s: S, x: [&[f32]; R], codes: &mut [[i8; SLICE]; R], padded: usize) -> ([f32; R], [i32; R]) {
    let len = x[0].len();
    for r in 0..R {
        assert_eq!(x[r].len(), len, "members of one group");
    }
    let (whole, tail) = (len / 16, len / 16 * 16..len);
    let mut greatest = [s.splat(0.0); R];
    for chunk in 0..whole {
        for r in 0..R {
            greatest[r] = s.max(s.abs(load_some(s, &x[r][chunk * 16..][..16])), greatest[r]);
        }
    }
    if !tail.is_empty() {
        for r in 0..R {
            greatest[r] = s.max(s.abs(load_some(s, &x[r][tail.clone()])), greatest[r]);
        }
    }
    let (mut scales, mut factors, mut vanishes) = ([0.0; R], [0.0; R], [false; R]);
    for r in 0..R {
        let amax = s.max_lane(greatest[r]);
        let inverse = 127.0 / amax;
        vanishes[r] = inverse == f32::INFINITY;
        (scales[r], factors[r]) = (amax / 127.0, if vanishes[r] { 0.0 } else { inverse });
    }
    let mut sums = [s.zero_int(); R];
    for chunk in 0..whole {
        for r in 0..R {
            let rounded = s.to_int(s.mul(load_some(s, &x[r][chunk * 16..][..16]), s.splat(factors[r])));
            sums[r] = s.add_int(sums[r], rounded);
            let (chunks, _) = codes[r].as_chunks_mut::<16>();
            s.store_codes(rounded, &mut chunks[chunk]);
        }
    }
    if !tail.is_empty() {
        for r in 0..R {
            let rounded = s.to_int(s.mul(load_some(s, &x[r][tail.clone()]), s.splat(factors[r])));
            sums[r] = s.add_int(sums[r], rounded);
            let mut last = [0i8; 16];
            s.store_codes(rounded, &mut last);
            // What is left of the codes is 8 or 16, with zeros for the padding.
            codes[r][tail.start..padded].copy_from_slice(&last[..padded - tail.start]);
        }
    }
    let mut of_groups = [0; R];
    for r in 0..R {
        of_groups[r] = s.sum_int(sums[r]);
        // So small that the inverse overflows.
        if vanishes[r] {
            codes[r][..padded].fill(0);
            (scales[r], of_groups[r]) = (0.0, 0);
        }
    }
    (scales, of_groups)
}
