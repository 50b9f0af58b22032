// Linear layers with int8 and int4 weights on the integer tensor cores: `out[row][n] = sum_k x[row][k] W[n][k] + bias[n]`, docs/numerics.md
// rule 3, the bits of `cpu-v1`. Weights are the A operand (16 outputs), quantised rows the B operand (8 rows), so one row costs one MMA.
//
// Layouts (K a multiple of 64 after padding with zero codes; g = lane / 4, t = lane % 4):
//   weights, int4   [N / 16][K / 64][lane] U4 { word(g, 0), word(g + 8, 0), word(g, 1), word(g + 8, 1) }, where word(row, half) has the nibbles of
//                   k = 32 half + 8 t + (0..7): low nibble of byte j is k = j, high nibble k = 4 + j. Two's complement, with a minimum unsigned.
//   weights, int8   [N / 16][K / 32][lane] U4 { (g, 0), (g + 8, 0), (g, 1), (g + 8, 1) }: bytes of k = 8 t + 4 half + (0..3).
//   scales, minima  [N / 16][slices][16 outputs][SLICE / G] f16, padded with 0.
//   xq              [rows / 8][K / 64][lane] U4: row g, bytes of k = 8 t + (0..7) of the first 32, then of the second 32.
//   xs, xa          [rows / 8][groups][8 rows] f32: scale, and sum of codes.
// k may be permuted inside a group because a group's sum is an integer.
#include "numerics.cuh"

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

// ---- rows as int8 in groups ----

/// One warp for a row and a group. Grid: (ceil(groups / 8), padded rows), 256 threads; rows from `rows` on become zeros.
template <int G> DEVICE void quantise(const float* x, u8* xq, float* xs, float* xa, int rows, int k) {
    int lane = threadIdx.x & 31, group = blockIdx.x * 8 + (threadIdx.x >> 5), row = blockIdx.y;
    int padded = (k + 63) / 64 * 64, groups = (k + G - 1) / G;
    if (group * G >= padded) return;
    float v[G / 32], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < G / 32; i++) {
        int at = group * G + i * 32 + lane;
        v[i] = row < rows && at < k ? x[(size_t)row * k + at] : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));
    }
    for (int o = 16; o; o /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, o));
    float inverse = __fdiv_rn(127.0f, amax);
    bool zero = !(inverse < float_of(0x7f800000));
    int sum = 0;
#pragma unroll
    for (int i = 0; i < G / 32; i++) {
        int at = group * G + i * 32 + lane;
        int code = zero ? 0 : __float2int_rn(v[i] * inverse);
        code = code > 127 ? 127 : code < -127 ? -127 : code;
        sum += code;
        if (at < padded) xq[(((size_t)(row / 8) * (padded / 64) + at / 64) * 32 + (row % 8) * 4 + at % 32 / 8) * 16 + at % 64 / 32 * 8 + at % 8] = (u8)code;
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0 && group < groups) {
        size_t to = ((size_t)(row / 8) * groups + group) * 8 + row % 8;
        xs[to] = zero ? 0.0f : __fdiv_rn(amax, 127.0f);
        xa[to] = (float)sum;
    }
}

// ---- few rows: a warp takes 16 outputs of one slice at a time, weights go straight from memory to registers ----

struct IntegerLayer {
    const U4* weights; const u16* scales; const u16* minima; const float* bias; // bias may be null
};
struct QuantisedRows {
    const U4* xq; const float* xs; const float* xa;
};

