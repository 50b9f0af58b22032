// NVIDIA's driver (libcuda.so.1) as far as src/card.rs calls it, over the card of device.cc: for tests of the code that speaks to a driver, and of every
// fault that a card may have. What it is strict about: nothing that was asked of a stream happens before somebody waits for it, as late as a driver may (with
// order 1 at once, as early), so that memory that is given back or written again too soon shows; handles and contexts are looked up; the kernels of a graph that do
// not depend on each other run the later ones first. What it cannot see: speed, and whatever a real driver does beyond the book.
//
// EMULATED_CARD_FAULT: what is wrong with it, by commas. no-card; old-driver; init-fails; stub; old-card; little-memory:BYTES; full-after:ALLOCATIONS;
// wrong-image; lost-at-start; lost-after:LAUNCHES; lost-when:FILE is there. EMULATED_CARD_ORDER: of warps, as the shim has it. EMULATED_CARD_BYTES: of memory.
#include "driver_state.h"

#define API extern "C" __attribute__((visibility("default"))) Result

API cuGetErrorName(Result code, const char** name) {
    for (auto& known : codes) if (known.code == code && !fault("stub")) { *name = known.name; return OK; }
    return INVALID_VALUE;
}
API cuGetErrorString(Result code, const char** text) {
    for (auto& known : codes) if (known.code == code && !fault("stub")) { *text = known.text; return OK; }
    return INVALID_VALUE;
}
API cuDriverGetVersion(int* version) {
    if (fault("stub")) return STUB;
    *version = fault("old-driver") ? 11040 : 13000;
    return OK;
}
API cuInit(unsigned) {
    std::lock_guard<std::mutex> one(state().calls);
    if (fault("stub")) return STUB;
    if (fault("init-fails")) return MISMATCH;
    if (fault("no-card")) return NO_DEVICE;
    if (!state().is_ready) emulated_start(state().order);
    state().is_ready = true;
    return OK;
}
API cuDeviceGetCount(int* count) { return call(false, [&] { *count = 1; return OK; }); }
API cuDeviceGet(int* device, int ordinal) { return call(false, [&] { *device = ordinal; return ordinal ? INVALID_DEVICE : OK; }); }
API cuDeviceGetName(char* name, int room, int device) {
    return call(false, [&] { snprintf(name, size_t(room), "Emulated card"); return device ? INVALID_DEVICE : OK; });
}
API cuDeviceTotalMem_v2(size_t* bytes, int device) { return call(false, [&] { *bytes = state().bytes; return device ? INVALID_DEVICE : OK; }); }
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    return call(false, [&] {
        // Of Hopper: threads of a cta, shared memory of a cta, lanes, processors, one space of addresses, capability, shared memory that may be asked for.
        static const std::map<int, int> known = {{1, 1024}, {8, 48 << 10}, {10, 32}, {16, 132}, {41, 1}, {75, 9}, {76, 0}, {97, 227 << 10}};
        auto found = known.find(attribute);
        if (found == known.end()) return INVALID_VALUE;
        *value = found->second;
        if (fault("old-card") && (attribute == 75 || attribute == 76)) *value = attribute == 75 ? 7 : 5;
        return device ? INVALID_DEVICE : OK;
    });
}
API cuDevicePrimaryCtxRetain(void** made, int device) { return call(false, [&] { if (fault("lost-at-start")) return LOST; state().contexts++; *made = &context; return device ? INVALID_DEVICE : OK; }); }
API cuDevicePrimaryCtxRelease_v2(int device) { return call(false, [&] { return device || !state().contexts-- ? INVALID_DEVICE : OK; }); }
API cuCtxSetCurrent(void* wanted) {
    return call(false, [&] { if (wanted && wanted != &context) return INVALID_CONTEXT; current = wanted; return OK; });
}
API cuCtxGetCurrent(void** found) { return call(false, [&] { *found = current; return OK; }); }
API cuCtxSynchronize() {
    return call(true, [] { Result outcome = OK; for (auto& [at, stream] : state().streams.all) outcome = wait(at); return outcome; });
}

