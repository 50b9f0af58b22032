//! How the integer kernels read a group's scales or minima of 16 outputs: as they are packed, and no wider in memory.

use super::lanes::Lanes;
use super::pack::LANES;

/// Scales or minima of some panels, lanes innermost.
pub(super) trait ScaleTable: Copy {
    /// Those of one panel, where a panel has `groups` groups.
    fn panel(self, panel: usize, groups: usize) -> Self;

    /// Those of group `g` as f32.
    ///
    /// # Safety
    /// The table is one of [`ScaleTable::panel`], and `g < groups`.
    unsafe fn load<S: Lanes>(self, s: S, g: usize) -> S::F;

    /// Where those of group `g` of a panel further on would begin; a hint, nothing is read.
    fn address(self, g: usize) -> *const u8;
}

/// `[panels][groups]` f16.
#[derive(Clone, Copy)]
pub(super) struct HalfScales<'a>(pub(super) &'a [[u16; LANES]]);

impl<'a> HalfScales<'a> {
    pub(super) fn new(scales: &'a [u16]) -> Self {
        Self(scales.as_chunks().0)
    }
}

impl ScaleTable for HalfScales<'_> {
    #[inline(always)]
    fn panel(self, panel: usize, groups: usize) -> Self {
        Self(&self.0[panel * groups..][..groups])
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(self, s: S, g: usize) -> S::F {
        // SAFETY: g < groups, which is the length that `panel` took.
        s.load_f16(unsafe { self.0.get_unchecked(g) })
    }

    #[inline(always)]
    fn address(self, g: usize) -> *const u8 {
        self.0.as_ptr().wrapping_add(g).cast()
    }
}

/// `BLOCK` groups share a second factor. The f32 product is the one that `format` forms, so the bits are the same.
#[derive(Clone, Copy)]
pub(super) struct TwoLevelScales<'a, const BLOCK: usize> {
    /// `[panels][groups]`.
    subs: &'a [[i8; LANES]],
    /// `[panels][groups / BLOCK]` f16.
    supers: &'a [[u16; LANES]],
}

impl<'a, const BLOCK: usize> TwoLevelScales<'a, BLOCK> {
    pub(super) fn new(subs: &'a [i8], supers: &'a [u16]) -> Self {
        Self { subs: subs.as_chunks().0, supers: supers.as_chunks().0 }
    }
}

impl<const BLOCK: usize> ScaleTable for TwoLevelScales<'_, BLOCK> {
    #[inline(always)]
    fn panel(self, panel: usize, groups: usize) -> Self {
        // The formats with blocks have whole blocks only; `load` relies on it.
        assert!(groups.is_multiple_of(BLOCK), "whole blocks");
        let blocks = groups / BLOCK;
        Self { subs: &self.subs[panel * groups..][..groups], supers: &self.supers[panel * blocks..][..blocks] }
    }

    #[inline(always)]
    unsafe fn load<S: Lanes>(self, s: S, g: usize) -> S::F {
        // SAFETY: g < groups and g / BLOCK < groups / BLOCK (groups is a multiple), the lengths that `panel` took.
        let (sub, factor) = unsafe { (self.subs.get_unchecked(g), self.supers.get_unchecked(g / BLOCK)) };
        s.mul(s.load_f16(factor), s.load_i8(sub))
    }

    #[inline(always)]
    fn address(self, g: usize) -> *const u8 {
        self.subs.as_ptr().wrapping_add(g).cast()
    }
}
