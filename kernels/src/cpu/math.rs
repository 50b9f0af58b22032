//! exp, tanh, erf and the activations over 16 lanes: operation for operation what `reference/math.rs` does.

use super::lanes::Lanes;
use crate::ops::Activation;
use crate::reference::math::{
    ERF_CENTRE, ERF_SPLIT, ERF_TAIL, EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, GELU_CUBIC, LN2_HIGH, LN2_LOW, LOG2_E, SQRT_2_OVER_PI, SQRT_HALF,
    TANH_POLYNOMIAL, TANH_SPLIT,
};

/// e^x.
#[inline(always)]
pub(super) fn exp<S: Lanes>(s: S, x: S::F) -> S::F {
    let x = s.max(s.min(x, s.splat(EXP_HIGH)), s.splat(EXP_LOW));
    let n = s.round_ties_even(s.mul(x, s.splat(LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let p = polynomial(s, &EXP_POLYNOMIAL, r);
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    s.scale_by_power(p, n)
}

/// tanh x.
#[inline(always)]
pub(super) fn tanh<S: Lanes>(s: S, x: S::F) -> S::F {
    let t = s.abs(x);
    let z = s.mul(x, x);
    let p = polynomial(s, &TANH_POLYNOMIAL, z);
    let near = s.fma(s.mul(p, z), x, x);
    let e = exp(s, s.add(t, t));
    let far = s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(e, s.splat(1.0))));
    s.select(s.less(t, s.splat(TANH_SPLIT)), near, s.copysign(far, x))
}

/// The error function.
#[inline(always)]
pub(super) fn erf<S: Lanes>(s: S, x: S::F) -> S::F {
    let t = s.abs(x);
    let square = s.mul(x, x);
    let [a, b, c, d, e, f, g] = ERF_TAIL;
    let r = s.fma(s.splat(a), t, s.splat(b));
    let u = s.fma(s.splat(c), t, s.splat(d));
    let r = s.fma(r, square, u);
    let r = s.fma(r, t, s.splat(e));
    let r = s.fma(r, t, s.splat(f));
    let r = s.fma(r, t, s.splat(g));
    let r = s.fma(r, t, s.neg(t));
    let far = s.copysign(s.sub(s.splat(1.0), exp(s, r)), x);
    let near = s.fma(polynomial(s, &ERF_CENTRE, square), x, x);
    s.select(s.less(s.splat(ERF_SPLIT), t), far, near)
}

/// One activation.
#[inline(always)]
pub(super) fn activate<S: Lanes>(s: S, x: S::F, activation: Activation) -> S::F {
    match activation {
        Activation::Silu => s.div(x, s.add(s.splat(1.0), exp(s, s.neg(x)))),
        Activation::GeluTanh => {
            let cubic = s.fma(s.mul(s.mul(x, x), s.splat(GELU_CUBIC)), x, x);
            let t = tanh(s, s.mul(cubic, s.splat(SQRT_2_OVER_PI)));
            s.mul(s.mul(s.splat(0.5), x), s.add(s.splat(1.0), t))
        }
        Activation::Gelu => {
            let e = erf(s, s.mul(x, s.splat(SQRT_HALF)));
            s.mul(s.mul(s.splat(0.5), x), s.add(s.splat(1.0), e))
        }
        Activation::Relu => s.max(x, s.splat(0.0)),
    }
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(super) fn softcap<S: Lanes>(s: S, x: S::F, cap: f32) -> S::F {
    s.mul(s.splat(cap), tanh(s, s.div(x, s.splat(cap))))
}

#[inline(always)]
fn polynomial<S: Lanes, const N: usize>(s: S, coefficients: &[f32; N], x: S::F) -> S::F {
    let mut p = s.splat(coefficients[0]);
    for c in &coefficients[1..] {
        p = s.fma(p, x, s.splat(*c));
    }
    p
}