API cuMemGetInfo_v2(size_t* free, size_t* total) { return call(true, [&] { *free = free_bytes(); *total = state().bytes; return OK; }); }
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    return call(true, [&] {
        const char* full = fault("full-after");
        if (!bytes) return INVALID_VALUE;
        if (bytes > free_bytes() || (full && state().allocations >= number(full))) return OUT_OF_MEMORY;
        state().allocations++;
        *address = emulated_allocate(bytes);
        state().memory.emplace(*address, bytes);
        return OK;
    });
}
API cuMemFree_v2(uint64_t address) {
    return call(true, [&] { if (!state().memory.erase(address)) return INVALID_VALUE; emulated_free(address); return OK; });
}
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    return call(true, [&] {
        if (!bytes) return INVALID_VALUE;
        *at = (void*)emulated_allocate(bytes);
        state().pinned.emplace(uint64_t(*at), bytes);
        return OK;
    });
}
API cuMemAllocHost_v2(void** at, size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }
API cuMemFreeHost(void* at) {
    return call(true, [&] { if (!state().pinned.erase(uint64_t(at))) return INVALID_VALUE; emulated_free(uint64_t(at)); return OK; });
}
/// Pageable bytes are taken at once, pinned ones when the copy happens.
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    return call(true, [&] {
        if (!on_card(to, bytes)) return INVALID_VALUE;
        if (is_pinned(from, bytes)) return ask(stream, [=] { emulated_write(to, from, bytes); });
        auto kept = std::make_shared<std::vector<uint8_t>>((const uint8_t*)from, (const uint8_t*)from + bytes);
        return ask(stream, [=] { emulated_write(to, kept->data(), bytes); });
    });
}
/// A copy to pageable memory has happened when the call returns.
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    return call(true, [&] {
        if (!on_card(from, bytes)) return INVALID_VALUE;
        Result outcome = ask(stream, [=] { emulated_read(to, from, bytes); });
        return outcome == OK && !is_pinned(to, bytes) ? wait(stream) : outcome;
    });
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
    return call(true, [&] {
        if (!on_card(to, bytes) || !on_card(from, bytes)) return INVALID_VALUE;
        return ask(stream, [=] { std::vector<uint8_t> moved(bytes); emulated_read(moved.data(), from, bytes); emulated_write(to, moved.data(), bytes); });
    });
}
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream* stream) {
    return call(true, [&] {
        if (!on_card(to, bytes)) return INVALID_VALUE;
        return ask(stream, [=] { std::vector<uint8_t> filled(bytes, value); emulated_write(to, filled.data(), bytes); });
    });
}

API cuStreamCreate(Stream** made, unsigned) { return call(true, [&] { *made = state().streams.make(); return OK; }); }
API cuStreamDestroy_v2(Stream* stream) {
    return call(true, [&] { if (!state().streams.holds(stream)) return INVALID_HANDLE; Result outcome = wait(stream); state().streams.drop(stream); return outcome; });
}
API cuStreamSynchronize(Stream* stream) { return call(true, [&] { return state().streams.holds(stream) ? wait(stream) : INVALID_HANDLE; }); }
API cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    return call(true, [&] {
        if (!state().events.holds(event)) return INVALID_HANDLE;
        return event->stream ? ask(stream, [at = *event] { run(at.stream, at.at); }) : OK;
    });
}
API cuEventCreate(Event** made, unsigned) { return call(true, [&] { *made = state().events.make(); return OK; }); }
API cuEventDestroy_v2(Event* event) { return call(true, [&] { return state().events.drop(event) ? OK : INVALID_HANDLE; }); }
API cuEventRecord(Event* event, Stream* stream) {
    return call(true, [&] {
        if (!state().events.holds(event) || !state().streams.holds(stream)) return INVALID_HANDLE;
        *event = {stream, stream->asked_count};
        return OK;
    });
}
API cuEventSynchronize(Event* event) {
    return call(true, [&] {
        if (!state().events.holds(event)) return INVALID_HANDLE;
        if (event->stream) run(event->stream, event->at);
        return state().is_lost ? LOST : OK;
    });
}
API cuEventQuery(Event* event) {
    return call(true, [&] {
        if (!state().events.holds(event)) return INVALID_HANDLE;
        return event->stream && event->stream->done_count < event->at ? NOT_READY : OK;
    });
}

