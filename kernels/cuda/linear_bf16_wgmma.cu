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

/// Groups of 128. Cta: 2 warpgroups of 64 outputs each, B rows. Weights go from memory to registers, asked for AHEAD steps of
/// 64 k before their use. Shared memory: STAGES of rows [4 steps of 16 k][2][B / 8][128 bytes], sums [slots][B / 2][256] f32, barriers.
/// SPLIT: a cluster of so many ctas shares the slices of K (blockIdx.z), each keeps the sums of its slices, then each adds up a part of the
/// outputs over all slices in ascending order. With one cta, whole slices are added up as they end, in one slot.
template <int B, int STAGES, int SPLIT> constexpr int wgmma_shared_bytes(int slices) { return STAGES * B * 128 + (SPLIT > 1 ? (slices + SPLIT - 1) / SPLIT : 1) * B * 512 + 16 * STAGES; }
template <int B, int STAGES, int SPLIT> DEVICE void many_rows(const Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    constexpr int STEP_BYTES = B * 32, STAGE_BYTES = 4 * STEP_BYTES, R = B / 2, AHEAD = B > 128 ? 2 : 4, PER_SLICE = SLICE / 64;
    DYNAMIC_SHARED(u8, stages);
    int all_steps = (k + 63) / 64, slices = (k + SLICE - 1) / SLICE, per = (slices + SPLIT - 1) / SPLIT, tiles = (n + 15) / 16;
    float* totals = (float*)(stages + STAGES * STAGE_BYTES) + threadIdx.x;
    u64* full = (u64*)(stages + STAGES * STAGE_BYTES + (SPLIT > 1 ? per : 1) * B * 512);
    u64* empty = full + STAGES;
    int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0), g = lane / 4, t = lane % 4;
    int first_step = SPLIT > 1 ? (int)blockIdx.z * per * PER_SLICE : 0, end_step = SPLIT > 1 ? first_step + per * PER_SLICE : all_steps;
    if (end_step > all_steps) end_step = all_steps;
    int steps = end_step > first_step ? end_step - first_step : 0;
    // Ctas that run together share rows and weights: up to 16 blocks of rows side by side.
    int linear = blockIdx.y * gridDim.x + blockIdx.x, in_panel = linear % (16 * gridDim.y), panel = linear / (16 * gridDim.y);
    int wide = (int)gridDim.x - panel * 16 < 16 ? (int)gridDim.x - panel * 16 : 16;
    int row_block = panel * 16 + in_panel % wide, tile0 = in_panel / wide * 8;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(full + s, 1); barrier_init(empty + s, 8); }
        barrier_init_fence();
    }
    __syncthreads();
    // A ninth warp that copies would leave 168 registers a thread instead of 255: thread 0 copies, a pair of steps after a stage was last read.
    const u8* x = xw + ((size_t)row_block * all_steps + first_step) * STAGE_BYTES;
    auto fetch = [&](int step) {
        barrier_expect(full + step % STAGES, STAGE_BYTES);
        bulk_copy(stages + step % STAGES * STAGE_BYTES, x + (size_t)step * STAGE_BYTES, STAGE_BYTES, full + step % STAGES);
    };
    if (threadIdx.x == 0)
        for (int step = 0; step < STAGES && step < steps; step++) fetch(step);
    int own = tile0 + warp, tile = own < tiles ? own : tiles - 1;
    const U4* w = layer.weights + ((size_t)tile * all_steps + first_step) * 32 + lane;
    const U2* scale_words = (const U2*)layer.scales + ((size_t)tile * slices + first_step / PER_SLICE) * 16 + g;
    U4 next[AHEAD];
    U2 scale[2], next_scale[2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = load_ahead(w + (i < steps ? i : 0) * 32);
    next_scale[0] = load_ahead(scale_words); next_scale[1] = load_ahead(scale_words + 8);
    u32 a[2][4][4];
    float d[R], acc[R];
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = 0.0f;
    auto fragments = [&](u32 (&to)[4][4], U4& from, int step) {
        code_fragments(to, from);
        from = load_ahead(w + (size_t)(step + AHEAD < steps ? step + AHEAD : step) * 32);
    };
    auto issue = [&](const u32 (&from)[4][4], int step, int keep) {
        barrier_wait(full + step % STAGES, step / STAGES & 1);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma_bf16<B>(d, from[i], wgmma_matrix(stages + step % STAGES * STAGE_BYTES + i * STEP_BYTES, B / 8 * 128, 128), keep | (i > 0));
        wgmma_commit();
    };
    auto release = [&](int step) { if (lane == 0) barrier_arrive(empty + step % STAGES); };
    if (steps > 0) fragments(a[0], next[0], 0);
    for (int slice_step = 0; slice_step < steps; slice_step += PER_SLICE) {
        scale[0] = next_scale[0]; scale[1] = next_scale[1];
        if (slice_step + PER_SLICE < steps) { scale_words += 16; next_scale[0] = load_ahead(scale_words); next_scale[1] = load_ahead(scale_words + 8); }
#pragma unroll
        for (int pair = 0; pair < PER_SLICE / 2; pair++) {
            int step = slice_step + pair * 2;
            if (step >= steps) break;
            bool second = step + 1 < steps;
            u32 bits0 = pair < 2 ? scale[0].x : scale[0].y, bits1 = pair < 2 ? scale[1].x : scale[1].y;
            float s0 = half_to_float((u16)(pair % 2 ? bits0 >> 16 : bits0)), s1 = half_to_float((u16)(pair % 2 ? bits1 >> 16 : bits1));
            issue(a[0], step, 0);
            if (threadIdx.x == 0)
                for (int old = step < 2 ? 0 : step - 2; old < step; old++)
                    if (old + STAGES < steps) { barrier_wait(empty + old % STAGES, old / STAGES & 1); fetch(old + STAGES); }
            __syncwarp();
            if (second) {
                fragments(a[1], next[(pair * 2 + 1) % AHEAD], step + 1);
                issue(a[1], step + 1, 1);
                wgmma_wait<1>();
#pragma unroll
                for (int i = 0; i < 4; i++) wgmma_keep(a[0][i]);
                release(step);
                if (step + 2 < steps) fragments(a[0], next[(pair * 2 + 2) % AHEAD], step + 2);
                wgmma_wait<0>();
                release(step + 1);
            } else {
                wgmma_wait<0>();
                release(step);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) wgmma_keep(a[1][i]);
#pragma unroll
            for (int i = 0; i < R; i++) wgmma_settle(d[i]);
#pragma unroll
            for (int i = 0; i < R; i++) acc[i] = fmaf(d[i], i & 2 ? s1 : s0, acc[i]);
        }
        if (SPLIT > 1) {
            float* slot = totals + slice_step / PER_SLICE * R * 256;
#pragma unroll
            for (int i = 0; i < R; i++) { slot[i * 256] = acc[i]; acc[i] = 0.0f; }
        } else if (slice_step + PER_SLICE < steps) {
#pragma unroll
            for (int i = 0; i < R; i++) { totals[i * 256] = slice_step ? totals[i * 256] + acc[i] : acc[i]; acc[i] = 0.0f; }
        }
    }
    if (SPLIT > 1) {
        cluster_sync();
        int rank = (int)cluster_rank();
#pragma unroll 4
        for (int i = rank * (R / SPLIT); i < (rank + 1) * (R / SPLIT); i++) {
            float total = 0.0f;
            for (int s0 = 0; s0 < slices; s0 += 8) { // eight loads under way, then added in order
                float v[8];
#pragma unroll
                for (int j = 0; j < 8; j++) { int s = s0 + j < slices ? s0 + j : s0; v[j] = load_from_cta(totals + (s % per * R + i) * 256, s / per); }
#pragma unroll
                for (int j = 0; j < 8; j++) if (s0 + j < slices) total = s0 + j ? total + v[j] : v[j];
            }
            int row = row_block * B + i / 4 * 8 + t * 2 + (i & 1), output = own * 16 + g + (i & 2) * 4;
            if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
        }
        cluster_sync();
    } else {
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = row_block * B + i / 4 * 8 + t * 2 + (i & 1), output = own * 16 + g + (i & 2) * 4;
        float total = slices > 1 ? totals[i * 256] + acc[i] : acc[i];
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
    }
}

// Grid: (ceil(rows / B), ceil(n / 128), SPLIT), 256 threads.
#define ENTRY(NAME, B, STAGES, SPLIT)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1) __cluster_dims__(1, 1, SPLIT) linear_w4a16_g128_##NAME(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) { \
        many_rows<B, STAGES, SPLIT>(layer, xw, out, rows, n, k);                                                                            \
    }
ENTRY(wgmma64, 64, 9, 1)
ENTRY(wgmma64_split4, 64, 9, 4)
ENTRY(wgmma128, 128, 9, 1)
ENTRY(wgmma192, 192, 5, 1)
#undef ENTRY
