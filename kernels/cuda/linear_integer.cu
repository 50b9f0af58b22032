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
// A launch for few rows takes any number of layers, each with rows of its own (linear.cuh): the shapes may differ, the format may not.
// k may be permuted inside a group because a group's sum is an integer.
#include "integer.cuh"

// ---- rows as int8 in groups ----

/// One warp for a row and a group. Grid: (ceil(groups / 8), padded rows), 256 threads; rows from `rows` on become zeros. BLOCK 0: the layouts
/// above. Else those of linear_integer_wgmma.cu for ctas of BLOCK rows.
template <int G, int BLOCK> DEVICE void quantise(const float* x, u8* xq, float* xs, float* xa, int rows, int k, int stride) {
    int lane = threadIdx.x & 31, group = blockIdx.x * 8 + (threadIdx.x >> 5), row = blockIdx.y;
    int padded = (k + 63) / 64 * 64, groups = (k + G - 1) / G;
    if (group * G >= padded) return;
    float v[G / 32], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < G / 32; i++) {
        int at = group * G + i * 32 + lane;
        v[i] = row < rows && at < k ? x[(size_t)row * stride + at] : 0.0f;
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
        if (BLOCK) {
            int b = BLOCK ? BLOCK : 1;
            if (at < padded) xq[((((size_t)(row / b) * (padded / 32) + at / 32) * 2 + at % 8 / 4) * (b / 8) + row % b / 8) * 128 + row % 8 * 16 + at % 32 / 8 * 4 + at % 4] = (u8)code;
        } else if (at < padded) xq[(((size_t)(row / 8) * (padded / 64) + at / 64) * 32 + (row % 8) * 4 + at % 32 / 8) * 16 + at % 64 / 32 * 8 + at % 8] = (u8)code;
    }
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0 && group < groups) {
        constexpr int TILE = BLOCK ? BLOCK : 8;
        size_t to = ((size_t)(row / TILE) * groups + group) * TILE + row % TILE;
        xs[to] = zero ? 0.0f : __fdiv_rn(amax, 127.0f);
        xa[to] = (float)sum;
    }
}

// ---- few rows: a warp takes 16 outputs of one slice at a time, weights go straight from memory to registers ----

