#!/usr/bin/env bash
# Checks and measures the CUDA device on a machine with a card: scripts/gpu-check.sh BINARIES OUT. BINARIES is a folder that scripts/gpu-check-build.sh
# made elsewhere: nothing is built here. Run it in the repository, whose tiny models the tests read. OUT gets JSON and logs. What must be right comes first, timings last (of the model in the folder
# GPU_CHECK_MODEL, which scripts/random-model.py makes); one step's failure does not stop the next.
set -uo pipefail
binaries=$1 out=$2
mkdir -p "$out"
log=$out/gpu-check.log
failed=0
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$out/cache}
# NVRTC where the system has none: PyTorch and NVIDIA's own packages bring it.
if ! ldconfig -p | grep -q libnvrtc; then
  folder=$(python3 -c 'import glob, site; print(next(iter(sum((glob.glob(p + "/nvidia/*/lib/libnvrtc.so.*") for p in site.getsitepackages()), [])), ""))' 2>/dev/null)
  [ -n "$folder" ] && export LD_LIBRARY_PATH=$(dirname "$folder")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

# step NAME SECONDS COMMAND...: runs it under a limit, its output in the log and its end on the screen.
step() {
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  printf '== %s\n' "$name" >>"$log"
  timeout "$limit" "$@" >"$out/step.txt" 2>&1
  rc=$?
  cat "$out/step.txt" >>"$log"
  tail -n "${TAIL:-6}" "$out/step.txt"
  printf '%s: rc %d, %d s\n' "$name" "$rc" "$((SECONDS - began))" | tee -a "$log"
  [ "$rc" = 0 ] || failed=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader | tee "$log"
step devices 60 "$binaries/ashlar" devices
# The op set's suite, one case after another as the card is one: the bits of the reference on random inputs, outputs poisoned.
ASHLAR_CARD=0 step ops 240 "$binaries/ops" --test-threads=1
# Models of every family and format, adapters, and the engine in any chunks: the bits of the CPU.
CARGO_MANIFEST_DIR=$PWD/executor/tests ASHLAR_CARD=0 step models 240 "$binaries/executor-tests" --test-threads=1 cards:: goldens::
# How fast whole steps are, against what the card reads in the same run: the shapes of Llama-3-8B with random weights.
if [ -n "${GPU_CHECK_MODEL:-}" ]; then
  zoo=$out/zoo
  for form in int4 int8 keep; do
    step "add $form" 300 "$binaries/ashlar" zoo add "$GPU_CHECK_MODEL" --name "check/$form" --dtype "$form" --raw --zoo "$zoo"
    TAIL=12 step "step $form" 200 "$binaries/ashlar" bench step --device cuda:0 --zoo "$zoo" --model "check/$form" --kv-format bf16 --context 1024 --decode 1,4,16 --prefill 512 --json "$out/step-$form.json"
  done
fi
rm -f "$out/step.txt"
exit $failed
