// The scalar arithmetic of docs/numerics.md (rules 4 to 6): the same sequence of roundings as `reference/math.rs`. Every multiply-add is
// written out, so sources are compiled with contraction off (-fmad=false).
#pragma once
#include "ptx.cuh"

#define SLICE 512
#define SEGMENT_TOKENS 64
#define PAGE_TOKENS 16

enum KvFormat { F32_KV, BF16_KV, INT8_KV };

DEVICE float power_of_two(int n) { return float_of((u32)(n + 127) << 23); }

/// e^x: 0 from -104 down, infinity from 89 up.
DEVICE float exp_exact(float x) {
    x = x < 89.0f ? x : 89.0f;
    x = x > -104.0f ? x : -104.0f;
    int n = __float2int_rn(x * 1.44269504088896340736f);
    float nf = (float)n;
    float r = fmaf(nf, -0.6933594f, x);
    r = fmaf(nf, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r) + 1.0f;
    int half = n >> 1;
    return p * power_of_two(half) * power_of_two(n - half);
}

DEVICE float tanh_exact(float x) {
    float t = fabsf(x);
    if (t < 0.625f) {
        float z = x * x;
        float p = -5.7049887e-3f;
        p = fmaf(p, z, 2.063909e-2f);
        p = fmaf(p, z, -5.3739716e-2f);
        p = fmaf(p, z, 1.3331442e-1f);
        p = fmaf(p, z, -3.333328e-1f);
        return fmaf(p * z, x, x);
    }
    return copysignf(1.0f - __fdiv_rn(2.0f, exp_exact(t + t) + 1.0f), x);
}
DEVICE float softcap_exact(float x, float cap) { return cap * tanh_exact(__fdiv_rn(x, cap)); }

DEVICE float erf_exact(float x) {
    float t = fabsf(x), s = x * x;
    if (t > 0.9277344f) {
        float r = fmaf(-1.7285347e-5f, t, 3.8319713e-4f), u = fmaf(-3.8839644e-3f, t, 2.4254622e-2f);
        r = fmaf(r, s, u);
        r = fmaf(r, t, -1.0677788e-1f);
        r = fmaf(r, t, -6.348467e-1f);
        r = fmaf(r, t, -1.2871751e-1f);
        r = fmaf(r, t, -t);
        return copysignf(1.0f - exp_exact(r), x);
    }
    float p = -5.967617e-4f;
    p = fmaf(p, s, 4.9911942e-3f);
    p = fmaf(p, s, -2.6768135e-2f);
    p = fmaf(p, s, 1.1281993e-1f);
    p = fmaf(p, s, -3.7612534e-1f);
    p = fmaf(p, s, 1.2837917e-1f);
    return fmaf(p, x, x);
}

enum ActivationKind { SILU, GELU_TANH, GELU, RELU };
DEVICE float activate_exact(float x, int kind) {
    if (kind == SILU) return __fdiv_rn(x, 1.0f + exp_exact(-x));
    if (kind == GELU_TANH) return (0.5f * x) * (1.0f + tanh_exact(fmaf(x * x * 0.044715f, x, x) * 0.7978846f));
    if (kind == GELU) return (0.5f * x) * (1.0f + erf_exact(x * 0.70710678118654752440f));
    return x > 0.0f ? x : 0.0f;
}

/// The two bf16 of a word as floats, exactly.
DEVICE float bf16_low(u32 pair) { return float_of(pair << 16); }
DEVICE float bf16_high(u32 pair) { return float_of(pair & 0xffff0000u); }
