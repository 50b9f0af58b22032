#!/usr/bin/env bash
# Runs the CUDA kernels' own sources on the CPU against the host's truth: scripts/emulate-cuda.sh [ORDER...]. Orders of warps and lanes: 0
# ascending, 1 descending with copies that land at once, others shuffled. Needs g++ on x86-64 and no CUDA. With --planted it also plants
# faults in copies of the sources and expects each to be found.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
command -v g++ >/dev/null || need_packages g++
folder=$ROOT/target/emulate-cuda
mkdir -p "$folder"
if [ "${1:-}" = --planted ]; then shift; kernels/cuda/emulate/planted.sh "$folder/planted"; fi
g++ -O2 -march=x86-64-v3 -ffp-contract=off -std=c++17 -fno-strict-aliasing -w -o "$folder/emulate" kernels/cuda/emulate/main.cc -lpthread
"$folder/emulate" "$@"
g++ -O2 -march=x86-64-v3 -ffp-contract=off -std=c++17 -fno-strict-aliasing -w -o "$folder/chunk" kernels/cuda/emulate/chunk.cc -lpthread
[ $# -gt 0 ] || set -- 0 1 7
"$folder/chunk" "$@"
