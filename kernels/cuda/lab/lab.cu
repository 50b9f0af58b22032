// The lab on a card: `lab check` (each kernel against the host's truth), `lab quick` (a few small ones, for compute-sanitizer),
// `lab bench OUT.jsonl` (timings: a graph of launches that rotate over more data than the second cache holds; median of replays).
#include "../linear_integer.cu"
#include "../linear_integer_wgmma.cu"
#include "../linear_bf16.cu"
#include "../linear_bf16_wgmma.cu"
#include "../attention.cu"
#include "device.h"
#include "checks.h"
#include <chrono>
#include <functional>
#include <string>

static FILE* results;
static double time_budget = 1e9;
static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

__global__ void fill_random(u32* to, size_t words, u32 keep, u32 set, u64 seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (size_t)gridDim.x * blockDim.x) {
        u64 x = (i + seed) * 0x9e3779b97f4a7c15ull; x ^= x >> 29; x *= 0xbf58476d1ce4e5b9ull; x ^= x >> 32;
        to[i] = ((u32)x & keep) | set;
    }
}
__global__ void fill_normal(float* to, size_t count, u64 seed) {
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        float s = 0;
        for (int j = 0; j < 4; j++) { u64 x = (i * 4 + j + seed) * 0x9e3779b97f4a7c15ull; x ^= x >> 29; x *= 0xbf58476d1ce4e5b9ull; x ^= x >> 32; s += (float)((u32)x >> 8) / 8388608.0f - 1.0f; }
        to[i] = s;
    }
}
template <class T> Buffer<T> random_buffer(size_t count, u32 keep = ~0u, u32 set = 0) {
    Buffer<T> b(count);
    fill_random<<<1024, 256>>>((u32*)b.data(), count * sizeof(T) / 4, keep, set, (u64)(size_t)b.data());
    CHECK(cudaDeviceSynchronize());
    return b;
}
static Buffer<float> normal_buffer(size_t count) {
    Buffer<float> b(count);
    fill_normal<<<1024, 256>>>(b.data(), count, 3);
    CHECK(cudaDeviceSynchronize());
    return b;
}
/// Random f16 scales of one binade, random bf16 of one binade and either sign.
static Buffer<u16> random_scales(size_t count) { return random_buffer<u16>(count, 0x03ff03ff, 0x20002000); }
static Buffer<u16> random_bf16(size_t count) { return random_buffer<u16>(count, 0x807f807f, 0x3f003f00); }

/// Median microseconds of one launch; `launch(i)` uses the i-th copy of the data.
static double time_us(const std::function<void(int)>& launch, int copies, double expected_us) {
    int launches = std::max(8, std::min(64, int(1500 / expected_us)));
    if (launches < copies) launches = std::min(copies, 64);
    cudaStream_t stream; CHECK(cudaStreamCreate(&stream)); lab_stream = stream;
    cudaGraph_t graph; cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; i++) launch(i % copies);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b; CHECK(cudaEventCreate(&a)); CHECK(cudaEventCreate(&b));
    for (int i = 0; i < 2; i++) CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaStreamSynchronize(stream));
    std::vector<double> times;
    for (int i = 0; i < 11; i++) {
        CHECK(cudaEventRecord(a, stream)); CHECK(cudaGraphLaunch(exec, stream)); CHECK(cudaEventRecord(b, stream)); CHECK(cudaEventSynchronize(b));
        float ms; CHECK(cudaEventElapsedTime(&ms, a, b)); times.push_back(ms * 1000.0 / launches);
    }
    std::sort(times.begin(), times.end());
    CHECK(cudaGraphExecDestroy(exec)); CHECK(cudaGraphDestroy(graph)); CHECK(cudaEventDestroy(a)); CHECK(cudaEventDestroy(b)); CHECK(cudaStreamDestroy(stream)); lab_stream = nullptr;
    return times[times.size() / 2];
}
static void emit(const char* kernel, const char* what, int rows, int n, int k, double us, double bytes, double operations) {
    fprintf(results, "{\"kernel\": \"%s\", \"what\": \"%s\", \"rows\": %d, \"n\": %d, \"k\": %d, \"us\": %.3f, \"gb_s\": %.1f, \"tera_s\": %.2f}\n", kernel, what, rows, n, k, us, bytes / us / 1e3, operations / us / 1e6);
    fflush(results);
}
static int copies_for(double bytes) { return std::max(2, std::min(48, int(300e6 / bytes) + 1)); }

