#!/usr/bin/env bash
# Builds the CUDA lab for Hopper into FOLDER, without a card or an installed toolkit: scripts/gpu-lab-build.sh FOLDER. The compiler comes from
# the Python packages of NVIDIA's toolkit, pinned to 13.0 (what driver 580 takes).
set -euo pipefail
source "$(dirname "$0")/lib.sh"
folder=${1:?a folder to build into}
venv=$ROOT/target/cuda-venv
if [ ! -d "$venv" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
fi
toolkit=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13)
options=(-std=c++17 -O3 -fmad=false -gencode=arch=compute_90a,code=sm_90a -cudart static -L"$toolkit/lib")
mkdir -p "$folder"
for program in lab mma_bits wgmma_rate; do
  "$toolkit/bin/nvcc" "${options[@]}" -diag-suppress 128,177 -Xcompiler -march=x86-64-v3,-ffp-contract=off,-fno-strict-aliasing \
    -Xptxas -v -o "$folder/$program" "kernels/cuda/lab/$program.cu" -lpthread 2>"$folder/$program.ptxas.txt" || { cat "$folder/$program.ptxas.txt" >&2; exit 1; }
done
cp kernels/cuda/lab/torch_bench.py scripts/gpu-lab.sh "$folder/"
say "built into $folder"