/// Cta: 16 outputs, all of K; warps share the slices; shared memory: [slices][8 RT rows][16] f32. RT: row tiles of 8.
template <int BITS, bool MINIMUM, int G, int RT>
DEVICE void integer_few_rows(const IntegerLayer layer, const QuantisedRows x, float* out, int rows, int n, int k) {
    constexpr int CHUNK = BITS == 4 ? 64 : 32, CHUNKS = SLICE / CHUNK, DEPTH = 8, WORDS = SLICE / G / 2;
    DYNAMIC_SHARED(float, sums);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane / 4, t = lane % 4, tile = blockIdx.x;
    int padded = (k + 63) / 64 * 64, slices = (k + SLICE - 1) / SLICE, groups = (k + G - 1) / G;
    const U4* w = layer.weights + (size_t)tile * (padded / CHUNK) * 32 + lane;
    u64 policy = evict_first();
    U4 ring[DEPTH];
#pragma unroll
    for (int c = 0; c < DEPTH; c++)
        if (warp * SLICE + c * CHUNK < padded) ring[c] = load_stream(w + (size_t)(warp * CHUNKS + c) * 32, policy);
    for (int slice = warp; slice < slices; slice += warps) {
        u32 scale[2][WORDS], minimum[2][WORDS];
        const u32* words = (const u32*)layer.scales + ((size_t)tile * slices + slice) * 16 * WORDS;
        const u32* lows = (const u32*)layer.minima + ((size_t)tile * slices + slice) * 16 * WORDS;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < WORDS; i += 2) {
                U2 v = *(const U2*)(words + (g + 8 * r) * WORDS + i);
                scale[r][i] = v.x; scale[r][i + 1] = v.y;
                if (MINIMUM) { U2 m = *(const U2*)(lows + (g + 8 * r) * WORDS + i); minimum[r][i] = m.x; minimum[r][i + 1] = m.y; }
            }
        float acc[RT][4] = {};
        int d[RT][4];
        U4 xv[RT];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = slice * SLICE + c * CHUNK;
            if (at >= padded) break;
            U4 v = ring[c % DEPTH];
            int next_slice = c + DEPTH < CHUNKS ? slice : slice + warps, next_chunk = (c + DEPTH) % CHUNKS;
            if (next_slice * SLICE + next_chunk * CHUNK < padded) ring[c % DEPTH] = load_stream(w + (size_t)(next_slice * CHUNKS + next_chunk) * 32, policy);
            if (BITS == 4 || c % 2 == 0) {
#pragma unroll
                for (int rt = 0; rt < RT; rt++) {
                    xv[rt] = U4{0, 0, 0, 0};
                    if (rt * 8 + g < rows) xv[rt] = load_shared_by_many(x.xq + ((size_t)rt * (padded / 64) + at / 64) * 32 + lane);
                }
            }
#pragma unroll
            for (int half = 0; half < CHUNK / 32; half++) {
                int step = c * (CHUNK / 32) + half; // of 32 in the slice
                bool first = step % (G / 32) == 0, last = step % (G / 32) == G / 32 - 1;
                u32 a[4];
                weight_fragments<BITS>(a, v, half);
                bool odd = BITS == 4 ? half : c % 2;
                int group = (slice * SLICE + step * 32) / G;
                float s[2], m[2];
                if (last || G > 64) {
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        s[r] = half_of(scale[r], step * 32 / G);
                        m[r] = MINIMUM ? half_of(minimum[r], step * 32 / G) : 0.0f;
                    }
                }
                // A group may end with the row, at a border of 64.
                bool ends = last || (G > 64 && step % 2 == 1 && at + CHUNK >= padded);
#pragma unroll
                for (int rt = 0; rt < RT; rt++) {
                    if (first) d[rt][0] = d[rt][1] = d[rt][2] = d[rt][3] = SUM_START;
                    multiply<BITS, MINIMUM>(d[rt], a, odd ? xv[rt].z : xv[rt].x, odd ? xv[rt].w : xv[rt].y);
                    if (ends && group < groups) {
                        size_t from = ((size_t)rt * groups + group) * 8 + t * 2;
                        F2 xs = *(const F2*)(x.xs + from), xa = {0.0f, 0.0f};
                        if (MINIMUM) xa = *(const F2*)(x.xa + from);
                        add_group<BITS, MINIMUM>(acc[rt], d[rt], s, m, xs, xa);
                    }
                }
            }
        }
#pragma unroll
        for (int rt = 0; rt < RT; rt++)