/// A layer's data several times over.
struct BenchLayer {
    int n, k, g, bits, copies; size_t weight_units, scale_count; Buffer<U4> weights; Buffer<u16> scales, minima;
    BenchLayer(int n, int k, int g, int bits, int copies_wanted = 0)
        : n(n), k(k), g(g), bits(bits), copies(copies_wanted ? copies_wanted : copies_for(double(n) * k * bits / 8)), weight_units(size_t(n) * k * bits / 128), scale_count(size_t(n) * ((k + 511) / 512) * (512 / g)),
          weights(random_buffer<U4>(weight_units * copies)), scales(random_scales(scale_count * copies)), minima(random_scales(scale_count * copies)) {}
    IntegerLayer integer(int i) const { return {weights.data() + weight_units * i, scales.data() + scale_count * i, minima.data() + scale_count * i, nullptr}; }
    Int4Layer int4(int i) const { return {weights.data() + weight_units * i, scales.data() + scale_count * i, nullptr}; }
    double bytes(int rows, double activation_bytes) const { return double(n) * k * bits / 8 + scale_count * 2.0 + rows * (k * activation_bytes + n * 4.0); }
};

static void bench_few() {
    struct Shape { int n, k; };
    std::vector<Shape> shapes = {{8192, 8192}, {4096, 4096}, {6144, 4096}, {28672, 4096}, {4096, 14336}};
    auto& kernels = bf16_kernels[2];
    for (auto s : shapes) {
        auto x = normal_buffer(size_t(128) * s.k);
        Buffer<U4> xb(size_t(128) * s.k / 8);
        LAUNCH(rows_to_bf16, dim3((s.k / 8 + 127) / 128, 128), dim3(128), 0, x.data(), xb.data(), 128, s.k);
        Buffer<float> out(size_t(128) * s.n);
        BenchLayer layer(s.n, s.k, 128, 4);
        char what[60];
        for (int overlap : {0, 1})
            for (int rows : {1, 2, 4, 8, 16, 32})
                for (int tiles : {1, 2})
                    for (int warps : {4, 8}) {
                        if (s.n != 8192 && rows != 1 && rows != 16) continue;
                        if (rows > 16 && tiles == 1) continue;
                        if (warps == 4 && rows > 16) continue;
                        int rt = (rows + 7) / 8;
                        Bf16Kernel kernel = rt <= 2 ? (tiles == 1 ? kernels.t1 : kernels.t2)[rt - 1] : kernels.rows32;
                        lab_overlap = overlap;
                        double us = time_us([&](int i) { LAUNCH(kernel, dim3(s.n / 16 / tiles), dim3(32 * warps), few_shared(s.k, rt, tiles), layer.int4(i), xb.data(), out.data(), rows, s.n, s.k); }, layer.copies, 15);
                        lab_overlap = false;
                        snprintf(what, sizeof what, "few, %d tiles, %d warps%s", tiles, warps, overlap ? ", overlapped" : "");
                        emit("w4a16_g128", what, rows, s.n, s.k, us, layer.bytes(rows, 2), 2.0 * rows * s.n * s.k);
                    }
        for (auto& kernels : integer_kernels) {
            if (kernels.g == 64 || (kernels.g == 128 && kernels.bits == 8)) continue;
            BenchLayer layer(s.n, s.k, kernels.g, kernels.bits);
            DeviceRows q(kernels, x, 16, s.k);
            for (int overlap : {0, 1})
                for (int tiles : {1, 2})
                    for (int rows : {1, 8, 16}) {
                        if (overlap && rows == 8) continue;
                        if (s.n != 8192 && tiles == 2) continue;
                        int rt = rows > 8 ? 2 : 1;
                        lab_overlap = overlap;
                        double us = time_us([&](int i) { LAUNCH((tiles == 1 ? kernels.t1 : kernels.t2)[rt - 1], dim3(s.n / 16 / tiles), dim3(few_threads(s.k)), few_shared(s.k, rt, tiles), q.through(layer.integer(i), out.data(), rows, s.n), (const LinearTask*)nullptr, (const u8*)nullptr, s.n, STORE); }, layer.copies, 15);
                        lab_overlap = false;
                        char name[40]; snprintf(name, sizeof name, "w%da8%s_g%d", kernels.bits, kernels.minimum ? "m" : "", kernels.g);
                        snprintf(what, sizeof what, "few, %d tiles%s", tiles, overlap ? ", overlapped" : "");
                        emit(name, what, rows, s.n, s.k, us, layer.bytes(rows, 1) + (kernels.minimum ? layer.scale_count * 2.0 : 0), 2.0 * rows * s.n * s.k);
                    }
        }
    }
}
static void bench_grouped() {
    const int blocks = 64, n = 4096, k = 4096;
    auto x = normal_buffer(size_t(8) * k * blocks);
    Buffer<float> out(size_t(blocks) * n);
    std::vector<float*> outs; for (int i = 0; i < blocks; i++) outs.push_back(out.data() + size_t(i) * n);
    Buffer<float*> outs_device(outs);
    {
        BenchLayer layer(n, k, 128, 4, blocks);
        Buffer<U4> xb(size_t(8) * k / 8 * blocks);
        std::vector<Int4Layer> layers; std::vector<const U4*> rows;
        for (int i = 0; i < blocks; i++) { layers.push_back(layer.int4(i)); rows.push_back(xb.data() + size_t(i) * k); }
        Buffer<Int4Layer> layers_device(layers); Buffer<const U4*> rows_device(rows);
        LAUNCH(rows_to_bf16, dim3((k / 8 + 127) / 128, 8 * blocks), dim3(128), 0, x.data(), xb.data(), 8 * blocks, k);
        for (int tiles : {1, 2})
            for (int warps : {4, 8}) {
                double us = time_us([&](int) { LAUNCH(bf16_kernels[2].grouped[tiles - 1], dim3(n / 16 / tiles, blocks), dim3(32 * warps), few_shared(k, 1, tiles), layers_device.data(), rows_device.data(), outs_device.data(), 1, n, k); }, 1, 200);
                char what[60]; snprintf(what, sizeof what, "grouped 64 x 1 row, %d tiles, %d warps", tiles, warps);
                emit("w4a16_g128", what, 1, n, k, us, blocks * layer.bytes(1, 2), 2.0 * blocks * n * k);
            }
        for (int overlap : {0, 1}) {
            lab_overlap = overlap;
            double us = time_us([&](int i) { LAUNCH(linear_w4a16_g128_rows1_t1, dim3(n / 16), dim3(256), few_shared(k, 1, 1), layer.int4(i), xb.data(), out.data(), 1, n, k); }, blocks, 10);
            lab_overlap = false;
            emit("w4a16_g128", overlap ? "64 launches x 1 row, each, overlapped" : "64 launches x 1 row, each", 1, n, k, us, layer.bytes(1, 2), 2.0 * n * k);
        }
    }
    {
        auto& kernels = integer_kernels[0];
        BenchLayer layer(n, k, 32, 4, blocks);
        DeviceRows q(kernels, x, 8 * blocks, k);
        std::vector<LinearTask> tasks;
        for (int i = 0; i < blocks; i++) tasks.push_back(q.through(layer.integer(i), outs[i], 1, n, i));
        Buffer<LinearTask> tasks_device(tasks);
        double us = time_us([&](int) { LAUNCH(kernels.t1[0], dim3(n / 16, blocks), dim3(256), few_shared(k, 1, 1), tasks[0], tasks_device.data(), (const u8*)nullptr, n, STORE); }, 1, 200);
        emit("w4a8_g32", "grouped 64 x 1 row", 1, n, k, us, blocks * layer.bytes(1, 1), 2.0 * blocks * n * k);
    }
}
static void bench_many() {
    struct Shape { int n, k; };
    std::vector<Shape> shapes = {{8192, 8192}, {4096, 4096}};
    for (auto s : shapes) {
        const int most = 4224;
        auto x = normal_buffer(size_t(most) * s.k);
        Buffer<float> out(size_t(most) * s.n);
        BenchLayer layer(s.n, s.k, 128, 4), layer32(s.n, s.k, 32, 4), layer8(s.n, s.k, 32, 8, 4);
        Buffer<U4> xb(size_t(most) * s.k / 8), xw64(size_t(most) * s.k / 8), xw128(size_t(most) * s.k / 8);
        LAUNCH(rows_to_bf16, dim3((s.k / 8 + 127) / 128, most), dim3(128), 0, x.data(), xb.data(), most, s.k);
        LAUNCH(rows_to_bf16_wgmma, dim3((s.k / 8 + 127) / 128, most), dim3(128), 0, x.data(), (u32*)xw64.data(), most, s.k, 64);
        LAUNCH(rows_to_bf16_wgmma, dim3((s.k / 8 + 127) / 128, most), dim3(128), 0, x.data(), (u32*)xw128.data(), most, s.k, 128);
        DeviceRows q32(integer_kernels[0], x, most, s.k), q128(integer_kernels[6], x, most, s.k);
        Buffer<u8> w32(size_t(most) * s.k), w128(size_t(most) * s.k); Buffer<float> w32s(size_t(most) * s.k / 32), w128s(size_t(most) * s.k / 128), sums(size_t(most) * s.k / 32);
        LAUNCH(integer_kernels[0].quantise_wgmma, dim3(s.k / 32 / 8, most), dim3(256), 0, x.data(), w32.data(), w32s.data(), sums.data(), most, s.k);
        LAUNCH(integer_kernels[6].quantise_wgmma, dim3((s.k / 128 + 7) / 8, most), dim3(256), 0, x.data(), w128.data(), w128s.data(), sums.data(), most, s.k);
        for (int rows : {16, 32, 64, 128, 256, 512, 1024, 2048, 4096}) {
            if (s.n == 4096 && rows != 64 && rows != 1024 && rows != 4096) continue;
            double work = 2.0 * rows * s.n * s.k, guess = std::max(20.0, work / 300e6);
            dim3 grid((s.n + 127) / 128, (rows + 127) / 128);
            emit("w4a16_g128", "mma.sync", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_w4a16_g128_many, grid, dim3(256), many_bf16_shared(128), layer.int4(i), xb.data(), out.data(), rows, s.n, s.k); }, layer.copies, guess), layer.bytes(rows, 2), work);
            emit("w4a16_g128", "wgmma64", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_w4a16_g128_wgmma64, dim3((rows + 63) / 64, s.n / 128), dim3(256), wgmma_shared_bytes<64, 8>(), layer.int4(i), (const u8*)xw64.data(), out.data(), rows, s.n, s.k); }, layer.copies, guess), layer.bytes(rows, 2), work);
            emit("w4a16_g128", "wgmma128", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_w4a16_g128_wgmma128, dim3((rows + 127) / 128, s.n / 128), dim3(256), wgmma_shared_bytes<128, 8>(), layer.int4(i), (const u8*)xw128.data(), out.data(), rows, s.n, s.k); }, layer.copies, guess), layer.bytes(rows, 2), work);
            emit("w4a8_g32", "wgmma", rows, s.n, s.k, time_us([&](int i) { LAUNCH(integer_kernels[0].wgmma, dim3((rows + 127) / 128, s.n / 128), dim3(256), wgmma_integer_shared(32), layer32.integer(i), w32.data(), w32s.data(), out.data(), rows, s.n, s.k); }, layer32.copies, guess), layer32.bytes(rows, 1), work);
            emit("w4a8_g128", "wgmma", rows, s.n, s.k, time_us([&](int i) { LAUNCH(integer_kernels[6].wgmma, dim3((rows + 127) / 128, s.n / 128), dim3(256), wgmma_integer_shared(128), layer.integer(i), w128.data(), w128s.data(), out.data(), rows, s.n, s.k); }, layer.copies, guess), layer.bytes(rows, 1), work);
            emit("w8a8_g32", "wgmma", rows, s.n, s.k, time_us([&](int i) { LAUNCH(integer_kernels[2].wgmma, dim3((rows + 127) / 128, s.n / 128), dim3(256), wgmma_integer_shared(32), layer8.integer(i), w32.data(), w32s.data(), out.data(), rows, s.n, s.k); }, layer8.copies, guess), layer8.bytes(rows, 1), work);
            emit("w4a8_g32", "many", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_4s_g32_many, grid, dim3(256), many_integer_shared(4, false, 32), q32.through(layer32.integer(i), out.data(), rows, s.n), (const u8*)nullptr, s.n, STORE); }, layer32.copies, guess), layer32.bytes(rows, 1), work);
            emit("w4a8_g128", "many", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_4s_g128_many, grid, dim3(256), many_integer_shared(4, false, 128), q128.through(layer.integer(i), out.data(), rows, s.n), (const u8*)nullptr, s.n, STORE); }, layer.copies, guess), layer.bytes(rows, 1), work);
            emit("w8a8_g32", "many", rows, s.n, s.k, time_us([&](int i) { LAUNCH(linear_8s_g32_many, grid, dim3(256), many_integer_shared(8, false, 32), q32.through(layer8.integer(i), out.data(), rows, s.n), (const u8*)nullptr, s.n, STORE); }, layer8.copies, guess), layer8.bytes(rows, 1), work);
        }
    }
}
static void bench_decode() {
    const int kv_heads = 8, d = 128, h = 4;
    for (int context : {1024, 4096})
        for (int batch : {1, 4, 16, 32, 64}) {
            int pages = context / 16, slots = pages * batch, segments = context / 64;
            double bytes = 4.0 * d * kv_heads * double(context) * batch;
            int copies = copies_for(bytes);
            auto keys = random_bf16(size_t(slots) * copies * kv_heads * 16 * d), values = random_bf16(size_t(slots) * copies * kv_heads * 16 * d);
            auto q = normal_buffer(size_t(batch) * kv_heads * h * d);
            std::vector<u32> tables; std::vector<int> positions(batch, context - 1);
            for (int c = 0; c < copies; c++) {
                std::vector<u32> order; for (int i = 0; i < slots; i++) order.push_back(u32(c * slots + i));
                Random r(c + 1); for (int i = slots; i > 1; i--) std::swap(order[i - 1], order[r.next() % i]);
                tables.insert(tables.end(), order.begin(), order.end());
            }
            Buffer<u32> tables_device(tables); Buffer<int> at(positions); Buffer<float> out(size_t(batch) * kv_heads * h * d), partial(size_t(batch) * kv_heads * segments * h * (d + 2));
            DecodeShape shape = {kv_heads, pages, 0, 0.08838834764f, 0.0f, 4};
            double work = 4.0 * d * h * kv_heads * double(context) * batch;
            for (auto& kernels : decode_kernels) {
                if (kernels.d != 128 || kernels.h != 4) continue;
                double us = time_us([&](int i) { LAUNCH(kernels.whole, dim3(kv_heads, batch), dim3(32 * kernels.w), kernels.shared, q.data(), keys.data(), values.data(), tables_device.data() + size_t(i) * slots, at.data(), out.data(), shape); }, copies, bytes / 2e6 + 10);
                char name[40]; snprintf(name, sizeof name, "whole, %d warps", kernels.w);
                emit("decode_d128_h4", name, batch, context, kv_heads, us, bytes, work);
                if (!kernels.split) continue;
                for (int each : {4, 8, 16, 32}) {
                    if (each > segments) continue;
                    shape.segments_each = each;
                    us = time_us([&](int i) {
                        LAUNCH(kernels.split, dim3(kv_heads, batch, (segments + each - 1) / each), dim3(32 * kernels.w), kernels.shared, q.data(), keys.data(), values.data(), tables_device.data() + size_t(i) * slots, at.data(), partial.data(), shape);
                        LAUNCH(kernels.merge, dim3(kv_heads * h, batch), dim3(d), 0, partial.data(), at.data(), out.data(), shape);
                    }, copies, bytes / 2e6 + 10);
                    snprintf(name, sizeof name, "splits of %d segments", each);
                    emit("decode_d128_h4", name, batch, context, kv_heads, us, bytes, work);
                }
            }
        }
}

