// A card of nothing but the CPU: the kernels that the device launches (src/sources.rs lists them), by name. `emulated/` makes a `Driver` of it, driver.cc
// a library that stands where NVIDIA's would. One call at a time.
#define CUDA_SHIM
#include "../rows.cu"
#include "../linear_exact.cu"
#include "../attend.cu"
#include "../linear_integer.cu"
#define EVERY_HEAD
#include "../attention.cu"
#include "../chunk.cu"
#include <algorithm>
#include <map>
#include <utility>

namespace {
struct Argument { const void* at; size_t bytes; };
typedef void (*Run)(dim3 grid, dim3 block, size_t shared_bytes, const Argument* arguments, size_t count);
template <class T> T value(const Argument& argument, const char* kernel) {
    if (argument.bytes != sizeof(T)) { fprintf(stderr, "emulation: %s takes %zu bytes where %zu are given\n", kernel, sizeof(T), argument.bytes); _exit(5); }
    T v; memcpy(&v, argument.at, sizeof v); return v;
}
template <class... P, size_t... I>
void call(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const Argument* arguments, size_t count, std::index_sequence<I...>) {
    if (count != sizeof...(P)) { fprintf(stderr, "emulation: %s takes %zu arguments, not %zu\n", name, sizeof...(P), count); _exit(5); }
    shim::launch(kernel, grid, block, shared_bytes, value<P>(arguments[I], name)...);
}
template <class... P> constexpr auto indices(void (*)(P...)) { return std::make_index_sequence<sizeof...(P)>(); }
typedef std::vector<size_t> (*Sizes)();
template <class... P> std::vector<size_t> sizes(void (*)(P...)) { return {sizeof(P)...}; }
#define ENTRY(NAME) {#NAME, [](dim3 grid, dim3 block, size_t shared_bytes, const Argument* arguments, size_t count) { call(#NAME, NAME, grid, block, shared_bytes, arguments, count, indices(NAME)); }, [] { return sizes(NAME); }}
#define BOTH(NAME) ENTRY(NAME##_rows1), ENTRY(NAME##_rows8)
#define OF_KIND(KIND, G) \
    ENTRY(KIND##_g##G##_rows1_any), ENTRY(KIND##_g##G##_rows2_any), ENTRY(KIND##_g##G##_rows1_t1), ENTRY(KIND##_g##G##_rows2_t1), \
    ENTRY(KIND##_g##G##_rows1_t2), ENTRY(KIND##_g##G##_rows2_t2), ENTRY(KIND##_g##G##_many)
#define OF_HEADS_ENTRIES(D, H) ENTRY(decode_d##D##_h##H##_w4), ENTRY(decode_split_d##D##_h##H##_w4), ENTRY(decode_merge_d##D##_h##H)
#define CHUNK_ENTRIES(D) ENTRY(chunk_f32_d##D), ENTRY(chunk_bf16_d##D), ENTRY(chunk_int8_d##D), ENTRY(chunk_split_bf16_d##D)
#define OF_GROUP(G) ENTRY(quantise_g##G##_rows), OF_KIND(linear_4s, G), OF_KIND(linear_4m, G), OF_KIND(linear_8s, G)
const struct { const char* name; Run run; Sizes sizes; } entries[] = {
    ENTRY(gather_rows), ENTRY(scatter_rows), ENTRY(rows_from), ENTRY(norm_rows), ENTRY(norm_heads), ENTRY(rope_heads), ENTRY(gate_rows), ENTRY(activate_elements), ENTRY(add_elements), ENTRY(softcap_elements), ENTRY(largest_of_rows), ENTRY(read_all),
    BOTH(linear_f32), BOTH(linear_f16), BOTH(linear_bf16), BOTH(linear_fp8), BOTH(linear_integer), ENTRY(quantise_exact),
    ENTRY(kv_write_f32), ENTRY(kv_write_bf16), ENTRY(kv_write_int8), ENTRY(attend_f32), ENTRY(attend_bf16), ENTRY(attend_int8),
    CHUNK_ENTRIES(64), CHUNK_ENTRIES(128), ENTRY(chunk_bf16_d256),
    OF_GROUP(32), OF_GROUP(64), OF_GROUP(128),
    OF_HEADS_ENTRIES(64, 1), OF_HEADS_ENTRIES(64, 3), OF_HEADS_ENTRIES(64, 4), OF_HEADS_ENTRIES(64, 7), OF_HEADS_ENTRIES(128, 2), OF_HEADS_ENTRIES(128, 4), OF_HEADS_ENTRIES(128, 8),
};
std::map<uint64_t, shim::Guarded>& memories = *new std::map<uint64_t, shim::Guarded>; // never destroyed, as the shim's state
/// The memory that holds all of these bytes.
u8* inside(uint64_t address, size_t bytes, const char* what) {
    auto after = memories.upper_bound(address);
    if (after != memories.begin()) {
        auto& memory = std::prev(after)->second;
        uint64_t begin = uint64_t(memory.data);
        if (address >= begin && address - begin <= memory.size && bytes <= memory.size - (address - begin)) return (u8*)address;
    }
    fprintf(stderr, "emulation: %s of %zu bytes at no memory that was taken\n", what, bytes);
    _exit(5);
}
} // namespace

extern "C" {
void emulated_start(uint64_t order) { shim::order_seed = order; shim::catch_faults(); }
/// Poisoned, and ends where nothing may be touched.
uint64_t emulated_allocate(size_t bytes) {
    shim::Guarded memory(bytes, 0xff);
    uint64_t address = uint64_t(memory.data);
    memories.emplace(address, std::move(memory));
    return address;
}
void emulated_free(uint64_t address) { if (!memories.erase(address)) { fprintf(stderr, "emulation: memory is given back that was not taken\n"); _exit(5); } }
void emulated_write(uint64_t to, const void* from, size_t bytes) { memcpy(inside(to, bytes, "a write"), from, bytes); }
void emulated_zero(uint64_t to, size_t bytes) { memset(inside(to, bytes, "a zeroing"), 0, bytes); }
void emulated_read(void* to, uint64_t from, size_t bytes) { memcpy(to, inside(from, bytes, "a read"), bytes); }
/// 0, or 1 where no kernel has the name.
int emulated_launch(const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, const Argument* arguments, size_t count) {
    for (auto& entry : entries)
        if (!strcmp(entry.name, name)) { entry.run(dim3(grid[0], grid[1], grid[2]), dim3(threads), shared_bytes, arguments, count); return 0; }
    return 1;
}
/// Bytes of each parameter of a kernel: how many there are, or -1 where no kernel has the name. `bytes` has room for 32.
int emulated_parameters(const char* name, size_t* bytes) {
    for (auto& entry : entries)
        if (!strcmp(entry.name, name)) { auto all = entry.sizes(); if (all.size() > 32) return -1; std::copy(all.begin(), all.end(), bytes); return int(all.size()); }
    return -1;
}
}
