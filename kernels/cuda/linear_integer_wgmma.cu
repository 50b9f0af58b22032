// Many rows with int4 and int8 weights on Hopper's integer wgmma: the bits of linear_integer.cu, whose mma.sync form is its twin in tests.
// sm_90a; K a multiple of 128, symmetric kinds. Weights (the A operand) go from memory to registers, rows come by bulk copies.
// Limited by the float operations at the end of each group: 4 for each output and group, against G / 32 products of 32.
//   xq   [rows / 128][K / 32][2][16 row groups][8 rows][16 bytes]: half h of 32 k has bytes 4 t + j of k = 8 t + 4 h + j.
//   xs   [rows / 128][groups][128 rows] f32.
#include "integer.cuh"

/// Cta: 2 warpgroups of 64 outputs, B rows. Shared memory: STAGES of 128 k { rows [4][2][B / 8][128 bytes], scales of rows [128 / G][B] f32 },
/// sums of whole slices [B / 2][256] f32, barriers.
template <int B, int G, int STAGES> constexpr int integer_wgmma_shared_bytes() { return STAGES * (B * 128 + 128 / G * B * 4) + B * 512 + 16 * STAGES; }
template <int BITS, int G, int B, int STAGES> DEVICE void many_rows_integer(const IntegerLayer layer, const u8* xq, const float* xs, float* out, int rows, int n, int k) {
    constexpr int ROW_BYTES = B * 128, SCALE_BYTES = 128 / G * B * 4, STAGE_BYTES = ROW_BYTES + SCALE_BYTES, R = B / 2, LOADS = BITS == 4 ? 2 : 4, GS = 128 / G, PER_SLICE = SLICE / 128;
    constexpr int LOOK = G == 128 ? 2 : 1;         // steps of 128 k by which weights are asked for early
    constexpr int TURN = G == 128 ? PER_SLICE : 1; // steps in a row, whose stages are named at compile time where there are several
    static_assert(TURN == 1 || TURN == STAGES, "stages are named at compile time");
    DYNAMIC_SHARED(u8, stages);
    float* totals = (float*)(stages + STAGES * STAGE_BYTES) + threadIdx.x;
    u64* full = (u64*)(stages + STAGES * STAGE_BYTES + B * 512);
    u64* empty = full + STAGES;
    int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0), g = lane / 4, t = lane % 4;
    int steps = k / 128, slices = (k + SLICE - 1) / SLICE, tiles = (n + 15) / 16;
    int linear = blockIdx.y * gridDim.x + blockIdx.x, in_panel = linear % (16 * gridDim.y), panel = linear / (16 * gridDim.y);
    int wide = (int)gridDim.x - panel * 16 < 16 ? (int)gridDim.x - panel * 16 : 16;
    int row_block = panel * 16 + in_panel % wide, tile0 = in_panel / wide * 8;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + s, 1); barrier_init(empty + s, 8); }
        barrier_init_fence();
    }
    __syncthreads();
    const u8* x = xq + (size_t)row_block * steps * ROW_BYTES;
    const float* row_scales = xs + (size_t)row_block * steps * GS * B;
    auto fetch = [&](int step, int stage) {
        u8* to = stages + stage * STAGE_BYTES;
        barrier_expect(full + stage, STAGE_BYTES);
        bulk_copy(to, x + (size_t)step * ROW_BYTES, ROW_BYTES, full + stage);
        bulk_copy(to + ROW_BYTES, row_scales + (size_t)step * GS * B, SCALE_BYTES, full + stage);
    };
    if (threadIdx.x == 0)
        for (int step = 0; step < STAGES && step < steps; step++) fetch(step, step);
    u64 base = wgmma_matrix(stages, B / 8 * 128, 128);
    int own = tile0 + warp, tile = own < tiles ? own : tiles - 1;
    const U4* w = layer.weights + (size_t)tile * steps * LOADS * 32 + lane;
    const u16* scales = layer.scales + ((size_t)tile * slices * 16 + g) * (SLICE / G);
    u32 none = (u32)rows >> 31; // 0. Without it int8 tiles were wrong now and then; why is a guess (docs/kernels-cuda.md, Lost)
    U4 ring[LOOK][LOADS];
    u16 ring_scale[LOOK][2][GS];
    auto load_next = [&](U4 (&next)[LOADS], u16 (&next_scale)[2][GS], int step) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) next[l] = load_ahead(w + ((size_t)step * LOADS + l) * 32);
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < GS; j++) next_scale[r][j] = load_ahead(scales + ((size_t)(step / PER_SLICE) * 16 + 8 * r) * (SLICE / G) + step % PER_SLICE * GS + j);
    };
