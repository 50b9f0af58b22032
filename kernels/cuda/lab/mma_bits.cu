// Experiment: do wgmma (m64nNk16) and mma.sync (m16n8k16) on bf16 give equal bits? Random fragments of several kinds, both forms on
// the same registers; counts of differing outputs as JSON. Also writes fragments with their results, from which a model of the tensor
// core's rounding is fitted without a card (lab/fit_tensor_core.cc).
// Usage: mma_bits OUT.json SAMPLES.bin
#include "../ptx.cuh"
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)

enum Kind { Normal, Wide, Cancelling, Extreme, Subnormal, RawBits, KIND_COUNT };
static const char* kind_names[] = {"normal", "wide_exponents", "cancelling", "near_overflow", "subnormal", "raw_bits"};

__device__ u32 hash(u64 x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; x ^= x >> 33;
    return (u32)x;
}
/// A bf16 of one kind from 32 random bits.
__device__ u16 element(int kind, u32 r, int which) {
    u32 sign = r >> 31 << 15, mantissa = r & 0x7f, spread = r >> 8 & 0xffff;
    switch (kind) {
    case Normal: return (u16)(sign | (127 - 4 + spread % 8) << 7 | mantissa);
    case Wide: return (u16)(sign | (127 - 50 + spread % 100) << 7 | mantissa);
    case Cancelling: return (u16)(sign | (127 - 2 + spread % 4) << 7 | mantissa);
    case Extreme: return (u16)(sign | (127 + (which ? 60 : 50) + spread % 14) << 7 | mantissa);
    case Subnormal: return (u16)(sign | (which ? spread % 60 : spread % 128) << 7 | mantissa);
    default: return (u16)r;
    }
}
__device__ float start(int kind, u32 r, u32 r2) {
    u32 sign = r & 0x80000000u, mantissa = r2 & 0x7fffff, spread = r >> 4 & 0xffff;
    switch (kind) {
    case Normal: return float_of(sign | (127 - 4 + spread % 8) << 23 | mantissa);
    case Wide: return float_of(sign | (127 - 100 + spread % 200) << 23 | mantissa);
    case Cancelling: return float_of(sign | (127 - 24 + spread % 24) << 23 | mantissa);
    case Extreme: return float_of(sign | (127 + 115 + spread % 12) << 23 | mantissa);
    case Subnormal: return float_of(sign | (spread % 30) << 23 | mantissa);
    default: return float_of(r2);
    }
}

/// One warpgroup a case: A [64][16] in registers, B [N][16] in shared memory as core matrices, accumulators from `start`; `chain` products in a row.
template <int N> __global__ void __launch_bounds__(128) compare(int kind, u64 seed, int chain, int zero_start, u64* differing, u32* example, u8* samples, int sample_cases) {
    __shared__ __align__(128) u16 b[2 * N * 8];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
    u64 base = seed + (u64)blockIdx.x * 1000003ull * 4096;
    float by_wgmma[N / 2];
    DYNAMIC_SHARED(F4, by_mma); // [N / 8][128 threads]: registers are for wgmma
    float first_c[4];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float c = zero_start ? 0.0f : start(kind, hash(base * 7 + threadIdx.x * 131 + i * 2), hash(base * 11 + threadIdx.x * 137 + i * 2 + 1));
        by_wgmma[i] = c; ((float*)&by_mma[i / 4 * 128 + threadIdx.x])[i % 4] = c;
        if (i < 4) first_c[i] = c;
    }
    u32 a[4];
    for (int link = 0; link < chain; link++) {
        __syncthreads();
        for (int i = threadIdx.x; i < N * 16; i += 128) {
            int row = i / 16, k = i % 16;
            u16 v;
            if (kind == Cancelling && k % 2) { // the partner's negative, sometimes one bit off
                u32 r = hash(base + 5 + (row * 16 + k - 1) * 3 + link * 77777ull), off = hash(base + 9 + (row * 16 + k) * 3 + link * 77777ull);
                v = element(kind, r, 1) ^ 0x8000 ^ (off % 4 == 0);
            } else v = element(kind, hash(base + 5 + (row * 16 + k) * 3 + link * 77777ull), 1);
            b[((k / 8) * (N / 8) + row / 8) * 64 + row % 8 * 8 + k % 8] = v;
        }
        for (int q = 0; q < 4; q++) {
            int row = warp * 16 + g + q % 2 * 8, k = t * 2 + q / 2 * 8;
            u16 lo = element(kind, hash(base + 3000001 + (row * 16 + k) * 5 + link * 99991ull), 0);
            u16 hi = kind == Cancelling ? lo : element(kind, hash(base + 3000001 + (row * 16 + k + 1) * 5 + link * 99991ull), 0);
            a[q] = lo | (u32)hi << 16;
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        wgmma_fence();
        wgmma_bf16<N>(by_wgmma, a, wgmma_matrix(b, N / 8 * 128, 128), zero_start ? link > 0 : 1);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < N / 2; i++) wgmma_settle(by_wgmma[i]);
        for (int j = 0; j < N / 8; j++) {
            const u32* words = (const u32*)b;
            F4 v = by_mma[j * 128 + threadIdx.x];
            float d[4] = {v.x, v.y, v.z, v.w};
            mma_bf16(d, a, words[j * 32 + g * 4 + t], words[(N / 8 + j) * 32 + g * 4 + t]);
            by_mma[j * 128 + threadIdx.x] = F4{d[0], d[1], d[2], d[3]};
        }
    }
    int mine = 0, nans = 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        u32 x = bits_of(by_wgmma[i]), y = bits_of(((const float*)&by_mma[i / 4 * 128 + threadIdx.x])[i % 4]);
        if (x != y) { mine++; if (atomicAdd((unsigned*)example, 1u) == 0) { example[1] = x; example[2] = y; example[3] = blockIdx.x; example[4] = threadIdx.x; example[5] = i; } }
        nans += (y & 0x7fffffff) > 0x7f800000;
    }
    if (mine) atomicAdd(differing, (u64)mine);
    if (nans) atomicAdd(differing + 1, (u64)nans);
    // A sample is the fragment of warp 0, rows 0 to 7 of B: A [16][16], B [8][16] bf16, C [16][8], D [16][8] f32.
    if (samples && (int)blockIdx.x < sample_cases && warp == 0) {
        u8* to = samples + (size_t)blockIdx.x * 1792;
        u16* sa = (u16*)to; u16* sb = sa + 256; float* sc = (float*)(to + 768); float* sd = sc + 128;
        for (int q = 0; q < 4; q++) {
            int row = g + q % 2 * 8, k = t * 2 + q / 2 * 8;
            sa[row * 16 + k] = (u16)a[q]; sa[row * 16 + k + 1] = (u16)(a[q] >> 16);
            sc[(g + q / 2 * 8) * 8 + t * 2 + q % 2] = first_c[q];
            sd[(g + q / 2 * 8) * 8 + t * 2 + q % 2] = ((const float*)&by_mma[threadIdx.x])[q];
        }
        for (int i = lane; i < 128; i += 32) { int row = i / 16, k = i % 16; sb[row * 16 + k] = b[((k / 8) * (N / 8)) * 64 + row * 8 + k % 8]; }
    }
}