/// Cta: TILES x 16 outputs, with a gate as many of each side, all of K; warps of a side share the slices; shared memory:
/// [sides][slices][8 RT rows][TILES x 16] f32. RT: row tiles of 8. Grid (ctas of the task with most outputs, tasks).
/// FULL: K is a multiple of a slice. Lanes of rows that do not exist read the last one: a column of B reaches its own column of D only.
template <int BITS, bool MINIMUM, int G, int RT, int TILES, bool FULL>
DEVICE void integer_few_rows(const LinearTask& one, const LinearTask* tasks, const u8* base, int stride, int finish) {
    constexpr int LOADS = BITS == 4 ? 1 : 2, CHUNKS = SLICE / 64, WORDS = SLICE / G / 2, DEPTH = 8 / TILES / LOADS, STEPS = G / 32;
    DYNAMIC_SHARED(float, sums);
    const LinearTask task = task_of(one, tasks, blockIdx.y);
    // Shifts and not divisions: what is the same in all lanes then stays out of their registers.
    int gated = finish >= GATE, tiles = ((task.n >> gated) + 15) / 16;
    if (blockIdx.x * TILES >= tiles) return;
    int lane = threadIdx.x & 31, warps = blockDim.x >> (5 + gated), side = threadIdx.x >> 5 >= warps, warp = (threadIdx.x >> 5) - side * warps, g = lane / 4, t = lane % 4;
    int k = task.k, padded = (k + 63) / 64 * 64, slices = (k + SLICE - 1) / SLICE, groups = (k + G - 1) / G;
    const U4* w[TILES];
    const u32 *words[TILES], *lows[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        int tile = (blockIdx.x * TILES + i < tiles ? blockIdx.x * TILES + i : tiles - 1) + side * tiles;
        w[i] = (const U4*)task.weights + ((size_t)tile * (padded / 64) + warp * CHUNKS) * LOADS * 32 + lane;
        words[i] = (const u32*)task.scales + ((size_t)tile * slices + warp) * 16 * WORDS + g * WORDS;
        lows[i] = (const u32*)task.minima + ((size_t)tile * slices + warp) * 16 * WORDS + g * WORDS;
    }
    u64 policy = evict_first();
    U4 ring[DEPTH][TILES][LOADS];
#pragma unroll
    for (int c = 0; c < DEPTH; c++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (FULL ? warp < slices : warp * SLICE + c * 64 < padded)
#pragma unroll
                for (int l = 0; l < LOADS; l++) ring[c][i][l] = load_stream(w[i] + (c * LOADS + l) * 32, policy);
    let_next_kernel_start();
    wait_for_previous_kernel();
    const U4* codes[RT];
    const float *row_scales[RT], *row_sums[RT];
#pragma unroll
    for (int rt = 0; rt < RT; rt++) {
        int row = rt * 8 + g < task.rows ? rt * 8 + g : task.rows - 1;
        codes[rt] = (const U4*)(base + task.x_at) + ((size_t)(row / 8) * (padded / 64) + warp * CHUNKS) * 32 + row % 8 * 4 + t;
        size_t from = ((size_t)rt * groups + warp * (SLICE / G)) * 8 + t * 2;
        row_scales[rt] = (const float*)(base + task.scales_at) + from; row_sums[rt] = (const float*)(base + task.sums_at) + from;
    }
    float* my_sums = sums + side * slices * RT * 128 * TILES;
    for (int slice = warp; slice < slices; slice += warps) {
        u32 scale[TILES][2][WORDS], minimum[TILES][2][WORDS];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < WORDS; j += 2) {
                    U2 v = *(const U2*)(words[i] + 8 * r * WORDS + j);
                    scale[i][r][j] = v.x; scale[i][r][j + 1] = v.y;
                    if (MINIMUM) { U2 m = *(const U2*)(lows[i] + 8 * r * WORDS + j); minimum[i][r][j] = m.x; minimum[i][r][j + 1] = m.y; }
                }
            words[i] += warps * 16 * WORDS; lows[i] += warps * 16 * WORDS;
        }
        float acc[TILES][RT][4] = {};
        int d[TILES][RT][4];
        U4 b[2][RT];
#pragma unroll
        for (int rt = 0; rt < RT; rt++) b[0][rt] = load_shared_by_many(codes[rt]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            int at = slice * SLICE + c * 64;
            if (!FULL && at >= padded) break;
            if (c + 1 < CHUNKS && (FULL || at + 64 < padded))
#pragma unroll
                for (int rt = 0; rt < RT; rt++) b[(c + 1) % 2][rt] = load_shared_by_many(codes[rt] + (c + 1) * 32);
            F2 xs[RT][2], xa[RT][2];
#pragma unroll
            for (int rt = 0; rt < RT; rt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int group = (c * 64 + half * 32) / G;
                    xs[rt][half] = xa[rt][half] = {0.0f, 0.0f};
                    if (half == 0 ? true : G == 32)
                        if (FULL || slice * (SLICE / G) + group < groups) {
                            xs[rt][half] = *(const F2*)(row_scales[rt] + group * 8);
                            if (MINIMUM) xa[rt][half] = *(const F2*)(row_sums[rt] + group * 8);
                        }
                }
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                U4 v[LOADS];
#pragma unroll
                for (int l = 0; l < LOADS; l++) {
                    v[l] = ring[c % DEPTH][i][l];
                    if (c + DEPTH < CHUNKS) {
                        if (FULL || at + DEPTH * 64 < padded) ring[c % DEPTH][i][l] = load_stream(w[i] + ((c + DEPTH) * LOADS + l) * 32, policy);
                    } else {
                        int next = slice + warps;
                        if (FULL ? next < slices : next * SLICE + (c + DEPTH - CHUNKS) * 64 < padded) ring[c % DEPTH][i][l] = load_stream(w[i] + (size_t)((warps * CHUNKS + c + DEPTH - CHUNKS) * LOADS + l) * 32, policy);
                    }
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int step = c * 2 + half;
                    bool first = step % STEPS == 0, last = step % STEPS == STEPS - 1 || (!FULL && G > 64 && half == 1 && at + 64 >= padded);
                    u32 a[4];
                    weight_fragments<BITS>(a, v[BITS == 4 ? 0 : half], half);
                    bool exists = FULL || slice * (SLICE / G) + step / STEPS < groups;
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) {
                        if (first) d[i][rt][0] = d[i][rt][1] = d[i][rt][2] = d[i][rt][3] = SUM_START;
                        multiply<BITS, MINIMUM>(d[i][rt], a, half ? b[c % 2][rt].z : b[c % 2][rt].x, half ? b[c % 2][rt].w : b[c % 2][rt].y);
                        if (last && exists) {
                            float s[2] = {half_of(scale[i][0], step / STEPS), half_of(scale[i][1], step / STEPS)}, m[2] = {0.0f, 0.0f};
                            if (MINIMUM) { m[0] = half_of(minimum[i][0], step / STEPS); m[1] = half_of(minimum[i][1], step / STEPS); }
                            add_group<BITS, MINIMUM>(acc[i][rt], d[i][rt], s, m, xs[rt][G == 32 ? half : 0], xa[rt][G == 32 ? half : 0]);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            w[i] += (size_t)warps * CHUNKS * LOADS * 32;
#pragma unroll
            for (int rt = 0; rt < RT; rt++)
#pragma unroll
                for (int q = 0; q < 4; q++) my_sums[((slice * RT + rt) * 8 + t * 2 + (q & 1)) * (TILES * 16) + i * 16 + g + q / 2 * 8] = acc[i][rt][q];
        }
#pragma unroll
        for (int rt = 0; rt < RT; rt++) { codes[rt] += warps * CHUNKS * 32; row_scales[rt] += warps * (SLICE / G) * 8; row_sums[rt] += warps * (SLICE / G) * 8; }
    }
    __syncthreads();
    // Read again, so that what is wanted only here is not kept all the while.
    const LinearTask end = task_of(one, tasks, blockIdx.y);
    int outputs = end.n >> gated;
    auto total = [&](int side, int at, int output) {
        const float* from = sums + side * slices * RT * 128 * TILES + at;
        float sum = from[0];
        for (int s = 1; s < slices; s++) sum = sum + from[s * RT * 128 * TILES];
        return end.bias ? sum + end.bias[output] : sum;
    };
    for (int i = threadIdx.x; i < end.rows * TILES * 16; i += blockDim.x) {
        int row = i / (TILES * 16), output = blockIdx.x * TILES * 16 + i % (TILES * 16);
        if (output < outputs) finish_output(end.out + (size_t)row * stride + output, total(0, i, output), gated ? total(1, i, outputs + output) : 0.0f, finish);
    }
}

// ---- many rows: 128 outputs x 16 RT rows a cta, rows staged through shared memory ----

/// Cta: 8 warps, 4 along the outputs (32 each) and 2 along the rows (8 RT each). Rows are padded to whole ctas in xq and xs. With a gate a warp's two
/// tiles are one of the first half of the outputs and the one of the second that meets it.
/// Shared memory: STAGES of 64 k { codes of rows [2 RT][512 bytes], scales (and sums) of rows [2 RT][groups of a stage][8], weights
/// [8 tiles][512 or 1024 bytes] }, then scales (and minima) of weights [2 slices][8 tiles][16][SLICE / G] f16, then each thread's sums of
/// whole slices [8 RT][256] f32, which would not fit in registers.
constexpr int integer_many_shared_bytes(int bits, bool minimum, int g, int rt, int stages) {
    return stages * (2 * rt * 512 + (minimum ? 2 : 1) * 2 * rt * (g < 64 ? 64 / g : 1) * 32 + 512 * bits * 2) + (minimum ? 2 : 1) * 2 * 8 * 32 * (SLICE / g) + 8 * rt * 1024;
}
template <int BITS, bool MINIMUM, int G, int RT, int STAGES>
DEVICE void integer_many_rows(const LinearTask& task, const u8* base, int stride, int finish) {
    constexpr int TILES = 2, LOADS = BITS == 4 ? 1 : 2, GS = G < 64 ? 64 / G : 1, KINDS = MINIMUM ? 2 : 1;
    constexpr int CODE_BYTES = 2 * RT * 512, ROW_SCALE_BYTES = 2 * RT * GS * 32, WEIGHTS_AT = CODE_BYTES + KINDS * ROW_SCALE_BYTES, STAGE_BYTES = WEIGHTS_AT + 4096 * LOADS;
    constexpr int SCALE_BYTES = 32 * (SLICE / G);
    DYNAMIC_SHARED(u8, stages);
    u8* scale_at = stages + STAGES * STAGE_BYTES;
    float* totals = (float*)(scale_at + KINDS * 2 * 8 * SCALE_BYTES) + threadIdx.x;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    int k = task.k, padded = (k + 63) / 64 * 64, steps = padded / 64, slices = (k + SLICE - 1) / SLICE, groups = (k + G - 1) / G;
    int gated = finish >= GATE, width = task.n >> gated, tiles = (width + 15) / 16;
    int row_tile0 = blockIdx.y * 2 * RT, my_rows = warp / 4 * RT, my_tiles = warp % 4 * TILES;
    // The tile that lies in place j of eight.
    auto tile_at = [&](int j) {
        int tile = blockIdx.x * (8 >> gated) + (j >> gated);
        return (tile < tiles ? tile : tiles - 1) + (j & gated) * tiles;
    };
    const U4* codes = (const U4*)(base + task.x_at);
    const float *scales_of_rows = (const float*)(base + task.scales_at), *sums_of_rows = (const float*)(base + task.sums_at);
    auto stage = [&](int step) {
        if (step < steps) {
            u8* to = stages + step % STAGES * STAGE_BYTES;
            for (int i = threadIdx.x; i < CODE_BYTES / 16; i += 256) cp_async16(to + i * 16, codes + ((size_t)(row_tile0 + i / 32) * steps + step) * 32 + i % 32);
            for (int i = threadIdx.x; i < KINDS * ROW_SCALE_BYTES / 16; i += 256) {
                int which = i / (ROW_SCALE_BYTES / 16), j = i % (ROW_SCALE_BYTES / 16), rt = j / (GS * 2), group = step * 64 / G + j % (GS * 2) / 2;
                if (group < groups) cp_async16(to + CODE_BYTES + i * 16, (which ? sums_of_rows : scales_of_rows) + ((size_t)(row_tile0 + rt) * groups + group) * 8 + j % 2 * 4);
            }
            int tile = tile_at(warp);
#pragma unroll
            for (int l = 0; l < LOADS; l++) cp_async16(to + WEIGHTS_AT + ((warp * LOADS + l) * 32 + lane) * 16, (const U4*)task.weights + (((size_t)tile * steps + step) * LOADS + l) * 32 + lane);
            if (step % (SLICE / 64) == 0) {
                int slice = step / (SLICE / 64);
                for (int i = threadIdx.x; i < KINDS * 8 * SCALE_BYTES / 16; i += 256) {
                    int which = i / (8 * SCALE_BYTES / 16), j = i % (8 * SCALE_BYTES / 16), from = tile_at(j / (SCALE_BYTES / 16));
                    cp_async16(scale_at + (which * 2 + slice % 2) * 8 * SCALE_BYTES + j * 16, (const u16*)(which ? task.minima : task.scales) + ((size_t)from * slices + slice) * SCALE_BYTES / 2 + j % (SCALE_BYTES / 16) * 8);
                }
            }
        }
        cp_async_commit();
    };
    float acc[TILES][RT][4] = {};
    int d[G > 32 ? TILES : 1][G > 32 ? RT : 1][4];
    for (int s = 0; s < STAGES - 1; s++) stage(s);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        stage(step + STAGES - 1);
        const u8* from = stages + step % STAGES * STAGE_BYTES;
        const float* row_scales = (const float*)(from + CODE_BYTES);
        int slice = step / (SLICE / 64);
        const u16* scales = (const u16*)(scale_at + (slice % 2 * 8 + my_tiles) * SCALE_BYTES) + g * (SLICE / G) + step % (SLICE / 64) * 64 / G;
        bool begins = G <= 64 || step % (G / 64) == 0, ends = G <= 64 || step % (G / 64) == G / 64 - 1 || step == steps - 1;
        u32 a[2][TILES][4];
        float s[TILES][2][GS], m[TILES][2][GS];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            U4 v[LOADS];
#pragma unroll
            for (int l = 0; l < LOADS; l++) v[l] = *(const U4*)(from + WEIGHTS_AT + (((my_tiles + i) * LOADS + l) * 32 + lane) * 16);
#pragma unroll
            for (int half = 0; half < 2; half++) weight_fragments<BITS>(a[half][i], v[BITS == 4 ? 0 : half], half);
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int j = 0; j < GS; j++) {
                    const u16* at = scales + i * (SCALE_BYTES / 2) + 8 * r * (SLICE / G) + j;
                    s[i][r][j] = half_to_float(*at);
                    m[i][r][j] = MINIMUM ? half_to_float(at[2 * 8 * SCALE_BYTES / 2]) : 0.0f;
                }
        }
