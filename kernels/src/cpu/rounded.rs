//! Activations as bf16 (docs/numerics.md, rule 9), in the order in which tiles take them: as `activations` has it, pairs of one row
//! beside the same pairs of the next.

use std::ops::Range;

use super::isa::Kernel;
use super::lanes::Lanes;
use super::memory::{Aligned, Shared};
use super::pairs::{round, smallest_exponent};
use crate::SLICE;
use crate::ops::{Columns, PackError};

/// Rounded rows; the memory is reused from call to call.
#[derive(Debug)]
pub(super) struct Rounded {
    /// `[blocks][K/2][rows of the block]`: an even k in the lower half; an odd K is padded with a zero.
    pub(super) pairs: Aligned<u32>,
    /// `[blocks][slices][rows of the block]`: see [`smallest_exponent`].
    pub(super) exponents: Aligned<u16>,
    /// The column of the inputs that they begin with.
    pub(super) first_input: usize,
    /// K.
    pub(super) inputs: usize,
}

impl Rounded {
    pub(super) fn empty() -> Self {
        let none = "no memory is asked for";
        Self { pairs: Aligned::new(0).expect(none), exponents: Aligned::new(0).expect(none), first_input: 0, inputs: 0 }
    }

    /// Makes room for `row_count` rows; allocates only if it never had so much.
    pub(super) fn prepare(&mut self, row_count: usize, inputs: usize, first_input: usize) -> Result<(), PackError> {
        (self.first_input, self.inputs) = (first_input, inputs);
        if self.pairs.len() < row_count * inputs.div_ceil(2) {
            self.pairs = Aligned::new(row_count * inputs.div_ceil(2))?;
        }
        if self.exponents.len() < row_count * inputs.div_ceil(SLICE) {
            self.exponents = Aligned::new(row_count * inputs.div_ceil(SLICE))?;
        }
        Ok(())
    }
}

/// Heights of tiles, as `activations::heights` has them for integers.
#[inline(always)]
pub(super) const fn heights(wide: bool) -> &'static [usize] {
    if wide { &[8, 4, 2, 1] } else { &[4, 2, 1] }
}

/// Rows of one run that are rounded together; a multiple of the greatest height.
pub(super) const ROUND_ROWS: usize = 8;

/// Rounds rows `rows` of `x`, which begin [`ROUND_ROWS`] or a multiple of them after their run and are as many or the run's last.
pub(super) struct RoundRows<'a> {
    pub(super) x: &'a [f32],
    /// Where a row's inputs are.
    pub(super) x_at: Columns,
    pub(super) rows: Range<usize>,
    pub(super) inputs: usize,
    pub(super) pairs: Shared<'a, u32>,
    pub(super) exponents: Shared<'a, u16>,
}

impl Kernel for RoundRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _s: S) {
        let mut first = self.rows.start;
        for &height in heights(S::WIDE) {
            while first + height <= self.rows.end {
                self.block(first, height);
                first += height;
            }
        }
    }
}

impl RoundRows<'_> {
    /// The `height` rows from `first` on.
    #[inline(always)]
    fn block(&self, first: usize, height: usize) {
        let (row_pairs, slices) = (self.inputs.div_ceil(2), self.inputs.div_ceil(SLICE));
        // SAFETY: units have disjoint rows, and so have blocks.
        let pairs = unsafe { self.pairs.part(first * row_pairs..(first + height) * row_pairs) };
        // SAFETY: as above.
        let exponents = unsafe { self.exponents.part(first * slices..(first + height) * slices) };
        for r in 0..height {
            let row = &self.x[(first + r) * self.x_at.stride + self.x_at.offset..][..self.inputs];
            for (slice, x) in row.chunks(SLICE).enumerate() {
                // Zero beyond an odd end.
                let mut rounded = [0; SLICE];
                for k in 0..x.len() {
                    rounded[k] = round(x[k]);
                }
                exponents[slice * height + r] = smallest_exponent(&rounded[..x.len()]);
                let (halves, _) = rounded.as_chunks::<2>();
                let out = &mut pairs[slice * (SLICE / 2) * height + r..];
                for (out, [even, odd]) in out.iter_mut().step_by(height).zip(&halves[..x.len().div_ceil(2)]) {
                    *out = u32::from(*even) | u32::from(*odd) << 16;
                }
            }
        }
    }
}
