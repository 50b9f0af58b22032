//! Activations as int8 in groups (docs/numerics.md, rule 3), in the order in which packed codes lie.

use super::isa::Kernel;
use super::lanes::{Lanes, load_some};
use super::memory::{Aligned, Shared};
use super::pack::{Groups, IntegerWeights};
use crate::ops::{Columns, PackError};

/// Quantised rows; the memory is reused from call to call.
#[derive(Debug)]
pub(super) struct Activations {
    /// `[rows][stride]` codes; groups padded to multiples of 8 with code 0.
    pub(super) codes: Aligned<i8>,
    /// `[rows][groups]`.
    pub(super) scales: Aligned<f32>,
    /// `[rows][groups]`: the sum of each group's codes, exact.
    pub(super) sums: Aligned<f32>,
    /// `[rows][groups]`: `-offset * sum`, where a group's dot product with unsigned codes starts.
    pub(super) corrections: Aligned<i32>,
    pub(super) groups: Groups,
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
            offset: 0,
            stride: 0,
        }
    }

    /// Makes room for `row_count` rows; allocates only if it never had so much.
    pub(super) fn prepare(&mut self, row_count: usize, weights: &IntegerWeights) -> Result<(), PackError> {
        let groups = weights.groups;
        (self.groups, self.offset) = (groups, weights.offset);
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

    /// Whether these were quantised for such weights.
    pub(super) fn suits(&self, weights: &IntegerWeights) -> bool {
        self.groups == weights.groups && self.offset == weights.offset
    }
}

/// Quantises rows `rows` of `x`.
pub(super) struct QuantiseRows<'a> {
    pub(super) x: &'a [f32],
    /// Where a row's inputs are.
    pub(super) x_at: Columns,
    pub(super) rows: std::ops::Range<usize>,
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
        let groups = self.groups;
        for row in self.rows {
            let x = &self.x[row * self.x_at.stride + self.x_at.offset..][..groups.inputs];
            // SAFETY: units have disjoint rows.
            let codes = unsafe { self.codes.part(row * self.stride..row * self.stride + groups.padded_inputs()) };
            // SAFETY: as above.
            let scales = unsafe { self.scales.part(row * groups.count..(row + 1) * groups.count) };
            // SAFETY: as above.
            let sums = unsafe { self.sums.part(row * groups.count..(row + 1) * groups.count) };
            // SAFETY: as above.
            let corrections = unsafe { self.corrections.part(row * groups.count..(row + 1) * groups.count) };
            for g in 0..groups.count {
                let codes = &mut codes[g * groups.padded_group()..][..groups.padded(g)];
                let (scale, sum) = quantise_group(s, &x[groups.members(g)], codes);
                (scales[g], sums[g], corrections[g]) = (scale, sum as f32, -self.offset * sum);
            }
        }
    }
}

/// Scale and sum of one group; `codes` is `x.len()` rounded up to 8 and its padding becomes 0.
#[inline(always)]
fn quantise_group<S: Lanes>(s: S, x: &[f32], codes: &mut [i8]) -> (f32, i32) {
    let (chunks, tail) = x.as_chunks::<16>();
    let mut amax = s.splat(0.0);
    for chunk in chunks {
        amax = s.max(s.abs(s.load(chunk)), amax);
    }
    if !tail.is_empty() {
        amax = s.max(s.abs(load_some(s, tail)), amax);
    }
    let amax = s.max_lane(amax);
    let inverse = 127.0 / amax;
    if inverse == f32::INFINITY {
        codes.fill(0);
        return (0.0, 0);
    }
    let factor = s.splat(inverse);
    let mut sums = s.zero_int();
    let (code_chunks, _) = codes.as_chunks_mut::<16>();
    for (chunk, codes) in chunks.iter().zip(code_chunks) {
        let rounded = s.to_int(s.mul(s.load(chunk), factor));
        sums = s.add_int(sums, rounded);
        s.store_codes(rounded, codes);
    }
    if !tail.is_empty() {
        let rounded = s.to_int(s.mul(load_some(s, tail), factor));
        sums = s.add_int(sums, rounded);
        let mut padded = [0i8; 16];
        s.store_codes(rounded, &mut padded);
        // What is left of the codes is 8 or 16, with zeros for the padding.
        let rest = &mut codes[chunks.len() * 16..];
        let len = rest.len();
        rest.copy_from_slice(&padded[..len]);
    }
    (amax / 127.0, s.sum_int(sums))
}