#pragma unroll
        for (int rt = 0; rt < RT; rt++) {
            U4 v = *(const U4*)(from + ((my_rows + rt) * 32 + lane) * 16);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr bool WIDE = G > 32;
                int j = WIDE ? 0 : half;
                F2 sa = *(const F2*)(row_scales + ((my_rows + rt) * GS + j) * 8 + t * 2), xa = {0.0f, 0.0f};
                if (MINIMUM) xa = *(const F2*)(row_scales + ROW_SCALE_BYTES / 4 + ((my_rows + rt) * GS + j) * 8 + t * 2);
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
        float sum = acc[j / (RT * 4)][j / 4 % RT][j % 4];
        totals[j * 256] = slices > 1 ? totals[j * 256] + sum : sum;
    }
    // Each thread goes on with what it wrote itself.
    for (int j = 0; j < TILES * RT * 4 >> gated; j++) {
        int rt = j / 4 % RT, q = j % 4, row = (row_tile0 + my_rows + rt) * 8 + t * 2 + (q & 1);
        int output = (blockIdx.x * (8 >> gated) + (my_tiles >> gated) + j / (RT * 4)) * 16 + g + q / 2 * 8;
        if (row >= task.rows || output >= width) continue;
        float first = totals[j * 256], second = gated ? totals[(j + RT * 4) * 256] : 0.0f;
        if (task.bias) { first = first + task.bias[output]; second = gated ? second + task.bias[width + output] : 0.0f; }
        finish_output(task.out + (size_t)row * stride + output, first, second, finish);
    }
}

