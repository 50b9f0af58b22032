// How fast is wgmma by itself, by the layout of B and the place of A? Two warpgroups a multiprocessor, products only, no loads.
// Usage: wgmma_rate OUT.jsonl
#include "../ptx.cuh"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>
#define CHECK(call) do { cudaError_t e = (call); if (e != cudaSuccess) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e)); exit(1); } } while (0)

template <int N> DEVICE void wgmma_ss(float (&d)[N / 2], u64 a, u64 b);
template <> DEVICE void wgmma_ss<128>(float (&d)[64], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                 : "l"(a), "l"(b));
}
DEVICE u64 matrix(const void* p, u32 along_k, u32 along_rows, u32 swizzle) { return wgmma_matrix(p, along_k, along_rows) | (u64)swizzle << 62; }

/// MODE 0: unswizzled, halves of k far apart; 1: unswizzled, halves side by side; 2: 128-byte swizzle. SHARED_A: A from shared memory, 128-byte swizzle.
template <int N, int MODE, bool SHARED_A> __global__ void __launch_bounds__(256, 1) rate(float* out, int rounds) {
    extern __shared__ __align__(1024) u8 raw[];
    u8* b = (u8*)(((u64)raw + 1023) & ~1023ull);
    u8* a_at = b + N * 128;
    for (int i = threadIdx.x; i < N * 32 + 4096; i += 256) ((u32*)b)[i] = 0x3f803f80u ^ (i * 2654435761u & 0x807f807fu);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    float d[N / 2];
    u32 a[4][4];
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) a[i / 4][i % 4] = 0x3f803f80u ^ ((threadIdx.x * 16 + i) * 2654435761u & 0x807f807fu);
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u64 desc = MODE == 0 ? matrix(b + i * N * 32, N * 16, 128, 0) : MODE == 1 ? matrix(b + i * N * 32, 128, 256, 0) : matrix(b + i * 32, 1, 1024, 1);
            if constexpr (SHARED_A) wgmma_ss<N>(d, matrix(a_at + (threadIdx.x / 128) * 8192 + i * 32, 1, 1024, 1), desc);
            else wgmma_bf16<N>(d, a[i], desc, 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < N / 2; i++) wgmma_settle(d[i]);
    }
    float s = 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) s += d[i];
    if (s == 12345.0f) out[0] = s;
}
template <int N, int MODE, bool SHARED_A> void run(FILE* json, const char* name) {
    float* out; CHECK(cudaMalloc(&out, 16));
    size_t shared = N * 128 + 16384 + 1024;
    CHECK(cudaFuncSetAttribute(rate<N, MODE, SHARED_A>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cudaEvent_t x, y; CHECK(cudaEventCreate(&x)); CHECK(cudaEventCreate(&y));
    std::vector<float> times;
    for (int i = 0; i < 6; i++) {
        CHECK(cudaEventRecord(x)); rate<N, MODE, SHARED_A><<<132, 256, shared>>>(out, 4000); CHECK(cudaEventRecord(y)); CHECK(cudaGetLastError()); CHECK(cudaEventSynchronize(y));
        float ms; CHECK(cudaEventElapsedTime(&ms, x, y)); if (i) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    double tera = 2.0 * 64 * N * 16 * 4 * 4000 * 2 * 132 / times[2] / 1e9;
    fprintf(json, "{\"n\": %d, \"layout\": \"%s\", \"a\": \"%s\", \"tera_s\": %.1f}\n", N, name, SHARED_A ? "shared memory" : "registers", tera);
    printf("wgmma n%d %s a in %s: %.1f TFLOP/s\n", N, name, SHARED_A ? "shared memory" : "registers", tera);
}
int main(int count, char** args) {
    FILE* json = fopen(count > 1 ? args[1] : "/dev/null", "w");
    run<64, 0, false>(json, "unswizzled"); run<128, 0, false>(json, "unswizzled"); run<192, 0, false>(json, "unswizzled");
    run<64, 1, false>(json, "unswizzled, halves side by side"); run<128, 1, false>(json, "unswizzled, halves side by side"); run<192, 1, false>(json, "unswizzled, halves side by side");
    run<64, 2, false>(json, "swizzled 128"); run<128, 2, false>(json, "swizzled 128"); run<192, 2, false>(json, "swizzled 128");
    run<128, 0, true>(json, "unswizzled"); run<128, 2, true>(json, "swizzled 128");
    fclose(json);
}
