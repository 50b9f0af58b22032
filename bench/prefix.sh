#!/usr/bin/env bash
# A prompt that one model has seen, sent to another: time to the first token of 1,000-token prompts on a descendant (B) of SmolLM2-135M-Instruct
# that differs from a second one (A) in the top quarter of its layers only. `cold`: B on a fresh server. `crossed`: B on a fresh server after
# A has answered the same prompts. `same`: B after B itself. Servers alternate; B has to say the same in all.
#
#   bench/prefix.sh     PROMPTS=8 TOKENS=1000 OUTPUT=32 RUNS=5 VARIANTS="cold crossed same" THREADS=<all> KV_FORMAT=bf16
#                       QUICK=0 OUT=target/bench/models NAME=smollm2-prefix PEERS=target/peers
#
# Prints times, counters and the fall in percent (goal: 60), to bench/results/models/NAME.json, and with QUICK=1 to OUT. Weights are those
# of bench/models.sh; PEERS has llama.cpp's tools, which make them. ASHLAR_BIN names a server's binary; BENCH_BIN another that asks.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"
# shellcheck source=peers/servers.sh
source bench/peers/servers.sh
# shellcheck source=descendants.sh
source bench/descendants.sh

prompts=${PROMPTS:-8} tokens=${TOKENS:-1000} output=${OUTPUT:-32} runs=${RUNS:-5} variants=${VARIANTS:-cold crossed same}
threads=${THREADS:-$(nproc)} kv_format=${KV_FORMAT:-bf16} quick=${QUICK:-0} name=${NAME:-smollm2-prefix} model=smollm2
out=$(realpath -m "${OUT:-target/bench/models}")
results=$out/prefix weights=$out/weights
# Models A and B of the zoo of two.
A=hub/m0 B=hub/m1

if [ "$quick" = 1 ]; then runs=1 prompts=2 output=8; fi
for variant in $variants; do [[ $variant =~ ^(cold|crossed|same)$ ]] || die "no such variant: $variant"; done

find_ashlar
rm -rf "$results"
mkdir -p "$results" "$weights"
install_peers "$results" llama
make_descendants "$(base_of_descendants)" 2 shared
file=$weights/shared-2

# ask MODEL REPORT SEED COUNT: so many prompts of that seed, one after another.
ask() {
  "${BENCH_BIN:-$ASHLAR_BIN}" bench load --url "http://127.0.0.1:$port" --model "$1" --requests "$4" --prompt-tokens "$tokens" --output-tokens "$output" \
    --ignore-eos --seed "$3" --warmup 0 --json "$2" --commit "$commit" --note "threads=$threads" --note "weights=$(cat "$file.hash")" \
    --note "load_before=$load" --note "quick=$quick" --note "flags=${ashlar_flags[*]}" >/dev/null
}

measure() { # VARIANT RUN
  local report=$results/$1.$2.json load
  log=${report%.json}.log
  load=$(cut -d' ' -f1 /proc/loadavg)
  say "== $1, run $2 of $runs (load $load)"
  serve ashlar-int8 "$1" "${ashlar_flags[@]}" && wait_loaded 2 || die "the server did not start: see $log"
  # Other prompts warm up both models, so that first touches of memory are charged to nobody.
  ask "$A" "$results/before.tmp" 2 1
  ask "$B" "$results/before.tmp" 3 1
  case $1 in
    crossed) ask "$A" "$results/before.tmp" 1 "$prompts" ;;
    same) ask "$B" "$results/before.tmp" 1 "$prompts" ;;
  esac
  python3 bench/prefix.py counters "http://127.0.0.1:$port/metrics" >"$results/counters.tmp"
  ask "$B" "$report" 1 "$prompts"
  python3 bench/prefix.py count "$report" "$results/counters.tmp" "http://127.0.0.1:$port/metrics"
  end_all
}

[ "$quick" = 1 ] || warn_of_load
for run in $(seq "$runs"); do
  in_turns "$run" $variants
  for variant in "${order[@]}"; do measure "$variant" "$run"; done
done
keep_in models
python3 bench/prefix.py table "$results" "$kept"