#pragma unroll
    for (int u = 0; u < LOOK; u++) load_next(ring[u], ring_scale[u], u < steps ? u : 0);
    int d[R];
    float acc[R];
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = 0.0f;
#pragma unroll 1
    for (int step0 = 0; step0 < steps; step0 += TURN)
#pragma unroll
    for (int u = 0; u < TURN; u++) {
        int step = step0 + u, stage = TURN > 1 ? u : step % STAGES, old_stage = TURN > 1 ? (u + STAGES - 2) % STAGES : (step + STAGES - 2) % STAGES;
        if (step >= steps) break;
        U4 (&next)[LOADS] = ring[u % LOOK];
        u16 (&next_scale)[2][GS] = ring_scale[u % LOOK];
        u32 a[4][4];
        float s[2][GS];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            weight_fragments<BITS>(a[i], next[BITS == 4 ? i / 2 : i], i % 2);
            if (BITS == 8)
#pragma unroll
                for (int q = 0; q < 4; q++) a[i][q] ^= none;
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int j = 0; j < GS; j++) s[r][j] = half_to_float(next_scale[r][j]);
        const u8* from = stages + stage * STAGE_BYTES;
        u64 matrix = base + stage * STAGE_BYTES / 16;
        const float* sa = (const float*)(from + ROW_BYTES) + t * 2;
        barrier_wait(full + stage, step / STAGES & 1);
#pragma unroll
        for (int j = 0; j < GS; j++) {
#pragma unroll
            for (int i = 0; i < R; i++) { d[i] = SUM_START; wgmma_settle(d[i]); }
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < G / 32; i++) wgmma_s8<B>(d, a[j * (G / 32) + i], matrix + (j * (G / 32) + i) * B * 32 / 16);
            wgmma_commit();
            if (j == 0) {
                if (step + LOOK < steps) load_next(next, next_scale, step + LOOK);
                if (threadIdx.x == 0 && step > 1 && step - 2 + STAGES < steps) { barrier_wait(empty + old_stage, (step - 2) / STAGES & 1); fetch(step - 2 + STAGES, old_stage); }
                __syncwarp();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < G / 32; i++) wgmma_keep(a[j * (G / 32) + i]);
#pragma unroll
            for (int i = 0; i < R; i++) wgmma_settle(d[i]);
#pragma unroll
            for (int i = 0; i < R; i += 4) {
                F2 v = *(const F2*)(sa + j * B + i * 2);
                acc[i] = fmaf(group_sum<BITS>(d[i]), v.x * s[0][j], acc[i]);
                acc[i + 1] = fmaf(group_sum<BITS>(d[i + 1]), v.y * s[0][j], acc[i + 1]);
                acc[i + 2] = fmaf(group_sum<BITS>(d[i + 2]), v.x * s[1][j], acc[i + 2]);
                acc[i + 3] = fmaf(group_sum<BITS>(d[i + 3]), v.y * s[1][j], acc[i + 3]);
            }
        }
        if (lane == 0) barrier_arrive(empty + stage);
        __syncwarp();
        if (step % PER_SLICE == PER_SLICE - 1 && step != steps - 1) {
            bool start = step < PER_SLICE;
#pragma unroll
            for (int i = 0; i < R; i++) { totals[i * 256] = start ? acc[i] : totals[i * 256] + acc[i]; acc[i] = 0.0f; }
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = row_block * B + i / 4 * 8 + t * 2 + (i & 1), output = own * 16 + g + (i & 2) * 4;
        float total = slices > 1 ? totals[i * 256] + acc[i] : acc[i];
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

// Grid: (ceil(rows / 128), ceil(n / 128)), 256 threads.
#define ENTRY(KIND, BITS, G)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256, 1) KIND##_g##G##_wgmma(IntegerLayer layer, const u8* xq, const float* xs, float* out, int rows, int n, int k) { \
        many_rows_integer<BITS, G, 128, G == 128 ? 4 : 8>(layer, xq, xs, out, rows, n, k);                                                                 \
    }
ENTRY(linear_4s, 4, 32)
ENTRY(linear_4s, 4, 64)
ENTRY(linear_4s, 4, 128)
ENTRY(linear_8s, 8, 32)
ENTRY(linear_8s, 8, 64)
ENTRY(linear_8s, 8, 128)
#undef ENTRY
