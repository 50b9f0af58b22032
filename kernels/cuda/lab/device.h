// Buffers and launches for the lab: on a card by the CUDA runtime, with -DCUDA_SHIM in emulation. The checks are written once on these.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef CUDA_SHIM
template <class T> struct Buffer {
    shim::Guarded memory; size_t count = 0;
    /// Poisoned: every byte 0xff.
    explicit Buffer(size_t n) : memory(n * sizeof(T), 0xff), count(n) {}
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { memcpy(memory.data, v.data(), v.size() * sizeof(T)); }
    T* data() const { return (T*)memory.data; }
    std::vector<T> read() const { return std::vector<T>(data(), data() + count); }
    void poison() { memset(memory.data, 0xff, count * sizeof(T)); }
};
#define LAUNCH(kernel, grid, block, shared, ...) shim::launch(kernel, grid, block, shared, __VA_ARGS__)
inline void finish() {}
#else
#define CHECK(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); exit(1); } } while (0)
template <class T> struct Buffer {
    T* memory = nullptr; size_t count = 0;
    explicit Buffer(size_t n) : count(n) { CHECK(cudaMalloc(&memory, n * sizeof(T) + 16)); poison(); }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { CHECK(cudaMemcpy(memory, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); }
    Buffer(const Buffer&) = delete;
    Buffer(Buffer&& o) noexcept : memory(o.memory), count(o.count) { o.memory = nullptr; }
    ~Buffer() { if (memory) cudaFree(memory); }
    T* data() const { return memory; }
    std::vector<T> read() const { std::vector<T> v(count); CHECK(cudaMemcpy(v.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost)); return v; }
    void poison() { CHECK(cudaMemset(memory, 0xff, count * sizeof(T))); }
};
inline cudaStream_t lab_stream = nullptr;
/// Launch so that a kernel may start while the one before it ends (kernels that wait for it themselves).
inline bool lab_overlap = false;
template <class... P, class... A> void launch_on_card(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    CHECK(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization; attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid; config.blockDim = block; config.dynamicSmemBytes = shared; config.stream = lab_stream; config.attrs = &attribute; config.numAttrs = lab_overlap ? 1 : 0;
    CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
    CHECK(cudaGetLastError());
}
#define LAUNCH(kernel, grid, block, shared, ...) launch_on_card(kernel, grid, block, shared, __VA_ARGS__)
inline void finish() { CHECK(cudaDeviceSynchronize()); }
#endif
