// Keys and values into pages, and attention of any rows over them: every KV format, any page, head and window; docs/numerics.md rule 6, the bits of
// `cpu-v1`, `cpu-v1+kv-bf16` and `cpu-v1+kv-int8`. A warp takes a query row and head; `attention.cu` has the faster form for decodes.
//
// Layouts: keys, values [slot][kv head][page_tokens][D] in their format; int8 scales [slot][kv head][page_tokens] f32;
// qkv rows [H D | KV D | KV D] f32; tables of slots, one after another; queries, in the order
// in which they are taken { first entry of the table, position, row, segment from which the row is alone }.
#include "numerics.cuh"

constexpr int HEAD_PER_LANE = 16; // heads of up to 512 elements

template <int FORMAT> DEVICE float kv_element(const void* from, size_t at) {
    if (FORMAT == F32_KV) return ((const float*)from)[at];
    if (FORMAT == BF16_KV) return float_of((u32)((const u16*)from)[at] << 16);
    return (float)((const i8*)from)[at];
}

/// Grid (rows, 2 kv heads): a warp stores the key or the value of one kv head. places { slot, offset }; `k` is the first key of the first row.
template <int FORMAT>
DEVICE void write_pages(void* keys, void* values, float* key_scales, float* value_scales, const float* k, const u32* places, int kv_heads, int d, int page_tokens, int stride) {
    int row = blockIdx.x, kv_head = blockIdx.y % kv_heads, lane = threadIdx.x;
    bool is_value = blockIdx.y >= kv_heads;
    const float* from = k + (size_t)row * stride + blockIdx.y * d;
    size_t token = ((size_t)places[2 * row] * kv_heads + kv_head) * page_tokens + places[2 * row + 1];
    void* to = is_value ? values : keys;
    if (FORMAT == INT8_KV) {
        float amax = 0.0f;
        for (int i = lane; i < d; i += 32) amax = fmaxf(amax, fabsf(from[i]));
        for (int step = 16; step; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
        float inverse = __fdiv_rn(127.0f, amax);
        bool used = inverse < float_of(0x7f800000);
        for (int i = lane; i < d; i += 32) {
            int code = used ? __float2int_rn(from[i] * inverse) : 0;
            ((i8*)to)[token * d + i] = (i8)(code > 127 ? 127 : code < -127 ? -127 : code);
        }
        if (lane == 0) (is_value ? value_scales : key_scales)[token] = used ? __fdiv_rn(amax, 127.0f) : 0.0f;
        return;
    }
    for (int i = lane; i < d; i += 32) {
        if (FORMAT == F32_KV) ((float*)to)[token * d + i] = from[i];
        else ((u16*)to)[token * d + i] = (u16)bf16_pair(from[i], 0.0f);
    }
}

/// Grid (heads, rows), a warp each. Shared memory: q [D], then p [64]. `softcap` 0: none; `window` 0: none.
template <int FORMAT>
DEVICE void attend_row(float* out, const float* qkv, const void* keys, const void* values, const float* key_scales, const float* value_scales, const u32* queries, const u32* tables, int kv_heads, int d, int page_tokens, int window, float scale, float softcap) {
    DYNAMIC_SHARED(float, q);
    float* p = q + d;
    int lane = threadIdx.x, head = blockIdx.x, heads = gridDim.x, kv_head = head / (heads / kv_heads);
    const u32* query = queries + 4 * blockIdx.y;
    const u32* table = tables + query[0];
    int position = (int)query[1], row = (int)query[2], first = window && position + 1 > window ? position + 1 - window : 0;
    const float* from = qkv + (size_t)row * (heads + 2 * kv_heads) * d + head * d;
    for (int i = lane; i < d; i += 32) q[i] = from[i];
    __syncwarp();
    auto place = [&](int token) { return ((size_t)table[token / page_tokens] * kv_heads + kv_head) * page_tokens + token % page_tokens; };
    const float nothing = float_of(0xff800000);
    float m = nothing, l = 0.0f, o[HEAD_PER_LANE] = {};
    for (int segment = first / SEGMENT_TOKENS; segment <= position / SEGMENT_TOKENS; segment++) {
        int base = segment * SEGMENT_TOKENS, lo = first > base ? first : base, hi = position + 1 < base + SEGMENT_TOKENS ? position + 1 : base + SEGMENT_TOKENS;
        float s[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = base + lane + 32 * i;
            s[i] = nothing;
            if (token < lo || token >= hi) continue;
            size_t at = place(token);
            float acc = 0.0f;
#pragma unroll 8
            for (int j = 0; j < d; j++) acc = fmaf(q[j], kv_element<FORMAT>(keys, at * d + j), acc);
            if (FORMAT == INT8_KV) acc = acc * key_scales[at];
            acc = acc * scale;
            s[i] = softcap > 0.0f ? softcap_exact(acc, softcap) : acc;
        }
        float greatest = fmaxf(s[0], s[1]);
        for (int step = 16; step; step /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
        float p0 = base + lane >= lo && base + lane < hi ? exp_exact(s[0] - greatest) : 0.0f;
        float p1 = base + lane + 32 >= lo && base + lane + 32 < hi ? exp_exact(s[1] - greatest) : 0.0f;
        // Lane i of 16 adds tokens i, i + 16, i + 32, i + 48; then the lanes by halving. Lanes 16 to 31 compute what nobody reads.
        float q0 = __shfl_xor_sync(~0u, p0, 16), q1 = __shfl_xor_sync(~0u, p1, 16), sum = ((p0 + q0) + p1) + q1;
        for (int step = 8; step; step /= 2) sum = sum + __shfl_xor_sync(~0u, sum, step);
        sum = __shfl_sync(~0u, sum, 0);
        p[lane] = p0;
        p[lane + 32] = p1;
        __syncwarp();
        float blend[HEAD_PER_LANE] = {};
        for (int token = lo; token < hi; token++) {
            size_t at = place(token);
            float weight = p[token - base];
            if (FORMAT == INT8_KV) weight = weight * value_scales[at];
#pragma unroll
            for (int i = 0; i < HEAD_PER_LANE; i++)
                if (lane + 32 * i < d) blend[i] = fmaf(weight, kv_element<FORMAT>(values, at * d + lane + 32 * i), blend[i]);
        }
        __syncwarp();
        float next = m > greatest ? m : greatest, old = exp_exact(m - next), fresh = exp_exact(greatest - next);
        l = l * old + sum * fresh;
#pragma unroll
        for (int i = 0; i < HEAD_PER_LANE; i++) o[i] = fmaf(blend[i], fresh, o[i] * old);
        m = next;
    }
#pragma unroll
    for (int i = 0; i < HEAD_PER_LANE; i++)
        if (lane + 32 * i < d) out[((size_t)row * heads + head) * d + lane + 32 * i] = __fdiv_rn(o[i], l);
}

#define ENTRIES(NAME, FORMAT)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32) kv_write_##NAME(void* keys, void* values, float* key_scales, float* value_scales, const float* k, const u32* places, int kv_heads, int d, int page_tokens, int stride) { \
        write_pages<FORMAT>(keys, values, key_scales, value_scales, k, places, kv_heads, d, page_tokens, stride);                               \
    }                                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32) attend_##NAME(float* out, const float* qkv, const void* keys, const void* values, const float* key_scales, const float* value_scales, const u32* queries, const u32* tables, int kv_heads, int d, int page_tokens, int window, float scale, float softcap) { \
        attend_row<FORMAT>(out, qkv, keys, values, key_scales, value_scales, queries, tables, kv_heads, d, page_tokens, window, scale, softcap); \
    }
ENTRIES(f32, F32_KV)
ENTRIES(bf16, BF16_KV)
ENTRIES(int8, INT8_KV)
#undef ENTRIES
