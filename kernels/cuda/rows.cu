// What works on rows alone: norms, rotations, activations, rows moved. The bits of `cpu-v1` (docs/numerics.md, rules 4 and 5).
// All are limited by bytes: each element is read once or twice and written once. Rows are dense f32 unless a stride is given.
#include "numerics.cuh"

// ---- rows moved ----

/// Grid (rows). dst[i] = src[index[i]].
extern "C" __global__ void __launch_bounds__(256) gather_rows(float* dst, const float* src, const u32* index, int width) {
    const float* from = src + (size_t)index[blockIdx.x] * width;
    float* to = dst + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += 256) to[i] = from[i];
}
/// Grid (rows). dst[index[i]] = src[i].
extern "C" __global__ void __launch_bounds__(256) scatter_rows(float* dst, const u32* index, const float* src, int width) {
    const float* from = src + (size_t)blockIdx.x * width;
    float* to = dst + (size_t)index[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += 256) to[i] = from[i];
}
/// Grid (rows). Row i of `out` becomes the `width` elements at sources[i], as f32 and times `scale`, or gains them. `format` 0: f32, 1: f16, 2: bf16.
extern "C" __global__ void __launch_bounds__(256) rows_from(float* out, const u64* sources, int width, int format, float scale, int adds) {
    u64 from = sources[blockIdx.x];
    float* to = out + (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += 256) {
        float value = format == 0 ? ((const float*)from)[i] : format == 1 ? half_to_float(((const u16*)from)[i]) : float_of((u32)((const u16*)from)[i] << 16);
        value = value * scale;
        to[i] = adds ? to[i] + value : value;
    }
}

// ---- norms: sixteen lanes a row, two rows a warp ----

/// Lane i of 16 with i + 8, i + 4, i + 2, i + 1; the same in all lanes.
DEVICE float halving_sum(float v) {
    for (int step = 8; step; step /= 2) v = v + __shfl_xor_sync(~0u, v, step);
    return v;
}
/// One row by the sixteen lanes that call it with the same one. All 32 lanes of a warp call it; those that do not write have a row too.
DEVICE void norm_one(float* dst, const float* src, int width, bool layer, float weight_offset, float eps, const float* weight, const float* bias, bool writes) {
    int lane = threadIdx.x & 15;
    float count = (float)width, mean = 0.0f, squares = 0.0f;
    if (layer) {
        float sum = 0.0f;
        for (int j = lane; j < width; j += 16) sum = sum + src[j];
        mean = __fdiv_rn(halving_sum(sum), count);
    }
    for (int j = lane; j < width; j += 16) {
        float x = layer ? src[j] - mean : src[j];
        squares = fmaf(x, x, squares);
    }
    float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(halving_sum(squares), count) + eps));
    if (!writes) return;
    for (int j = lane; j < width; j += 16) {
        float x = layer ? src[j] - mean : src[j], w = weight_offset == 0.0f ? weight[j] : weight_offset + weight[j];
        float y = (x * inverse) * w;
        dst[j] = bias ? y + bias[j] : y;
    }
}
/// Eight rows a cta.
extern "C" __global__ void __launch_bounds__(128) norm_rows(float* dst, const float* src, const float* weight, const float* bias, int rows, int width, int layer, float weight_offset, float eps) {
    int row = blockIdx.x * 8 + threadIdx.x / 16, mine = row < rows ? row : rows - 1;
    norm_one(dst + (size_t)mine * width, src + (size_t)mine * width, width, layer != 0, weight_offset, eps, weight, bias, row < rows);
}
/// Heads of rows in place: head h of row r begins at r * stride + h * head_dim. Eight heads a cta.
extern "C" __global__ void __launch_bounds__(128) norm_heads(float* buffer, const float* weight, int rows, int heads, int stride, int head_dim, float weight_offset, float eps) {
    int item = blockIdx.x * 8 + threadIdx.x / 16, items = rows * heads, mine = item < items ? item : items - 1;
    float* head = buffer + (size_t)(mine / heads) * stride + mine % heads * head_dim;
    norm_one(head, head, head_dim, false, weight_offset, eps, weight, nullptr, item < items);
}

// ---- elements ----

/// Grid (rows). Rotates the first 2 half elements of each head (halves style); rope_rows[row] = [cos | sin].
extern "C" __global__ void __launch_bounds__(256) rope_heads(float* buffer, const float* rope_rows, int heads, int stride, int head_dim, int half) {
    const float *cosines = rope_rows + (size_t)blockIdx.x * 2 * half, *sines = cosines + half;
    for (int i = threadIdx.x; i < heads * half; i += 256) {
        float* head = buffer + (size_t)blockIdx.x * stride + i / half * head_dim;
        int j = i % half;
        float a = head[j], b = head[half + j], c = cosines[j], s = sines[j];
        head[j] = a * c - b * s;
        head[half + j] = b * c + a * s;
    }
}
/// Grid (rows). out[row][j] = act(gate_up[row][j]) * gate_up[row][width + j], rows of `stride` in out.
extern "C" __global__ void __launch_bounds__(256) gate_rows(float* out, const float* gate_up, int width, int stride, int activation) {
    const float* from = gate_up + (size_t)blockIdx.x * 2 * width;
    for (int j = threadIdx.x; j < width; j += 256) out[(size_t)blockIdx.x * stride + j] = activate_exact(from[j], activation) * from[width + j];
}
extern "C" __global__ void __launch_bounds__(256) activate_elements(float* x, u64 count, int activation) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) x[i] = activate_exact(x[i], activation);
}
extern "C" __global__ void __launch_bounds__(256) add_elements(float* acc, const float* x, u64 count) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) acc[i] = acc[i] + x[i];
}
extern "C" __global__ void __launch_bounds__(256) softcap_elements(float* x, u64 count, float cap) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) x[i] = softcap_exact(x[i], cap);
}

// ---- the largest ----

/// Grid (rows). The lowest index of the largest element that is above negative infinity, else ~0.
extern "C" __global__ void __launch_bounds__(256) largest_of_rows(const float* x, u32* out, int width) {
    DYNAMIC_SHARED(float, values); // [256], then their indices
    u32* indices = (u32*)(values + 256);
    const float* row = x + (size_t)blockIdx.x * width;
    float value = float_of(0xff800000);
    u32 index = ~0u;
    for (int i = threadIdx.x; i < width; i += 256)
        if (row[i] > value) { value = row[i]; index = (u32)i; }
    values[threadIdx.x] = value;
    indices[threadIdx.x] = index;
    for (int step = 128; step; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) {
            float other = values[threadIdx.x + step];
            u32 at = indices[threadIdx.x + step];
            if (other > values[threadIdx.x] || (other == values[threadIdx.x] && at < indices[threadIdx.x])) { values[threadIdx.x] = other; indices[threadIdx.x] = at; }
        }
    }
    if (threadIdx.x == 0) out[blockIdx.x] = indices[0];
}

// ---- what the card reads at best ----

/// Any grid. Reads all units; `out` is written where their bits are what they hardly ever are.
extern "C" __global__ void __launch_bounds__(256) read_all(const U4* from, u64 units, u32* out) {
    u64 policy = evict_first(), stride = (u64)gridDim.x * 256;
    u32 sum = 0;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < units; i += stride * 4) {
        U4 v[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * stride < units) v[j] = load_stream(from + i + j * stride, policy);
#pragma unroll
        for (int j = 0; j < 4; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x12345678) out[0] = sum;
}