// ---- entries: linear_<bits><s symmetric, m with minimum>_g<G>_rows<8 RT>_t<TILES> where K is a multiple of 512, _any for any K ----
#define QUANTISE(G) \
    extern "C" __global__ void __launch_bounds__(256) quantise_g##G(const float* x, u8* xq, float* xs, float* xa, int rows, int k) { quantise<G, 0>(x, xq, xs, xa, rows, k, k); }                       \
    /* Grid (ceil(groups / 8), rows, tasks), each the most of any: rows of a task begin a tile of eight, and those that fill its last one are not written. */                                          \
    extern "C" __global__ void __launch_bounds__(256) quantise_g##G##_rows(QuantiseTask one, const QuantiseTask* tasks, u8* base, int stride) {                                                            \
        const QuantiseTask task = task_of(one, tasks, blockIdx.z);                                                                                                                                        \
        if (blockIdx.y < task.rows) quantise<G, 0>(task.x, base + task.codes_at, (float*)(base + task.scales_at), (float*)(base + task.sums_at), task.rows, task.k, stride);                                \
    }                                                                                                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) quantise_g##G##_wgmma128(const float* x, u8* xq, float* xs, float* xa, int rows, int k) { quantise<G, 128>(x, xq, xs, xa, rows, k, k); }
