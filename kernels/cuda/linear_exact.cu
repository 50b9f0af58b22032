// Linear layers of every storage format with the bits of `cpu-v1` (docs/numerics.md, rules 1 to 3): floats by f32 fma in ascending k, integers
// by exact group sums. What no tensor core can give, and what has no faster form yet. Few rows are cut by slices of 512 over ctas, whose sums
// `linear_finish` adds in order; many rows walk the slices themselves.
//
// Layouts (n is padded to N2, an even number, with zeros):
//   float weights    [K][N2] f32, f16, bf16 or fp8 codes; fp8 scales [groups][N2] f32
//   integer weights  [K4 / 4][N2] words of four codes (i8) along k, K4 = K rounded up to 4; scales, minima [groups][N2] f32
//   row codes        [rows][K4] i8; row scales, sums [rows][groups] f32
//   partial          [slices][rows][stride] f32, this layer's outputs from its first column on
// Bytes: the weights, once for each 8 rows; operations: 2 K N rows, floats in f32.
#include "numerics.cuh"

enum WeightKind { F32_WEIGHTS, F16_WEIGHTS, BF16_WEIGHTS, FP8_WEIGHTS };
constexpr int EXACT_ROWS = 8; // of a cta
constexpr int EXACT_THREADS = 128;

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

