// Random layers, their packing into the kernels' layouts, and the slow truth (docs/numerics.md rule 3) on the host.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>
#include "../tensor_core.h"

struct Random {
    uint64_t s;
    explicit Random(uint64_t seed) : s(seed) {}
    uint32_t next() { s += 0x9e3779b97f4a7c15ull; uint64_t z = s; z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull; z = (z ^ (z >> 27)) * 0x94d049bb133111ebull; return uint32_t((z ^ (z >> 31)) >> 16); }
    float uniform() { return float(next() % 16777216) / 8388608.0f - 1.0f; }
    float normal() { float x = 0; for (int i = 0; i < 4; i++) x += uniform(); return x; }
};

inline float half_value(uint16_t h) { _Float16 v; memcpy(&v, &h, 2); return float(v); }
inline uint16_t half_bits(float f) { _Float16 v = _Float16(f); uint16_t h; memcpy(&h, &v, 2); return h; }
inline float round_bf16(float f) { uint32_t u; memcpy(&u, &f, 4); u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u; memcpy(&f, &u, 4); return f; }
inline uint16_t bf16_bits(float f) { f = round_bf16(f); uint32_t u; memcpy(&u, &f, 4); return uint16_t(u >> 16); }

template <class F> void in_parallel(int n, F f) {
    int threads = std::min<int>(n, std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> all;
    for (int i = 0; i < threads; i++) all.emplace_back([=] { for (int j = i; j < n; j += threads) f(j); });
    for (auto& t : all) t.join();
}

/// A layer `[n][k]` of codes with a scale (and a minimum) for each group of g.
struct Layer {
    int n, k, g, bits; bool minimum;
    std::vector<int8_t> codes; std::vector<uint16_t> scale, low; std::vector<float> bias;
    int groups() const { return (k + g - 1) / g; }
    int padded() const { return (k + 63) / 64 * 64; }
    int slices() const { return (k + 511) / 512; }
    int tiles() const { return (n + 15) / 16; }
    int code(int row, int at) const { return row < n && at < k ? codes[size_t(row) * k + at] : 0; }
};
/// `simple`: scales are powers of two and codes small, so that sums are exact in f32.
inline Layer random_layer(int n, int k, int g, int bits, bool minimum, uint64_t seed, bool simple = false) {
    Layer l{n, k, g, bits, minimum, {}, {}, {}, {}};
    Random r(seed);
    l.codes.resize(size_t(n) * k);
    for (auto& c : l.codes) { uint32_t v = r.next(); c = bits == 8 ? int8_t(v % 5 == 0 ? (v & 32 ? -128 : 127) : v >> 8) : int8_t(minimum ? v % 16 : int(v % 16) - 8); }
    for (int i = 0; i < n * l.groups(); i++) {
        l.scale.push_back(simple ? half_bits(std::ldexp(1.0f, int(r.next() % 3) - 4)) : half_bits(0.01f * (r.uniform() + 0.1f)));
        if (minimum) l.low.push_back(half_bits(0.05f * r.uniform()));
    }
    for (int i = 0; i < n; i++) l.bias.push_back(simple ? float(int(r.next() % 17) - 8) : r.uniform());
    return l;
}
inline std::vector<float> random_rows(int rows, int k, uint64_t seed, bool simple = false) {
    Random r(seed); std::vector<float> x(size_t(rows) * k);
    for (auto& v : x) v = simple ? float(int(r.next() % 17) - 8) / 8 : r.normal();
    if (!simple && rows > 1) for (int i = 0; i < std::min(k, 32); i++) x[size_t(k) + i] = 0.0f; // a group of nothing
    if (!simple) x[0] = 200.0f;
    return x;
}

struct Packed { std::vector<U4> weights; std::vector<uint16_t> scales, minima; };
inline Packed pack(const Layer& l) {
    Packed p; int chunk = l.bits == 4 ? 64 : 32;
    for (int tile = 0; tile < l.tiles(); tile++)
        for (int c = 0; c < l.padded() / chunk; c++)
            for (int lane = 0; lane < 32; lane++) {
                uint32_t word[4];
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    int row = tile * 16 + g + i % 2 * 8; uint32_t v = 0;
                    if (l.bits == 4)
                        for (int j = 0; j < 8; j++) v |= uint32_t(l.code(row, c * 64 + i / 2 * 32 + 8 * t + j) & 15) << (j % 4 * 8 + j / 4 * 4);
                    else
                        for (int j = 0; j < 4; j++) v |= uint32_t(uint8_t(l.code(row, c * 32 + 8 * t + i / 2 * 4 + j))) << (8 * j);
                    word[i] = v;
                }
                p.weights.push_back({word[0], word[1], word[2], word[3]});
            }
    for (int tile = 0; tile < l.tiles(); tile++)
        for (int s = 0; s < l.slices(); s++)
            for (int row = tile * 16; row < tile * 16 + 16; row++)
                for (int j = 0; j < 512 / l.g; j++) {
                    int group = s * (512 / l.g) + j; bool real = row < l.n && group < l.groups();
                    p.scales.push_back(real ? l.scale[size_t(row) * l.groups() + group] : 0);
                    p.minima.push_back(real && l.minimum ? l.low[size_t(row) * l.groups() + group] : 0);
                }
    return p;
}

