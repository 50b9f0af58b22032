// Int4 weights as bf16 codes: what the mma.sync and the wgmma form of W4A16 share. Layouts: linear_integer.cu.
#pragma once
#include "numerics.cuh"

struct Int4Layer {
    const U4* weights; const u16* scales; const float* bias; // bias may be null
};

/// Nibbles `i` and `i + 4` of a word as bf16 codes: 128 + (nibble ^ 8) by bits, minus 136.
template <int I> DEVICE u32 bf16_codes(u32 word) {
    return bf16x2_fma(and_xor(word >> (4 * I), 0x000f000fu, 0x43084308u), 0x3f803f80u, 0xc308c308u);
}
