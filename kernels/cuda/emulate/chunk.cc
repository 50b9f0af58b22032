// Runs chunk.cu on the CPU beside attend.cu on one chunk of each shape: the same bits, also where sums are a negative zero. Usage: chunk [order seed ...]; 0 if all
// is well. The op set's suite has the full comparison; this one is small, for faults that are planted.
#define CUDA_SHIM
#define EVERY_HEAD
#include "../attend.cu"
#include "../chunk.cu"

namespace {
u64 state = 1;
/// In -1..1.
float draw() { state = state * 6364136223846793005ull + 1442695040888963407ull; return float(int64_t(state) >> 40) / float(1 << 23); }

struct Shape { int d, kv_heads, group, page_tokens, window; float softcap; };

/// Rows 40.. of one sequence, a full tile. Values of some columns are as good as -0 before token 74 and above 0 after it, so a masked product would show.
bool equal_bits(const Shape& shape) {
    int d = shape.d, heads = shape.kv_heads * shape.group, rows = CHUNK_LINES / shape.group, first = 40, past = first + rows;
    int pages = (past + shape.page_tokens - 1) / shape.page_tokens, stride = (heads + 2 * shape.kv_heads) * d;
    size_t tokens = size_t(pages) * shape.page_tokens * shape.kv_heads, outputs = size_t(rows) * heads * d * 4;
    shim::Guarded keys(tokens * d * 4, 0), values(tokens * d * 4, 0), qkv(size_t(rows) * stride * 4, 0), expected(outputs, 0xff), got(outputs, 0xff), queries(rows * 16, 0), table(pages * 4, 0), tile(sizeof(Tile), 0);
    for (auto* memory : {&keys, &values, &qkv})
        for (size_t i = 0; i < memory->size / 4; i++) ((float*)memory->data)[i] = draw();
    for (size_t i = 0; i < values.size / 4; i++) {
        size_t token = i / d, slot = token / (shape.kv_heads * shape.page_tokens), position = (pages - 1 - slot) * shape.page_tokens + token % shape.page_tokens;
        if (i % d < 32) ((float*)values.data)[i] = position >= 74 ? 1e-45f : draw() < 0 ? -1e-45f : -0.0f;
    }
    for (int row = 0; row < rows; row++) ((u32*)queries.data)[4 * row + 1] = u32(first + row), ((u32*)queries.data)[4 * row + 2] = u32(row);
    for (int page = 0; page < pages; page++) ((u32*)table.data)[page] = u32(pages - 1 - page);
    auto seen = [&](int position) { return u32(shape.window && position + 1 > shape.window ? position + 1 - shape.window : 0); };
    *(Tile*)tile.data = {0, u32(rows), seen(first) / 64, u32(past + 63) / 64, seen(first), u32(past), seen(past - 1), u32(first + 1)};
    shim::launch(attend_f32, dim3(heads, rows), dim3(32), (d + 64) * 4, (float*)expected.data, (float*)qkv.data, keys.data, values.data, nullptr, nullptr, (u32*)queries.data, (u32*)table.data, shape.kv_heads, d, shape.page_tokens, shape.window, 0.5f, shape.softcap);
    auto run = [&](auto kernel, size_t shared) {
        shim::launch(kernel, dim3(shape.kv_heads), dim3(128), shared, (float*)got.data, (float*)qkv.data, keys.data, values.data, nullptr, nullptr, (u32*)queries.data, (u32*)table.data, (Tile*)tile.data, shape.group, shape.page_tokens / 16, shape.window, 0.5f, shape.softcap, 0, 0);
    };
    if (d == 64) run(chunk_f32_d64, chunk_shared_bytes<64, F32_KV>());
    else run(chunk_f32_d128, chunk_shared_bytes<128, F32_KV>());
    return !memcmp(expected.data, got.data, outputs);
}
} // namespace

int main(int count, char** args) {
    shim::catch_faults();
    int failed = 0;
    for (int i = 1; i < count; i++) {
        shim::order_seed = strtoull(args[i], nullptr, 10);
        for (Shape shape : {Shape{64, 2, 1, 32, 0, 0.0f}, Shape{64, 1, 4, 32, 33, 0.0f}, Shape{64, 1, 7, 16, 0, 3.0f}, Shape{128, 1, 4, 48, 0, 0.0f}})
            if (!equal_bits(shape)) { failed++; printf("FAIL order %s, D = %d, %d heads a kv head\n", args[i], shape.d, shape.group); }
    }
    printf("emulation of chunks: %d failed\n", failed);
    return failed != 0;
}
