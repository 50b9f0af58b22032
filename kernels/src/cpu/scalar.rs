//! [`Lanes`] as arrays: the fallback on machines without AVX2, and a check of the kernels' logic without intrinsics. Builds with assertions call
//! these and do not inline them: unrolled over arrays in every kernel they would take a third of the time that this crate takes to compile.

use super::lanes::Lanes;
use crate::format::fp8::as_half;
use half::{bf16, f16};
use std::array::from_fn;

/// No instruction set in particular.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

impl Lanes for Scalar {
    type F = [f32; 16];
    type I = [i32; 16];
    type Mask = [bool; 16];
    type Codes = [u8; 64];
    type Quad = [i8; 4];
    type Dot = [i32; 16];

    const WIDE: bool = false;

    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn prefetch(self, _address: *const u8) {}
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn prefetch_write(self, _address: *const u8) {}
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn splat(self, x: f32) -> [f32; 16] {
        [x; 16]
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load(self, x: &[f32; 16]) -> [f32; 16] {
        *x
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn store(self, x: [f32; 16], out: &mut [f32; 16]) {
        *out = x;
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_f16(self, x: &[u16; 16]) -> [f32; 16] {
        x.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_bf16(self, x: &[u16; 16]) -> [f32; 16] {
        x.map(|bits| bf16::from_bits(bits).to_f32())
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_fp8(self, x: &[u8; 16]) -> [f32; 16] {
        x.map(|code| f16::from_bits(as_half(code)).to_f32())
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_pairs(self, x: &[u32; 16]) -> ([f32; 16], [f32; 16]) {
        (x.map(|pair| f32::from_bits(pair << 16)), x.map(|pair| f32::from_bits(pair & 0xffff_0000)))
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn splat_pair(self, x: u32) -> ([f32; 16], [f32; 16]) {
        self.load_pairs(&[x; 16])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_i8(self, x: &[i8; 16]) -> [f32; 16] {
        x.map(f32::from)
    }

    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] + b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] - b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] * b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i] / b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn fma(self, a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn abs(self, a: [f32; 16]) -> [f32; 16] {
        a.map(f32::abs)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn neg(self, a: [f32; 16]) -> [f32; 16] {
        a.map(|x| -x)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn copysign(self, a: [f32; 16], sign: [f32; 16]) -> [f32; 16] {
        from_fn(|i| a[i].copysign(sign[i]))
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn less(self, a: [f32; 16], b: [f32; 16]) -> [bool; 16] {
        from_fn(|i| a[i] < b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn range_mask(self, first: usize, end: usize) -> [bool; 16] {
        from_fn(|i| (first..end).contains(&i))
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn select(self, mask: [bool; 16], yes: [f32; 16], no: [f32; 16]) -> [f32; 16] {
        from_fn(|i| if mask[i] { yes[i] } else { no[i] })
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn round_ties_even(self, a: [f32; 16]) -> [f32; 16] {
        a.map(f32::round_ties_even)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn scale_by_power(self, p: [f32; 16], n: [f32; 16]) -> [f32; 16] {
        from_fn(|i| {
            let n = n[i] as i32;
            let half = n >> 1;
            let power = |n: i32| f32::from_bits(((n + 127) << 23).cast_unsigned());
            p[i] * power(half) * power(n - half)
        })
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn max_lane(self, a: [f32; 16]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn halving_sum(self, mut a: [f32; 16]) -> f32 {
        for step in [8, 4, 2, 1] {
            for i in 0..step {
                a[i] += a[i + step];
            }
        }
        a[0]
    }

    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn zero_int(self) -> [i32; 16] {
        [0; 16]
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn add_int(self, a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        from_fn(|i| a[i] + b[i])
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn to_int(self, a: [f32; 16]) -> [i32; 16] {
        a.map(|x| x.round_ties_even() as i32)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn sum_int(self, a: [i32; 16]) -> i32 {
        a.into_iter().sum()
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn store_codes(self, a: [i32; 16], out: &mut [i8; 16]) {
        *out = a.map(|code| code as i8);
    }

    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_codes(self, x: &[u8; 64]) -> [u8; 64] {
        *x
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_nibbles(self, x: &[u8; 64]) -> ([u8; 64], [u8; 64]) {
        (x.map(|byte| byte & 15), x.map(|byte| byte >> 4))
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn load_bits(self, x: &[u8; 8]) -> [u8; 64] {
        from_fn(|i| (x[i / 8] >> (i % 8) & 1) * 2)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn quad(self, x: [i8; 4]) -> [i8; 4] {
        x
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn dot_start(self, value: i32) -> [i32; 16] {
        [value; 16]
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn dot(self, mut acc: [i32; 16], codes: [u8; 64], quad: [i8; 4]) -> [i32; 16] {
        for column in 0..16 {
            for i in 0..4 {
                acc[column] += i32::from(codes[4 * column + i]) * i32::from(quad[i]);
            }
        }
        acc
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn dot_start_whole(self, value: i32) -> [i32; 16] {
        self.dot_start(value)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn dot_whole(self, acc: [i32; 16], codes: [u8; 64], quad: [i8; 4]) -> [i32; 16] {
        self.dot(acc, codes, quad)
    }
    #[cfg_attr(debug_assertions, inline(never))]
    #[cfg_attr(not(debug_assertions), inline(always))]
    fn dot_finish(self, acc: [i32; 16]) -> [f32; 16] {
        acc.map(|x| x as f32)
    }
}