/// The images are nvrtc.cc's: a line that says whose they are, the unit, the architecture.
API cuModuleLoadData(Module** made, const void* image) {
    return call(true, [&] {
        std::string text((const char*)image, strnlen((const char*)image, 256)), begin = "\x7f" "ELF emulated\n";
        if (text.compare(0, begin.size(), begin)) return INVALID_IMAGE;
        size_t line = text.find('\n', begin.size());
        if (line == std::string::npos || text.back() != '\n') return INVALID_IMAGE;
        if (fault("wrong-image") || text.substr(line + 1) != "sm_90a\n") return NO_BINARY;
        *made = state().modules.make({text.substr(begin.size(), line - begin.size())});
        return OK;
    });
}
API cuModuleUnload(Module* module) { return call(true, [&] { return state().modules.drop(module) ? OK : INVALID_HANDLE; }); }
API cuModuleGetFunction(Function** made, Module* module, const char* name) {
    return call(true, [&] {
        if (!state().modules.holds(module)) return INVALID_HANDLE;
        size_t bytes[32];
        int count = emulated_parameters(name, bytes);
        if (count < 0) return NOT_FOUND;
        *made = state().functions.make({name, {bytes, bytes + count}});
        return OK;
    });
}
/// Bytes of dynamic shared memory, 8, alone.
API cuFuncSetAttribute(Function* kernel, int attribute, int value) {
    return call(true, [&] {
        if (!state().functions.holds(kernel)) return INVALID_HANDLE;
        if (attribute != 8 || value < 0 || value > 227 << 10) return INVALID_VALUE;
        kernel->shared_bytes_max = uint32_t(value);
        return OK;
    });
}
API cuLaunchKernel(Function* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y, unsigned threads_z, unsigned shared_bytes, Stream* stream,
    void** arguments, void** extra) {
    return call(true, [&] {
        auto launch = std::make_shared<Launch>();
        Result outcome = take(*launch, kernel, {x, y, z}, {threads_x, threads_y, threads_z}, shared_bytes, arguments, extra);
        return outcome == OK ? ask(stream, [=] { compute(*launch); }) : outcome;
    });
}

API cuGraphCreate(Graph** made, unsigned) { return call(true, [&] { *made = state().graphs.make(); return OK; }); }
API cuGraphDestroy(Graph* graph) {
    return call(true, [&] {
        if (!state().graphs.holds(graph)) return INVALID_HANDLE;
        for (auto& node : graph->nodes) state().nodes.erase(node.get());
        state().graphs.drop(graph);
        return OK;
    });
}
API cuGraphAddKernelNode_v2(Node** made, Graph* graph, Node* const* after, size_t count, const KernelNode* given) {
    return call(true, [&] {
        if (!state().graphs.holds(graph)) return INVALID_HANDLE;
        auto node = std::make_unique<Node>();
        node->after.assign(after, after + count);
        for (Node* before : node->after)
            if (std::none_of(graph->nodes.begin(), graph->nodes.end(), [&](auto& one) { return one.get() == before; })) return INVALID_VALUE;
        if (Result outcome = take(node->launch, given)) return outcome;
        state().nodes.insert(*made = node.get());
        graph->nodes.push_back(std::move(node));
        return OK;
    });
}
API cuGraphKernelNodeSetParams_v2(Node* node, const KernelNode* given) {
    return call(true, [&] { return state().nodes.count(node) ? take(node->launch, given) : INVALID_HANDLE; });
}
API cuGraphInstantiateWithFlags(Executable** made, Graph* graph, unsigned long long) {
    return call(true, [&] {
        if (!state().graphs.holds(graph)) return INVALID_HANDLE;
        Executable executable;
        std::set<Node*> done;
        while (done.size() < graph->nodes.size()) {
            // The latest that may run now: whoever forgot what a kernel depends on sees it run too early.
            auto may_run = [&](const std::unique_ptr<Node>& node) {
                return !done.count(node.get()) && std::all_of(node->after.begin(), node->after.end(), [&](Node* before) { return done.count(before) != 0; });
            };
            auto next = std::find_if(graph->nodes.rbegin(), graph->nodes.rend(), may_run);
            executable.launches.emplace_back(next->get(), (*next)->launch);
            done.insert(next->get());
        }
        *made = state().executables.make(std::move(executable));
        return OK;
    });
}
API cuGraphExecKernelNodeSetParams_v2(Executable* executable, Node* node, const KernelNode* given) {
    return call(true, [&] {
        if (!state().executables.holds(executable)) return INVALID_HANDLE;
        auto at = std::find_if(executable->launches.begin(), executable->launches.end(), [&](auto& one) { return one.first == node; });
        return at == executable->launches.end() ? INVALID_VALUE : take(at->second, given);
    });
}
API cuGraphUpload(Executable* executable, Stream*) { return call(true, [&] { return state().executables.holds(executable) ? OK : INVALID_HANDLE; }); }
API cuGraphLaunch(Executable* executable, Stream* stream) {
    return call(true, [&] {
        if (!state().executables.holds(executable)) return INVALID_HANDLE;
        return ask(stream, [copy = *executable] { for (auto& [node, launch] : copy.launches) if (!state().is_lost) compute(launch); });
    });
}
API cuGraphExecDestroy(Executable* executable) { return call(true, [&] { return state().executables.drop(executable) ? OK : INVALID_HANDLE; }); }
