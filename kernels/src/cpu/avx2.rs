//! [`Lanes`] by AVX2 with FMA and F16C: two registers are 16 f32.
//!
//! Integer products are exact. Without VNNI `maddubs_epi16` multiplies an unsigned by a signed byte and adds pairs to 16
//! bits, saturating beyond 32767; activations are within ±127, and
//! - codes of at most 127 give at most 2 * 127 * 127 = 32258;
//! - codes of the whole byte become `w = code - 128`, within ±128, and go as `|w| * sign(w) a`: `|-128|` is 128 as an unsigned
//!   byte and `-a` is a byte, so at most 2 * 128 * 127 = 32512. (The other way round, `|a| * sign(a) w`, -128 has no negative.)
//!
//! `madd_epi16` by ones then adds pairs to i32. With AVX-VNNI `vpdpbusd` does it all, for any code, as in `avx512`.

use super::lanes::Lanes;
use std::arch::x86_64::*;

/// Proof that AVX2, FMA and F16C are there, and AVX-VNNI if `VNNI`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
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

/// Applies one expression to both halves.
macro_rules! both {
    (|$($name:ident),*| $call:expr) => {{
        let low = { $(let $name = $name[0];)* op!($call) };
        let high = { $(let $name = $name[1];)* op!($call) };
        [low, high]
    }};
}

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type Mask = [__m256; 2];
    type Codes = [__m256i; 2];
    type Quad = __m256i;
    type Dot = [__m256i; 2];

    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
    #[inline(always)]
    fn prefetch_write(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_ET0>(address.cast()))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [__m256; 2] {
        [op!(_mm256_set1_ps(x)); 2]
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: the reference covers both 32-byte loads. The token proves the instruction.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, x: [__m256; 2], out: &mut [f32; 16]) {
        // SAFETY: the reference covers both 32-byte stores. The token proves the instruction.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; 16]) -> [__m256; 2] {
        // SAFETY: the reference covers both 16-byte loads. The token proves the instruction.
        let x = unsafe { [_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast())] };
        both!(|x| _mm256_cvtph_ps(x))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; 16]) -> [__m256; 2] {
        // SAFETY: the reference covers both 16-byte loads. The token proves the instruction.
        let x = unsafe { [_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast())] };
        both!(|x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))))
    }
    #[inline(always)]
    fn load_fp8(self, x: &[u8; 16]) -> [__m256; 2] {
        // SAFETY: the reference covers both 8-byte loads. The token proves the instruction.
        let x = unsafe { [_mm_loadl_epi64(x.as_ptr().cast()), _mm_loadl_epi64(x.as_ptr().add(8).cast())] };
        // Widened, the sign fills the upper byte: shifted by 7 it is in the top two bits, of which the lower is the exponent's.
        both!(|x| _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16::<7>(_mm_cvtepi8_epi16(x)), _mm_set1_epi16(0xbf80u16.cast_signed()))))
    }
    #[inline(always)]
    fn load_pairs(self, x: &[u32; 16]) -> ([__m256; 2], [__m256; 2]) {
        // SAFETY: the reference covers both 32-byte loads. The token proves the instruction.
        let x = unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())] };
        (
            both!(|x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))),
            both!(|x| _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-0x1_0000)))),
        )
    }
    #[inline(always)]
    fn splat_pair(self, x: u32) -> ([__m256; 2], [__m256; 2]) {
        (self.splat(f32::from_bits(x << 16)), self.splat(f32::from_bits(x & 0xffff_0000)))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> [__m256; 2] {
        // SAFETY: the reference covers both 8-byte loads. The token proves the instruction.
        let x = unsafe { [_mm_loadl_epi64(x.as_ptr().cast()), _mm_loadl_epi64(x.as_ptr().add(8).cast())] };
        both!(|x| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)))
    }

    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b, c| _mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: [__m256; 2]) -> [__m256; 2] {
        both!(|a| _mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn neg(self, a: [__m256; 2]) -> [__m256; 2] {
        both!(|a| _mm256_xor_ps(a, _mm256_set1_ps(-0.0)))
    }
    #[inline(always)]
    fn copysign(self, a: [__m256; 2], sign: [__m256; 2]) -> [__m256; 2] {
        both!(|a, sign| {
            let bit = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign))
        })
    }
    #[inline(always)]
    fn less(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        both!(|a, b| _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn range_mask(self, first: usize, end: usize) -> [__m256; 2] {
        let lanes = [op!(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), op!(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))];
        both!(|lanes| _mm256_castsi256_ps(_mm256_and_si256(
            _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(first as i32 - 1)),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(end as i32), lanes),
        )))
    }
    #[inline(always)]
    fn select(self, mask: [__m256; 2], yes: [__m256; 2], no: [__m256; 2]) -> [__m256; 2] {
        both!(|mask, yes, no| _mm256_blendv_ps(no, yes, mask))
    }
    #[inline(always)]
    fn round_ties_even(self, a: [__m256; 2]) -> [__m256; 2] {
        both!(|a| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn scale_by_power(self, p: [__m256; 2], n: [__m256; 2]) -> [__m256; 2] {
        both!(|p, n| {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: [__m256; 2]) -> f32 {
        op!({
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn halving_sum(self, a: [__m256; 2]) -> f32 {
        op!({
            let a = _mm256_add_ps(a[0], a[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn zero_int(self) -> [__m256i; 2] {
        [op!(_mm256_setzero_si256()); 2]
    }
    #[inline(always)]
    fn add_int(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        both!(|a, b| _mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn to_int(self, a: [__m256; 2]) -> [__m256i; 2] {
        both!(|a| _mm256_cvtps_epi32(a))
    }
    #[inline(always)]
    fn sum_int(self, a: [__m256i; 2]) -> i32 {
        op!({
            let a = _mm256_add_epi32(a[0], a[1]);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b01_00_11_10>(a));
            _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a)))
        })
    }
    #[inline(always)]
    fn store_codes(self, a: [__m256i; 2], out: &mut [i8; 16]) {
        let packed = op!({
            // Packing works within 128-bit halves: [a0 a2 | a1 a3] until the permutation.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a[0], a[1]));
            _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
        });
        // SAFETY: the reference covers the 16 bytes. The token proves the instruction.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), packed) }
    }

    #[inline(always)]
    fn load_codes(self, x: &[u8; 64]) -> [__m256i; 2] {
        // SAFETY: the reference covers both 32-byte loads. The token proves the instruction.
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(32).cast())] }
    }
    #[inline(always)]
    fn load_nibbles(self, x: &[u8; 64]) -> ([__m256i; 2], [__m256i; 2]) {
        let pair = self.load_codes(x);
        let mask = op!(_mm256_set1_epi8(15));
        (both!(|pair| _mm256_and_si256(pair, mask)), both!(|pair| _mm256_and_si256(_mm256_srli_epi16::<4>(pair), mask)))
    }
    #[inline(always)]
    fn load_bits(self, x: &[u8; 8]) -> [__m256i; 2] {
        let (halves, _) = x.as_chunks::<4>();
        let bits = [i32::from_le_bytes(halves[0]), i32::from_le_bytes(halves[1])];
        both!(|bits| {
            // Byte j takes byte j / 8 of the 32 bits, and keeps its bit j % 8.
            let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let single = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), bytes), single);
            _mm256_and_si256(_mm256_cmpeq_epi8(spread, single), _mm256_set1_epi8(2))
        })
    }
    #[inline(always)]
    fn quad(self, x: [i8; 4]) -> __m256i {
        op!(_mm256_set1_epi32(i32::from_ne_bytes(x.map(i8::cast_unsigned))))
    }
    #[inline(always)]
    fn dot_start(self, value: i32) -> [__m256i; 2] {
        [op!(_mm256_set1_epi32(value)); 2]
    }
    #[inline(always)]
    fn dot(self, acc: [__m256i; 2], codes: [__m256i; 2], quad: __m256i) -> [__m256i; 2] {
        if VNNI {
            both!(|acc, codes| _mm256_dpbusd_avx_epi32(acc, codes, quad))
        } else {
            both!(|acc, codes| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, quad), _mm256_set1_epi16(1))))
        }
    }
    #[inline(always)]
    fn dot_start_whole(self, value: i32) -> [__m256i; 2] {
        // Without VNNI the products are those of code - 128 already.
        self.dot_start(if VNNI { value } else { 0 })
    }
    #[inline(always)]
    fn dot_whole(self, acc: [__m256i; 2], codes: [__m256i; 2], quad: __m256i) -> [__m256i; 2] {
        if VNNI {
            return self.dot(acc, codes, quad);
        }
        both!(|acc, codes| {
            let w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(quad, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn dot_finish(self, acc: [__m256i; 2]) -> [__m256; 2] {
        both!(|acc| _mm256_cvtepi32_ps(acc))
    }
}
