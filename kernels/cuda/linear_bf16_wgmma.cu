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

/// Groups of 128. Cta: 2 warpgroups of 64 outputs, B rows. Shared memory: STAGES x [4 steps of 16 k][2][B / 8][128 bytes], then barriers.
template <int B, int STAGES> DEVICE void many_rows(const Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    constexpr int STEP_BYTES = B * 32, STAGE_BYTES = 4 * STEP_BYTES, R = B / 2;
    DYNAMIC_SHARED(u8, stages);
    u64* full = (u64*)(stages + STAGES * STAGE_BYTES);
    u64* empty = full + STAGES;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE, tiles = (n + 15) / 16;
    int own = blockIdx.y * 8 + warp, tile = own < tiles ? own : tiles - 1;
    const u8* x = xw + (size_t)blockIdx.x * steps * STAGE_BYTES;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + s, 1); barrier_init(empty + s, 8); }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES && s < steps; s++) { barrier_expect(full + s, STAGE_BYTES); bulk_copy(stages + s * STAGE_BYTES, x + (size_t)s * STAGE_BYTES, STAGE_BYTES, full + s); }
    const U4* w = layer.weights + (size_t)tile * steps * 32 + lane;
    const u16* scales = layer.scales + (size_t)tile * slices * 16 * (SLICE / 128);
    U4 next[2];
    u32 a[2][4][4];
    next[0] = load_shared_by_many(w);
    next[1] = steps > 1 ? load_shared_by_many(w + 32) : U4{0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u};
    float d[R], acc[R], total[R];
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = total[i] = 0.0f;
    code_fragments(a[0], next[0]);
    auto issue = [&](const u32 (&fragments)[4][4], int step, int keep) {
        int stage = step % STAGES;
        barrier_wait(full + stage, step / STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_bf16<B>(d, fragments[i], wgmma_matrix(stages + stage * STAGE_BYTES + i * STEP_BYTES, B / 8 * 128, 128), keep | (i > 0));
        wgmma_commit();
    };
    auto release = [&](int step) {
        int stage = step % STAGES;
        if (lane == 0) barrier_arrive(empty + stage);
        if (threadIdx.x == 0 && step + STAGES < steps) {
            barrier_wait(empty + stage, step / STAGES & 1);
            barrier_expect(full + stage, STAGE_BYTES);
            bulk_copy(stages + stage * STAGE_BYTES, x + (size_t)(step + STAGES) * STAGE_BYTES, STAGE_BYTES, full + stage);
        }
        __syncwarp();
    };
    for (int step = 0; step < steps; step += 2) {
        bool second = step + 1 < steps;
        if (step + 2 < steps) next[0] = load_shared_by_many(w + (size_t)(step + 2) * 32);
        float s0 = half_to_float(scales[((size_t)(step / 8) * 16 + g) * 4 + step % 8 / 2]), s1 = half_to_float(scales[((size_t)(step / 8) * 16 + g + 8) * 4 + step % 8 / 2]);
        issue(a[0], step, 0);
        if (second) {
            code_fragments(a[1], next[1]);
            if (step + 3 < steps) next[1] = load_shared_by_many(w + (size_t)(step + 3) * 32);
            issue(a[1], step + 1, 1);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        if (step + 2 < steps) code_fragments(a[0], next[0]);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < R; i++) wgmma_settle(d[i]);
        release(step);
        if (second) release(step + 1);
#pragma unroll
        for (int i = 0; i < R; i++) acc[i] = fmaf(d[i], i & 2 ? s1 : s0, acc[i]);
        if (step % 8 == 6 || step + 2 >= steps) {
            bool start = step < 8;
#pragma unroll
            for (int i = 0; i < R; i++) { total[i] = start ? acc[i] : total[i] + acc[i]; acc[i] = 0.0f; }
        }
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = blockIdx.x * B + i / 4 * 8 + t * 2 + (i & 1), output = own * 16 + g + (i & 2) * 4;
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total[i] + layer.bias[output] : total[i];
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g128_wgmma64(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    many_rows<64, 8>(layer, xw, out, rows, n, k);
}
extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g128_wgmma128(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    many_rows<128, 6>(layer, xw, out, rows, n, k);
}
