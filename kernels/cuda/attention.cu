// Decode attention over pages, grouped-query, bf16 keys and values: docs/numerics.md rule 6, the bits of `cpu-v1+kv-bf16`.
// A warp takes a segment of 64 tokens for all heads of a kv head; the cta merges its warps' segments in order.
//
// Layouts: keys, values [slot][kv head][page][D] bf16, a page being `pieces` times 16 tokens; q, out [sequence][heads][D] f32, q with a stride of its own
// where it is given; tables of slots: [sequence][pages_max], or where `queries` says, as in attend.cu. A page below is a piece of 16 tokens.
// Bytes: 4 D for each token and kv head. Operations: 4 D H. Limited by bytes up to H = 4 or so, then by f32 arithmetic.
#include "numerics.cuh"

struct DecodeShape {
    int kv_heads, pages_max, window; // window 0: none
    float scale, softcap;            // softcap 0: none
    int segments_each;               // of a split (blockIdx.z); whole rows where there is one split
    int pieces, q_stride;            // of a page; elements from row to row of q. 0: one; dense
    const u32* queries;              // null: positions, and tables by pages_max
};
DEVICE int position_of(const DecodeShape& shape, const int* positions, int sequence) { return shape.queries ? (int)shape.queries[4 * sequence + 1] : positions[sequence]; }
DEVICE size_t row_of(const DecodeShape& shape, int sequence) { return shape.queries ? shape.queries[4 * sequence + 2] : (u32)sequence; }

/// Bytes of shared memory: for each warp K [64][2 D + 16], V [64][2 D], p [64][H], o [H][D], then q [H][D] and m, l [W][H].
template <int D, int H, int W> constexpr int decode_shared_bytes() { return W * (64 * (2 * D + 16) + 64 * 2 * D + 64 * H * 4 + H * D * 4) + H * D * 4 + 2 * W * H * 4; }

