//! The vector operations that kernels are written over: 16 f32 lanes, and 16 columns of 4 int8 products. One trait, so
//! that every instruction set runs the same sequence of operations and hence gives the same bits.

/// 16 lanes. A value of the type is the proof that the machine has the instructions; every method is `#[inline(always)]`.
pub(super) trait Lanes: Copy + Send + Sync + 'static {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 16 booleans.
    type Mask: Copy;
    /// 16 columns of 4 unsigned codes.
    type Codes: Copy;
    /// 4 signed codes for every column.
    type Quad: Copy;
    /// 16 integer sums in the making.
    type Dot: Copy;

    /// Whether there are 32 registers of 16 lanes: tiles of several column panels pay.
    const WIDE: bool;

    /// A hint that the cache line at `address` will be read; any address will do.
    fn prefetch(self, address: *const u8);
    /// A hint that the cache line at `address` will be written; any address will do.
    fn prefetch_write(self, address: *const u8);
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; 16]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; 16]);
    fn load_f16(self, x: &[u16; 16]) -> Self::F;
    fn load_bf16(self, x: &[u16; 16]) -> Self::F;
    /// 16 e4m3fn, each divided by 256 (`format::fp8`); codes that are NaN give some number.
    fn load_fp8(self, x: &[u8; 16]) -> Self::F;
    /// The lower, then the upper bf16 of 16 pairs.
    fn load_pairs(self, x: &[u32; 16]) -> (Self::F, Self::F);
    /// The lower, then the upper bf16 of one pair, for every lane.
    fn splat_pair(self, x: u32) -> (Self::F, Self::F);
    fn load_i8(self, x: &[i8; 16]) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    fn neg(self, a: Self::F) -> Self::F;
    /// The magnitude of `a`, the sign of `sign`.
    fn copysign(self, a: Self::F, sign: Self::F) -> Self::F;
    fn less(self, a: Self::F, b: Self::F) -> Self::Mask;
    /// Lanes `first..end`.
    fn range_mask(self, first: usize, end: usize) -> Self::Mask;
    /// `yes` where the mask holds.
    fn select(self, mask: Self::Mask, yes: Self::F, no: Self::F) -> Self::F;
    fn round_ties_even(self, a: Self::F) -> Self::F;
    /// `p * 2^(n >> 1) * 2^(n - (n >> 1))` for integral `n` within -252..=254.
    fn scale_by_power(self, p: Self::F, n: Self::F) -> Self::F;
    /// The largest lane.
    fn max_lane(self, a: Self::F) -> f32;
    /// Lane i with i + 8, then i + 4, i + 2, i + 1.
    fn halving_sum(self, a: Self::F) -> f32;

    fn zero_int(self) -> Self::I;
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// To the nearest integer, ties to even; lanes are within i32.
    fn to_int(self, a: Self::F) -> Self::I;
    fn sum_int(self, a: Self::I) -> i32;
    /// Lanes are within i8.
    fn store_codes(self, a: Self::I, out: &mut [i8; 16]);

    /// Byte `4 * c + i` is code i of column c.
    fn load_codes(self, x: &[u8; 64]) -> Self::Codes;
    /// Low nibbles, then high nibbles, each as [`Lanes::load_codes`] would lie.
    fn load_nibbles(self, x: &[u8; 64]) -> (Self::Codes, Self::Codes);
    /// Bits as codes 0 and 2: bit `4 * c + i`, from the lowest of the first byte, is code i of column c.
    fn load_bits(self, x: &[u8; 8]) -> Self::Codes;
    /// Activations, within ±127.
    fn quad(self, x: [i8; 4]) -> Self::Quad;
    /// Every column starts at `value`.
    fn dot_start(self, value: i32) -> Self::Dot;
    /// Column c gains the four products; exact for codes of at most 127.
    fn dot(self, acc: Self::Dot, codes: Self::Codes, quad: Self::Quad) -> Self::Dot;
    /// As [`Lanes::dot_start`] for codes of the whole byte, whose offset is 128: `value` is `-128 * sum` of the activations to
    /// come. Where the products are made of `code - 128`, it is not wanted.
    fn dot_start_whole(self, value: i32) -> Self::Dot;
    /// As [`Lanes::dot`] for codes of the whole byte, after [`Lanes::dot_start_whole`].
    fn dot_whole(self, acc: Self::Dot, codes: Self::Codes, quad: Self::Quad) -> Self::Dot;
    /// The sums as f32 (exact below 2^24).
    fn dot_finish(self, acc: Self::Dot) -> Self::F;
}

/// Up to 16 elements, zero beyond them.
#[inline(always)]
pub(super) fn load_some<S: Lanes>(s: S, x: &[f32]) -> S::F {
    if let Ok(whole) = x.try_into() {
        return s.load(whole);
    }
    let mut padded = [0.0; 16];
    padded[..x.len()].copy_from_slice(x);
    s.load(&padded)
}

/// The first `out.len()` lanes, at most 16.
#[inline(always)]
pub(super) fn store_some<S: Lanes>(s: S, x: S::F, out: &mut [f32]) {
    if let Ok(whole) = (&mut *out).try_into() {
        return s.store(x, whole);
    }
    let mut padded = [0.0; 16];
    s.store(x, &mut padded);
    out.copy_from_slice(&padded[..out.len()]);
}
