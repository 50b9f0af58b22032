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

/// Cta: TILES x 16 outputs, all of K; warps share the slices; shared memory: [slices][8 RT rows][TILES x 16] f32. RT: row tiles of 8.
/// FULL: K is a multiple of a slice. Lanes of rows that do not exist read the last one: a column of B reaches its own column of D only.
template <int G, int RT, int TILES, bool FULL> DEVICE void bf16_few_rows(const Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) {
    constexpr int CHUNKS = SLICE / 64, WORDS = SLICE / G / 2, DEPTH = 8 / TILES, STEPS = G / 32;
    DYNAMIC_SHARED(float, sums);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, slices = (k + SLICE - 1) / SLICE, tiles = (n + 15) / 16;
    const U4* w[TILES];
    const u32* words[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int tile = blockIdx.x * TILES + i < tiles ? blockIdx.x * TILES + i : tiles - 1;
        w[i] = layer.weights + ((size_t)tile * (padded / 64) + warp * CHUNKS) * 32 + lane;
        words[i] = (const u32*)layer.scales + ((size_t)tile * slices + warp) * 16 * WORDS + g * WORDS;
    }
    u64 policy = evict_first();
    U4 ring[DEPTH][TILES];
#pragma unroll
    for (int c = 0; c < DEPTH; c++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (FULL ? warp < slices : warp * SLICE + c * 64 < padded) ring[c][i] = load_stream(w[i] + c * 32, policy);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const U4* x[RT];
#pragma unroll
    for (int rt = 0; rt < RT; rt++) {
        int row = rt * 8 + g < rows ? rt * 8 + g : rows - 1;
        x[rt] = xb + ((size_t)(row / 8) * (padded / 32) + warp * CHUNKS * 2) * 32 + row % 8 * 4 + t;
    }
    for (int slice = warp; slice < slices; slice += warps) {
        u32 scale[TILES][2][WORDS];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < WORDS; j += 2) {
                    U2 v = *(const U2*)(words[i] + 8 * r * WORDS + j);
                    scale[i][r][j] = v.x; scale[i][r][j + 1] = v.y;
                }
            words[i] += warps * 16 * WORDS;
        }
        float acc[TILES][RT][4] = {}, d[TILES][RT][4];
        U4 b[2][RT][2]; // rows' operands: the next while these are used
        auto load_rows = [&](int c) {
#pragma unroll
            for (int rt = 0; rt < RT; rt++) { b[c % 2][rt][0] = load_shared_by_many(x[rt] + c * 64); b[c % 2][rt][1] = load_shared_by_many(x[rt] + c * 64 + 32); }
        };
        load_rows(0);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = slice * SLICE + c * 64;
            if (!FULL && at >= padded) break;
            if (c + 1 < CHUNKS && (FULL || at + 64 < padded)) load_rows(c + 1);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                U4 v = ring[c % DEPTH][i];
                constexpr int AHEAD = DEPTH;
                if (c + AHEAD < CHUNKS) {
                    if (FULL || at + AHEAD * 64 < padded) ring[c % DEPTH][i] = load_stream(w[i] + (c + AHEAD) * 32, policy);
                } else {
                    int next = slice + warps;
                    if (FULL ? next < slices : next * SLICE + (c + AHEAD - CHUNKS) * 64 < padded) ring[c % DEPTH][i] = load_stream(w[i] + (size_t)(warps * CHUNKS + c + AHEAD - CHUNKS) * 32, policy);
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int step = c * 2 + half;
                    bool first = step % STEPS == 0, last = step % STEPS == STEPS - 1 || (!FULL && G > 64 && half == 1 && at + 64 >= padded);
                    u32 a0[4], a1[4];
                    code_fragment<0>(a0, half ? v.z : v.x, half ? v.w : v.y);
                    code_fragment<1>(a1, half ? v.z : v.x, half ? v.w : v.y);
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) {
                        if (first) d[i][rt][0] = d[i][rt][1] = d[i][rt][2] = d[i][rt][3] = 0.0f;
                        mma_bf16(d[i][rt], a0, b[c % 2][rt][half].x, b[c % 2][rt][half].y);
                        mma_bf16(d[i][rt], a1, b[c % 2][rt][half].z, b[c % 2][rt][half].w);
                        if (last)
#pragma unroll
                            for (int q = 0; q < 4; q++) acc[i][rt][q] = fmaf(d[i][rt][q], scale_of(scale[i][q / 2], step / STEPS), acc[i][rt][q]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            w[i] += (size_t)warps * CHUNKS * 32;
#pragma unroll
            for (int rt = 0; rt < RT; rt++)
#pragma unroll
                for (int q = 0; q < 4; q++) sums[(((size_t)slice * RT + rt) * 8 + t * 2 + (q & 1)) * (TILES * 16) + i * 16 + g + q / 2 * 8] = acc[i][rt][q];
        }
#pragma unroll
        for (int rt = 0; rt < RT; rt++) x[rt] += warps * CHUNKS * 2 * 32;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * TILES * 16; i += blockDim.x) {
        int row = i / (TILES * 16), output = blockIdx.x * TILES * 16 + i % (TILES * 16);
        if (output >= n) continue;
        float total = sums[i];
        for (int s = 1; s < slices; s++) total = total + sums[s * RT * TILES * 128 + i];
        out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

// ---- many rows on mma.sync: 128 outputs x 16 RT rows a cta ----

/// Cta: 8 warps, 4 along the outputs (32 each), 2 along the rows (8 RT each); rows padded to whole ctas in xb.
/// Shared memory: STAGES x { rows [2 RT][2][512 bytes], weights [8 tiles][512 bytes] }, scales [2 slices][8 tiles][16][SLICE / G] f16, and
/// each thread's sums of whole slices [8 RT][256] f32, which would not fit in registers.
template <int RT, int STAGES> constexpr int bf16_many_shared_bytes(int g) { return STAGES * (2 * RT * 1024 + 4096) + 2 * 8 * 32 * (SLICE / g) + 8 * RT * 1024; }
template <int G, int RT, int STAGES> DEVICE void bf16_many_rows(const Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) {
    constexpr int TILES = 2, ROW_BYTES = 2 * RT * 1024, STAGE_BYTES = ROW_BYTES + 4096, GS = G < 64 ? 2 : 1, SCALE_BYTES = 32 * (SLICE / G);
    DYNAMIC_SHARED(u8, stages);
    u8* scale_at = stages + STAGES * STAGE_BYTES;
    float* totals = (float*)(scale_at + 2 * 8 * SCALE_BYTES) + threadIdx.x;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE;
    int row_tile0 = blockIdx.y * 2 * RT, my_rows = warp / 4 * RT, tiles = (n + 15) / 16, my_tiles = warp % 4 * TILES;
    auto stage = [&](int step) {
        if (step < steps) {
            u8* to = stages + step % STAGES * STAGE_BYTES;
            for (int i = threadIdx.x; i < ROW_BYTES / 16; i += 256) cp_async16(to + i * 16, xb + ((size_t)(row_tile0 + i / 64) * steps + step) * 64 + i % 64);
            int tile = blockIdx.x * 8 + warp < tiles ? blockIdx.x * 8 + warp : tiles - 1;
            cp_async16(to + ROW_BYTES + threadIdx.x * 16, layer.weights + ((size_t)tile * steps + step) * 32 + lane);
            if (step % (SLICE / 64) == 0) {
                int slice = step / (SLICE / 64);
                for (int i = threadIdx.x; i < 8 * SCALE_BYTES / 16; i += 256) {
                    int from = blockIdx.x * 8 + i / (SCALE_BYTES / 16) < tiles ? blockIdx.x * 8 + i / (SCALE_BYTES / 16) : tiles - 1;
                    cp_async16(scale_at + slice % 2 * 8 * SCALE_BYTES + i * 16, layer.scales + ((size_t)from * slices + slice) * SCALE_BYTES / 2 + i % (SCALE_BYTES / 16) * 8);
                }
            }
        }
        cp_async_commit();
    };
    float acc[TILES][RT][4] = {}, d[TILES][RT][4];
    for (int s = 0; s < STAGES - 1; s++) stage(s);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        stage(step + STAGES - 1);
        const u8* from = stages + step % STAGES * STAGE_BYTES;
        int slice = step / (SLICE / 64), group = step % (SLICE / 64) * 64 / G;
        bool begins = G <= 64 || step % (G / 64) == 0, ends = G <= 64 || step % (G / 64) == G / 64 - 1 || step == steps - 1;
        const u16* scales = (const u16*)(scale_at + (slice % 2 * 8 + my_tiles) * SCALE_BYTES) + g * (SLICE / G) + group;
        U4 v[TILES];
#pragma unroll
        for (int i = 0; i < TILES; i++) v[i] = *(const U4*)(from + ROW_BYTES + ((my_tiles + i) * 32 + lane) * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 a[TILES][2][4];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                code_fragment<0>(a[i][0], half ? v[i].z : v[i].x, half ? v[i].w : v[i].y);
                code_fragment<1>(a[i][1], half ? v[i].z : v[i].x, half ? v[i].w : v[i].y);
                if (G == 32 || (half == 0 && begins))
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) d[i][rt][0] = d[i][rt][1] = d[i][rt][2] = d[i][rt][3] = 0.0f;
            }
#pragma unroll
            for (int rt = 0; rt < RT; rt++) {
                U4 b = *(const U4*)(from + (((my_rows + rt) * 2 + half) * 32 + lane) * 16);
#pragma unroll
                for (int i = 0; i < TILES; i++) mma_bf16(d[i][rt], a[i][0], b.x, b.y);
#pragma unroll
                for (int i = 0; i < TILES; i++) mma_bf16(d[i][rt], a[i][1], b.z, b.w);
            }
            if (G == 32 || (half == 1 && ends))
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const u16* at = scales + i * (SCALE_BYTES / 2) + (GS == 2 ? half : 0);
                    float s[2] = {half_to_float(at[0]), half_to_float(at[8 * (SLICE / G)])};
#pragma unroll
                    for (int rt = 0; rt < RT; rt++)
#pragma unroll
                        for (int q = 0; q < 4; q++) acc[i][rt][q] = fmaf(d[i][rt][q], s[q / 2], acc[i][rt][q]);
                }
        }
        if (step % (SLICE / 64) == SLICE / 64 - 1 && step != steps - 1) {
            bool start = step < SLICE / 64;
#pragma unroll
            for (int j = 0; j < TILES * RT * 4; j++) {
                float& sum = acc[j / (RT * 4)][j / 4 % RT][j % 4];
                totals[j * 256] = start ? sum : totals[j * 256] + sum;
                sum = 0.0f;
            }
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int j = 0; j < TILES * RT * 4; j++) {
        int i = j / (RT * 4), rt = j / 4 % RT, q = j % 4, row = (row_tile0 + my_rows + rt) * 8 + t * 2 + (q & 1), output = (blockIdx.x * 8 + my_tiles + i) * 16 + g + q / 2 * 8;
        float total = slices > 1 ? totals[j * 256] + acc[i][rt][q] : acc[i][rt][q];
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

// ---- entries ----
// rows<RT>_t<TILES>: few rows, where K is a multiple of 512; rows<RT>_any: any K.
#define FEW_ROWS(G, NAME, RT, TILES, FULL)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, RT > 2 ? 1 : 2) linear_w4a16_g##G##_rows##RT##_##NAME(Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) { \
        bf16_few_rows<G, RT, TILES, FULL>(layer, xb, out, rows, n, k);                                                                      \
    }