template <int D, int H, int W, bool SPLIT>
DEVICE void decode(const float* q, const u16* keys, const u16* values, const u32* tables, const int* positions, float* out, float* partial, DecodeShape shape) {
    constexpr int KROW = 2 * D + 16, VROW = 2 * D, PIECES = D / 8, PER_LANE = D / 32;
    constexpr int WARP_BYTES = 64 * (KROW + VROW) + 64 * H * 4 + H * D * 4;
    DYNAMIC_SHARED(u8, memory);
    int lane = threadIdx.x & 31, kv_head = blockIdx.x, sequence = blockIdx.y;
    int warp = __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0); // so that the compiler knows it is one for all lanes
    u8* k_at = memory + warp * WARP_BYTES;
    u8* v_at = k_at + 64 * KROW;
    float* p_at = (float*)(v_at + 64 * VROW);
    float* o_at = p_at + 64 * H;
    float* q_at = (float*)(memory + W * WARP_BYTES);
    float* m_at = q_at + H * D;
    float* l_at = m_at + W * H;
    int position = position_of(shape, positions, sequence), first = shape.window ? (position + 1 > shape.window ? position + 1 - shape.window : 0) : 0;
    int begin = first / SEGMENT_TOKENS, end = position / SEGMENT_TOKENS + 1;
    if (SPLIT) {
        if (shape.queries && begin < (int)shape.queries[4 * sequence + 3]) begin = shape.queries[4 * sequence + 3]; // what is before was taken with others
        begin = begin + blockIdx.z * shape.segments_each;
        end = end < begin + shape.segments_each ? end : begin + shape.segments_each;
        if (begin >= end) return;
    }
    const u32* table = tables + (shape.queries ? shape.queries[4 * sequence] : (size_t)sequence * shape.pages_max);
    int pieces = shape.pieces ? shape.pieces : 1;
    // Pages are copied whole where they hold a token that is seen: what lies beyond the position in them is never used.
    constexpr int PAGES = SEGMENT_TOKENS / PAGE_TOKENS;
    auto holds = [&](int page) { return page * PAGE_TOKENS <= position && page * PAGE_TOKENS + PAGE_TOKENS > first; };
    // Slots of the segment that is loaded next: looked up a round early, as nothing hides that latency later.
    u32 slots[PAGES];
    auto look_up = [&](int segment) {
#pragma unroll
        for (int p = 0; p < PAGES; p++) slots[p] = segment < end && holds(segment * PAGES + p) ? table[(segment * PAGES + p) / pieces] : 0;
    };
    auto load = [&](int segment, const u16* from, u8* to, int row_bytes) {
        if (segment < end) {
            constexpr int ROWS = 32 / PIECES, COPIES = PAGE_TOKENS / ROWS; // rows that a warp copies at once
            const u16* lane_from = from + (size_t)kv_head * pieces * PAGE_TOKENS * D + lane * 8;
            u8* lane_to = to + lane / PIECES * row_bytes + lane % PIECES * 16;
#pragma unroll
            for (int p = 0; p < PAGES; p++) {
                if (holds(segment * PAGES + p)) {
                    const u16* at = lane_from + ((size_t)slots[p] * shape.kv_heads * pieces + (segment * PAGES + p) % pieces) * (PAGE_TOKENS * D);
#pragma unroll
                    for (int i = 0; i < COPIES; i++) cp_async16(lane_to + (p * PAGE_TOKENS + i * ROWS) * row_bytes, at + i * 256);
                }
            }
        }
        cp_async_commit();
    };
    look_up(begin + warp);
    load(begin + warp, keys, k_at, KROW);
    load(begin + warp, values, v_at, VROW);
    look_up(begin + warp + W);
    for (int i = threadIdx.x; i < H * D; i += 32 * W) q_at[i] = q[row_of(shape, sequence) * (shape.q_stride ? shape.q_stride : shape.kv_heads * H * D) + kv_head * H * D + i];
    __syncthreads();
    constexpr int ELEMENTS = (H * D + 32 * W - 1) / (32 * W);
    float m[ELEMENTS], l[ELEMENTS], o[ELEMENTS];
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) { m[i] = float_of(0xff800000); l[i] = 0.0f; o[i] = 0.0f; }

    for (int round = begin; round < end; round += W) {
        int segment = round + warp, base = segment * SEGMENT_TOKENS;
        cp_async_wait<1>();
        __syncwarp();
        float blend[H][PER_LANE] = {};
        if (segment < end) {
            int lo = first > base ? first - base : 0, hi = position + 1 - base < 64 ? position + 1 - base : 64;
            float s[2][H] = {};
#pragma unroll 4
            for (int piece = 0; piece < PIECES; piece++) {
                U4 k0 = *(const U4*)(k_at + lane * KROW + piece * 16), k1 = *(const U4*)(k_at + (lane + 32) * KROW + piece * 16);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 a0 = i ? k0.z : k0.x, b0 = i ? k0.w : k0.y, a1 = i ? k1.z : k1.x, b1 = i ? k1.w : k1.y;
#pragma unroll
                    for (int h = 0; h < H; h++) {
                        F4 qv = *(const F4*)(q_at + h * D + piece * 8 + i * 4);
                        s[0][h] = fmaf(qv.x, bf16_low(a0), s[0][h]); s[1][h] = fmaf(qv.x, bf16_low(a1), s[1][h]);
                        s[0][h] = fmaf(qv.y, bf16_high(a0), s[0][h]); s[1][h] = fmaf(qv.y, bf16_high(a1), s[1][h]);
                        s[0][h] = fmaf(qv.z, bf16_low(b0), s[0][h]); s[1][h] = fmaf(qv.z, bf16_low(b1), s[1][h]);
                        s[0][h] = fmaf(qv.w, bf16_high(b0), s[0][h]); s[1][h] = fmaf(qv.w, bf16_high(b1), s[1][h]);
                    }
                }
            }
            __syncwarp();
            load(segment + W, keys, k_at, KROW);
#pragma unroll
            for (int h = 0; h < H; h++) { s[0][h] = s[0][h] * shape.scale; s[1][h] = s[1][h] * shape.scale; }
            if (shape.softcap > 0.0f)
                for (int h = 0; h < H; h++) { s[0][h] = softcap_exact(s[0][h], shape.softcap); s[1][h] = softcap_exact(s[1][h], shape.softcap); }
            bool in0 = lane >= lo && lane < hi, in1 = lane + 32 >= lo && lane + 32 < hi;
#pragma unroll
            for (int h = 0; h < H; h++) {
                float x0 = in0 ? s[0][h] : float_of(0xff800000), x1 = in1 ? s[1][h] : float_of(0xff800000);
                float greatest = fmaxf(x0, x1);
                for (int step = 16; step; step /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
                float p0 = in0 ? exp_exact(x0 - greatest) : 0.0f, p1 = in1 ? exp_exact(x1 - greatest) : 0.0f;
                p_at[lane * H + h] = p0; p_at[(lane + 32) * H + h] = p1;
                // Lane i of 16 adds tokens i, i + 16, i + 32, i + 48; then the lanes by halving. Lanes 16 to 31 compute what nobody reads.
                float q0 = __shfl_xor_sync(~0u, p0, 16), q1 = __shfl_xor_sync(~0u, p1, 16), sum = ((p0 + q0) + p1) + q1;
                for (int step = 8; step; step /= 2) sum = sum + __shfl_xor_sync(~0u, sum, step);
                if (lane == 0) { m_at[warp * H + h] = greatest; l_at[warp * H + h] = sum; }
            }
            cp_async_wait<1>();
            __syncwarp();
            auto blend_token = [&](int token) {
                float v[PER_LANE];
                if (PER_LANE == 4) {
                    U2 pair = *(const U2*)(v_at + token * VROW + lane * 8);
                    v[0] = bf16_low(pair.x); v[1] = bf16_high(pair.x); v[PER_LANE - 2] = bf16_low(pair.y); v[PER_LANE - 1] = bf16_high(pair.y);
                } else {
                    u32 pair = *(const u32*)(v_at + token * VROW + lane * 4);
                    v[0] = bf16_low(pair); v[1] = bf16_high(pair);
                }
                float p[H];
                if (H % 4 == 0) {
#pragma unroll
                    for (int h = 0; h < H; h += 4) { F4 four = *(const F4*)(p_at + token * H + h); p[h] = four.x; p[h + 1 < H ? h + 1 : h] = four.y; p[h + 2 < H ? h + 2 : h] = four.z; p[h + 3 < H ? h + 3 : h] = four.w; }
                } else {
#pragma unroll
                    for (int h = 0; h < H; h++) p[h] = p_at[token * H + h];
                }
#pragma unroll
                for (int h = 0; h < H; h++)
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++) blend[h][i] = fmaf(p[h], v[i], blend[h][i]);
            };
            if (hi - lo == SEGMENT_TOKENS) {
#pragma unroll 16
                for (int token = 0; token < SEGMENT_TOKENS; token++) blend_token(token);
            } else {
                for (int token = lo; token < hi; token++) blend_token(token);
            }
            __syncwarp();
            load(segment + W, values, v_at, VROW);
            look_up(segment + 2 * W);
        }
        if (SPLIT) {
            if (segment < end) {
                float* to = partial + ((size_t)(sequence * shape.kv_heads + kv_head) * ((shape.pages_max + 3) / 4) + segment) * H * (D + 2);
#pragma unroll
                for (int h = 0; h < H; h++) {
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++) to[h * (D + 2) + lane * PER_LANE + i] = blend[h][i];
                    __syncwarp();
                    if (lane == 0) { to[h * (D + 2) + D] = m_at[warp * H + h]; to[h * (D + 2) + D + 1] = l_at[warp * H + h]; }
                }
            }
            continue;
        }
        if (segment < end)