/// Grid (outputs / 256, slices or 1, rows / ROWS). x [rows] of `x_stride`.
template <int KIND, int ROWS>
DEVICE void float_rows(const void* weights, const float* scales, const float* x, float* partial, int rows, int n, int padded_n, int k, int x_stride, int stride, int group) {
    DYNAMIC_SHARED(float, xs); // [ROWS][SLICE]
    int output = (blockIdx.x * EXACT_THREADS + threadIdx.x) * 2, row0 = blockIdx.z * ROWS, slices = (k + SLICE - 1) / SLICE;
    bool split = gridDim.y > 1, inside = output < padded_n;
    float total[ROWS][2];
    for (int slice = split ? blockIdx.y : 0; slice < slices; slice++) {
        int first = slice * SLICE, length = k - first < SLICE ? k - first : SLICE;
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * length; i += EXACT_THREADS) {
            int row = i / length, at = i % length;
            xs[row * SLICE + at] = row0 + row < rows ? x[(size_t)(row0 + row) * x_stride + first + at] : 0.0f;
        }
        __syncthreads();
        float acc[ROWS][2] = {};
        if (inside) {
            F2 scale = {1.0f, 1.0f};
#pragma unroll 8
            for (int i = 0; i < length; i++) {
                F2 w = weight_pair<KIND>(weights, (size_t)(first + i) * padded_n + output);
                if (KIND == FP8_WEIGHTS) {
                    if (i == 0 || (first + i) % group == 0) scale = *(const F2*)(scales + (size_t)((first + i) / group) * padded_n + output);
                    w.x = w.x * scale.x; w.y = w.y * scale.y;
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float value = xs[r * SLICE + i];
                    acc[r][0] = fmaf(value, w.x, acc[r][0]);
                    acc[r][1] = fmaf(value, w.y, acc[r][1]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 2; i++) total[r][i] = split || slice == 0 ? acc[r][i] : total[r][i] + acc[r][i];
        if (split) break;
    }
    float* to = partial + (split ? (size_t)blockIdx.y * rows * stride : 0);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row0 + r < rows && output + i < n) to[(size_t)(row0 + r) * stride + output + i] = total[r][i];
}

/// Grid (groups, rows), a warp each: rule 3's codes, scales and sums of codes.
extern "C" __global__ void __launch_bounds__(32) quantise_exact(const float* x, i8* codes, float* scales, float* sums, int k, int padded_k, int x_stride, int group) {
    int g = blockIdx.x, row = blockIdx.y, first = g * group, length = k - first < group ? k - first : group, lane = threadIdx.x;
    const float* from = x + (size_t)row * x_stride + first;
    float amax = 0.0f;
    for (int i = lane; i < length; i += 32) amax = fmaxf(amax, fabsf(from[i]));
    for (int step = 16; step; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
    float inverse = __fdiv_rn(127.0f, amax);
    bool used = inverse < float_of(0x7f800000);
    int sum = 0;
    i8* to = codes + (size_t)row * padded_k + first;
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
        scales[(size_t)row * gridDim.x + g] = used ? __fdiv_rn(amax, 127.0f) : 0.0f;
        sums[(size_t)row * gridDim.x + g] = (float)sum;
    }
}

/// Grid (outputs / 128, slices or 1, rows / ROWS). `minima` may be null.
template <int ROWS>
DEVICE void integer_rows(const u32* weights, const float* scales, const float* minima, const i8* codes, const float* row_scales, const float* row_sums, float* partial, int rows, int n, int padded_n, int k, int stride, int group) {
    DYNAMIC_SHARED(u32, xs); // [ROWS][SLICE / 4]
    int output = blockIdx.x * EXACT_THREADS + threadIdx.x, row0 = blockIdx.z * ROWS, slices = (k + SLICE - 1) / SLICE;
    int words = (k + 3) / 4, groups = (k + group - 1) / group;
    bool split = gridDim.y > 1, inside = output < padded_n;
    float total[ROWS];
    for (int slice = split ? blockIdx.y : 0; slice < slices; slice++) {
        int first = slice * (SLICE / 4), length = words - first < SLICE / 4 ? words - first : SLICE / 4;
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * length; i += EXACT_THREADS) {
            int row = i / length, at = i % length;
            xs[row * (SLICE / 4) + at] = row0 + row < rows ? ((const u32*)codes)[(size_t)(row0 + row) * words + first + at] : 0;
        }
        __syncthreads();
        float acc[ROWS] = {};
        if (inside) {
            int g_end = (slice + 1) * SLICE / group < groups ? (slice + 1) * SLICE / group : groups;
            for (int g = slice * SLICE / group; g < g_end; g++) {
                int sum[ROWS] = {};
                if (group >= 4) {
                    int from = g * group / 4 - first, to = from + group / 4 < length ? from + group / 4 : length;
#pragma unroll 8
                    for (int i = from; i < to; i++) {
                        u32 w = weights[(size_t)(first + i) * padded_n + output];
#pragma unroll
                        for (int r = 0; r < ROWS; r++) sum[r] = dot4(w, xs[r * (SLICE / 4) + i], sum[r]);
                    }
                } else {
                    for (int at = g * group; at < g * group + group && at < k; at++) {
                        u32 w = weights[(size_t)(at / 4) * padded_n + output] >> at % 4 * 8 & 0xff;
#pragma unroll
                        for (int r = 0; r < ROWS; r++) sum[r] = dot4(w, xs[r * (SLICE / 4) + at / 4 - first] >> at % 4 * 8 & 0xff, sum[r]);
                    }
                }
                float scale = scales[(size_t)g * padded_n + output], minimum = minima ? minima[(size_t)g * padded_n + output] : 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    size_t at = (size_t)(row0 + r < rows ? row0 + r : 0) * groups + g;
                    float row_scale = row_scales[at];
                    acc[r] = fmaf((float)sum[r], row_scale * scale, acc[r]);
                    if (minima) acc[r] = fmaf(row_sums[at], row_scale * minimum, acc[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) total[r] = split || slice == 0 ? acc[r] : total[r] + acc[r];
        if (split) break;
    }
    float* to = partial + (split ? (size_t)blockIdx.y * rows * stride : 0);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (row0 + r < rows && output < n) to[(size_t)(row0 + r) * stride + output] = total[r];
}

/// What becomes of outputs: FINISH 0 stores, 1 adds, 2 gates (the first half of the columns by the second).
/// Grid (columns / 256, rows). partial [slices][rows][stride], out rows of `out_stride`; `bias` may be null.
extern "C" __global__ void __launch_bounds__(256) linear_finish(const float* partial, const float* bias, float* out, int slices, int rows, int columns, int stride, int out_stride, int finish, int activation) {
    int column = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    auto total = [&](int at) {
        float sum = partial[(size_t)row * stride + at];
        for (int s = 1; s < slices; s++) sum = sum + partial[((size_t)s * rows + row) * stride + at];
        return bias ? sum + bias[at] : sum;
    };
    float* to = out + (size_t)row * out_stride + column;
    if (finish == 2) {
        if (column < columns / 2) *to = activate_exact(total(column), activation) * total(columns / 2 + column);
    } else if (column < columns) {
        float y = total(column);
        *to = finish == 1 ? *to + y : y;
    }
}

#define FLOAT_ENTRIES(NAME, KIND)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) linear_##NAME##_rows1(const void* weights, const float* scales, const float* x, float* partial, int rows, int n, int padded_n, int k, int x_stride, int stride, int group) { \
        float_rows<KIND, 1>(weights, scales, x, partial, rows, n, padded_n, k, x_stride, stride, group);                                        \
    }                                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) linear_##NAME##_rows8(const void* weights, const float* scales, const float* x, float* partial, int rows, int n, int padded_n, int k, int x_stride, int stride, int group) { \
        float_rows<KIND, EXACT_ROWS>(weights, scales, x, partial, rows, n, padded_n, k, x_stride, stride, group);                               \
    }
FLOAT_ENTRIES(f32, F32_WEIGHTS)
FLOAT_ENTRIES(f16, F16_WEIGHTS)
FLOAT_ENTRIES(bf16, BF16_WEIGHTS)
FLOAT_ENTRIES(fp8, FP8_WEIGHTS)
#undef FLOAT_ENTRIES
#define INTEGER_ENTRY(ROWS)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) linear_integer_rows##ROWS(const u32* weights, const float* scales, const float* minima, const i8* codes, const float* row_scales, const float* row_sums, float* partial, int rows, int n, int padded_n, int k, int stride, int group) { \
        integer_rows<ROWS>(weights, scales, minima, codes, row_scales, row_sums, partial, rows, n, padded_n, k, stride, group);                 \
    }
INTEGER_ENTRY(1)
INTEGER_ENTRY(8)
#undef INTEGER_ENTRY
