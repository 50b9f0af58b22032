// Linear layers of every storage format with the bits of `cpu-v1` (docs/numerics.md, rules 1 to 3): floats by f32 fma in ascending k, integers
// by exact group sums. What no tensor core can give, and what has no faster form yet. Warps of a cta share the slices of 512, whose sums meet in
// shared memory and are added in order, so that a launch ends with whole outputs; it takes any number of layers of one format, each with rows of its
// own (linear.cuh).
//
// Layouts (n is padded to N2, an even number, with zeros):
//   float weights    [K][N2] f32, f16, bf16 or fp8 codes; fp8 scales [groups][N2] f32
//   integer weights  [K4 / 4][N2] words of four codes (i8) along k, K4 = K rounded up to 4; scales, minima [groups][N2] f32
//   row codes        [rows][K4] i8; row scales, sums [rows][groups] f32
// Bytes: the weights, once for each 8 rows; operations: 2 K N rows, floats in f32.
#include "linear.cuh"

enum WeightKind { F32_WEIGHTS, F16_WEIGHTS, BF16_WEIGHTS, FP8_WEIGHTS };
constexpr int EXACT_THREADS = 256; // of a cta, at most
constexpr int MEET = 16; // slices whose sums meet at once, at most
constexpr int X_WORDS = 512; // of a warp: the rows of the slice that it works on, or of a piece of it

/// Grid (the most outputs / WIDTH, the most rows / ROWS, tasks). Shared memory: [warps][x_words], then [sides][1 + MEET or fewer][ROWS][WIDTH] f32, where
/// place 0 has the total so far. `sum(task, slice, row0, first, limit, x, to)` has a warp leave the sums of a slice, for outputs from `first` on, at `to`; what
/// it leaves from `limit` on is not looked at.
template <int ROWS, int WIDTH, class Sum>
DEVICE void rows_by_slices(const LinearTask& one, const LinearTask* tasks, int stride, int finish, int x_words, Sum sum) {
    DYNAMIC_SHARED(float, shared);
    const LinearTask task = task_of(one, tasks, blockIdx.z);
    int gated = finish >= GATE, width = task.n >> gated, row0 = blockIdx.y * ROWS, first = blockIdx.x * WIDTH;
    if (first >= width || row0 >= task.rows) return;
    int warps = blockDim.x >> (5 + gated), side = threadIdx.x >> 5 >= warps, warp = (threadIdx.x >> 5) - side * warps;
    int slices = (task.k + SLICE - 1) / SLICE, places = 1 + (slices < MEET ? slices : MEET);
    float *x = shared + (threadIdx.x >> 5) * x_words, *sums = shared + (blockDim.x >> 5) * x_words;
    for (int from = 0; from < slices; from += MEET) {
        int count = slices - from < MEET ? slices - from : MEET;
        for (int s = warp; s < count; s += warps) sum(task, from + s, row0, side * width + first, width - first, x, sums + (side * places + 1 + s) * ROWS * WIDTH);
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * WIDTH; i += blockDim.x) {
            auto total = [&](int side) {
                float* at = sums + side * places * ROWS * WIDTH + i;
                float total = from ? at[0] + at[ROWS * WIDTH] : at[ROWS * WIDTH];
                for (int s = 1; s < count; s++) total = total + at[(1 + s) * ROWS * WIDTH];
                at[0] = total;
                return total;
            };
            float y = total(0), with = gated ? total(1) : 0.0f;
            int row = row0 + i / WIDTH, output = first + i % WIDTH;
            if (from + MEET < slices || row >= task.rows || output >= width) continue;
            if (task.bias) { y = y + task.bias[output]; with = gated ? with + task.bias[width + output] : 0.0f; }
            finish_output(task.out + (size_t)row * stride + output, y, with, finish);
        }
        if (from + MEET < slices) __syncthreads();
    }
}

/// e4m3fn as f32, exactly: its bits are those of a float that is 2^120 too small.
DEVICE float fp8_value(u32 code) { return float_of((code & 0x80) << 24 | (code & 0x7f) << 20) * float_of(0x7b800000); }

