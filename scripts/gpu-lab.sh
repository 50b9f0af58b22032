#!/usr/bin/env bash
# Runs the CUDA lab on a machine with a card: scripts/gpu-lab.sh BINARIES OUT. BINARIES is a folder made by scripts/gpu-lab-build.sh (nothing
# is built here); OUT gets JSON and logs. Correctness comes first, timings last; one step's failure does not stop the next.
set -uo pipefail
binaries=$1 out=$2
mkdir -p "$out"
log=$out/gpu-lab.log
failed=0

# step NAME SECONDS COMMAND...: runs it under a limit, its output in the log and its end on the screen.
step() {
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  printf '== %s\n' "$name" >>"$log"
  timeout "$limit" "$@" >"$out/step.txt" 2>&1
  rc=$?
  cat "$out/step.txt" >>"$log"
  tail -n "${TAIL:-4}" "$out/step.txt"
  printf '%s: rc %d, %d s\n' "$name" "$rc" "$((SECONDS - began))" | tee -a "$log"
  [ "$rc" = 0 ] || failed=1
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv,noheader | tee "$log"
wants() { [ -z "${GPU_LAB_STEPS:-}" ] || [[ " $GPU_LAB_STEPS " == *" $1 "* ]]; }
if wants bits; then step mma_bits 30 "$binaries/mma_bits" "$out/mma_bits.json" "$out/mma_samples.bin"; fi
if wants rate; then TAIL=20 step wgmma_rate 20 "$binaries/wgmma_rate" "$out/wgmma_rate.jsonl"; fi
if wants check; then TAIL=30 step check 60 "$binaries/lab" check; fi
if wants bench; then step bench 90 "$binaries/lab" bench "$out/lab.jsonl"; fi
if wants torch; then step torch 75 python3 "$binaries/torch_bench.py" "$out/torch.jsonl"; fi
if wants profile; then
  step profile 60 ncu --clock-control none --section SpeedOfLight --section WarpStateStats --section LaunchStats --section Occupancy --section MemoryWorkloadAnalysis \
    -k 'regex:linear|decode' "$binaries/lab" profile
fi
if wants sanitizer; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$binaries/lab" quick
  done
fi
rm -f "$out/step.txt"
exit $failed