#pragma unroll
            for (int h = 0; h < H; h++)
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) o_at[h * D + lane * PER_LANE + i] = blend[h][i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            int element = i * 32 * W + threadIdx.x, h = element / D;
            if (element >= H * D) break;
            for (int w = 0; w < W && round + w < end; w++) {
                float m_s = m_at[w * H + h], o_s = ((const float*)(memory + w * WARP_BYTES + 64 * (KROW + VROW) + 64 * H * 4))[element];
                // One of the two factors is exp(0), exactly 1.
                bool newer = m_s > m[i];
                float factor = exp_exact(newer ? m[i] - m_s : m_s - m[i]), a = newer ? factor : 1.0f, b = newer ? 1.0f : factor;
                l[i] = l[i] * a + l_at[w * H + h] * b;
                o[i] = fmaf(o_s, b, o[i] * a);
                m[i] = newer ? m_s : m[i];
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    if (SPLIT) return;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        int element = i * 32 * W + threadIdx.x;
        if (element < H * D) out[(row_of(shape, sequence) * shape.kv_heads + kv_head) * H * D + element] = __fdiv_rn(o[i], l[i]);
    }
}

/// Merges what splits left, in order. Grid (heads, sequences), D threads. Eight segments' loads are under way before their sums.
template <int D, int H> DEVICE void merge(const float* partial, const int* positions, float* out, DecodeShape shape) {
    constexpr int AHEAD = 8, STRIDE = H * (D + 2);
    int head = blockIdx.x, sequence = blockIdx.y, position = position_of(shape, positions, sequence);
    int first = shape.window ? (position + 1 > shape.window ? position + 1 - shape.window : 0) : 0, end = position / SEGMENT_TOKENS + 1;
    const float* from = partial + (size_t)(sequence * shape.kv_heads + head / H) * ((shape.pages_max + 3) / 4) * STRIDE + head % H * (D + 2);
    float m = float_of(0xff800000), l = 0.0f, o = 0.0f;
    for (int segment = first / SEGMENT_TOKENS; segment < end; segment += AHEAD) {
        float m_s[AHEAD], l_s[AHEAD], o_s[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float* at = from + (size_t)(segment + i < end ? segment + i : segment) * STRIDE;
            m_s[i] = at[D]; l_s[i] = at[D + 1]; o_s[i] = at[threadIdx.x];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (segment + i >= end) break;
            bool newer = m_s[i] > m;
            float factor = exp_exact(newer ? m - m_s[i] : m_s[i] - m), a = newer ? factor : 1.0f, b = newer ? 1.0f : factor;
            l = l * a + l_s[i] * b;
            o = fmaf(o_s[i], b, o * a);
            m = newer ? m_s[i] : m;
        }
    }
    out[(row_of(shape, sequence) * gridDim.x + head) * D + threadIdx.x] = __fdiv_rn(o, l);
}