#define FEW_ROWS(KIND, BITS, MINIMUM, G, NAME, RT, TILES, FULL)                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2) KIND##_g##G##_rows##RT##_##NAME(LinearTask one, const LinearTask* tasks, const u8* base, int stride, int finish) { \
        integer_few_rows<BITS, MINIMUM, G, RT, TILES, FULL>(one, tasks, base, stride, finish);                                              \
    }
#define MANY_ROWS(KIND, BITS, MINIMUM, G)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 1) KIND##_g##G##_many(LinearTask task, const u8* base, int stride, int finish) {       \
        integer_many_rows<BITS, MINIMUM, G, MANY_ROW_TILES, 4>(task, base, stride, finish);                                                 \
    }
#define MANY_ROW_TILES 8
#define KIND_ENTRIES(KIND, BITS, MINIMUM, G)                                                                                               \
    FEW_ROWS(KIND, BITS, MINIMUM, G, any, 1, 1, false) FEW_ROWS(KIND, BITS, MINIMUM, G, any, 2, 1, false)                                   \
    FEW_ROWS(KIND, BITS, MINIMUM, G, t1, 1, 1, true) FEW_ROWS(KIND, BITS, MINIMUM, G, t1, 2, 1, true)                                       \
    FEW_ROWS(KIND, BITS, MINIMUM, G, t2, 1, 2, true) FEW_ROWS(KIND, BITS, MINIMUM, G, t2, 2, 2, true) MANY_ROWS(KIND, BITS, MINIMUM, G)
#define ENTRIES(G) QUANTISE(G) KIND_ENTRIES(linear_4s, 4, false, G) KIND_ENTRIES(linear_4m, 4, true, G) KIND_ENTRIES(linear_8s, 8, false, G)
#ifdef GROUP
ENTRIES(GROUP)
#else
ENTRIES(32)
ENTRIES(64)
ENTRIES(128)
#endif
#undef ENTRIES
#undef FEW_ROWS
#undef KIND_ENTRIES
#undef MANY_ROWS
#undef QUANTISE
