// What linear layers of all formats share: what a launch is told, and what becomes of its outputs.
#pragma once
#include "numerics.cuh"

/// Rows through a layer, or through a part of one. The host writes it as ten words (src/task.rs); a launch has one by value, or a list on the card.
struct LinearTask {
    const void* weights; const void* scales; const void* minima; const float* bias; // all but the first may be null
    u64 x_at, scales_at, sums_at; // rows, or their codes, with their scales and sums: bytes from the launch's base on
    float* out;
    int rows, n, k, group;
};
/// Rows that are quantised, six words. `group` matters where it is no constant of the kernel.
struct QuantiseTask {
    const float* x;
    u64 codes_at, scales_at, sums_at;
    int rows, k, group, unused;
};

/// The one of a cta: of the list, or the only one. All lanes of a cta read the same.
template <class T> DEVICE T task_of(const T& one, const T* tasks, int index) {
    if (tasks) return tasks[index];
    return one;
}

/// What becomes of outputs: stored, added, or GATE + an activation: that of the first half times the second.
enum Finish { STORE, ADD, GATE };
/// With a gate there are two sides: half of a cta's warps take the first half of the outputs, and the others those that meet them.
DEVICE void finish_output(float* to, float first, float second, int finish) {
    if (finish >= GATE) *to = activate_exact(first, finish - GATE) * second;
    else *to = finish == ADD ? *to + first : first;
}
