#!/usr/bin/env bash
# Runs all tests, real components included, and installs what they need: scripts/test.sh [STAGE...]. Without names all stages
# run, in order of cost. Prints the minutes of each stage and the count of tests; logs lie in target/test-logs.
set -uo pipefail
source "$(dirname "$0")/lib.sh"

export PATH=$ROOT/.venv/bin:$PATH
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
MINUTES_MAX=${ASHLAR_TEST_MINUTES_MAX:-45}
unset ASHLAR_TEST_MINUTES_MAX # it is no key of the program's configuration
target=${CARGO_TARGET_DIR:-$ROOT/target}
logs=$target/test-logs
wanted=("$@")
names=() results=() seconds=()
failed_stages=0
trap 'exit 130' INT TERM

# stage NAME COMMAND...: runs it, keeps its time, result and log.
stage() {
  local name=$1 began=$SECONDS result=ok
  shift
  if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return 0; fi
  printf '\n== %s\n' "$name"
  "$@" </dev/null 2>&1 | tee "$logs/$name.log"
  if [ "${PIPESTATUS[0]}" != 0 ]; then
    result=FAILED
    failed_stages=$((failed_stages + 1))
  fi
  names+=("$name") results+=("$result") seconds+=($((SECONDS - began)))
  [ "$result" = ok ]
}

# Nothing after it can tell anything if it fails.
stage_or_stop() { stage "$@" || { summary; exit 1; }; }

# count WORD: the tests that cargo test, nextest and pytest counted as WORD in their closing lines.
count() {
  cat "$logs"/*.log 2>/dev/null | sed 's/\x1b\[[0-9;]*m//g' \
    | grep -E '^test result: |^ *Summary \[|^=* ?[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s' \
    | grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'
}

summary() {
  local index total=$SECONDS
  printf '\n%-10s %8s  %s\n' stage minutes result
  for index in "${!names[@]}"; do
    printf '%-10s %8s  %s\n' "${names[index]}" "$(minutes "${seconds[index]}")" "${results[index]}"
  done
  printf '%-10s %8s\n' all "$(minutes "$total")"
  if [ "$total" -gt $((MINUTES_MAX * 60)) ]; then
    say "took more than $MINUTES_MAX minutes"
    failed_stages=$((failed_stages + 1))
  fi
  # A failed stage without a failed test (a lint, a build) counts as one failure.
  local failed=$(($(count failed) + $(count error)))
  [ "$failed" -ge "$failed_stages" ] || failed=$failed_stages
  printf '\n%s passed, %s failed, %s skipped\n' "$(count passed)" "$failed" "$(($(count skipped) + $(count ignored)))"
}

minutes() { awk -v s="$1" 'BEGIN { printf "%.1f", s / 60 }'; }

format() { cargo fmt --all --check; }

lint() { cargo clippy --workspace --all-targets --locked -- -D warnings; }

deny() {
  if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; else echo "cargo-deny is not installed: left out"; fi
}

# Binaries and tests in one call and with one set of features, so that no dependency is built twice.
build() { cargo build --workspace --bins --tests --bench plan --locked; }

# NVRTC, with which the tests of the CUDA device compile every kernel; ASHLAR_NVRTC says that it must be there.
with_nvrtc() {
  local folder
  for folder in "$ROOT"/.venv/lib/python3*/site-packages/nvidia/cu13/lib; do
    [ -d "$folder" ] || { echo "NVRTC is not in .venv: its tests are left out"; return; }
    export ASHLAR_NVRTC=1 LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  done
}

# The fuzz targets are ordinary tests of a few seconds; scripts/soak.sh gives them longer.
tests() {
  with_nvrtc
  if command -v cargo-nextest >/dev/null; then
    cargo nextest run --workspace --locked --no-fail-fast
  else
    cargo test --workspace --lib --bins --tests --locked --no-fail-fast
  fi
}

doctests() { cargo test --doc --workspace --locked; }

# Gated by retired instructions, which are the same however busy the machine is.
planning() { SEQUENCES=2048 scripts/planning-cost.sh; }

# The sources of the CUDA kernels, on the CPU and in one order of warps; scripts/emulate-cuda.sh alone takes three.
cuda() {
  if ! grep -qw avx2 /proc/cpuinfo; then echo "the emulation needs AVX2: left out"; return; fi
  scripts/emulate-cuda.sh 0
}

chart() { python -m pytest -q -p no:cacheprovider helm/tests; }

# Two files at a time: most of a test is waiting for leases, starts and streams.
end_to_end() { ASHLAR_BIN=$target/debug/ashlar python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile tests/e2e; }

rm -rf "$logs"
mkdir -p "$logs"
stage_or_stop set-up scripts/setup-tests.sh
stage_or_stop models scripts/fetch-models.sh smollm2
stage format format
stage lint lint
stage deny deny
stage_or_stop build build
stage tests tests
stage doctests doctests
stage planning planning
stage cuda cuda
stage chart chart
stage e2e end_to_end
summary
[ "$failed_stages" = 0 ]
