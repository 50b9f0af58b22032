// What Hopper's tensor cores compute for bf16, to the last bit, in plain C++: found from fragments of a card (lab/fit_tensor_core.cc: all of
// 768,000 outputs, cancellation, near overflow and subnormals included), the same for mma.sync and wgmma (lab/mma_bits.cu).
// d = c + sum of 16 products: everything is cut towards zero to 2^-25 of the greatest exponent among products (the sum of the two
// exponent fields) and c, added exactly, and the sum is cut towards zero to f32. Finite operands only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct TensorCoreTerm { int64_t significand; int exponent; };
/// `significand * 2^(exponent - bits)`, with a subnormal at the least normal exponent.
inline TensorCoreTerm tensor_core_term(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    int field = int(u >> 23 & 255); int64_t m = (u & 0x7fffff) | (field ? 0x800000 : 0);
    return {u >> 31 ? -m : m, (field ? field : 1) - 127};
}
inline float tensor_core_dot16(const float* a, const float* b, float c) {
    TensorCoreTerm terms[17]; int greatest = -1000;
    for (int k = 0; k < 16; k++) {
        TensorCoreTerm x = tensor_core_term(a[k]), y = tensor_core_term(b[k]);
        terms[k] = {(x.significand >> 16) * (y.significand >> 16) * 2048, x.exponent + y.exponent}; // in 2^-25 of its exponent
        if (terms[k].significand && terms[k].exponent > greatest) greatest = terms[k].exponent;
    }
    TensorCoreTerm z = tensor_core_term(c);
    terms[16] = {z.significand * 4, z.exponent};
    if (z.significand && z.exponent > greatest) greatest = z.exponent;
    int64_t sum = 0;
    for (const TensorCoreTerm& term : terms) {
        int down = greatest - term.exponent;
        if (!term.significand || down > 40) continue;
        int64_t magnitude = (term.significand < 0 ? -term.significand : term.significand) >> down;
        sum += term.significand < 0 ? -magnitude : magnitude;
    }
    double v = std::ldexp(double(sum), greatest - 25); float f = float(v);
    if (std::fabs(double(f)) > std::fabs(v) && !std::isinf(f)) f = std::nextafterf(f, 0.0f);
    return f;
}