__global__ void __launch_bounds__(256) read_all(const U4* from, size_t units, u32* out) {
    u64 policy = evict_first(); u32 sum = 0;
    size_t stride = (size_t)gridDim.x * 256;
    for (size_t i = (size_t)blockIdx.x * 256 + threadIdx.x; i < units; i += stride * 4) {
        U4 v[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) if (i + j * stride < units) v[j] = load_stream(from + i + j * stride, policy);
#pragma unroll
        for (int j = 0; j < 4; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x12345678) out[0] = sum;
}
static void bench_ceilings() {
    size_t bytes = size_t(4) << 30;
    auto a = random_buffer<U4>(bytes / 16); Buffer<U4> b(bytes / 16); Buffer<u32> out(4);
    double us = time_us([&](int) { CHECK(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice, lab_stream)); }, 1, 1000);
    emit("copy", "device to device, read plus written", 0, 0, 0, us, 2.0 * bytes, 0);
    us = time_us([&](int) { LAUNCH(read_all, dim3(132 * 8), dim3(256), 0, a.data(), bytes / 16, out.data()); }, 1, 1000);
    emit("read", "all of 4 GiB", 0, 0, 0, us, double(bytes), 0);
    size_t part = size_t(34) << 20;
    us = time_us([&](int i) { LAUNCH(read_all, dim3(132 * 8), dim3(256), 0, a.data() + size_t(i) * part / 16, part / 16, out.data()); }, 16, 15);
    emit("read", "34 MiB a launch", 0, 0, 0, us, double(part), 0);
    us = time_us([&](int) { LAUNCH(read_all, dim3(132), dim3(256), 0, a.data(), 0, out.data()); }, 1, 3);
    emit("launch", "nothing, in a graph", 0, 0, 0, us, 0, 0);
}

