// Many rows with int4 weights on Hopper's wgmma: the formula and order of `linear_bf16.cu`, whose mma.sync form is its twin in tests.
// Codes become bf16 in registers and are the A operand (64 outputs a warpgroup), rows come by bulk copies and are the B operand.
// sm_90a only. Limited by the tensor cores; a warpgroup adds its groups up while the other's products run.
#include "int4.cuh"

/// The four A operands of 64 k.
DEVICE void code_fragments(u32 (&a)[4][4], const U4& v) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 low = half ? v.z : v.x, high = half ? v.w : v.y;
        a[half * 2][0] = bf16_codes<0>(low); a[half * 2][1] = bf16_codes<0>(high); a[half * 2][2] = bf16_codes<1>(low); a[half * 2][3] = bf16_codes<1>(high);
        a[half * 2 + 1][0] = bf16_codes<2>(low); a[half * 2 + 1][1] = bf16_codes<2>(high); a[half * 2 + 1][2] = bf16_codes<3>(low); a[half * 2 + 1][3] = bf16_codes<3>(high);
    }
}

/// Groups of 128. Cta: 2 warpgroups of 64 outputs, B rows. Shared memory: STAGES of 64 k { rows [4 steps of 16 k][2][B / 8][128 bytes], weights
/// [8 tiles][512 bytes] }, scales [2 slices][8 tiles][16][4] f16, sums of whole slices [B / 2][256] f32, barriers.
template <int B, int STAGES> constexpr int wgmma_shared_bytes() { return STAGES * (B * 128 + 4096) + 2048 + B * 512 + 16 * STAGES; }
template <int B, int STAGES> DEVICE void many_rows(const Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    constexpr int STEP_BYTES = B * 32, ROW_BYTES = 4 * STEP_BYTES, STAGE_BYTES = ROW_BYTES + 4096, R = B / 2;
    DYNAMIC_SHARED(u8, stages);
    u8* scale_at = stages + STAGES * STAGE_BYTES;
    float* totals = (float*)(scale_at + 2048) + threadIdx.x;
    u64* full = (u64*)(scale_at + 2048 + B * 512);
    u64* empty = full + STAGES;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE, tiles = (n + 15) / 16;
    // Ctas that run together share rows and weights: up to 16 blocks of rows side by side.
    int linear = blockIdx.y * gridDim.x + blockIdx.x, in_panel = linear % (16 * gridDim.y), panel = linear / (16 * gridDim.y);
    int wide = (int)gridDim.x - panel * 16 < 16 ? (int)gridDim.x - panel * 16 : 16;
    int row_block = panel * 16 + in_panel % wide, tile0 = in_panel / wide * 8;
    const u8* x = xw + (size_t)row_block * steps * ROW_BYTES;
    auto fetch = [&](int step) {
        u8* to = stages + step % STAGES * STAGE_BYTES;
        u64* barrier = full + step % STAGES;
        bool new_slice = step % (SLICE / 64) == 0;
        barrier_expect(barrier, STAGE_BYTES + (new_slice ? 1024 : 0));
        bulk_copy(to, x + (size_t)step * ROW_BYTES, ROW_BYTES, barrier);
        for (int i = 0; i < 8; i++) {
            int tile = tile0 + i < tiles ? tile0 + i : tiles - 1, slice = step / (SLICE / 64);
            bulk_copy(to + ROW_BYTES + i * 512, layer.weights + ((size_t)tile * steps + step) * 32, 512, barrier);
            if (new_slice) bulk_copy(scale_at + (slice % 2 * 8 + i) * 128, layer.scales + ((size_t)tile * slices + slice) * 64, 128, barrier);
        }
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + s, 1); barrier_init(empty + s, 8); }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES && s < steps; s++) fetch(s);
    u32 a[2][4][4];
    float d[R], acc[R];
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = 0.0f;
    auto fragments = [&](u32 (&to)[4][4], int step) {
        barrier_wait(full + step % STAGES, step / STAGES & 1);
        code_fragments(to, *(const U4*)(stages + step % STAGES * STAGE_BYTES + ROW_BYTES + (warp * 32 + lane) * 16));
    };
    auto issue = [&](const u32 (&from)[4][4], int step, int keep) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_bf16<B>(d, from[i], wgmma_matrix(stages + step % STAGES * STAGE_BYTES + i * STEP_BYTES, B / 8 * 128, 128), keep | (i > 0));
        wgmma_commit();
    };
    auto release = [&](int step) {
        if (lane == 0) barrier_arrive(empty + step % STAGES);
        if (threadIdx.x == 0 && step + STAGES < steps) {
            barrier_wait(empty + step % STAGES, step / STAGES & 1);
            fetch(step + STAGES);
        }
        __syncwarp();
    };
    fragments(a[0], 0);
    for (int step = 0; step < steps; step += 2) {
        bool second = step + 1 < steps;
        const u16* scales = (const u16*)(scale_at + (step / 8 % 2 * 8 + warp) * 128) + g * 4 + step % 8 / 2;
        float s0 = half_to_float(scales[0]), s1 = half_to_float(scales[32]);
        issue(a[0], step, 0);
        if (second) {
            fragments(a[1], step + 1);
            issue(a[1], step + 1, 1);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        if (step + 2 < steps) fragments(a[0], step + 2);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < R; i++) wgmma_settle(d[i]);
        release(step);
        if (second) release(step + 1);
#pragma unroll
        for (int i = 0; i < R; i++) acc[i] = fmaf(d[i], i & 2 ? s1 : s0, acc[i]);
        if (step % 8 == 6 && step + 2 < steps) {
            bool start = step < 8;
#pragma unroll
            for (int i = 0; i < R; i++) { totals[i * 256] = start ? acc[i] : totals[i * 256] + acc[i]; acc[i] = 0.0f; }
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = row_block * B + i / 4 * 8 + t * 2 + (i & 1), output = (tile0 + warp) * 16 + g + (i & 2) * 4;
        float total = slices > 1 ? totals[i * 256] + acc[i] : acc[i];
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g128_wgmma64(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    many_rows<64, 7>(layer, xw, out, rows, n, k);
}
extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g128_wgmma128(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    many_rows<128, 7>(layer, xw, out, rows, n, k);
}