#pragma unroll
            for (int q = 0; q < 4; q++) sums[((size_t)slice * RT * 8 + rt * 8 + t * 2 + (q & 1)) * 16 + g + q / 2 * 8] = acc[rt][q];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < RT * 128; i += blockDim.x) {
        int row = i / 16, output = tile * 16 + i % 16;
        if (row >= rows || output >= n) continue;
        float total = sums[i];
        for (int s = 1; s < slices; s++) total = total + sums[s * RT * 128 + i];
        out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

// ---- many rows: 128 outputs x 16 RT rows a cta, rows staged through shared memory ----

/// Cta: 8 warps, 4 along the outputs (32 each) and 2 along the rows (8 RT each). Rows are padded to whole ctas in xq and xs.
/// Shared memory: STAGES stages of 64 k: codes [2 RT][512 bytes], then scales (and sums) [2 RT][groups of a stage][8].
template <int BITS, bool MINIMUM, int G, int RT, int STAGES>
DEVICE void integer_many_rows(const IntegerLayer layer, const QuantisedRows x, float* out, int rows, int n, int k) {
    constexpr int TILES = 2, LOADS = BITS == 4 ? 1 : 2, GS = G < 64 ? 64 / G : 1, SCALES = MINIMUM ? 2 : 1;
    constexpr int CODE_BYTES = 2 * RT * 512, SCALE_BYTES = 2 * RT * GS * 32, STAGE_BYTES = CODE_BYTES + SCALES * SCALE_BYTES;
    DYNAMIC_SHARED(u8, stages);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE, groups = (k + G - 1) / G;
    int row_tile0 = blockIdx.y * 2 * RT, my_rows = warp / 4 * RT;
    int tiles = (n + 15) / 16, tile0 = blockIdx.x * 8 + warp % 4 * TILES;
    auto stage_rows = [&](int step) {
        if (step < steps) {
            u8* to = stages + step % STAGES * STAGE_BYTES;
            for (int i = threadIdx.x; i < CODE_BYTES / 16; i += 256) {
                int rt = i / 32, piece = i % 32;
                cp_async16(to + i * 16, x.xq + ((size_t)(row_tile0 + rt) * steps + step) * 32 + piece);
            }
            for (int i = threadIdx.x; i < SCALES * SCALE_BYTES / 16; i += 256) {
                int which = i / (SCALE_BYTES / 16), j = i % (SCALE_BYTES / 16), rt = j / (GS * 2), group = step * 64 / G + j % (GS * 2) / 2;
                if (group < groups) cp_async16(to + CODE_BYTES + i * 16, (which ? x.xa : x.xs) + ((size_t)(row_tile0 + rt) * groups + group) * 8 + j % 2 * 4);
            }
        }
        cp_async_commit();
    };
    const U4* w[TILES];
    const u16 *scales[TILES], *minima[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int tile = tile0 + i < tiles ? tile0 + i : tiles - 1;
        w[i] = layer.weights + (size_t)tile * steps * LOADS * 32 + lane;
        scales[i] = layer.scales + (size_t)tile * slices * 16 * (SLICE / G);
        minima[i] = layer.minima + (size_t)tile * slices * 16 * (SLICE / G);
    }
    U4 ring[2][TILES][LOADS];
    auto load_weights = [&](U4 (&to)[TILES][LOADS], int step) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int l = 0; l < LOADS; l++) to[i][l] = load_shared_by_many(w[i] + (size_t)(step * LOADS + l) * 32);
    };
    float total[TILES][RT][4] = {}, acc[TILES][RT][4] = {};
    int d[G > 32 ? TILES : 1][G > 32 ? RT : 1][4];
    for (int s = 0; s < STAGES - 1; s++) stage_rows(s);
    load_weights(ring[0], 0);
    if (steps > 1) load_weights(ring[1], 1);
    auto compute = [&](int step, U4 (&now)[TILES][LOADS]) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        stage_rows(step + STAGES - 1);
        const u8* from = stages + step % STAGES * STAGE_BYTES;
        const float* xs = (const float*)(from + CODE_BYTES);
        U4 weights[TILES][LOADS];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int l = 0; l < LOADS; l++) weights[i][l] = now[i][l];
        if (step + 2 < steps) load_weights(now, step + 2);
        float s[TILES][2][GS], m[TILES][2][GS];
        int slice = step / (SLICE / 64), in_slice = step % (SLICE / 64) * 64 / G;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < GS; j++) {
                    size_t at = ((size_t)slice * 16 + g + 8 * r) * (SLICE / G) + in_slice + j;
                    s[i][r][j] = half_to_float(scales[i][at]);
                    m[i][r][j] = MINIMUM ? half_to_float(minima[i][at]) : 0.0f;
                }
        bool begins = G <= 64 || step % (G / 64) == 0, ends = G <= 64 || step % (G / 64) == G / 64 - 1 || step == steps - 1;
        u32 a[2][TILES][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < TILES; i++) weight_fragments<BITS>(a[half][i], weights[i][BITS == 4 ? 0 : half], half);
