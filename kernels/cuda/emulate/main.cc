// Runs the kernels' own sources on the CPU on small shapes against the host's truth. Usage: emulate [order seed ...]; 0 if all is well.
#define CUDA_SHIM
#include "../linear_integer.cu"
#include "../linear_bf16.cu"
#include "../attention.cu"
#include "../lab/device.h"
#include "../lab/checks.h"
#include <ctime>

int main(int count, char** args) {
    shim::catch_faults();
    std::vector<uint64_t> orders = {0, 1, 7};
    if (count > 1) { orders.clear(); for (int i = 1; i < count; i++) orders.push_back(strtoull(args[i], nullptr, 10)); }
    for (uint64_t order : orders) {
        shim::order_seed = order;
        clock_t begin = clock();
#ifdef EMULATE_BRIEFLY
        check_integer(integer_kernels[0], 20, 1088, {9, 140});
        check_bf16(bf16_kernels[2], 20, 1152, {9, 140}, true);
        check_decode(decode_kernels[0], 2, 0, 0.0f, {0, 64, 401});
#else
        for (auto& kernels : integer_kernels) {
            check_quantise(kernels, 5, 320);
            check_integer(kernels, 48, 576, {1, 3, 11});   // a short last slice, half a cta of outputs
            check_integer(kernels, 20, 1088, {9, 140});    // two full slices, outputs not a multiple of 16, two ctas of rows
            check_integer(kernels, 56, 1024, {2, 16});     // whole slices
        }
        for (auto& kernels : bf16_kernels) {
            check_bf16(kernels, 48, 576, {1, 11}, true);
            check_bf16(kernels, 48, 640, {1, 11}, false);
            check_bf16(kernels, 20, 1152, {9, 140}, true);
            check_bf16(kernels, 56, 1024, {2, 16}, true);
        }
        for (auto& kernels : decode_kernels) {
            check_decode(kernels, 2, 0, 0.0f, {0, 15, 16, 64, 401});
            check_decode(kernels, 1, 100, 20.0f, {63, 99, 100, 300});
        }
#endif
        fprintf(stderr, "order %llu: %.1f s\n", (unsigned long long)order, double(clock() - begin) / CLOCKS_PER_SEC);
    }
    printf("emulation: %d checks, %d failed\n", tally.checks, tally.failed);
    return tally.failed != 0;
}