/// Two neighbouring weights, as floats.
template <int KIND> DEVICE F2 weight_pair(const void* weights, size_t at) {
    if (KIND == F32_WEIGHTS) return *(const F2*)((const float*)weights + at);
    if (KIND == FP8_WEIGHTS) { u32 pair = *(const u16*)((const u8*)weights + at); return {fp8_value(pair & 0xff), fp8_value(pair >> 8)}; }
    u32 pair = *(const u32*)((const u16*)weights + at);
    if (KIND == BF16_WEIGHTS) return {bf16_low(pair), bf16_high(pair)};
    return {half_to_float((u16)pair), half_to_float((u16)(pair >> 16))};
}

/// A warp takes 64 outputs. x: rows of `x_stride`.
template <int KIND, int ROWS>
DEVICE void float_rows(const LinearTask& one, const LinearTask* tasks, const u8* base, int x_stride, int stride, int finish) {
    constexpr int WIDTH = 64, PIECE = X_WORDS / ROWS;
    rows_by_slices<ROWS, WIDTH>(one, tasks, stride, finish, X_WORDS, [&](const LinearTask& task, int slice, int row0, int first, int limit, float* xs, float* to) {
        const float* x = (const float*)(base + task.x_at);
        const float* scales = (const float*)task.scales;
        int lane = threadIdx.x & 31, begin = slice * SLICE, length = task.k - begin < SLICE ? task.k - begin : SLICE, padded_n = (task.n + 1) / 2 * 2;
        float acc[ROWS][2] = {};
        for (int piece = begin; piece < begin + length; piece += PIECE) {
            int there = begin + length - piece < PIECE ? begin + length - piece : PIECE;
            __syncwarp();
            for (int i = lane; i < X_WORDS; i += 32) {
                int row = row0 + i / PIECE, at = i % PIECE;
                if (at < there) xs[i] = row < task.rows ? x[(size_t)row * x_stride + piece + at] : 0.0f;
            }
            __syncwarp();
            if (lane * 2 >= limit) continue;
            F2 scale = {1.0f, 1.0f};
#pragma unroll(ROWS == 1 ? 16 : 8)
            for (int i = 0; i < there; i++) {
                F2 w = weight_pair<KIND>(task.weights, (size_t)(piece + i) * padded_n + first + lane * 2);
                if (KIND == FP8_WEIGHTS) {
                    if (i == 0 || (piece + i) % task.group == 0) scale = *(const F2*)(scales + (size_t)((piece + i) / task.group) * padded_n + first + lane * 2);
                    w.x = w.x * scale.x; w.y = w.y * scale.y;
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float value = xs[r * PIECE + i];
                    acc[r][0] = fmaf(value, w.x, acc[r][0]);
                    acc[r][1] = fmaf(value, w.y, acc[r][1]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) *(F2*)(to + r * WIDTH + lane * 2) = {acc[r][0], acc[r][1]};
    });
}

/// Grid (the most groups, the most rows, tasks), a warp each: rule 3's codes, scales and sums of codes.
extern "C" __global__ void __launch_bounds__(32) quantise_exact(QuantiseTask one, const QuantiseTask* tasks, u8* base, int stride) {
    const QuantiseTask task = task_of(one, tasks, blockIdx.z);
    int g = blockIdx.x, row = blockIdx.y, k = task.k, group = task.group, groups = (k + group - 1) / group, padded_k = (k + 3) / 4 * 4, lane = threadIdx.x;
    if (g >= groups || row >= task.rows) return;
    int first = g * group, length = k - first < group ? k - first : group;
    const float* from = task.x + (size_t)row * stride + first;
    float amax = 0.0f;
    for (int i = lane; i < length; i += 32) amax = fmaxf(amax, fabsf(from[i]));
    for (int step = 16; step; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
    float inverse = __fdiv_rn(127.0f, amax);
    bool used = inverse < float_of(0x7f800000);
    int sum = 0;
    i8* to = (i8*)(base + task.codes_at) + (size_t)row * padded_k + first;
    // What lies behind the last group up to the padding is zero.
    int end = first + length == k ? padded_k - first : length;
    for (int i = lane; i < end; i += 32) {
        int code = used && i < length ? __float2int_rn(from[i] * inverse) : 0;
        code = code > 127 ? 127 : code < -127 ? -127 : code;
        to[i] = (i8)code;
        sum += code;
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
        ((float*)(base + task.scales_at))[(size_t)row * groups + g] = used ? __fdiv_rn(amax, 127.0f) : 0.0f;
        ((float*)(base + task.sums_at))[(size_t)row * groups + g] = (float)sum;
    }
}

/// A warp takes 32 outputs.
template <int ROWS> DEVICE void integer_rows(const LinearTask& one, const LinearTask* tasks, const u8* base, int stride, int finish) {
    constexpr int WIDTH = 32, WORDS = SLICE / 4;
    rows_by_slices<ROWS, WIDTH>(one, tasks, stride, finish, ROWS * WORDS, [&](const LinearTask& task, int slice, int row0, int first, int limit, float* x, float* to) {
        const u32 *weights = (const u32*)task.weights, *codes = (const u32*)(base + task.x_at);
        const float *scales = (const float*)task.scales, *minima = (const float*)task.minima, *row_scales = (const float*)(base + task.scales_at), *row_sums = (const float*)(base + task.sums_at);
        u32* xs = (u32*)x; // [ROWS][WORDS]
        int lane = threadIdx.x & 31, output = first + lane, k = task.k, group = task.group, padded_n = (task.n + 1) / 2 * 2;
        int words = (k + 3) / 4, groups = (k + group - 1) / group, begin = slice * WORDS, length = words - begin < WORDS ? words - begin : WORDS;
        __syncwarp();
        for (int i = lane; i < ROWS * WORDS; i += 32) {
            int row = row0 + i / WORDS, at = i % WORDS;
            if (at < length) xs[i] = row < task.rows ? codes[(size_t)row * words + begin + at] : 0;
        }
        __syncwarp();
        if (lane >= limit) return;
        float acc[ROWS] = {};
        int g_end = (slice + 1) * SLICE / group < groups ? (slice + 1) * SLICE / group : groups;
        for (int g = slice * SLICE / group; g < g_end; g++) {
            int sum[ROWS] = {};
            if (group >= 4) {
                int from = g * group / 4 - begin, end = from + group / 4 < length ? from + group / 4 : length;
#pragma unroll 8
                for (int i = from; i < end; i++) {
                    u32 w = weights[(size_t)(begin + i) * padded_n + output];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sum[r] = dot4(w, xs[r * WORDS + i], sum[r]);
                }
            } else {
                for (int at = g * group; at < g * group + group && at < k; at++) {
                    u32 w = weights[(size_t)(at / 4) * padded_n + output] >> at % 4 * 8 & 0xff;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sum[r] = dot4(w, xs[r * WORDS + at / 4 - begin] >> at % 4 * 8 & 0xff, sum[r]);
                }
            }
            float scale = scales[(size_t)g * padded_n + output], minimum = minima ? minima[(size_t)g * padded_n + output] : 0.0f;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                size_t at = (size_t)(row0 + r < task.rows ? row0 + r : 0) * groups + g;
                float row_scale = row_scales[at];
                acc[r] = fmaf((float)sum[r], row_scale * scale, acc[r]);
                if (minima) acc[r] = fmaf(row_sums[at], row_scale * minimum, acc[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) to[r * WIDTH + lane] = acc[r];
    });
}

#define FLOAT_ENTRY(NAME, KIND, ROWS)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) linear_##NAME##_rows##ROWS(LinearTask one, const LinearTask* tasks, const u8* base, int x_stride, int stride, int finish) { \
        float_rows<KIND, ROWS>(one, tasks, base, x_stride, stride, finish);                                                                     \
    }
#define FLOAT_ENTRIES(NAME, KIND) FLOAT_ENTRY(NAME, KIND, 1) FLOAT_ENTRY(NAME, KIND, 8)
FLOAT_ENTRIES(f32, F32_WEIGHTS)
FLOAT_ENTRIES(f16, F16_WEIGHTS)
FLOAT_ENTRIES(bf16, BF16_WEIGHTS)
FLOAT_ENTRIES(fp8, FP8_WEIGHTS)
#undef FLOAT_ENTRIES
#undef FLOAT_ENTRY
#define INTEGER_ENTRY(ROWS)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) linear_integer_rows##ROWS(LinearTask one, const LinearTask* tasks, const u8* base, int stride, int finish) { \
        integer_rows<ROWS>(one, tasks, base, stride, finish);                                                                                   \
    }
INTEGER_ENTRY(1)
INTEGER_ENTRY(8)
#undef INTEGER_ENTRY