#pragma unroll
        for (int rt = 0; rt < RT; rt++) {
            U4 v = *(const U4*)(from + ((my_rows + rt) * 32 + lane) * 16);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr bool WIDE = G > 32;
                int j = WIDE ? 0 : half;
                F2 sa = *(const F2*)(xs + ((my_rows + rt) * GS + j) * 8 + t * 2), xa = {0.0f, 0.0f};
                if (MINIMUM) xa = *(const F2*)(xs + SCALE_BYTES / 4 + ((my_rows + rt) * GS + j) * 8 + t * 2);
                bool exists = (step * 64 + half * 32) / G < groups;
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    int(&sum)[4] = d[WIDE ? i : 0][WIDE ? rt : 0];
                    if (!WIDE || (half == 0 && begins)) sum[0] = sum[1] = sum[2] = sum[3] = SUM_START;
                    multiply<BITS, MINIMUM>(sum, a[half][i], half ? v.z : v.x, half ? v.w : v.y);
                    if (WIDE ? half == 1 && ends : exists) {
                        float sw[2] = {s[i][0][j], s[i][1][j]}, mw[2] = {m[i][0][j], m[i][1][j]};
                        add_group<BITS, MINIMUM>(acc[i][rt], sum, sw, mw, sa, xa);
                    }
                }
            }
        }
        if (step % (SLICE / 64) == SLICE / 64 - 1 || step == steps - 1) {
            bool start = step < SLICE / 64;
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int rt = 0; rt < RT; rt++)
#pragma unroll
                    for (int q = 0; q < 4; q++) { total[i][rt][q] = start ? acc[i][rt][q] : total[i][rt][q] + acc[i][rt][q]; acc[i][rt][q] = 0.0f; }
        }
    };
    for (int step = 0; step < steps; step += 2) {
        compute(step, ring[0]);
        if (step + 1 < steps) compute(step + 1, ring[1]);
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int rt = 0; rt < RT; rt++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                int row = (row_tile0 + my_rows + rt) * 8 + t * 2 + (q & 1), output = (tile0 + i) * 16 + g + q / 2 * 8;
                if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total[i][rt][q] + layer.bias[output] : total[i][rt][q];
            }
}

// ---- entries: linear_<bits>_<s symmetric, m with minimum>_g<G>_<rows> ----
#define QUANTISE(G) \
    extern "C" __global__ void __launch_bounds__(256) quantise_g##G(const float* x, u8* xq, float* xs, float* xa, int rows, int k) { quantise<G>(x, xq, xs, xa, rows, k); }
#define FEW_ROWS(NAME, BITS, MINIMUM, G, RT)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) NAME##_g##G##_rows##RT(IntegerLayer layer, QuantisedRows x, float* out, int rows, int n, int k) { \
        integer_few_rows<BITS, MINIMUM, G, RT>(layer, x, out, rows, n, k);                                                                  \
    }                                                                                                                                     \
    /* Several layers of one shape, each with rows of its own: blockIdx.y names the problem. */                                           \
    extern "C" __global__ void __launch_bounds__(256) NAME##_g##G##_rows##RT##_grouped(const IntegerLayer* layers, const QuantisedRows* x, float* const* out, int rows, int n, int k) { \
        integer_few_rows<BITS, MINIMUM, G, RT>(layers[blockIdx.y], x[blockIdx.y], out[blockIdx.y], rows, n, k);                            \
    }
#define MANY_ROWS(NAME, BITS, MINIMUM, G)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) NAME##_g##G##_many(IntegerLayer layer, QuantisedRows x, float* out, int rows, int n, int k) { \
        integer_many_rows<BITS, MINIMUM, G, 4, 4>(layer, x, out, rows, n, k);                                                 \
    }
#define ENTRIES(G)                                                                                                    \
    QUANTISE(G)                                                                                                       \
    FEW_ROWS(linear_4s, 4, false, G, 1) FEW_ROWS(linear_4s, 4, false, G, 2) MANY_ROWS(linear_4s, 4, false, G)         \
    FEW_ROWS(linear_4m, 4, true, G, 1) FEW_ROWS(linear_4m, 4, true, G, 2) MANY_ROWS(linear_4m, 4, true, G)            \
    FEW_ROWS(linear_8s, 8, false, G, 1) FEW_ROWS(linear_8s, 8, false, G, 2) MANY_ROWS(linear_8s, 8, false, G)
ENTRIES(32)
ENTRIES(64)
ENTRIES(128)
#undef ENTRIES
