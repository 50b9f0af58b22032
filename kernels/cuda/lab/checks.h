// Each kernel against the host's truth, outputs poisoned first. One source for the card and for emulation; shapes are the caller's.
#pragma once
#include "problems.h"

struct Tally { int checks = 0, failed = 0; };
inline Tally tally;
inline void report(bool good, const char* name, const char* detail) {
    tally.checks++;
    if (!good) tally.failed++;
    if (!good || getenv("LAB_VERBOSE")) printf("%s %s: %s\n", good ? "ok  " : "FAIL", name, detail);
}
inline void compare_bits(const char* name, const std::vector<float>& got, const std::vector<float>& want, int n) {
    size_t wrong = 0, first = 0;
    for (size_t i = 0; i < want.size(); i++) if (memcmp(&got[i], &want[i], 4)) { if (!wrong) first = i; wrong++; }
    char text[160];
    if (wrong) snprintf(text, sizeof text, "%zu of %zu differ, first [%zu][%zu]: %.9g, wanted %.9g", wrong, want.size(), first / n, first % n, got[first], want[first]);
    else snprintf(text, sizeof text, "%zu outputs equal", want.size());
    report(wrong == 0, name, text);
}

// ---- integer ----

struct IntegerSetup {
    Layer layer; Packed packed; Buffer<U4> weights; Buffer<u16> scales, minima; Buffer<float> bias;
    explicit IntegerSetup(Layer l) : layer(std::move(l)), packed(pack(layer)), weights(packed.weights), scales(packed.scales), minima(packed.minima), bias(layer.bias) {}
    IntegerLayer view() const { return {weights.data(), scales.data(), minima.data(), bias.data()}; }
};
typedef void (*FewKernel)(LinearTask, const LinearTask*, const u8*, int, int);
typedef void (*ManyKernel)(LinearTask, const u8*, int, int);
typedef void (*Quantise)(const float*, u8*, float*, float*, int, int);
typedef void (*WgmmaInteger)(IntegerLayer, const u8*, const float*, float*, int, int, int);
struct IntegerKernels { int bits; bool minimum; int g; FewKernel any[2], t1[2], t2[2]; ManyKernel many; Quantise quantise; WgmmaInteger wgmma; Quantise quantise_wgmma; };
#ifdef CUDA_SHIM
#define WGMMA(NAME) nullptr
#else
#define WGMMA(NAME) NAME
#define linear_4m_g32_wgmma nullptr
#define linear_4m_g64_wgmma nullptr
#define linear_4m_g128_wgmma nullptr
#endif
#define INTEGER_KERNELS(NAME, BITS, MINIMUM, G) \
    {BITS, MINIMUM, G, {NAME##_g##G##_rows1_any, NAME##_g##G##_rows2_any}, {NAME##_g##G##_rows1_t1, NAME##_g##G##_rows2_t1}, {NAME##_g##G##_rows1_t2, NAME##_g##G##_rows2_t2}, \
     NAME##_g##G##_many, quantise_g##G, WGMMA(NAME##_g##G##_wgmma), quantise_g##G##_wgmma128}
static const IntegerKernels integer_kernels[] = {
    INTEGER_KERNELS(linear_4s, 4, false, 32), INTEGER_KERNELS(linear_4m, 4, true, 32), INTEGER_KERNELS(linear_8s, 8, false, 32),
    INTEGER_KERNELS(linear_4s, 4, false, 64), INTEGER_KERNELS(linear_4m, 4, true, 64), INTEGER_KERNELS(linear_8s, 8, false, 64),
    INTEGER_KERNELS(linear_4s, 4, false, 128), INTEGER_KERNELS(linear_4m, 4, true, 128), INTEGER_KERNELS(linear_8s, 8, false, 128),
};
constexpr int MANY_BLOCK = 128; // rows of a cta of the many-row kernels: 16 RT
inline size_t few_shared(int k, int row_tiles, int tiles) { return size_t((k + 511) / 512) * row_tiles * tiles * 512; }
inline int few_threads(int k) { int slices = (k + 511) / 512; return 32 * (slices < 8 ? slices : 8); }
inline size_t many_integer_shared(int bits, bool minimum, int g) { return integer_many_shared_bytes(bits, minimum, g, MANY_ROW_TILES, 4); }
#ifdef CUDA_SHIM
inline size_t wgmma_integer_shared(int) { return 0; }
#else
inline size_t wgmma_integer_shared(int g) { return g == 32 ? integer_wgmma_shared_bytes<128, 32, 8>() : g == 64 ? integer_wgmma_shared_bytes<128, 64, 8>() : integer_wgmma_shared_bytes<128, 128, 4>(); }
#endif
inline size_t many_bf16_shared(int g) { return bf16_many_shared_bytes<8, 4>(g); }

/// Quantises on the device; rows padded to whole ctas.
struct DeviceRows {
    int rows, padded_rows, k; Buffer<u8> xq; Buffer<float> xs, xa;
    DeviceRows(const IntegerKernels& kernels, const Buffer<float>& x, int rows, int k)
        : rows(rows), padded_rows((rows + MANY_BLOCK - 1) / MANY_BLOCK * MANY_BLOCK), k(k), xq(size_t(padded_rows) * ((k + 63) / 64 * 64)),
          xs(size_t(padded_rows) * ((k + kernels.g - 1) / kernels.g)), xa(size_t(padded_rows) * ((k + kernels.g - 1) / kernels.g)) {
        int padded = (k + 63) / 64 * 64;
        LAUNCH(kernels.quantise, dim3(((padded + kernels.g - 1) / kernels.g + 7) / 8, padded_rows), dim3(256), 0, x.data(), xq.data(), xs.data(), xa.data(), rows, k);
    }
    /// So many rows from a tile of eight on, through a layer; the launch's base is null.
    LinearTask through(const IntegerLayer& layer, float* out, int rows, int n, int tile = 0) const {
        size_t groups = xs.count / padded_rows, padded = xq.count / padded_rows;
        return {layer.weights, layer.scales, layer.minima, layer.bias, (u64)(xq.data() + tile * 8 * padded), (u64)(xs.data() + tile * 8 * groups), (u64)(xa.data() + tile * 8 * groups), out, rows, n, k, 0};
    }
};

inline void check_quantise(const IntegerKernels& kernels, int rows, int k) {
    auto x = random_rows(rows, k, 77 + k);
    Buffer<float> device(x);
    DeviceRows q(kernels, device, rows, k);
    finish();
    auto codes = q.xq.read(); auto xs = q.xs.read(), xa = q.xa.read();
    int padded = (k + 63) / 64 * 64, groups = (k + kernels.g - 1) / kernels.g; size_t wrong = 0;
    for (int row = 0; row < q.padded_rows; row++) {
        Quantised want;
        if (row < rows) want = quantise_row(&x[size_t(row) * k], k, kernels.g);
        for (int at = 0; at < padded; at++) {
            size_t from = ((size_t(row / 8) * (padded / 64) + at / 64) * 32 + row % 8 * 4 + at % 32 / 8) * 16 + at % 64 / 32 * 8 + at % 8;
            wrong += int8_t(codes[from]) != (row < rows && at < k ? want.codes[at] : 0);
        }
        for (int g = 0; g < groups; g++) {
            size_t from = (size_t(row / 8) * groups + g) * 8 + row % 8;
            wrong += xs[from] != (row < rows ? want.scales[g] : 0) || xa[from] != (row < rows ? want.sums[g] : 0);
        }
    }
    char name[80], text[40]; snprintf(name, sizeof name, "quantise g%d %d x %d", kernels.g, rows, k); snprintf(text, sizeof text, "%zu wrong", wrong);
    report(wrong == 0, name, text);
}

/// All of a kind's kernels on one layer; `rows` for each form that takes so many.
inline void check_integer(const IntegerKernels& kernels, int n, int k, const std::vector<int>& row_counts) {
    IntegerSetup setup(random_layer(n, k, kernels.g, kernels.bits, kernels.minimum, 5 + n * 31 + k));
    int most = *std::max_element(row_counts.begin(), row_counts.end());
    auto x = random_rows(most, k, 9 + n + k);
    auto want = integer_reference(setup.layer, x, most);
    Buffer<float> device(x);
    for (int rows : row_counts) {
        DeviceRows q(kernels, device, rows, k);
        std::vector<float> expected(want.begin(), want.begin() + size_t(rows) * n);
        const char* names[] = {"any", "t1", "t2", "many", "wgmma"};
        for (int form = 0; form < 5; form++) {
            if (form == 4 && (!kernels.wgmma || k % 128)) continue;
            if (form < 3 && (rows > 16 || (form > 0 && k % 512))) continue;
            Buffer<float> out(size_t(rows) * n);
            int tiles = form == 2 ? 2 : 1, row_tiles = rows > 8 ? 2 : 1;
            if (form < 3) LAUNCH((form == 0 ? kernels.any : form == 1 ? kernels.t1 : kernels.t2)[row_tiles - 1], dim3((setup.layer.tiles() + tiles - 1) / tiles), dim3(few_threads(k)), few_shared(k, row_tiles, tiles), q.through(setup.view(), out.data(), rows, n), (const LinearTask*)nullptr, (const u8*)nullptr, n, STORE);
            else if (form == 4) {
                int blocks = (rows + 127) / 128;
                Buffer<u8> xq(size_t(blocks) * 128 * k); Buffer<float> xs(size_t(blocks) * 128 * k / kernels.g), xa(size_t(blocks) * 128 * k / kernels.g);
                LAUNCH(kernels.quantise_wgmma, dim3((k / kernels.g + 7) / 8, blocks * 128), dim3(256), 0, device.data(), xq.data(), xs.data(), xa.data(), rows, k);
                LAUNCH(kernels.wgmma, dim3(blocks, (n + 127) / 128), dim3(256), wgmma_integer_shared(kernels.g), setup.view(), xq.data(), xs.data(), out.data(), rows, n, k);
                finish();
            } else LAUNCH(kernels.many, dim3((n + 127) / 128, (rows + MANY_BLOCK - 1) / MANY_BLOCK), dim3(256), many_integer_shared(kernels.bits, kernels.minimum, kernels.g), q.through(setup.view(), out.data(), rows, n), (const u8*)nullptr, n, STORE);
            finish();
            char name[96]; snprintf(name, sizeof name, "w%da8%s g%d %s, %d rows %d x %d", kernels.bits, kernels.minimum ? " minimum" : "", kernels.g, names[form], rows, n, k);
            compare_bits(name, out.read(), expected, n);
        }
    }
}

// ---- W4A16 ----

typedef void (*Bf16Kernel)(Int4Layer, const U4*, float*, int, int, int);
struct Bf16Kernels { int g; Bf16Kernel any[2], t1[2], t2[2], many, rows32; void (*grouped[2])(const Int4Layer*, const U4* const*, float* const*, int, int, int); };
#define BF16_KERNELS(G) \
    {G, {linear_w4a16_g##G##_rows1_any, linear_w4a16_g##G##_rows2_any}, {linear_w4a16_g##G##_rows1_t1, linear_w4a16_g##G##_rows2_t1}, {linear_w4a16_g##G##_rows1_t2, linear_w4a16_g##G##_rows2_t2}, \
     linear_w4a16_g##G##_many, linear_w4a16_g##G##_rows4_t2, {linear_w4a16_g##G##_rows1_t1_grouped, linear_w4a16_g##G##_rows1_t2_grouped}}
static const Bf16Kernels bf16_kernels[] = {BF16_KERNELS(32), BF16_KERNELS(64), BF16_KERNELS(128)};

/// All forms equal the class's reference bit for bit; that one is near the double reference, or equal to it where `simple` makes sums exact.
inline void check_bf16(const Bf16Kernels& kernels, int n, int k, const std::vector<int>& row_counts, bool simple) {
    IntegerSetup setup(random_layer(n, k, kernels.g, 4, false, 15 + n * 31 + k, simple));
    Int4Layer layer{setup.weights.data(), setup.scales.data(), setup.bias.data()};
    int most = *std::max_element(row_counts.begin(), row_counts.end()), padded = (k + 63) / 64 * 64;
    auto x = random_rows(most, k, 19 + n + k, simple);
    auto want = bf16_reference(setup.layer, x, most);
    auto exact = bf16_class_reference(setup.layer, x, most);
    double error = 0, norm = 0; size_t unequal = 0;
    for (size_t i = 0; i < exact.size(); i++) { error += (exact[i] - want[i]) * (exact[i] - want[i]); norm += want[i] * want[i]; unequal += exact[i] != float(want[i]); }
    char text[80], title[80]; snprintf(title, sizeof title, "w4a16 g%d reference, %d x %d", kernels.g, n, k); snprintf(text, sizeof text, "relative error %.3g, %zu unequal", std::sqrt(error / norm), unequal);
    report(simple ? unequal == 0 : std::sqrt(error / norm) < 2e-6, title, text);
    Buffer<float> device(x);
    for (int rows : row_counts) {
        int padded_rows = (rows + 383) / 384 * 384;
        Buffer<U4> xb(size_t(padded_rows) * padded / 8);
        LAUNCH(rows_to_bf16, dim3((padded / 8 + 127) / 128, padded_rows), dim3(128), 0, device.data(), xb.data(), rows, k);
        std::vector<float> golden(exact.begin(), exact.begin() + size_t(rows) * n);
        for (int form = 0; form < 7; form++) {
            if (form < 3 && (rows > 16 || (form > 0 && k % 512))) continue;
            if (form == 6 && (rows > 32 || k % 512)) continue;
            Buffer<float> out(size_t(rows) * n);
            const char* names[] = {"any", "t1", "t2", "many", "wgmma64", "wgmma128", "32 rows t2"};
            int tiles = form == 2 ? 2 : 1, row_tiles = rows > 8 ? 2 : 1;
            if (form < 3) LAUNCH((form == 0 ? kernels.any : form == 1 ? kernels.t1 : kernels.t2)[row_tiles - 1], dim3((setup.layer.tiles() + tiles - 1) / tiles), dim3(few_threads(k)), few_shared(k, row_tiles, tiles), layer, xb.data(), out.data(), rows, n, k);
            else if (form == 3) LAUNCH(kernels.many, dim3((n + 127) / 128, (rows + MANY_BLOCK - 1) / MANY_BLOCK), dim3(256), many_bf16_shared(kernels.g), layer, xb.data(), out.data(), rows, n, k);
            else if (form == 6) {
                LAUNCH(kernels.rows32, dim3((setup.layer.tiles() + 1) / 2), dim3(few_threads(k)), few_shared(k, 4, 2), layer, xb.data(), out.data(), rows, n, k);
            } else {
#ifdef CUDA_SHIM
                continue;
#else
                if (kernels.g != 128) continue;
                int block = form == 4 ? 64 : 128;
                Buffer<u32> xw(size_t(padded_rows) * padded / 2);
                LAUNCH(rows_to_bf16_wgmma, dim3((padded / 8 + 127) / 128, padded_rows), dim3(128), 0, device.data(), xw.data(), rows, k, block);
                LAUNCH(form == 4 ? linear_w4a16_g128_wgmma64 : linear_w4a16_g128_wgmma128, dim3((rows + block - 1) / block, (n + 127) / 128), dim3(256), form == 4 ? wgmma_shared_bytes<64, 8>() : wgmma_shared_bytes<128, 8>(), layer, (const u8*)xw.data(), out.data(), rows, n, k);
                finish();
#endif
            }
            finish();
            auto got = out.read();
            char name[96]; snprintf(name, sizeof name, "w4a16 g%d %s, %d rows %d x %d", kernels.g, names[form], rows, n, k);
            compare_bits(name, got, golden, n);
        }
    }
}

// ---- attention ----

typedef void (*DecodeKernel)(const float*, const u16*, const u16*, const u32*, const int*, float*, DecodeShape);
struct DecodeKernels { int d, h, w; DecodeKernel whole; size_t shared; DecodeKernel split; void (*merge)(const float*, const int*, float*, DecodeShape); };
#define DECODE(D, H, W) {D, H, W, decode_d##D##_h##H##_w##W, decode_shared_bytes<D, H, W>(), nullptr, nullptr}
#define DECODE_SPLIT(D, H, W) {D, H, W, decode_d##D##_h##H##_w##W, decode_shared_bytes<D, H, W>(), decode_split_d##D##_h##H##_w##W, decode_merge_d##D##_h##H}
static const DecodeKernels decode_kernels[] = {DECODE_SPLIT(128, 4, 4), DECODE(128, 4, 5), DECODE(128, 4, 6), DECODE(128, 8, 4), DECODE_SPLIT(64, 3, 4)};

inline float host_exp(float x) {
    x = x < 89.0f ? x : 89.0f; x = x > -104.0f ? x : -104.0f;
    float n = rintf(x * 1.44269504088896340736f), r = fmaf(n, -0.6933594f, x); r = fmaf(n, 2.1219444e-4f, r);
    const float c[] = {1.9875691e-4f, 1.3981999e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f}; float p = c[0];
    for (int i = 1; i < 6; i++) p = fmaf(p, r, c[i]);
    p = fmaf(p, r * r, r) + 1.0f;
    int i = int(n), half = i >> 1;
    return p * std::ldexp(1.0f, half) * std::ldexp(1.0f, i - half);
}
inline float host_tanh(float x) {
    float t = std::fabs(x);
    if (t < 0.625f) { float z = x * x, p = -5.7049887e-3f; for (float c : {2.063909e-2f, -5.3739716e-2f, 1.3331442e-1f, -3.333328e-1f}) p = fmaf(p, z, c); return fmaf(p * z, x, x); }
    return std::copysign(1.0f - 2.0f / (host_exp(t + t) + 1.0f), x);
}

struct DecodeProblem {
    int kv_heads, h, d, window; float softcap; std::vector<int> positions; int pages_max, slots;
    std::vector<float> q; std::vector<u16> keys, values; std::vector<u32> tables;
    DecodeProblem(int kv_heads, int h, int d, int window, float softcap, std::vector<int> at, uint64_t seed) : kv_heads(kv_heads), h(h), d(d), window(window), softcap(softcap), positions(std::move(at)) {
        Random r(seed);
        pages_max = *std::max_element(positions.begin(), positions.end()) / 16 + 1; slots = int(positions.size()) * pages_max + 3;
        q.resize(positions.size() * kv_heads * h * d); for (auto& v : q) v = r.normal();
        keys.resize(size_t(slots) * kv_heads * 16 * d); values.resize(keys.size());
        for (auto& v : keys) v = bf16_bits(r.normal());
        for (auto& v : values) v = bf16_bits(r.normal());
        for (size_t i = 0; i < positions.size() * pages_max; i++) tables.push_back(u32((i * 7919 + 3) % slots));
        // Beyond a sequence's position pages hold what must not be read as numbers.
    }
    DecodeShape shape() const { return {kv_heads, pages_max, window, 0.08838834764f, softcap, 0}; }
    std::vector<float> reference() const {
        std::vector<float> out(q.size());
        in_parallel(int(positions.size()) * kv_heads * h, [&](int i) {
            int sequence = i / (kv_heads * h), kv = i / h % kv_heads, position = positions[sequence], first = window ? std::max(0, position + 1 - window) : 0;
            const float* query = &q[size_t(i) * d]; float* o = &out[size_t(i) * d];
            float m = -INFINITY, l = 0;
            auto row = [&](const std::vector<u16>& from, int t) { return &from[((size_t(tables[size_t(sequence) * pages_max + t / 16]) * kv_heads + kv) * 16 + t % 16) * d]; };
            auto value = [](u16 b) { uint32_t u = uint32_t(b) << 16; float f; memcpy(&f, &u, 4); return f; };
            for (int s = first / 64; s <= position / 64; s++) {
                int lo = std::max(s * 64, first), hi = std::min(s * 64 + 64, position + 1); float score[64], m_s = -INFINITY, lanes[16] = {}; std::vector<float> blend(d);
                for (int t = lo; t < hi; t++) {
                    float acc = 0; const u16* k = row(keys, t);
                    for (int j = 0; j < d; j++) acc = fmaf(query[j], value(k[j]), acc);
                    acc = acc * shape().scale; if (softcap > 0) acc = softcap * host_tanh(acc / softcap);
                    score[t - s * 64] = acc; m_s = std::max(m_s, acc);
                }
                for (int t = lo; t < hi; t++) {
                    float p = host_exp(score[t - s * 64] - m_s); lanes[t % 16] += p; const u16* v = row(values, t);
                    for (int j = 0; j < d; j++) blend[j] = fmaf(p, value(v[j]), blend[j]);
                }
                for (int half = 8; half; half /= 2) for (int j = 0; j < half; j++) lanes[j] = lanes[j] + lanes[j + half];
                float m_new = std::max(m, m_s), a = host_exp(m - m_new), b = host_exp(m_s - m_new);
                l = l * a + lanes[0] * b;
                for (int j = 0; j < d; j++) o[j] = fmaf(blend[j], b, o[j] * a);
                m = m_new;
            }
            for (int j = 0; j < d; j++) o[j] = o[j] / l;
        });
        return out;
    }
};
inline void check_decode(const DecodeKernels& kernels, int kv_heads, int window, float softcap, const std::vector<int>& positions) {
    DecodeProblem p(kv_heads, kernels.h, kernels.d, window, softcap, positions, 40 + window + positions.size());
    auto want = p.reference();
    Buffer<float> q(p.q), out(p.q.size()); Buffer<u16> keys(p.keys), values(p.values); Buffer<u32> tables(p.tables); Buffer<int> at(p.positions);
    DecodeShape shape = p.shape(); int sequences = int(positions.size()), segments = (p.pages_max + 3) / 4;
    char name[112]; snprintf(name, sizeof name, "decode d%d h%d w%d, %d sequences, window %d, cap %g", kernels.d, kernels.h, kernels.w, sequences, window, softcap);
    LAUNCH(kernels.whole, dim3(kv_heads, sequences), dim3(32 * kernels.w), kernels.shared, q.data(), keys.data(), values.data(), tables.data(), at.data(), out.data(), shape);
    finish();
    compare_bits(name, out.read(), want, kernels.d);
    if (!kernels.split) return;
    for (int each : {1, 3}) {
        shape.segments_each = each;
        Buffer<float> partial(size_t(sequences) * kv_heads * segments * kernels.h * (kernels.d + 2)), merged(p.q.size());
        LAUNCH(kernels.split, dim3(kv_heads, sequences, (segments + each - 1) / each), dim3(32 * kernels.w), kernels.shared, q.data(), keys.data(), values.data(), tables.data(), at.data(), partial.data(), shape);
        LAUNCH(kernels.merge, dim3(kv_heads * kernels.h, sequences), dim3(kernels.d), 0, partial.data(), at.data(), merged.data(), shape);
        finish();
        char split[128]; snprintf(split, sizeof split, "%s, splits of %d", name, each);
        compare_bits(split, merged.read(), want, kernels.d);
    }
}
