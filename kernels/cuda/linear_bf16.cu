// Linear layers with int4 weights and bf16 rows on the bf16 tensor cores (W4A16): class `cuda-bf16`.
// `out[row][n] = sum over slices of sum over groups of scale[n][group] * (sum over the group of code[n][k] x[row][k])`.
// Order: inside a group the tensor core adds 16 products at a time onto its f32 accumulator, from 0; then `acc = fma(group, scale, acc)`;
// slices of 512 are added ascending. Codes are exact in bf16, scales never rounded to it. The same for any number of rows.
//
// Layouts: weights and scales as in linear_integer.cu (one packing serves both); its two words of a lane and 32 k make two MMAs: the
// first takes k = 8 t + {0, 2, 4, 6}, the second 8 t + {1, 3, 5, 7}.
//   xb              [rows / 8][K / 32][lane] U4: row g, the 8 bf16 of k = 8 t + {0, 2, 4, 6, 1, 3, 5, 7}.
//   xw (wgmma)      [rows / B][K / 16][2][B / 8][8 rows][8 bf16]: core matrices of 8 rows x 16 bytes, unswizzled; B rows a cta.
#include "int4.cuh"

/// The A operand of MMA `I` (0 or 1) of 32 k.
template <int I> DEVICE void code_fragment(u32 (&a)[4], u32 low, u32 high) {
    a[0] = bf16_codes<2 * I>(low); a[1] = bf16_codes<2 * I>(high);
    a[2] = bf16_codes<2 * I + 1>(low); a[3] = bf16_codes<2 * I + 1>(high);
}
DEVICE float scale_of(const u32* words, int index) { return half_to_float((u16)(index & 1 ? words[index / 2] >> 16 : words[index / 2])); }

// ---- rows to bf16 in fragment order: a thread for a row and 8 k; grid (ceil(K / 8 / 128), padded rows), 128 threads ----

extern "C" __global__ void __launch_bounds__(128) rows_to_bf16(const float* x, U4* xb, int rows, int k) {
    int padded = (k + 63) / 64 * 64, octet = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;
    if (octet * 8 >= padded) return;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = row < rows && octet * 8 + i < k ? x[(size_t)row * k + octet * 8 + i] : 0.0f;
    U4 o = {bf16_pair(v[0], v[2]), bf16_pair(v[4], v[6]), bf16_pair(v[1], v[3]), bf16_pair(v[5], v[7])};
    xb[((size_t)(row / 8) * (padded / 32) + octet / 4) * 32 + row % 8 * 4 + octet % 4] = o;
}
/// The same for wgmma: position 2t, 2t+1, 8+2t, 9+2t of MMA i are k = 8 t + i + {0, 2, 4, 6}; so a thread writes 4 words of 2.
extern "C" __global__ void __launch_bounds__(128) rows_to_bf16_wgmma(const float* x, u32* xw, int rows, int k, int block) {
    int padded = (k + 63) / 64 * 64, octet = blockIdx.x * 128 + threadIdx.x, row = blockIdx.y;
    if (octet * 8 >= padded) return;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = row < rows && octet * 8 + i < k ? x[(size_t)row * k + octet * 8 + i] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            size_t core = (((size_t)(row / block) * (padded / 16) + octet / 4 * 2 + i) * 2 + h) * (block / 8) + row % block / 8;
            xw[(core * 8 + row % 8) * 4 + octet % 4] = bf16_pair(v[i + 4 * h], v[i + 4 * h + 2]);
        }
}

// ---- few rows ----

