//! Differences of floats of 16 bits, and classes of their exponents, as `reference::differences` has them. Integers only: all instruction sets give the
//! same bytes. The sums are the reference's own loop, compiled for the instruction set; the classes are written out, as they do not vectorise by
//! themselves (a third of the time of a restore, against a thirtieth). Limited by the bytes that move within the first cache.

use super::isa::Isa;
use crate::reference::{self, BOUNDS_MAX};

/// See [`reference::add_differences`].
///
/// # Panics
/// If lengths differ, or the machine lacks the instruction set.
pub fn add_differences(isa: Isa, differences: &[u8], base: &[u8], out: &mut [u8]) {
    assert!(isa.available(), "this machine does not run {isa:?}");
    match isa {
        // SAFETY: `available` found AVX-512 F, BW and VL, which both of these stand for.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512Vnni => unsafe { avx512_add_differences(differences, base, out) },
        // SAFETY: `available` found AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni | Isa::Avx2 => unsafe { avx2_add_differences(differences, base, out) },
        _ => reference::add_differences(differences, base, out),
    }
}

/// See [`reference::exponent_classes`].
///
/// # Panics
/// If lengths differ, there are more than [`BOUNDS_MAX`] bounds, or the machine lacks the instruction set.
pub fn exponent_classes(isa: Isa, base: &[u8], bounds: &[u8], out: &mut [u16]) {
    assert!(isa.available(), "this machine does not run {isa:?}");
    assert!(bounds.len() <= BOUNDS_MAX, "classes that fit 16 bits");
    let done = match isa {
        // SAFETY: `available` found AVX-512 F, BW and VL, which both of these stand for.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 | Isa::Avx512Vnni => unsafe { avx512_exponent_classes(base, bounds, out) },
        // SAFETY: `available` found AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni | Isa::Avx2 => unsafe { avx2_exponent_classes(base, bounds, out) },
        _ => 0,
    };
    reference::exponent_classes(&base[2 * done..], bounds, &mut out[done..]);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512_add_differences(differences: &[u8], base: &[u8], out: &mut [u8]) {
    reference::add_differences(differences, base, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2_add_differences(differences: &[u8], base: &[u8], out: &mut [u8]) {
    reference::add_differences(differences, base, out);
}

/// Whole registers of 32 floats. Returns how many floats.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512_exponent_classes(base: &[u8], bounds: &[u8], out: &mut [u16]) -> usize {
    use std::arch::x86_64::*;
    let step = _mm512_set1_epi16(2048);
    // Spread once: within the loop a spread costs as much as a comparison.
    let mut spread = [_mm512_setzero_si512(); BOUNDS_MAX];
    for (spread, bound) in spread.iter_mut().zip(bounds) {
        *spread = _mm512_set1_epi16(i16::from(*bound));
    }
    let (bases, outs) = (base.as_chunks::<64>().0, out.as_chunks_mut::<32>().0);
    let count = bases.len().min(outs.len());
    for (base, out) in bases.iter().zip(outs) {
        // SAFETY: `base` has 64 bytes.
        let bits = unsafe { _mm512_loadu_si512(base.as_ptr().cast()) };
        let exponents = _mm512_and_si512(_mm512_srli_epi16::<7>(bits), _mm512_set1_epi16(255));
        let mut classes = _mm512_setzero_si512();
        for bound in &spread[..bounds.len()] {
            let above = _mm512_cmpge_epu16_mask(exponents, *bound);
            classes = _mm512_mask_add_epi16(classes, above, classes, step);
        }
        // SAFETY: `out` has 32 elements of two bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), classes) };
    }
    32 * count
}

/// Whole registers of 16 floats. Returns how many floats.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2_exponent_classes(base: &[u8], bounds: &[u8], out: &mut [u16]) -> usize {
    use std::arch::x86_64::*;
    let mut spread = [_mm256_setzero_si256(); BOUNDS_MAX];
    for (spread, bound) in spread.iter_mut().zip(bounds) {
        *spread = _mm256_set1_epi16(i16::from(*bound) - 1);
    }
    let (bases, outs) = (base.as_chunks::<32>().0, out.as_chunks_mut::<16>().0);
    let count = bases.len().min(outs.len());
    for (base, out) in bases.iter().zip(outs) {
        // SAFETY: `base` has 32 bytes.
        let bits = unsafe { _mm256_loadu_si256(base.as_ptr().cast()) };
        let exponents = _mm256_and_si256(_mm256_srli_epi16::<7>(bits), _mm256_set1_epi16(255));
        let mut classes = _mm256_setzero_si256();
        for bound in &spread[..bounds.len()] {
            // All ones, which is -1, where the exponent is above bound - 1; exponents and bounds are small enough for signed numbers.
            let above = _mm256_cmpgt_epi16(exponents, *bound);
            classes = _mm256_sub_epi16(classes, above);
        }
        // SAFETY: `out` has 16 elements of two bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_slli_epi16::<11>(classes)) };
    }
    16 * count
}
