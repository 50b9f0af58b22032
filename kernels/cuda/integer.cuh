// What the mma.sync and the wgmma form of the integer linear layers share. Layouts: linear_integer.cu.
#pragma once
#include "linear.cuh"

struct IntegerLayer {
    const U4* weights; const u16* scales; const u16* minima; const float* bias; // bias may be null
};

/// 1.5 * 2^23 as bits: an integer sum that starts here is, read as a float, 12582912 + sum (exact while |sum| < 2^22, so G <= 128).
#define SUM_START 0x4b400000
#define SUM_START_FLOAT 12582912.0f

/// Codes of the int4 words times 16, as bytes: multiplying by 16 costs nothing, `group_sum` takes it back exactly.
template <int BITS> DEVICE void weight_fragments(u32 (&a)[4], const U4& w, int half) {
    if (BITS == 8) {
        a[0] = w.x; a[1] = w.y; a[2] = w.z; a[3] = w.w;
    } else {
        u32 low = half ? w.z : w.x, high = half ? w.w : w.y;
        a[0] = (low << 4) & 0xf0f0f0f0u; a[1] = (high << 4) & 0xf0f0f0f0u;
        a[2] = low & 0xf0f0f0f0u; a[3] = high & 0xf0f0f0f0u;
    }
}
template <int BITS, bool MINIMUM> DEVICE void multiply(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (BITS == 4 && MINIMUM) mma_u8(d, a, b0, b1);
    else mma_s8(d, a, b0, b1);
}
/// f32(isum), exactly.
template <int BITS> DEVICE float group_sum(int d) {
    float f = float_of((u32)d);
    return BITS == 4 ? fmaf(f, 0.0625f, -SUM_START_FLOAT / 16.0f) : f - SUM_START_FLOAT;
}
/// acc += isum * (s_a s_w) [+ asum * (s_a m_w)] for the 16 x 8 outputs of one group.
template <int BITS, bool MINIMUM>
DEVICE void add_group(float (&acc)[4], const int (&d)[4], const float (&s)[2], const float (&m)[2], F2 xs, F2 xa) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        float sa = q & 1 ? xs.y : xs.x;
        acc[q] = fmaf(group_sum<BITS>(d[q]), sa * s[q / 2], acc[q]);
        if (MINIMUM) acc[q] = fmaf(q & 1 ? xa.y : xa.x, sa * m[q / 2], acc[q]);
    }
}
DEVICE float half_of(const u32* words, int index) { return half_to_float((u16)(index & 1 ? words[index / 2] >> 16 : words[index / 2])); }
