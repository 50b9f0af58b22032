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

/// Groups of 128. Cta: 2 warpgroups of 64 outputs each, B rows. Weights go from memory to registers, asked for AHEAD steps of 64 k before their
/// use. Shared memory: STAGES of rows [4 steps of 16 k][2][B / 8][128 bytes], sums of whole slices [B / 2][256] f32, barriers.
template <int B, int STAGES> constexpr int wgmma_shared_bytes() { return STAGES * B * 128 + B * 512 + 16 * STAGES; }
template <int B, int STAGES> DEVICE void many_rows(const Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) {
    constexpr int STEP_BYTES = B * 32, STAGE_BYTES = 4 * STEP_BYTES, R = B / 2, AHEAD = 4, PER_SLICE = SLICE / 64;
    DYNAMIC_SHARED(u8, stages);
    int steps = (k + 63) / 64, slices = (k + SLICE - 1) / SLICE, tiles = (n + 15) / 16;
    float* totals = (float*)(stages + STAGES * STAGE_BYTES) + threadIdx.x;
    u64* full = (u64*)(stages + STAGES * STAGE_BYTES + B * 512);
    u64* empty = full + STAGES;
    int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0), g = lane / 4, t = lane % 4;
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
    const u8* x = xw + (size_t)row_block * steps * STAGE_BYTES;
    auto fetch = [&](int step) {
        barrier_expect(full + step % STAGES, STAGE_BYTES);
        bulk_copy(stages + step % STAGES * STAGE_BYTES, x + (size_t)step * STAGE_BYTES, STAGE_BYTES, full + step % STAGES);
    };
    if (threadIdx.x == 0)
        for (int step = 0; step < STAGES && step < steps; step++) fetch(step);
    int own = tile0 + warp, tile = own < tiles ? own : tiles - 1;
    const U4* w = layer.weights + (size_t)tile * steps * 32 + lane;
    const U2* scale_words = (const U2*)layer.scales + (size_t)tile * slices * 16 + g;
    U4 next[AHEAD];
    U2 scale[2], next_scale[2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = load_ahead(w + (i < steps ? i : 0) * 32);
    next_scale[0] = load_ahead(scale_words); next_scale[1] = load_ahead(scale_words + 8);
    u32 a[2][4][4];
    float d[R], acc[R];
#pragma unroll
    for (int i = 0; i < R; i++) acc[i] = 0.0f;
    static_assert(PER_SLICE % STAGES == 0 || STAGES % PER_SLICE == 0, "stages are named at compile time");
    u64 base = wgmma_matrix(stages, B / 8 * 128, 128);
    // A slice of 8 steps, two by two. SURE: all steps and those that are asked for ahead exist, so nothing is checked.
    auto slice_of = [&](int slice_step, auto sure) {
        constexpr bool SURE = decltype(sure)::value;
        scale[0] = next_scale[0]; scale[1] = next_scale[1];
        if (SURE || slice_step + PER_SLICE < steps) { scale_words += 16; next_scale[0] = load_ahead(scale_words); next_scale[1] = load_ahead(scale_words + 8); }
        u32 turn = slice_step / STAGES; // how often the first stage of this slice was filled before
        auto fragments = [&](u32 (&to)[4][4], U4& from, int step) {
            code_fragments(to, from);
            if (SURE || step + AHEAD < steps) from = load_ahead(w + (size_t)(step + AHEAD) * 32);
        };
        auto issue = [&](const u32 (&from)[4][4], int in_slice, int keep) {
            barrier_wait(full + in_slice % STAGES, (turn + in_slice / STAGES) & 1);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++) wgmma_bf16<B>(d, from[i], base + (in_slice % STAGES * STAGE_BYTES + i * STEP_BYTES) / 16, keep | (i > 0));
            wgmma_commit();
        };
#pragma unroll
        for (int pair = 0; pair < PER_SLICE / 2; pair++) {
            int step = slice_step + pair * 2;
            if (!SURE && step >= steps) break;
            bool second = SURE || step + 1 < steps;
            u32 bits0 = pair < 2 ? scale[0].x : scale[0].y, bits1 = pair < 2 ? scale[1].x : scale[1].y;
            float s0 = half_to_float((u16)(pair % 2 ? bits0 >> 16 : bits0)), s1 = half_to_float((u16)(pair % 2 ? bits1 >> 16 : bits1));
            issue(a[0], pair * 2, 0);
            if (threadIdx.x == 0) {
#pragma unroll
                for (int back = 2; back > 0; back--) {
                    int old = step - back, in_slice = (pair * 2 - back + PER_SLICE) % PER_SLICE; // old % PER_SLICE
                    if (old >= 0 && old + STAGES < steps) {
                        barrier_wait(empty + in_slice % STAGES, (u32)(old / STAGES) & 1);
                        barrier_expect(full + in_slice % STAGES, STAGE_BYTES);
                        bulk_copy(stages + in_slice % STAGES * STAGE_BYTES, x + (size_t)(old + STAGES) * STAGE_BYTES, STAGE_BYTES, full + in_slice % STAGES);
                    }
                }
            }
            __syncwarp();
            if (second) {
                fragments(a[1], next[(pair * 2 + 1) % AHEAD], step + 1);
                issue(a[1], pair * 2 + 1, 1);
                wgmma_wait<1>();
#pragma unroll
                for (int i = 0; i < 4; i++) wgmma_keep(a[0][i]);
                if (lane == 0) barrier_arrive(empty + pair * 2 % STAGES);
                if (SURE || step + 2 < steps) fragments(a[0], next[(pair * 2 + 2) % AHEAD], step + 2);
                wgmma_wait<0>();
                if (lane == 0) barrier_arrive(empty + (pair * 2 + 1) % STAGES);
#pragma unroll
                for (int i = 0; i < 4; i++) wgmma_keep(a[1][i]);
            } else {
                wgmma_wait<0>();
                if (lane == 0) barrier_arrive(empty + pair * 2 % STAGES);
            }
#pragma unroll
            for (int i = 0; i < R; i++) wgmma_settle(d[i]);
#pragma unroll
            for (int i = 0; i < R; i++) acc[i] = fmaf(d[i], i & 2 ? s1 : s0, acc[i]);
        }
        if (SURE || slice_step + PER_SLICE < steps) {
#pragma unroll
            for (int i = 0; i < R; i++) { totals[i * 256] = slice_step ? totals[i * 256] + acc[i] : acc[i]; acc[i] = 0.0f; }
        }
    };
    struct Yes { enum { value = 1 }; };
    struct No { enum { value = 0 }; };
    if (steps > 0) {
        code_fragments(a[0], next[0]);
        if (AHEAD < steps) next[0] = load_ahead(w + (size_t)AHEAD * 32);
    }
    int slice_step = 0;
#pragma unroll 1
    for (; slice_step + PER_SLICE + AHEAD <= steps; slice_step += PER_SLICE) slice_of(slice_step, Yes());
#pragma unroll 1
    for (; slice_step < steps; slice_step += PER_SLICE) slice_of(slice_step, No());
#pragma unroll
    for (int i = 0; i < R; i++) {
        int row = row_block * B + i / 4 * 8 + t * 2 + (i & 1), output = own * 16 + g + (i & 2) * 4;
        float total = slices > 1 ? totals[i * 256] + acc[i] : acc[i];
        if (row < rows && output < n) out[(size_t)row * n + output] = layer.bias ? total + layer.bias[output] : total;
    }
}

// Grid: (ceil(rows / B), ceil(n / 128)), 256 threads.
#define ENTRY(NAME, B, STAGES)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1) linear_w4a16_g128_##NAME(Int4Layer layer, const u8* xw, float* out, int rows, int n, int k) { \
        many_rows<B, STAGES>(layer, xw, out, rows, n, k);                                                                            \
    }
ENTRY(wgmma64, 64, 8)
ENTRY(wgmma128, 128, 8)
#undef ENTRY
