// Which arithmetic is the tensor core's? Reads the fragments that mma_bits left and counts, for each candidate, the outputs that it gives to
// the last bit. Runs without a card. Usage: fit_tensor_core SAMPLES.bin OUT.json
// A sample: A [16][16], B [8][16] bf16, C [16][8], D [16][8] f32; 1,200 of each kind.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

static float bf16(uint16_t b) { uint32_t u = uint32_t(b) << 16; float f; memcpy(&f, &u, 4); return f; }
static uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
/// Exponent as the field says it (subnormals at the least normal exponent), before the significand is normalised.
static int field(float f) { int e = int(bits(f) >> 23 & 255); return (e ? e : 1) - 127; }
/// Towards zero to f32.
static float towards_zero(double v) {
    float f = float(v);
    if (std::isinf(f) && !std::isinf(v)) return f; // beyond the largest: counted apart by its kind
    if (std::fabs(double(f)) > std::fabs(v)) f = std::nextafterf(f, 0.0f);
    return f;
}
/// One sum of `count` products and c: all cut to 2^(greatest exponent - bits), added exactly, result towards zero or to nearest.
static float aligned_sum(const float* a, const float* b, int count, float c, int fraction, bool nearest) {
    int greatest = -1000;
    for (int k = 0; k < count; k++) if (a[k] != 0 && b[k] != 0) greatest = std::max(greatest, field(a[k]) + field(b[k]));
    if (c != 0) greatest = std::max(greatest, field(c));
    if (greatest == -1000) return 0.0f;
    double sum = 0;
    for (int k = 0; k < count; k++) sum += std::trunc(std::ldexp(double(a[k]) * b[k], fraction - greatest));
    sum += std::trunc(std::ldexp(double(c), fraction - greatest));
    double v = std::ldexp(sum, greatest - fraction);
    return nearest ? float(v) : towards_zero(v);
}

int main(int count, char** args) {
    if (count < 3) return 2;
    FILE* in = fopen(args[1], "rb"); FILE* out = fopen(args[2], "w");
    const char* kinds[] = {"normal", "wide_exponents", "cancelling", "near_overflow", "subnormal"};
    std::vector<uint8_t> sample(1792);
    fprintf(out, "[");
    for (int kind = 0; kind < 5; kind++) {
        const int models = 3 + 5 * 3 * 2;
        long hits[models] = {}, total = 0; char names[models][80];
        for (int s = 0; s < 1200; s++) {
            if (fread(sample.data(), 1, 1792, in) != 1792) return 3;
            const uint16_t *a = (const uint16_t*)sample.data(), *b = a + 256; const float *c = (const float*)(sample.data() + 768), *d = c + 128;
            for (int i = 0; i < 16; i++)
                for (int j = 0; j < 8; j++) {
                    float x[16], y[16], want = d[i * 8 + j], start = c[i * 8 + j];
                    for (int k = 0; k < 16; k++) { x[k] = bf16(a[i * 16 + k]); y[k] = bf16(b[j * 16 + k]); }
                    float got[models]; int m = 0;
                    float up = start, down = start; double exact = 0;
                    for (int k = 0; k < 16; k++) { up = fmaf(x[k], y[k], up); down = fmaf(x[15 - k], y[15 - k], down); exact += double(x[k]) * y[k]; }
                    snprintf(names[m], 80, "fma, k ascending"); got[m++] = up;
                    snprintf(names[m], 80, "fma, k descending"); got[m++] = down;
                    snprintf(names[m], 80, "rounded once, from double"); got[m++] = float(exact + start);
                    for (int fraction = 23; fraction <= 27; fraction++)
                        for (int block : {16, 8, 4})
                            for (int nearest = 0; nearest < 2; nearest++) {
                                float v = start;
                                for (int k = 0; k < 16; k += block) v = aligned_sum(x + k, y + k, block, v, fraction, nearest);
                                snprintf(names[m], 80, "%d products at a time, cut at 2^-%d of the greatest, %s", block, fraction, nearest ? "to nearest" : "towards zero"); got[m++] = v;
                            }
                    total++;
                    for (int q = 0; q < models; q++) hits[q] += bits(got[q]) == bits(want) || (got[q] == 0 && want == 0);
                }
        }
        int best = 0;
        for (int q = 0; q < models; q++) if (hits[q] > hits[best]) best = q;
        printf("%-15s %ld outputs; best: %s %.4f%%; fma ascending %.2f%%, rounded once %.2f%%\n", kinds[kind], total, names[best], 100.0 * hits[best] / total, 100.0 * hits[0] / total, 100.0 * hits[2] / total);
        for (int q = 0; q < models; q++) fprintf(out, "%s\n  {\"kind\": \"%s\", \"model\": \"%s\", \"outputs\": %ld, \"equal\": %ld}", kind + q ? "," : "", kinds[kind], names[q], total, hits[q]);
    }
    fprintf(out, "\n]\n"); fclose(out);
}
