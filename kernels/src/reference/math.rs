//! exp, tanh, erf and the activations built of them, as sequences of f32 operations that every backend repeats exactly
//! (docs/numerics.md, rule 5). The coefficients are shared; the SIMD form is `cpu/math.rs`.

use crate::ops::Activation;

/// e^x. Below [`EXP_LOW`] it is 0, from [`EXP_HIGH`] on infinity; denormal results are rounded once.
pub fn exp(x: f32) -> f32 {
    let x = max(min(x, EXP_HIGH), EXP_LOW);
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = EXP_POLYNOMIAL[0];
    for c in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    // Two factors, because 2^n itself may be no normal number.
    let n = n as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

/// tanh x.
pub fn tanh(x: f32) -> f32 {
    let t = x.abs();
    if t < TANH_SPLIT {
        let z = x * x;
        let mut p = TANH_POLYNOMIAL[0];
        for c in &TANH_POLYNOMIAL[1..] {
            p = p.mul_add(z, *c);
        }
        (p * z).mul_add(x, x)
    } else {
        (1.0 - 2.0 / (exp(t + t) + 1.0)).copysign(x)
    }
}

/// The error function.
pub fn erf(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    if t > ERF_SPLIT {
        let [a, b, c, d, e, f, g] = ERF_TAIL;
        let r = a.mul_add(t, b);
        let u = c.mul_add(t, d);
        let r = r.mul_add(s, u);
        let r = r.mul_add(t, e);
        let r = r.mul_add(t, f);
        let r = r.mul_add(t, g);
        let r = r.mul_add(t, -t);
        (1.0 - exp(r)).copysign(x)
    } else {
        let mut p = ERF_CENTRE[0];
        for c in &ERF_CENTRE[1..] {
            p = p.mul_add(s, *c);
        }
        p.mul_add(x, x)
    }
}

/// One activation.
pub fn activate(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::GeluTanh => {
            let cubic = (x * x * GELU_CUBIC).mul_add(x, x);
            (0.5 * x) * (1.0 + tanh(cubic * SQRT_2_OVER_PI))
        }
        Activation::Gelu => (0.5 * x) * (1.0 + erf(x * SQRT_HALF)),
        Activation::Relu => max(x, 0.0),
    }
}

/// `cap * tanh(x / cap)`.
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// The larger; `b` unless `a > b`, as the vector instruction does.
pub fn max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The smaller; `b` unless `a < b`.
pub fn min(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23).cast_unsigned())
}

/// e^-104 rounds to 0.
pub const EXP_LOW: f32 = -104.0;
/// e^89 is beyond the largest f32.
pub const EXP_HIGH: f32 = 89.0;
/// 1 / ln 2.
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// The first bits of ln 2, so that `n * LN2_HIGH` is exact.
pub const LN2_HIGH: f32 = 0.693_359_4;
/// ln 2 - LN2_HIGH.
pub const LN2_LOW: f32 = -2.121_944_4e-4;
/// `(e^r - 1 - r) / r^2` on |r| <= ln 2 / 2, highest power first (Cephes).
pub const EXP_POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
/// Below it tanh is a polynomial.
pub const TANH_SPLIT: f32 = 0.625;
/// `(tanh x / x - 1) / x^2` in x^2, highest power first (Cephes).
pub const TANH_POLYNOMIAL: [f32; 5] = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];
/// Above it erf is `1 - e^(polynomial)`.
pub const ERF_SPLIT: f32 = 0.927_734_4;
/// `ln(1 - erf t) + t`, see [`erf`] for the scheme (minimax by N. Juffa).
pub const ERF_TAIL: [f32; 7] =
    [-1.728_534_7e-5, 3.831_971_3e-4, -3.883_964_4e-3, 2.425_462_2e-2, -1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1];
/// `erf x / x - 1` in x^2, highest power first (minimax by N. Juffa).
pub const ERF_CENTRE: [f32; 6] = [-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_3e-1, -3.761_253_4e-1, 1.283_791_7e-1];
/// GELU's cubic coefficient.
pub const GELU_CUBIC: f32 = 0.044_715;
/// sqrt(2 / pi).
pub const SQRT_2_OVER_PI: f32 = 0.797_884_6;
/// sqrt(1 / 2).
pub const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error in units of the last place of the true result, over a fine sweep.
    fn worst_ulp(ours: impl Fn(f32) -> f32, truth: impl Fn(f64) -> f64, low: f32, high: f32) -> f64 {
        let mut worst = 0.0f64;
        for i in 0..=400_000 {
            let x = low + (high - low) * (i as f32 / 400_000.0);
            let expected = truth(f64::from(x));
            let ulp = 2f64.powi((expected.abs().log2().floor() as i32).max(-126) - 23);
            worst = worst.max((f64::from(ours(x)) - expected).abs() / ulp);
        }
        worst
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let worst = worst_ulp(exp, libm::exp, -103.0, 88.7);
        assert!(worst < 1.5, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(1000.0), f32::INFINITY);
    }

    #[test]
    fn tanh_is_within_two_ulp() {
        let worst = worst_ulp(tanh, libm::tanh, -12.0, 12.0).max(worst_ulp(tanh, libm::tanh, -1e-3, 1e-3));
        assert!(worst < 2.0, "{worst}");
        assert_eq!(tanh(1e30), 1.0);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert_eq!(tanh(-0.0), 0.0);
    }

    #[test]
    fn erf_is_within_two_ulp() {
        let worst = worst_ulp(erf, libm::erf, -6.0, 6.0).max(worst_ulp(erf, libm::erf, -1e-3, 1e-3));
        assert!(worst < 2.0, "{worst}");
        assert_eq!(erf(f32::INFINITY), 1.0);
        assert_eq!(erf(-50.0), -1.0);
        assert_eq!(erf(1e30), 1.0);
    }

    #[test]
    fn activations_have_their_limits() {
        assert_eq!(activate(-200.0, Activation::Silu), 0.0);
        assert_eq!(activate(200.0, Activation::Silu), 200.0);
        assert_eq!(activate(30.0, Activation::Gelu), 30.0);
        assert_eq!(activate(30.0, Activation::GeluTanh), 30.0);
        assert_eq!(activate(-3.0, Activation::Relu), 0.0);
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            assert_eq!(activate(0.0, activation), 0.0);
        }
    }
}
