// What driver.cc's card knows of itself: its faults, memory, streams with what was asked of them, graphs; and how a launch happens. Included by driver.cc alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unistd.h>
#include <vector>

extern "C" {
struct Argument { const void* at; size_t bytes; };
void emulated_start(uint64_t order);
uint64_t emulated_allocate(size_t bytes);
void emulated_free(uint64_t address);
void emulated_write(uint64_t to, const void* from, size_t bytes);
void emulated_read(void* to, uint64_t from, size_t bytes);
int emulated_launch(const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, const Argument* arguments, size_t count);
int emulated_parameters(const char* name, size_t* bytes);
}

namespace {
typedef int Result;
// Codes, names and what they mean are the driver's own.
const struct Code { Result code; const char *name, *text; } codes[] = {
    {0, "CUDA_SUCCESS", "no error"}, {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"}, {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"}, {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}, {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}, {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}, {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"}, {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
};
constexpr Result OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, STUB = 34, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, NO_BINARY = 209, LOST = 214, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, MISMATCH = 803;

/// The value of a fault, empty where it has none; null where the card does not have it.
const char* fault(const char* name) {
    static auto& faults = *new std::map<std::string, std::string>;
    static bool read = [] {
        const char* given = getenv("EMULATED_CARD_FAULT");
        std::string all = given ? given : "";
        for (size_t begin = 0; begin < all.size();) {
            size_t end = std::min(all.find(',', begin), all.size());
            std::string one = all.substr(begin, end - begin);
            size_t colon = one.find(':');
            faults[one.substr(0, colon)] = colon == std::string::npos ? "" : one.substr(colon + 1);
            begin = end + 1;
        }
        return true;
    }();
    (void)read;
    auto found = faults.find(name);
    return found == faults.end() ? nullptr : found->second.c_str();
}
uint64_t number(const char* text) { return strtoull(text, nullptr, 10); }
uint64_t setting(const char* name, uint64_t otherwise) { const char* text = getenv(name); return text ? number(text) : otherwise; }

struct Stream { std::deque<std::function<void()>> asked; uint64_t asked_count = 0, done_count = 0; };
struct Event { Stream* stream = nullptr; uint64_t at = 0; };
struct Module { std::string unit; };
struct Function { std::string name; std::vector<size_t> parameters; uint32_t shared_bytes_max = 48 << 10; };
/// A launch with copies of its arguments.
struct Launch { Function* kernel; uint32_t grid[3]; uint32_t threads, shared_bytes; std::vector<std::vector<uint8_t>> arguments; };
struct Node { Launch launch; std::vector<Node*> after; };
struct Graph { std::vector<std::unique_ptr<Node>> nodes; };
/// A graph as it was when it was made: its nodes in an order that it allows, each with the node of the graph that it came from.
struct Executable { std::vector<std::pair<Node*, Launch>> launches; };

/// Things that callers know by their address.
template <class T> struct Handles {
    std::map<T*, std::unique_ptr<T>> all;
    T* make(T value = {}) { auto made = std::make_unique<T>(std::move(value)); T* at = made.get(); all.emplace(at, std::move(made)); return at; }
    bool holds(T* at) const { return all.count(at) != 0; }
    bool drop(T* at) { return all.erase(at) != 0; }
};

/// All of the card's state, never destroyed: another thread may still compute when the process ends.
struct State {
    std::mutex calls;
    bool is_ready = false, is_lost = false;
    uint64_t launches = 0, allocations = 0, contexts = 0;
    uint64_t bytes = setting("EMULATED_CARD_BYTES", uint64_t(1) << 30), order = setting("EMULATED_CARD_ORDER", 0);
    std::map<uint64_t, uint64_t> memory, pinned;
    Handles<Stream> streams; Handles<Event> events; Handles<Module> modules; Handles<Function> functions; Handles<Graph> graphs; Handles<Executable> executables;
    std::set<Node*> nodes;
};
State& state() { static State& state = *new State; return state; }
thread_local void* current;
int context; // its address is the only context's

uint64_t taken() { uint64_t sum = 0; for (auto& [at, bytes] : state().memory) sum += bytes; return sum; }
uint64_t free_bytes() {
    const char* left = fault("little-memory");
    uint64_t all = left ? std::min(number(left), state().bytes) : state().bytes;
    return all - std::min(all, taken());
}
const uint64_t* region(const std::map<uint64_t, uint64_t>& regions, const void* at, size_t bytes) {
    auto after = regions.upper_bound(uint64_t(at));
    if (after == regions.begin()) return nullptr;
    auto& [begin, size] = *std::prev(after);
    return uint64_t(at) - begin + bytes <= size ? &begin : nullptr;
}
bool on_card(uint64_t at, size_t bytes) { return region(state().memory, (const void*)at, bytes) != nullptr; }
bool is_pinned(const void* at, size_t bytes) { return region(state().pinned, at, bytes) != nullptr; }

/// What was asked of a stream, up to a count. A card that is lost does nothing any more.
void run(Stream* stream, uint64_t until) {
    if (!state().streams.holds(stream)) return;
    while (stream->done_count < until) {
        auto next = std::move(stream->asked.front());
        stream->asked.pop_front();
        if (!state().is_lost) next();
        stream->done_count++;
    }
}
Result wait(Stream* stream) { run(stream, stream->asked_count); return state().is_lost ? LOST : OK; }
Result ask(Stream* stream, std::function<void()> what) {
    if (!state().streams.holds(stream)) return INVALID_HANDLE;
    stream->asked.push_back(std::move(what));
    stream->asked_count++;
    return state().order == 1 ? wait(stream) : OK;
}

/// The calls that need a card that can be used and, if `in_context`, a context.
template <class Body> Result call(bool in_context, Body body) {
    std::lock_guard<std::mutex> one(state().calls);
    if (!state().is_ready) return NOT_INITIALIZED;
    if (state().is_lost) return LOST;
    if (in_context && current != &context) return INVALID_CONTEXT;
    return body();
}

bool falls_off() {
    const char *after = fault("lost-after"), *file = fault("lost-when");
    return (after && state().launches > number(after)) || (file && !access(file, F_OK));
}
void compute(const Launch& launch) {
    state().launches++;
    if (falls_off()) { state().is_lost = true; return; }
    std::vector<Argument> arguments;
    for (auto& bytes : launch.arguments) arguments.push_back({bytes.data(), bytes.size()});
    emulated_launch(launch.kernel->name.c_str(), launch.grid, launch.threads, launch.shared_bytes, arguments.data(), arguments.size());
}
/// A launch as it may be, or why not.
Result take(Launch& launch, Function* kernel, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared_bytes, void** arguments, void** extra) {
    if (!state().functions.holds(kernel)) return INVALID_HANDLE;
    unsigned threads = block[0] * block[1] * block[2];
    bool fits = grid[0] && grid[1] && grid[2] && grid[0] < 1u << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16 && block[0] && block[1] == 1 && block[2] == 1 && threads <= 1024;
    if (!fits || extra || shared_bytes > kernel->shared_bytes_max || (!arguments && !kernel->parameters.empty())) return INVALID_VALUE;
    launch = {kernel, {grid[0], grid[1], grid[2]}, threads, shared_bytes, {}};
    for (size_t i = 0; i < kernel->parameters.size(); i++) {
        auto* at = (const uint8_t*)arguments[i];
        launch.arguments.emplace_back(at, at + kernel->parameters[i]);
    }
    return OK;
}
/// As the driver's header has it.
struct KernelNode { Function* kernel; unsigned grid[3], block[3], shared_bytes; void **arguments, **extra; void *library_kernel, *context; };
Result take(Launch& launch, const KernelNode* node) {
    return node ? take(launch, node->kernel, node->grid, node->block, node->shared_bytes, node->arguments, node->extra) : INVALID_VALUE;
}
} // namespace
