//! Pairs of bf16 products (docs/numerics.md, rule 9): the fma of the odd k, then that of the even k, and whatever is subnormal is a zero.
//!
//! AVX-512 BF16 has an instruction for it. Elsewhere both fma are computed as f32, which flushes nothing: that is the same as long as no
//! sum can become subnormal, and whether one can is known before ([`may_vanish`]); such sums take [`careful_sum`]. Subnormal weights and
//! activations are made zeros where they are packed and rounded.

use super::lanes::Lanes;

/// Products of bf16, the even k in the lower half of a word. A value of the type is the proof that the machine has the instructions.
pub(super) trait Pairs: Copy {
    type S: Lanes;
    /// Pairs of 16 columns.
    type Weights: Copy;
    /// A pair for every column.
    type Input: Copy;

    /// Whether `dot` makes zeros of subnormal sums.
    const FLUSHES: bool;

    fn lanes(self) -> Self::S;
    fn load(self, pairs: &[u32; 16]) -> Self::Weights;
    fn splat(self, pair: u32) -> Self::Input;
    /// Adds the odd products, then the even ones, each sum rounded once.
    fn dot(self, acc: F<Self>, weights: Self::Weights, input: Self::Input) -> F<Self>;
}

pub(super) type F<P> = <<P as Pairs>::S as Lanes>::F;

/// Pairs as two f32 products.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widened<S>(pub(super) S);

impl<S: Lanes> Pairs for Widened<S> {
    type S = S;
    type Weights = (S::F, S::F);
    type Input = (S::F, S::F);

    const FLUSHES: bool = false;

    #[inline(always)]
    fn lanes(self) -> S {
        self.0
    }
    #[inline(always)]
    fn load(self, pairs: &[u32; 16]) -> (S::F, S::F) {
        self.0.load_pairs(pairs)
    }
    #[inline(always)]
    fn splat(self, pair: u32) -> (S::F, S::F) {
        self.0.splat_pair(pair)
    }
    #[inline(always)]
    fn dot(self, acc: S::F, weights: (S::F, S::F), input: (S::F, S::F)) -> S::F {
        self.0.fma(input.0, weights.0, self.0.fma(input.1, weights.1, acc))
    }
}

/// The exponent bits of the smallest of some bf16 that are not zero; [`NONE`] if all are.
#[inline(always)]
pub(super) fn smallest_exponent(values: &[u16]) -> u16 {
    let mut smallest = u16::MAX;
    for bits in values {
        // A zero wraps to the largest.
        smallest = smallest.min((bits & 0x7fff).wrapping_sub(1));
    }
    if smallest == u16::MAX { NONE } else { (smallest + 1) >> 7 }
}

/// Larger than any exponent, and small enough to be added.
pub(super) const NONE: u16 = 1 << 9;

/// Whether a sum of products of values with at least these exponents can be subnormal, or become so by rounding. bf16 are multiples of
/// 2^(exponent - 127 - 7); products, their sums and these rounded are then multiples of 2^(x + w - 268). Where that is above 2^-126, no sum
/// but zero is within reach of the subnormal ones.
#[inline(always)]
pub(super) fn may_vanish(x_exponent: u16, w_exponent: u16) -> bool {
    x_exponent + w_exponent < 143
}

/// One panel's sums of a slice for one row, whose pairs lie `stride` apart.
#[inline(always)]
pub(super) fn careful_sum<S: Lanes>(s: S, x: &[u32], stride: usize, weights: &[[u32; 16]]) -> S::F {
    let mut acc = s.splat(0.0);
    for (x, weights) in x.iter().step_by(stride).zip(weights) {
        let ((x_even, x_odd), (w_even, w_odd)) = (s.splat_pair(*x), s.load_pairs(weights));
        acc = flushing_fma(s, x_odd, w_odd, acc);
        acc = flushing_fma(s, x_even, w_even, acc);
    }
    acc
}

/// As `reference::linear` has it.
#[inline(always)]
fn flushing_fma<S: Lanes>(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
    let (scale, sum) = (s.splat(SCALE), s.fma(a, b, c));
    let scaled = s.fma(s.mul(a, scale), b, s.mul(c, scale));
    s.select(s.less(s.abs(scaled), s.splat(f32::MIN_POSITIVE * SCALE)), s.copysign(s.splat(0.0), sum), sum)
}

/// An activation as bf16 bits, ties to even: what is subnormal becomes a zero of its sign, what is no number stays so.
#[inline(always)]
pub(super) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    let flushed = if magnitude < 0x0080_0000 { bits >> 16 & 0x8000 } else { rounded };
    (if magnitude > 0x7f80_0000 { bits >> 16 | 0x40 } else { flushed }) as u16
}