static int check(bool quick) {
    for (auto& kernels : integer_kernels) {
        if (quick && !(kernels.g == 32 || (kernels.g == 128 && kernels.bits == 4))) continue;
        check_quantise(kernels, 9, quick ? 576 : 4096 + 64);
        if (quick) { check_integer(kernels, 48, 576, {1, 11, 70}); check_integer(kernels, 48, 1024, {2}); continue; }
        check_integer(kernels, 1040, 4096, {1, 2, 8, 9, 16, 17, 64, 65, 200});
        check_integer(kernels, 200, 576, {1, 3, 16, 130});
        if (kernels.g == 32) check_integer(kernels, 512, 14336, {1, 16, 257});
    }
    for (auto& kernels : decode_kernels) {
        check_decode(kernels, 2, 0, 0.0f, {0, 15, 16, 64, 401});
        check_decode(kernels, 1, 100, 20.0f, {63, 99, 100, 300});
        if (!quick) check_decode(kernels, 8, 0, 0.0f, {4095, 17, 1000, 2049, 640, 511, 512, 513});
    }
    for (auto& kernels : bf16_kernels) {
        check_bf16(kernels, 48, 576, {1, 11, 70}, true);
        check_bf16(kernels, 48, 1024, {2, 40}, true);
        if (quick) continue;
        check_bf16(kernels, 1040, 4096, {1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 129, 300}, false);
        check_bf16(kernels, 256, 14336, {1, 16, 200}, false);
        check_bf16(kernels, 200, 1088, {5, 140}, false);
    }
    printf("%s: %d checks, %d failed\n", quick ? "quick" : "check", tally.checks, tally.failed);
    return tally.failed != 0;
}