/// Cta: 16 outputs, all of K; warps share the slices; shared memory: [slices][8 RT rows][16] f32. RT: row tiles of 8.
template <int G, int RT> DEVICE void bf16_few_rows(const Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) {
    constexpr int CHUNKS = SLICE / 64, WORDS = SLICE / G / 2;
    DYNAMIC_SHARED(float, sums);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane / 4, t = lane % 4, tile = blockIdx.x;
    int padded = (k + 63) / 64 * 64, slices = (k + SLICE - 1) / SLICE;
    const U4* w = layer.weights + (size_t)tile * (padded / 64) * 32 + lane;
    u64 policy = evict_first();
    U4 ring[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        if (warp * SLICE + c * 64 < padded) ring[c] = load_stream(w + (size_t)(warp * CHUNKS + c) * 32, policy);
    for (int slice = warp; slice < slices; slice += warps) {
        u32 scale[2][WORDS];
        const u32* words = (const u32*)layer.scales + ((size_t)tile * slices + slice) * 16 * WORDS;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < WORDS; i += 2) {
                U2 v = *(const U2*)(words + (g + 8 * r) * WORDS + i);
                scale[r][i] = v.x; scale[r][i + 1] = v.y;
            }
        float acc[RT][4] = {}, d[RT][4];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = slice * SLICE + c * 64;
            if (at >= padded) break;
            U4 v = ring[c];
            if (at + warps * SLICE < padded) ring[c] = load_stream(w + (size_t)((slice + warps) * CHUNKS + c) * 32, policy);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr int STEPS = G / 32;
                int step = c * 2 + half;
                bool first = step % STEPS == 0, last = step % STEPS == STEPS - 1 || (G > 64 && half == 1 && at + 64 >= padded);
                u32 a0[4], a1[4];
                code_fragment<0>(a0, half ? v.z : v.x, half ? v.w : v.y);
                code_fragment<1>(a1, half ? v.z : v.x, half ? v.w : v.y);
#pragma unroll
                for (int rt = 0; rt < RT; rt++) {
                    U4 b = {0, 0, 0, 0};
                    if (rt * 8 + g < rows) b = load_shared_by_many(xb + ((size_t)rt * (padded / 32) + at / 32 + half) * 32 + lane);
                    if (first) d[rt][0] = d[rt][1] = d[rt][2] = d[rt][3] = 0.0f;
                    mma_bf16(d[rt], a0, b.x, b.y);
                    mma_bf16(d[rt], a1, b.z, b.w);
                    if (last)
#pragma unroll
                        for (int q = 0; q < 4; q++) acc[rt][q] = fmaf(d[rt][q], scale_of(scale[q / 2], step / STEPS), acc[rt][q]);
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

// ---- many rows on mma.sync: 128 outputs x 16 RT rows a cta ----

/// Cta: 8 warps, 4 along the outputs (32 each), 2 along the rows (8 RT each); rows padded to whole ctas in xb.
/// Shared memory: STAGES x [2 RT][2][512 bytes].
template <int G, int RT, int STAGES> DEVICE void bf16_many_rows(const Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) {
    constexpr int TILES = 2, STAGE_BYTES = 2 * RT * 1024, GS = G < 64 ? 2 : 1;
    DYNAMIC_SHARED(u8, stages);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE;
    int row_tile0 = blockIdx.y * 2 * RT, my_rows = warp / 4 * RT, tiles = (n + 15) / 16, tile0 = blockIdx.x * 8 + warp % 4 * TILES;
    auto stage_rows = [&](int step) {
        if (step < steps)
            for (int i = threadIdx.x; i < STAGE_BYTES / 16; i += 256)
                cp_async16(stages + step % STAGES * STAGE_BYTES + i * 16, xb + ((size_t)(row_tile0 + i / 64) * steps + step) * 64 + i % 64);
        cp_async_commit();
    };
    const U4* w[TILES];
    const u16* scales[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int tile = tile0 + i < tiles ? tile0 + i : tiles - 1;
        w[i] = layer.weights + (size_t)tile * steps * 32 + lane;
        scales[i] = layer.scales + (size_t)tile * slices * 16 * (SLICE / G);
    }
    U4 ring[2][TILES];
    float total[TILES][RT][4] = {}, acc[TILES][RT][4] = {}, d[TILES][RT][4];
    for (int s = 0; s < STAGES - 1; s++) stage_rows(s);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        ring[0][i] = load_shared_by_many(w[i]);
        if (steps > 1) ring[1][i] = load_shared_by_many(w[i] + 32);
    }
    auto compute = [&](int step, U4 (&now)[TILES]) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        stage_rows(step + STAGES - 1);
        const u8* from = stages + step % STAGES * STAGE_BYTES;
        U4 v[TILES];
        float s[TILES][2][GS];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            v[i] = now[i];
            if (step + 2 < steps) now[i] = load_shared_by_many(w[i] + (size_t)(step + 2) * 32);
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < GS; j++)
                    s[i][r][j] = half_to_float(scales[i][((size_t)(step / (SLICE / 64)) * 16 + g + 8 * r) * (SLICE / G) + step % (SLICE / 64) * 64 / G + j]);
        }
        bool begins = G <= 64 || step % (G / 64) == 0, ends = G <= 64 || step % (G / 64) == G / 64 - 1 || step == steps - 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 a[TILES][2][4];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                code_fragment<0>(a[i][0], half ? v[i].z : v[i].x, half ? v[i].w : v[i].y);
                code_fragment<1>(a[i][1], half ? v[i].z : v[i].x, half ? v[i].w : v[i].y);
            }
#pragma unroll
            for (int rt = 0; rt < RT; rt++) {
                U4 b = *(const U4*)(from + (((my_rows + rt) * 2 + half) * 32 + lane) * 16);
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    if (G == 32 || (half == 0 && begins)) d[i][rt][0] = d[i][rt][1] = d[i][rt][2] = d[i][rt][3] = 0.0f;
                    mma_bf16(d[i][rt], a[i][0], b.x, b.y);
                    mma_bf16(d[i][rt], a[i][1], b.z, b.w);
                    if (G == 32 || (half == 1 && ends))
#pragma unroll
                        for (int q = 0; q < 4; q++) acc[i][rt][q] = fmaf(d[i][rt][q], s[i][q / 2][G == 32 ? half : 0], acc[i][rt][q]);
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

// ---- entries ----
#define ENTRIES(G)                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) linear_w4a16_g##G##_rows1(Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) { \
        bf16_few_rows<G, 1>(layer, xb, out, rows, n, k);                                                                                      \
    }                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) linear_w4a16_g##G##_rows2(Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) { \
        bf16_few_rows<G, 2>(layer, xb, out, rows, n, k);                                                                                      \
    }                                                                                                                                       \
    /* Several layers of one shape, each with rows of its own: blockIdx.y names the problem. */                                             \
    extern "C" __global__ void __launch_bounds__(256) linear_w4a16_g##G##_rows1_grouped(const Int4Layer* layers, const U4* const* xb, float* const* out, int rows, int n, int k) { \
        bf16_few_rows<G, 1>(layers[blockIdx.y], xb[blockIdx.y], out[blockIdx.y], rows, n, k);                                                 \
    }                                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) linear_w4a16_g##G##_many(Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) { \
        bf16_many_rows<G, 4, 4>(layer, xb, out, rows, n, k);                                                                                  \
    }
ENTRIES(32)
ENTRIES(64)
ENTRIES(128)
#undef ENTRIES