/// A weight as it is packed: what is subnormal becomes a zero of its sign.
#[inline(always)]
pub(super) fn flush(bits: u16) -> u16 {
    if bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}

const SCALE: f32 = (1u64 << 63) as f32;

/// Asks the instruction for the bits that it must give.
#[cfg(target_arch = "x86_64")]
pub(super) mod selftest {
    use super::super::isa::PairKernel;
    use super::super::lanes::Lanes;
    use super::super::scalar::Scalar;
    use super::{Pairs, careful_sum, flush};

    /// Counts the lanes in which chains of dot products differ from [`careful_sum`].
    pub(in super::super) struct Differing;

    impl PairKernel for Differing {
        type Output = usize;

        #[inline(always)]
        fn run<P: Pairs>(self, p: P) -> usize {
            let mut random = Random(1);
            let mut differing = 0;
            for chain in 0..CHAINS {
                let mut x = [0; LENGTH];
                let mut weights = [[0; 16]; LENGTH];
                // Two kinds for each chain: some of their products vanish, cancel, overflow or are of different size.
                let kinds = [random.next(), random.next()];
                for k in 0..LENGTH {
                    x[k] = random.pair(kinds[0]);
                    weights[k] = std::array::from_fn(|_| random.pair(kinds[1]));
                }
                if chain % 4 == 0 {
                    // The smallest normal number, less a product of half a step below it, more or less: what becomes of it depends on
                    // whether it is rounded before it is found subnormal.
                    (x[0], weights[0]) = (SMALL, [SMALL; 16]);
                    let half = if chain % 8 == 0 { 0 } else { 16 };
                    x[1] = (0x8000 | 0x1a00 | random.next() & 0x7f) << half;
                    weights[1] = std::array::from_fn(|_| (0x1980 | random.next() & 0x7f) << half);
                    x[2..].fill(0);
                }
                let mut acc = p.lanes().splat(0.0);
                for k in 0..LENGTH {
                    acc = p.dot(acc, p.load(&weights[k]), p.splat(x[k]));
                }
                let mut got = [0.0; 16];
                p.lanes().store(acc, &mut got);
                let expected = careful_sum(Scalar, &x, 1, &weights);
                for lane in 0..16 {
                    let same = got[lane].to_bits() == expected[lane].to_bits() || got[lane].is_nan() && expected[lane].is_nan();
                    differing += usize::from(!same);
                }
            }
            differing
        }
    }