/// One launch of each on the shapes of the bench, for ncu.
static void profile() {
    const int n = 8192, k = 8192, rows = 1024;
    auto x = normal_buffer(size_t(rows) * k);
    Buffer<float> out(size_t(rows) * n);
    BenchLayer layer(n, k, 128, 4, 2), layer32(n, k, 32, 4, 2);
    Buffer<U4> xb(size_t(rows) * k / 8), xw(size_t(rows) * k / 8);
    LAUNCH(rows_to_bf16, dim3((k / 8 + 127) / 128, rows), dim3(128), 0, x.data(), xb.data(), rows, k);
    LAUNCH(rows_to_bf16_wgmma, dim3((k / 8 + 127) / 128, rows), dim3(128), 0, x.data(), (u32*)xw.data(), rows, k, 128);
    DeviceRows q32(integer_kernels[0], x, rows, k);
    LAUNCH(linear_w4a16_g128_rows1_t2, dim3(n / 32), dim3(256), few_shared(k, 1, 2), layer.int4(0), xb.data(), out.data(), 1, n, k);
    LAUNCH(linear_w4a16_g128_rows2_t2, dim3(n / 32), dim3(256), few_shared(k, 2, 2), layer.int4(1), xb.data(), out.data(), 16, n, k);
    LAUNCH(linear_4s_g32_rows1_t1, dim3(n / 16), dim3(256), few_shared(k, 1, 1), q32.through(layer32.integer(0), out.data(), 1, n), (const LinearTask*)nullptr, (const u8*)nullptr, n, STORE);
    LAUNCH(linear_w4a16_g128_many, dim3(n / 128, rows / 128), dim3(256), many_bf16_shared(128), layer.int4(0), xb.data(), out.data(), rows, n, k);
    LAUNCH(linear_w4a16_g128_wgmma128, dim3(rows / 128, n / 128), dim3(256), wgmma_shared_bytes<128, 8>(), layer.int4(0), (const u8*)xw.data(), out.data(), rows, n, k);
    Buffer<u8> w32(size_t(rows) * k); Buffer<float> w32s(size_t(rows) * k / 32), sums(size_t(rows) * k / 32);
    LAUNCH(integer_kernels[0].quantise_wgmma, dim3(k / 32 / 8, rows), dim3(256), 0, x.data(), w32.data(), w32s.data(), sums.data(), rows, k);
    LAUNCH(linear_4s_g32_wgmma, dim3(rows / 128, n / 128), dim3(256), wgmma_integer_shared(32), layer32.integer(0), w32.data(), w32s.data(), out.data(), rows, n, k);
    LAUNCH(linear_4s_g32_many, dim3(n / 128, rows / 128), dim3(256), many_integer_shared(4, false, 32), q32.through(layer32.integer(0), out.data(), rows, n), (const u8*)nullptr, n, STORE);
    const int batch = 32, context = 4096, slots = batch * context / 16;
    auto keys = random_bf16(size_t(slots) * 8 * 16 * 128), values = random_bf16(size_t(slots) * 8 * 16 * 128);
    auto q = normal_buffer(size_t(batch) * 32 * 128);
    std::vector<u32> tables; for (int i = 0; i < slots; i++) tables.push_back(u32(i * 7919ll % slots));
    Buffer<u32> tables_device(tables); Buffer<int> at(std::vector<int>(batch, context - 1));
    DecodeShape shape = {8, context / 16, 0, 0.0883883f, 0.0f, 4};
    LAUNCH(decode_d128_h4_w6, dim3(8, batch), dim3(192), decode_kernels[2].shared, q.data(), keys.data(), values.data(), tables_device.data(), at.data(), out.data(), shape);
    finish();
}

int main(int count, char** args) {
    std::string mode = count > 1 ? args[1] : "check";
    if (mode == "check" || mode == "quick") return check(mode == "quick");
    if (mode == "profile") { profile(); return 0; }
    results = fopen(args[2], "w");
    double begin = seconds();
    bench_ceilings(); bench_few(); bench_grouped(); bench_decode(); bench_many();
    printf("bench: %.1f s\n", seconds() - begin);
    fclose(results);
    return 0;
}
