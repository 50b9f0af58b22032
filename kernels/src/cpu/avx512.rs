//! [`Lanes`] by AVX-512 with VNNI: one register is 16 f32, or 16 columns of 4 codes.
//!
//! `vpdpbusd` (not its saturating sibling `vpdpbusds`) adds four u8 * i8 products, each exact, to an i32. It would wrap,
//! and never does: a group of 512 codes of 255 on a start of -128 * 512 * 127 stays within 2^25.

use super::lanes::Lanes;
use super::pairs::Pairs;
use std::arch::x86_64::*;

/// Proof that AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA and F16C are there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The features must be there.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Calls an intrinsic that touches no memory.
macro_rules! op {
    ($call:expr) => {
        // SAFETY: the token `self` proves that the instruction exists; the call touches no memory.
        unsafe { $call }
    };
}

impl Lanes for Avx512 {
    type F = __m512;
    type I = __m512i;
    type Mask = __mmask16;
    type Codes = __m512i;
    type Quad = __m512i;
    type Dot = __m512i;

    const WIDE: bool = true;

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
    #[inline(always)]
    fn prefetch_write(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_ET0>(address.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        // SAFETY: the reference covers the 64 bytes; unaligned loads are allowed. The token proves the instruction.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; 16]) {
        // SAFETY: the reference covers the 64 bytes; unaligned stores are allowed. The token proves the instruction.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: the reference covers the 32 bytes. The token proves the instruction.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> __m512 {
        // SAFETY: the reference covers the 32 bytes. The token proves the instruction.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())))) }
    }
    #[inline(always)]
    fn load_fp8(self, x: &[u8; 16]) -> __m512 {
        // SAFETY: the reference covers the 16 bytes. The token proves the instruction.
        let wide = unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(x.as_ptr().cast())) };
        // The sign is at the top in all of the upper byte: shifted by 7 it is in the top two bits, of which one is the exponent's.
        op!(_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16::<7>(wide), _mm256_set1_epi16(0xbf80u16.cast_signed()))))
    }
    #[inline(always)]
    fn load_pairs(self, x: &[u32; 16]) -> (__m512, __m512) {
        // SAFETY: the reference covers the 64 bytes. The token proves the instruction.
        let x = unsafe { _mm512_loadu_si512(x.as_ptr().cast()) };
        op!((_mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)), _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-0x1_0000)))))
    }
    #[inline(always)]
    fn splat_pair(self, x: u32) -> (__m512, __m512) {
        (self.splat(f32::from_bits(x << 16)), self.splat(f32::from_bits(x & 0xffff_0000)))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> __m512 {
        // SAFETY: the reference covers the 16 bytes. The token proves the instruction.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        op!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn neg(self, a: __m512) -> __m512 {
        op!(_mm512_xor_ps(a, _mm512_set1_ps(-0.0)))
    }
    #[inline(always)]
    fn copysign(self, a: __m512, sign: __m512) -> __m512 {
        op!(_mm512_or_ps(_mm512_abs_ps(a), _mm512_and_ps(sign, _mm512_set1_ps(-0.0))))
    }
    #[inline(always)]
    fn less(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn range_mask(self, first: usize, end: usize) -> __mmask16 {
        ((1u32 << end) - (1u32 << first)) as u16
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, yes: __m512, no: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(mask, no, yes))
    }
    #[inline(always)]
    fn round_ties_even(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn scale_by_power(self, p: __m512, n: __m512) -> __m512 {
        // One rounding either way: the first of the two factors keeps p normal.
        op!(_mm512_scalef_ps(p, n))
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn halving_sum(self, a: __m512) -> f32 {
        op!({
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn zero_int(self) -> __m512i {
        op!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn add_int(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn to_int(self, a: __m512) -> __m512i {
        op!(_mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn sum_int(self, a: __m512i) -> i32 {
        op!(_mm512_reduce_add_epi32(a))
    }
    #[inline(always)]
    fn store_codes(self, a: __m512i, out: &mut [i8; 16]) {
        // SAFETY: the reference covers the 16 bytes. The token proves the instruction.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(a)) }
    }

    #[inline(always)]
    fn load_codes(self, x: &[u8; 64]) -> __m512i {
        // SAFETY: the reference covers the 64 bytes. The token proves the instruction.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 64]) -> (__m512i, __m512i) {
        let both = self.load_codes(x);
        let mask = op!(_mm512_set1_epi8(15));
        op!((_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask)))
    }
    #[inline(always)]
    fn load_bits(self, x: &[u8; 8]) -> __m512i {
        op!(_mm512_maskz_set1_epi8(u64::from_le_bytes(*x), 2))
    }
    #[inline(always)]
    fn quad(self, x: [i8; 4]) -> __m512i {
        op!(_mm512_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned))))
    }
    #[inline(always)]
    fn dot_start(self, value: i32) -> __m512i {
        op!(_mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn dot(self, acc: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
        op!(_mm512_dpbusd_epi32(acc, codes, quad))
    }
    #[inline(always)]
    fn dot_start_whole(self, value: i32) -> __m512i {
        self.dot_start(value)
    }
    #[inline(always)]
    fn dot_whole(self, acc: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
        self.dot(acc, codes, quad)
    }
    #[inline(always)]
    fn dot_finish(self, acc: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(acc))
    }
}

/// Proof that AVX-512 BF16 is there beside all that [`Avx512`] proves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    /// # Safety
    /// The features must be there.
    #[inline(always)]
    pub(super) unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { Avx512::new() })
    }
}

/// `vdpbf16ps` is docs/numerics.md's rule 9: `pairs::selftest` asks it.
impl Pairs for Avx512Bf16 {
    type S = Avx512;
    type Weights = __m512bh;
    type Input = __m512bh;

    const FLUSHES: bool = true;

    #[inline(always)]
    fn lanes(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn load(self, pairs: &[u32; 16]) -> __m512bh {
        // SAFETY: the reference covers the 64 bytes; a __m512bh is any 64 bytes. The token proves the instruction.
        unsafe { std::mem::transmute(_mm512_loadu_si512(pairs.as_ptr().cast())) }
    }
    #[inline(always)]
    fn splat(self, pair: u32) -> __m512bh {
        // SAFETY: a __m512bh is any 64 bytes. The token proves the instruction.
        unsafe { std::mem::transmute(_mm512_set1_epi32(pair.cast_signed())) }
    }
    #[inline(always)]
    fn dot(self, acc: __m512, weights: __m512bh, input: __m512bh) -> __m512 {
        op!(_mm512_dpbf16_ps(acc, input, weights))
    }
}
