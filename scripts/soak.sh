#!/usr/bin/env bash
# The long checks, run by hand before something large is called done: scripts/soak.sh [STAGE...]. Some hours on two cores. Stages:
#
#   seeds        every property test with many seeds, the engine's with SEEDS (10000)
#   sim          SEEDS seeds of the simulator, and traces where they are (TRACES, a folder)
#   sanitizer    the kernels' tests under AddressSanitizer
#   fuzz         every fuzz target for FUZZ_SECONDS (600)
#   real-models  64 greedy tokens of every prompt on three real models against transformers
#   repeat       the end-to-end tests RUNS (10) times over
#   smoke        SmolLM2 and the demo family behind the official client, release build
#   quality      how far bf16, int8 and int4 are from f32, here and in llama.cpp
#   speed        one stream against llama.cpp, with one thread and with all
#
# Ends with a table of minutes; logs lie in target/soak-logs.
set -uo pipefail
source "$(dirname "$0")/lib.sh"

SEEDS=${SEEDS:-10000} FUZZ_SECONDS=${FUZZ_SECONDS:-600} RUNS=${RUNS:-10}
TRACES=${TRACES:-$ROOT/../shared/data}
target=${CARGO_TARGET_DIR:-$ROOT/target}
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
export PATH=$ROOT/.venv/bin:$PATH
stages=(seeds sim sanitizer fuzz real-models repeat smoke quality speed)
logs=$target/soak-logs
trap 'exit 130' INT TERM

# The tests state their cases as parts and multiples of proptest's own number; the engine's is a quarter of it. All crates at once,
# so that nothing is built anew with other features.
seeds() {
  PROPTEST_CASES=$((SEEDS * 4)) cargo test --workspace --locked --lib --test text &&
    PROPTEST_CASES=$((SEEDS / 4)) cargo test --workspace --locked --test ops # against a slow reference
}

sim() {
  cargo build -p ashlar --bin ashlar --locked || return
  "$target/debug/ashlar" sim --seeds "$SEEDS" || return
  local trace
  for trace in "$TRACES"/azure-llm-2023/*.csv "$TRACES"/mooncake-fast25/*.jsonl.gz "$TRACES"/servegen/*_rates.csv.gz; do
    [ -e "$trace" ] || continue
    say "-- ${trace##*/}"
    "$target/debug/ashlar" sim --seed 1 --trace "$trace" || return
  done
}

sanitizer() {
  # The stable toolchain has the sanitizer's runtime; only its flag is not stable. One test asks for more memory than there is, and must get an error.
  RUSTC_BOOTSTRAP=1 ASAN_OPTIONS=allocator_may_return_null=1 RUSTFLAGS=-Zsanitizer=address \
    cargo test -p ashlar-kernels --locked --lib --tests --target "$(rustc -vV | sed -n 's/^host: //p')" --target-dir "$target/asan"
}

fuzz() { ASHLAR_FUZZ_SECONDS=$FUZZ_SECONDS cargo test --workspace --locked --test smoke; }

real-models() { scripts/test-real-models.sh all; }

repeat() {
  cargo build --workspace --bins --locked || return
  local run
  for run in $(seq "$RUNS"); do
    say "== run $run of $RUNS"
    ASHLAR_BIN=$target/debug/ashlar python -m pytest -q -p no:cacheprovider tests/e2e || return
  done
}

smoke() { bench/smoke.sh; }

quality() { bench/quality.sh; }

speed() { THREADS=1 bench/single-stream.sh && bench/single-stream.sh; }

[ $# = 0 ] || stages=("$@")
for stage in "${stages[@]}"; do
  declare -F "$stage" >/dev/null || die "no stage $stage: see the head of $0"
done
mkdir -p "$logs"
scripts/setup-tests.sh || exit 1
scripts/fetch-models.sh smollm2 || exit 1
table='' failed=0
for stage in "${stages[@]}"; do
  say "== $stage"
  began=$SECONDS result=ok
  "$stage" </dev/null 2>&1 | tee "$logs/$stage.log"
  [ "${PIPESTATUS[0]}" = 0 ] || { result=FAILED; failed=1; }
  table+=$(awk -v stage="$stage" -v s="$((SECONDS - began))" -v result="$result" 'BEGIN { printf "%-12s %8.1f  %s", stage, s / 60, result }')$'\n'
done
printf '\n%-12s %8s  %s\n%s' stage minutes result "$table"
exit "$failed"
