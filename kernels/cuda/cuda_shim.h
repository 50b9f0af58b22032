// Runs a .cu kernel on the CPU: one fiber for each CUDA thread, one cta after another. Tests only; x86-64 Linux.
// What it is strict about: copies of cp.async land at their wait, as late as the hardware may do them, or with order 1 at once, as early;
// shared memory is poisoned before each cta; ctas, warps and lanes run in an order drawn from a seed, each as far as it can, so that a missing barrier shows;
// buffers end at a page that cannot be touched, so that a wrong index stops the program; lanes that part at a barrier stop it too.
// What it cannot see: races within a warp between its syncs, bank conflicts, the memory model.
#pragma once
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#include "tensor_core.h"

typedef uint8_t u8;
typedef int8_t i8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
struct alignas(16) U4 { u32 x, y, z, w; };
struct alignas(8) U2 { u32 x, y; };
struct alignas(8) F2 { float x, y; };
struct alignas(16) F4 { float x, y, z, w; };
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define DEVICE inline
#define DYNAMIC_SHARED(T, name) T* name = (T*)shim::dynamic_shared
struct Index3 { unsigned x = 0, y = 0, z = 0; };
struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };

namespace shim {
enum State { Running, AtBarrier, AtWarpSync, Done };
struct Copy { void* to; const void* from; };
struct Fiber { void* stack; Index3 thread; State state; std::vector<std::vector<Copy>> copies; };
struct Warp { u32 a[32][8]; float f[32][4]; int i[32][4]; uint64_t x[32]; };
inline Fiber* current;
inline void* scheduler_stack;
// Never destroyed: another thread may still compute when the process ends.
inline std::vector<Fiber>& fibers = *new std::vector<Fiber>;
inline std::vector<Warp>& warps = *new std::vector<Warp>;
inline void (*entry)(void*);
inline void* entry_argument;
inline Index3 block_index;
inline dim3 block_size, grid_size;
inline u8* dynamic_shared;
/// Order of ctas, warps and lanes: 0 ascending, 1 descending, else shuffled by it.
inline uint64_t order_seed = 0;

extern "C" void shim_switch(void** save, void* load);
asm(R"(.text
.globl shim_switch
.type shim_switch,@function
shim_switch: push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
 mov %rsp,(%rdi); mov %rsi,%rsp
 pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret)");
inline void park(State state) { current->state = state; shim_switch(&current->stack, scheduler_stack); }
inline void trampoline() { entry(entry_argument); park(Done); __builtin_trap(); }
inline unsigned linear() { return unsigned(current - fibers.data()); }
inline unsigned lane() { return linear() & 31; }
inline Warp& warp() { return warps[linear() >> 5]; }
inline void sync_warp() { park(AtWarpSync); }

[[noreturn]] inline void fail(const char* what) { fprintf(stderr, "emulation: %s in cta (%u, %u, %u)\n", what, block_index.x, block_index.y, block_index.z); _exit(3); }
inline void on_fault(int, siginfo_t* info, void*) {
    char text[96];
    int n = snprintf(text, sizeof text, "emulation: access out of bounds at %p, thread %u\n", info->si_addr, current ? linear() : 0);
    (void)!write(2, text, size_t(n));
    _exit(4);
}
inline void catch_faults() {
    static u8 stack[1 << 14];
    stack_t alternate{}; alternate.ss_sp = stack; alternate.ss_size = sizeof stack; sigaltstack(&alternate, nullptr);
    struct sigaction action{}; action.sa_sigaction = on_fault; action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr); sigaction(SIGBUS, &action, nullptr);
}
/// Memory that ends at pages which cannot be touched, a mebibyte of them; those before it are as closed. Filled with `poison`.
struct Guarded {
    u8* base = nullptr; size_t mapped = 0; u8* data = nullptr; size_t size = 0;
    Guarded() = default;
    Guarded(size_t bytes, int poison) : size(bytes) {
        size_t room = (bytes + 4095) / 4096 * 4096, closed = 1 << 20; mapped = room + 2 * closed;
        base = (u8*)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (room) mprotect(base + closed, room, PROT_READ | PROT_WRITE);
        memset(base + closed, poison, room);
        data = base + closed + room - (bytes + 15) / 16 * 16;
    }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& o) noexcept { *this = static_cast<Guarded&&>(o); }
    Guarded& operator=(Guarded&& o) noexcept { std::swap(base, o.base); std::swap(mapped, o.mapped); std::swap(data, o.data); std::swap(size, o.size); return *this; }
    ~Guarded() { if (base) munmap(base, mapped); }
};