#define ENTRIES(D, H, W) NAMED_ENTRIES(D, H, W)
#define SPLIT_ENTRIES(D, H, W) NAMED_SPLIT_ENTRIES(D, H, W)
#define NAMED_ENTRIES(D, H, W)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * W, 1) decode_d##D##_h##H##_w##W(const float* q, const u16* keys, const u16* values, const u32* tables, const int* positions, float* out, DecodeShape shape) { \
        decode<D, H, W, false>(q, keys, values, tables, positions, out, nullptr, shape);                                                      \
    }
#define NAMED_SPLIT_ENTRIES(D, H, W)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * W, 1) decode_split_d##D##_h##H##_w##W(const float* q, const u16* keys, const u16* values, const u32* tables, const int* positions, float* partial, DecodeShape shape) { \
        decode<D, H, W, true>(q, keys, values, tables, positions, nullptr, partial, shape);                                                   \
    }                                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(D) decode_merge_d##D##_h##H(const float* partial, const int* positions, float* out, DecodeShape shape) { \
        merge<D, H>(partial, positions, out, shape);                                                                                          \
    }
// As devices launch them: four warps, and the commonest numbers of heads on a kv head.
#define OF_HEADS(D, H) ENTRIES(D, H, 4) SPLIT_ENTRIES(D, H, 4)
#if HEAD == 64 || defined(EVERY_HEAD) // the emulated card has all in one unit
OF_HEADS(64, 1) OF_HEADS(64, 3) OF_HEADS(64, 4) OF_HEADS(64, 7)
#endif
#if HEAD == 128 || defined(EVERY_HEAD)
OF_HEADS(128, 2) OF_HEADS(128, 4) OF_HEADS(128, 8)
#endif
#if !defined(HEAD) && !defined(EVERY_HEAD) // the lab
ENTRIES(128, 4, 4)
ENTRIES(128, 4, 5)
ENTRIES(128, 4, 6)
ENTRIES(128, 8, 4)
ENTRIES(64, 3, 4)
SPLIT_ENTRIES(128, 4, 4)
SPLIT_ENTRIES(64, 3, 4)
#endif
#undef ENTRIES
#undef SPLIT_ENTRIES