template <int N> void run(FILE* json, FILE* bin, bool& comma) {
    u64* differing; u32* example; u8* samples;
    const int sample_cases = 1200;
    CHECK(cudaFuncSetAttribute(compare<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, N / 8 * 128 * 16));
    CHECK(cudaMalloc(&differing, 16)); CHECK(cudaMalloc(&example, 64)); CHECK(cudaMalloc(&samples, sample_cases * 1792));
    for (int kind = 0; kind < KIND_COUNT; kind++)
        for (int form = 0; form < 3; form++) { // one product onto c; one onto zero; 32 in a row from zero (512 k)
            int chain = form == 2 ? 32 : 1, cases = (1 << 20) / (N / 2) / (form == 2 ? 4 : 1);
            CHECK(cudaMemset(differing, 0, 16)); CHECK(cudaMemset(example, 0, 64));
            bool keep = N == 64 && form == 0;
            if (keep) CHECK(cudaMemset(samples, 0, sample_cases * 1792));
            compare<N><<<cases, 128, N / 8 * 128 * 16>>>(kind, 1234567ull * (kind + 1) + form * 99 + N, chain, form > 0, differing, example, keep ? samples : nullptr, sample_cases);
            CHECK(cudaGetLastError()); CHECK(cudaDeviceSynchronize());
            u64 counts[2]; u32 ex[6];
            CHECK(cudaMemcpy(counts, differing, 16, cudaMemcpyDeviceToHost)); CHECK(cudaMemcpy(ex, example, 24, cudaMemcpyDeviceToHost));
            fprintf(json, "%s\n  {\"n\": %d, \"kind\": \"%s\", \"form\": \"%s\", \"fragments\": %llu, \"outputs\": %llu, \"differing\": %llu, \"nan\": %llu, \"example\": [\"%08x\", \"%08x\"]}", comma ? "," : "", N, kind_names[kind],
                    form == 0 ? "onto c" : form == 1 ? "onto zero" : "chain of 32", (u64)cases * N / 2, (u64)cases * N * 64, counts[0], counts[1], ex[1], ex[2]);
            comma = true;
            if (counts[0]) printf("mma_bits n%d %s form %d: %llu of %llu differ\n", N, kind_names[kind], form, counts[0], (u64)cases * N * 64);
            if (keep) {
                std::vector<u8> host(sample_cases * 1792);
                CHECK(cudaMemcpy(host.data(), samples, host.size(), cudaMemcpyDeviceToHost));
                fwrite(host.data(), 1, host.size(), bin);
            }
        }
}

int main(int count, char** args) {
    if (count < 3) return 2;
    FILE* json = fopen(args[1], "w"); FILE* bin = fopen(args[2], "wb");
    bool comma = false;
    fprintf(json, "[");
    run<8>(json, bin, comma); run<64>(json, bin, comma); run<128>(json, bin, comma); run<256>(json, bin, comma);
    fprintf(json, "\n]\n");
    fclose(json); fclose(bin);
    puts("mma_bits: done");
}