struct Quantised { std::vector<int8_t> codes; std::vector<float> scales, sums; };
inline Quantised quantise_row(const float* x, int k, int g) {
    Quantised q;
    for (int at = 0; at < k; at += g) {
        float amax = 0; int sum = 0, end = std::min(k, at + g);
        for (int i = at; i < end; i++) amax = std::max(amax, std::fabs(x[i]));
        float inverse = 127.0f / amax; bool zero = !(inverse < INFINITY);
        for (int i = at; i < end; i++) { int c = zero ? 0 : int(std::min(127.0f, std::max(-127.0f, rintf(x[i] * inverse)))); q.codes.push_back(int8_t(c)); sum += c; }
        q.scales.push_back(zero ? 0.0f : amax / 127.0f); q.sums.push_back(float(sum));
    }
    return q;
}
/// The truth of the integer path, bit for bit.
inline std::vector<float> integer_reference(const Layer& l, const std::vector<float>& x, int rows) {
    std::vector<float> out(size_t(rows) * l.n);
    in_parallel(rows, [&](int row) {
        Quantised q = quantise_row(&x[size_t(row) * l.k], l.k, l.g);
        for (int n = 0; n < l.n; n++) {
            float total = 0;
            for (int s = 0; s < l.k; s += 512) {
                float acc = 0;
                for (int at = s; at < std::min(l.k, s + 512); at += l.g) {
                    int isum = 0, group = at / l.g;
                    for (int i = at; i < std::min(l.k, at + l.g); i++) isum += int(q.codes[i]) * int(l.codes[size_t(n) * l.k + i]);
                    acc = fmaf(float(isum), q.scales[group] * half_value(l.scale[size_t(n) * l.groups() + group]), acc);
                    if (l.minimum) acc = fmaf(q.sums[group], q.scales[group] * half_value(l.low[size_t(n) * l.groups() + group]), acc);
                }
                total = s == 0 ? acc : total + acc;
            }
            out[size_t(row) * l.n + n] = total + l.bias[n];
        }
    });
    return out;
}
/// The W4A16 path in double: rows rounded to bf16, everything else exact.
inline std::vector<double> bf16_reference(const Layer& l, const std::vector<float>& x, int rows) {
    std::vector<double> out(size_t(rows) * l.n);
    in_parallel(rows, [&](int row) {
        std::vector<double> v(l.k);
        for (int i = 0; i < l.k; i++) v[i] = round_bf16(x[size_t(row) * l.k + i]);
        for (int n = 0; n < l.n; n++) {
            double total = l.bias[n];
            for (int group = 0; group < l.groups(); group++) {
                double sum = 0;
                for (int i = group * l.g; i < std::min(l.k, (group + 1) * l.g); i++) sum += v[i] * l.codes[size_t(n) * l.k + i];
                total += sum * half_value(l.scale[size_t(n) * l.groups() + group]);
            }
            out[size_t(row) * l.n + n] = total;
        }
    });
    return out;
}
/// The W4A16 path to the last bit: the order that linear_bf16.cu states, on the tensor core's own arithmetic.
inline std::vector<float> bf16_class_reference(const Layer& l, const std::vector<float>& x, int rows) {
    std::vector<float> out(size_t(rows) * l.n);
    in_parallel(rows, [&](int row) {
        int padded = l.padded(); std::vector<float> v(padded), w(padded);
        // Position p of product q of 32 k: lane t's k = 8 t + q + {0, 2, 4, 6}.
        auto at = [](int p) { int block = p / 32, q = p / 16 % 2, i = p % 16; return block * 32 + 8 * (i % 8 / 2) + q + 2 * (i % 2) + 4 * (i / 8); };
        for (int p = 0; p < padded; p++) v[p] = at(p) < l.k ? round_bf16(x[size_t(row) * l.k + at(p)]) : 0.0f;
        for (int n = 0; n < l.n; n++) {
            for (int p = 0; p < padded; p++) w[p] = float(l.code(n, at(p)));
            float total = 0;
            for (int s = 0; s < padded; s += 512) {
                float acc = 0;
                for (int group = s; group < std::min(padded, s + 512); group += l.g) {
                    float sum = 0;
                    for (int p = group; p < std::min(padded, group + l.g); p += 16) sum = tensor_core_dot16(&w[p], &v[p], sum);
                    acc = fmaf(sum, group / l.g < l.groups() ? half_value(l.scale[size_t(n) * l.groups() + group / l.g]) : 0.0f, acc);
                }
                total = s == 0 ? acc : total + acc;
            }
            out[size_t(row) * l.n + n] = total + l.bias[n];
        }
    });
    return out;
}