inline uint64_t mix(uint64_t& s) { s += 0x9e3779b97f4a7c15ull; uint64_t z = s; z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull; z = (z ^ (z >> 27)) * 0x94d049bb133111ebull; return z ^ (z >> 31); }
inline void draw_order(std::vector<unsigned>& order, uint64_t& seed) {
    unsigned n = unsigned(order.size());
    for (unsigned i = 0; i < n; i++) order[i] = order_seed == 1 ? n - 1 - i : i;
    if (order_seed > 1) for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[mix(seed) % i]);
}
constexpr size_t stack_bytes = 128 << 10;
inline void run_block(unsigned n) {
    static u8* stacks; static unsigned room; static uint64_t seed = order_seed;
    if (n > room) {
        if (stacks) munmap(stacks, stack_bytes * room);
        stacks = (u8*)mmap(nullptr, stack_bytes * n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); room = n;
    }
    fibers.clear(); fibers.resize(n); warps.resize((n + 31) / 32);
    for (unsigned i = 0; i < n; i++) {
        uintptr_t* s = (uintptr_t*)(stacks + stack_bytes * (i + 1)) - 2; *s = (uintptr_t)trampoline; s -= 6; memset(s, 0, 48);
        fibers[i].stack = s; fibers[i].thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y}; fibers[i].state = Running;
    }
    std::vector<unsigned> warp_order((n + 31) / 32), lane_order;
    for (unsigned done = 0; done < n;) {
        draw_order(warp_order, seed);
        for (unsigned w : warp_order) { // each warp goes on until every lane of it waits at the barrier or is done
            unsigned first = w * 32, end = first + 32 < n ? first + 32 : n;
            for (bool more = true; more;) {
                more = false; lane_order.resize(end - first); draw_order(lane_order, seed);
                for (unsigned l : lane_order) { Fiber& f = fibers[first + l]; if (f.state == Running) { current = &f; shim_switch(&scheduler_stack, f.stack); done += f.state == Done; } }
                unsigned count[4] = {}; for (unsigned i = first; i < end; i++) count[fibers[i].state]++;
                if (count[AtWarpSync]) {
                    if (count[AtBarrier] || count[Done]) fail("a warp parted: some lanes at a warp sync, some beyond");
                    for (unsigned i = first; i < end; i++) fibers[i].state = Running; more = true;
                }
            }
        }
        unsigned waiting = 0; for (auto& f : fibers) waiting += f.state == AtBarrier;
        if (waiting && waiting + done != n) fail("a barrier that not all threads reach");
        if (waiting && done) fail("threads ended before a barrier of their cta");
        for (auto& f : fibers) if (f.state == AtBarrier) f.state = Running;
    }
    for (auto& f : fibers) for (auto& group : f.copies) if (!group.empty()) fail("cp.async that nobody waited for");
    current = nullptr;
}
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
    auto body = [=] { kernel(static_cast<P>(arguments)...); }; using Body = decltype(body);
    entry = [](void* p) { (*(Body*)p)(); }; entry_argument = &body; grid_size = grid; block_size = block;
    static uint64_t seed = order_seed;
    std::vector<unsigned> cta_order(size_t(grid.x) * grid.y * grid.z);
    draw_order(cta_order, seed);
    for (unsigned cta : cta_order) {
        Guarded shared((shared_bytes + 127) / 128 * 128, 0xff); dynamic_shared = shared.data;
        block_index = {cta % grid.x, cta / grid.x % grid.y, cta / grid.x / grid.y}; run_block(block.x * block.y * block.z);
    }
}
template <class T> T exchange(T v, unsigned from) {
    auto& w = warp(); uint64_t bits = 0; memcpy(&bits, &v, sizeof v); w.x[lane()] = bits; sync_warp();
    T r; memcpy(&r, &w.x[from & 31], sizeof r); sync_warp(); return r;
}
} // namespace shim
#define threadIdx (shim::current->thread)
#define blockIdx shim::block_index
#define blockDim shim::block_size
#define gridDim shim::grid_size
inline void __syncthreads() { shim::park(shim::AtBarrier); }
inline void __syncwarp(unsigned = ~0u) { shim::sync_warp(); }
template <class T> T __shfl_sync(unsigned, T v, int s) { return shim::exchange(v, unsigned(s)); }
template <class T> T __shfl_xor_sync(unsigned, T v, int m) { return shim::exchange(v, shim::lane() ^ unsigned(m)); }
template <class T> T __shfl_down_sync(unsigned, T v, int d) { unsigned l = shim::lane(); return shim::exchange(v, l + unsigned(d) < 32 ? l + unsigned(d) : l); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __float2int_rn(float f) { return int(rintf(f)); }

inline u32 bits_of(float f) { u32 b; memcpy(&b, &f, 4); return b; }
inline float float_of(u32 b) { float f; memcpy(&f, &b, 4); return f; }
inline float bf16_value(u32 b) { return float_of(b << 16); }
inline u16 bf16_nearest(float f) { u32 u = bits_of(f); if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff; return u16((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
inline float half_to_float(u16 h) { _Float16 v; memcpy(&v, &h, 2); return float(v); }
inline u32 bf16_pair(float lo, float hi) { return bf16_nearest(lo) | u32(bf16_nearest(hi)) << 16; }
inline u32 bf16x2_fma(u32 a, u32 b, u32 c) {
    auto one = [](u32 a, u32 b, u32 c) { return u32(bf16_nearest(fmaf(bf16_value(a & 0xffff), bf16_value(b & 0xffff), bf16_value(c & 0xffff)))); };
    return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline int dot4(u32 a, u32 b, int sum) { for (int i = 0; i < 4; i++) sum += int(i8(a >> (8 * i))) * int(i8(b >> (8 * i))); return sum; }
inline u32 and_xor(u32 a, u32 b, u32 c) { return (a & b) ^ c; }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline u64 evict_first() { return 0; }
inline U4 load_stream(const U4* p, u64) { return *p; }
inline U4 load_shared_by_many(const U4* p) { return *p; }
inline auto& shim_copies() { auto& c = shim::current->copies; if (c.empty()) c.emplace_back(); return c; }
inline void cp_async16(void* s, const void* g) { if ((uintptr_t(s) | uintptr_t(g)) & 15) shim::fail("cp.async that is not aligned"); if (shim::order_seed == 1) memcpy(s, g, 16); else shim_copies().back().push_back({s, g}); }
inline void cp_async_commit() { shim_copies().emplace_back(); }
template <int N> void cp_async_wait() { auto& c = shim_copies(); while (c.size() > N + 1) { for (auto& x : c[0]) memcpy(x.to, x.from, 16); c.erase(c.begin()); } }
inline void ldmatrix_x4(u32 (&r)[4], const void* p) {
    auto& w = shim::warp(); unsigned l = shim::lane(); w.x[l] = uint64_t(p); shim::sync_warp();
    for (int m = 0; m < 4; m++) memcpy(&r[m], (const u8*)w.x[unsigned(m) * 8 + l / 4] + (l % 4) * 4, 4);
    shim::sync_warp();
}
template <bool UNSIGNED> void shim_mma_8bit(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    auto& w = shim::warp(); unsigned l = shim::lane(); u32* m = w.a[l];
    for (int i = 0; i < 4; i++) m[i] = a[i];
    m[4] = b0; m[5] = b1; shim::sync_warp();
    for (unsigned q = 0; q < 4; q++) {
        unsigned row = l / 4 + (q / 2) * 8, col = (l % 4) * 2 + (q & 1); int sum = 0;
        for (unsigned k = 0; k < 32; k++) {
            u8 x = u8(w.a[(row % 8) * 4 + k % 16 / 4][row / 8 + k / 16 * 2] >> (k % 4 * 8)), y = u8(w.a[col * 4 + k % 16 / 4][4 + k / 16] >> (k % 4 * 8));
            sum += (UNSIGNED ? int(x) : int(i8(x))) * int(i8(y));
        }
        d[q] = int(u32(d[q]) + u32(sum));
    }
    shim::sync_warp();
}
inline void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { shim_mma_8bit<false>(d, a, b0, b1); }
inline void mma_u8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { shim_mma_8bit<true>(d, a, b0, b1); }
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    auto& w = shim::warp(); unsigned l = shim::lane(); u32* m = w.a[l];
    for (int i = 0; i < 4; i++) m[i] = a[i];
    m[4] = b0; m[5] = b1; shim::sync_warp();
    for (unsigned q = 0; q < 4; q++) {
        unsigned row = l / 4 + (q / 2) * 8, col = (l % 4) * 2 + (q & 1); float x[16], y[16];
        for (unsigned k = 0; k < 16; k++) {
            x[k] = bf16_value(w.a[(row % 8) * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> (k % 2 * 16) & 0xffff);
            y[k] = bf16_value(w.a[col * 4 + k % 8 / 2][4 + k / 8] >> (k % 2 * 16) & 0xffff);
        }
        d[q] = tensor_core_dot16(x, y, d[q]);
    }
    shim::sync_warp();
}