#define GROUPED(G, NAME, TILES, FULL)                                                                                                      \
    /* Several layers of one shape, each with rows of its own: blockIdx.y names the problem. */                                            \
    extern "C" __global__ void __launch_bounds__(256, 2) linear_w4a16_g##G##_rows1_##NAME##_grouped(const Int4Layer* layers, const U4* const* xb, float* const* out, int rows, int n, int k) { \
        bf16_few_rows<G, 1, TILES, FULL>(layers[blockIdx.y], xb[blockIdx.y], out[blockIdx.y], rows, n, k);                                  \
    }
#define ENTRIES(G)                                                                                                                         \
    FEW_ROWS(G, any, 1, 1, false) FEW_ROWS(G, any, 2, 1, false) GROUPED(G, any, 1, false)                                                  \
    FEW_ROWS(G, t1, 1, 1, true) FEW_ROWS(G, t1, 2, 1, true) FEW_ROWS(G, t2, 1, 2, true) FEW_ROWS(G, t2, 2, 2, true)                        \
    FEW_ROWS(G, t2, 4, 2, true)                                                                                                            \
    GROUPED(G, t1, 1, true) GROUPED(G, t2, 2, true)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g##G##_many(Int4Layer layer, const U4* xb, float* out, int rows, int n, int k) { \
        bf16_many_rows<G, 8, 4>(layer, xb, out, rows, n, k);                                                                                \
    }
ENTRIES(32)
ENTRIES(64)
ENTRIES(128)
#undef ENTRIES
#undef FEW_ROWS
#undef GROUPED