    struct Random(u32);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            self.0 >> 8
        }

        /// Without subnormal numbers: none are packed.
        fn pair(&mut self, kind: u32) -> u32 {
            let [even, odd] = [self.bf16(kind), self.bf16(kind)].map(|bits| u32::from(flush(bits as u16)));
            even | odd << 16
        }

        fn bf16(&mut self, kind: u32) -> u32 {
            let (bits, exponent) = (self.next() & 0x807f, self.next());
            match kind % 6 {
                // About 1.
                0 => bits | (120 + exponent % 14) << 7,
                // Products about the smallest normal number, and sums within a rounding of it.
                1 => bits | (56 + exponent % 14) << 7,
                2 => [0, 0x8000, 0x0080, 0x8080, 0x007f, 0x0001, 0x3f80, 0xbf80][exponent as usize % 8],
                3 => bits | (1 + exponent % 60) << 7,
                4 => bits | (exponent % 255) << 7,
                _ => [0x7f7f, 0xff7f, 0x7f80, 0x7fc0, 0x3f80, 0x0080][exponent as usize % 6],
            }
        }
    }

    /// The root of the smallest normal number, in the even half.
    const SMALL: u32 = (127 - 63) << 7;
    const CHAINS: usize = 256;
    const LENGTH: usize = 8;
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::scalar::Scalar;
    use super::*;
    use crate::reference::round_to_bf16;

    /// An instruction that is wrong in one way.
    #[cfg(target_arch = "x86_64")]
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Wrong {
        NoFlush,
        FlushBeforeRounding,
        EvenFirst,
        RoundsOnce,
    }

    #[cfg(target_arch = "x86_64")]
    impl Pairs for Wrong {
        type S = Scalar;
        type Weights = ([f32; 16], [f32; 16]);
        type Input = ([f32; 16], [f32; 16]);

        const FLUSHES: bool = true;

        fn lanes(self) -> Scalar {
            Scalar
        }
        fn load(self, pairs: &[u32; 16]) -> Self::Weights {
            Widened(Scalar).load(pairs)
        }
        fn splat(self, pair: u32) -> Self::Input {
            Widened(Scalar).splat(pair)
        }
        fn dot(self, acc: [f32; 16], weights: Self::Weights, input: Self::Input) -> [f32; 16] {
            let zero = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
            std::array::from_fn(|lane| {
                let [w_even, w_odd, x_even, x_odd] = [weights.0, weights.1, input.0, input.1].map(|of| zero(of[lane]));
                match self {
                    Self::NoFlush => x_even.mul_add(w_even, x_odd.mul_add(w_odd, acc[lane])),
                    // A sum of steps of subnormal numbers that reaches the smallest normal one is left.
                    Self::FlushBeforeRounding => zero(x_even.mul_add(w_even, zero(x_odd.mul_add(w_odd, acc[lane])))),
                    Self::EvenFirst => x_odd.mul_add(w_odd, x_even.mul_add(w_even, acc[lane])),
                    Self::RoundsOnce => {
                        zero((f64::from(x_odd) * f64::from(w_odd) + f64::from(x_even) * f64::from(w_even) + f64::from(acc[lane])) as f32)
                    }
                }
            })
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_self_test_finds_an_instruction_that_is_wrong() {
        use super::super::isa::PairKernel;

        for wrong in [Wrong::NoFlush, Wrong::FlushBeforeRounding, Wrong::EvenFirst, Wrong::RoundsOnce] {
            let differing = selftest::Differing.run(wrong);
            assert!(differing > 20, "{wrong:?}: {differing} lanes");
        }
        if is_x86_feature_detected!("avx512bf16") {
            assert!(super::super::Isa::Avx512Bf16.available(), "this processor's instruction differs");
        } else {
            println!("skipped: this processor has no bf16 dot product");
        }
    }

    /// Bits of f32 that end or begin something, and a walk through all others.
    fn floats() -> impl Iterator<Item = f32> {
        let borders = [0u32, 1, 0x007f_ffff, 0x0080_0000, 0x3f80_8000, 0x3f81_8000, 0x7f7f_7fff, 0x7f7f_8000, 0x7f7f_ffff, 0x7f80_0000];
        let all = borders.into_iter().chain((0..0x7f80_0000).step_by(60_013));
        all.flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    #[test]
    fn activations_are_rounded_as_the_reference_rounds_them() {
        for x in floats() {
            assert_eq!(bf16::from_bits(round(x)).to_f32().to_bits(), round_to_bf16(x).to_bits(), "{x:e}");
        }
        for nan in [0x7f80_0001, 0x7fff_ffff, 0xffff_ffff] {
            assert!(bf16::from_bits(round(f32::from_bits(nan))).is_nan(), "{nan:x}");
        }
    }

    #[test]
    fn subnormal_weights_are_zeros() {
        assert_eq!([0, 0x8000, 0x007f, 0x807f, 0x0080, 0xff80].map(flush), [0, 0x8000, 0, 0x8000, 0x0080, 0xff80]);
    }

    #[test]
    fn the_smallest_exponent_leaves_zeros_out() {
        assert_eq!(smallest_exponent(&[0, 0x8000]), NONE);
        assert_eq!(smallest_exponent(&[]), NONE);
        assert_eq!(smallest_exponent(&[0, 0x3f80, 0xbe90, 0x4000]), 125);
        assert_eq!(smallest_exponent(&[0x0080]), 1);
        assert!(!may_vanish(NONE, 1) && !may_vanish(NONE, NONE) && !may_vanish(127, 16) && may_vanish(127, 15));
    }

    /// Where the plain way is taken, it must be right: products at the border, which cancel as far as they can.
    #[test]
    fn sums_that_cannot_vanish_need_no_flush() {
        let mut seed = 7u32;
        let mut next = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        for x_exponent in [1, 16, 40, 71, 72, 100, 127, 142, 200] {
            let w_exponent = 143u32.saturating_sub(x_exponent).max(1);
            let mut bf16 = |exponent: u32| (next() & 0x807f) | (exponent + next() % 3) << 7;
            let x: Vec<u32> = (0..2000).map(|_| bf16(x_exponent) | bf16(x_exponent) << 16).collect();
            let weights: Vec<[u32; 16]> = (0..2000).map(|_| std::array::from_fn(|_| bf16(w_exponent) | bf16(w_exponent) << 16)).collect();
            assert!(!may_vanish(x_exponent as u16, w_exponent as u16));
            let p = Widened(Scalar);
            let mut acc = [0.0; 16];
            for (x, weights) in x.iter().zip(&weights) {
                acc = p.dot(acc, p.load(weights), p.splat(*x));
            }
            let careful = careful_sum(p.lanes(), &x, 1, &weights);
            assert_eq!(acc.map(f32::to_bits), careful.map(f32::to_bits), "exponents {x_exponent} and {w_exponent}");
        }
    }
}
