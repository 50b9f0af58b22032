#!/usr/bin/env bash
# Many models at once: descendants of SmolLM2-135M-Instruct that share three quarters of their layers, all asked at the same time, served by one
# Ashlar that shares, by one Ashlar that cannot, and by one llama.cpp server for each model. Servers take turns; one table, with its goals.
#
#   bench/models.sh     COUNTS="8 16" VARIANTS="shared alone llama@1" CELLS="closed decode open-alone open-llama"
#                       RUNS=3 THREADS=<all> KV_FORMAT=bf16 QUICK=0 OUT=target/bench/models NAME=smollm2 PEERS=target/peers
#
# shared     Ashlar with the descendants as they are
# alone      Ashlar with the same descendants stored so that they have nothing in common (peers/descendants.py): sharing off.
#            Each answers as it does in `shared`, to the bit, and every run is held to that
# llama@T    a llama.cpp server of T threads for each model, from the same weights as Q8_0. With two threads each on two cores they spin
#            against each other and are many times slower
#
# closed     a stream for each model, 128 tokens in, 64 out: its next request when it has its answer
# decode     the same with 16 in, 128 out
# open-X     Poisson arrivals over all models, 128 in, 64 out, at 0.8 of the requests/s that X (alone, or the best of llama) had in
#            `closed`; or at X requests/s where X is a number
#
# Weights (8 GB for 16 models, minutes) are made where they are not there yet; with QUICK=1 those of 2 models, unless COUNTS says otherwise.
# ASHLAR_BIN names a server's binary; BENCH_BIN another that asks.
# The JSON of each run lies in OUT; the comparison goes to bench/results/models/NAME.json, and with QUICK=1, which is short and shows only that all works, to OUT.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"
# shellcheck source=peers/servers.sh
source bench/peers/servers.sh
# shellcheck source=descendants.sh
source bench/descendants.sh

counts_default="8 16"
[ "${QUICK:-0}" != 1 ] || counts_default=2
read -ra counts <<<"${COUNTS:-$counts_default}"
variants=${VARIANTS:-shared alone llama@1} cells=${CELLS:-closed decode open-alone open-llama}
runs=${RUNS:-3} threads=${THREADS:-$(nproc)} kv_format=${KV_FORMAT:-bf16} quick=${QUICK:-0} name=${NAME:-smollm2} model=smollm2
out=$(realpath -m "${OUT:-target/bench/models}")
results=$out/results weights=$out/weights
# Longest that one load may take; share of a server's closed rate that an open load has.
RUN_SECONDS=1800 OPEN_SHARE=0.8
# Tokens of a place for a request, here as in llama.cpp.
PLACE_TOKENS=256

[ "$quick" != 1 ] || runs=1
for count in "${counts[@]}"; do [[ $count =~ ^([2-9]|[12][0-9]|3[0-2])$ ]] || die "no such count of models, 2 to 32: $count"; done
for variant in $variants; do [[ $variant =~ ^(shared|alone|llama@[1-9][0-9]*)$ ]] || die "no such variant: $variant"; done
for cell in $cells; do [[ $cell =~ ^(closed|decode|open-(alone|llama|[0-9]+([.][0-9]+)?))$ ]] || die "no such cell: $cell"; done

find_ashlar
rm -rf "$results"
mkdir -p "$results" "$weights"
: >"$results/peers.tsv"
# Also for what makes the weights.
install_peers "$results" llama
[ -n "${version_of[llama]:-}" ] || die "needs llama.cpp's tools to make the descendants"

# serve_each COUNT THREADS SLOTS: a llama.cpp server for each model; sets `server` to all of them and `targets` to where they are.
serve_each() {
  local number all=() logs=$log
  targets=()
  for number in $(seq 0 $(($1 - 1))); do
    port=$(free_port) log=$logs.$number
    bench/peers/llama.sh serve "$weights/gguf/$number.gguf" "$2" "$port" --alias "hub/m$number" --no-kv-unified --cache-ram 0 --parallel "$3" \
      --ctx-size $(($3 * PLACE_TOKENS)) "${llama_flags[@]}" >"$log" 2>&1 &
    all+=("$!")
    server=${all[*]}
    targets+=("--target" "hub/m$number=http://127.0.0.1:$port")
  done
  local target
  for target in "${targets[@]}"; do
    [[ $target == hub/* ]] || continue
    number=${target%%=*} number=${number#hub/m} log=$logs.$number server=${all[$number]}
    wait_ready "${target#*=}/health" || { server=${all[*]}; end_all; return 1; }
  done
  server=${all[*]} log=$logs
  cat "$logs".* >"$logs"
}

# rate_of CELL COUNT: requests a second of an open load.
rate_of() {
  local of=${1#open-}
  if [[ $of =~ ^[0-9] ]]; then echo "$of"; else python3 bench/models.py rate "$results/$2/closed" "$of" "$OPEN_SHARE"; fi
}

measure() { # COUNT CELL VARIANT RUN
  local count=$1 cell=$2 variant=$3 run=$4 report=$results/$1/$2/$3.$4.json input=128 output=64 requests=$(($1 * 6)) slots=1 load failed='' number pid flags=()
  log=${report%.json}.log
  mkdir -p "$(dirname "$report")"
  targets=()
  local args=(--in-turn --ignore-eos --seed 1 --warmup 1 --json "$report")
  case $cell in
    decode) input=16 output=128 requests=$((count * 3)) ;;
    open-*) slots=4 ;;
  esac
  if [ "$quick" = 1 ]; then requests=$count output=$((output / 4)); fi
  case $cell in
    open-*) args+=(--rate "$(rate_of "$cell" "$count")") ;;
    *) args+=(--concurrency "$count") ;;
  esac
  load=$(cut -d' ' -f1 /proc/loadavg)
  say "== $count models, $cell, $variant, run $run of $runs (load $load)"
  case $variant in
    llama@*)
      serve_each "$count" "${variant#*@}" "$slots" || { say "$variant did not start: see $log"; return 0; }
      file=$weights/gguf-$count
      args+=("${targets[@]}" --extra '{"cache_prompt": false}' --note "peer=${version_of[llama]}" --note "flags=${llama_flags[*]}")
      ;;
    *)
      file=$weights/$variant-$count
      # Pages for as many tokens as all llama.cpp servers together have places for.
      mapfile -t flags < <(pages_for $((count * slots * PLACE_TOKENS)))
      flags+=("${ashlar_flags[@]}")
      serve ashlar-int8 "$variant" "${flags[@]}" && wait_loaded "$count" || { end_all; say "$variant did not start: see $log"; return 0; }
      args+=(--url "http://127.0.0.1:$port" --commit "$commit" --note "flags=${flags[*]}")
      ;;
  esac
  local held=("${server// /,}" "$report" "$log" "$file")
  [[ $variant == llama@* ]] || held+=("http://127.0.0.1:$port/metrics")
  for number in $(seq 0 $((count - 1))); do args+=(--model "hub/m$number"); done
  for pid in $server; do args+=(--server-pid "$pid"); done
  args+=(--requests "$requests" --prompt-tokens "$input" --output-tokens "$output" --note "threads=$threads" --note "load_before=$load" --note "quick=$quick"
    --note "weights=$(cat "$file.hash")")
  timeout "$RUN_SECONDS" "${BENCH_BIN:-$ASHLAR_BIN}" bench load "${args[@]}" | sed -n '3,12p' || failed=yes
  [ -n "$failed" ] || python3 bench/peers/process.py held "${held[@]}" || failed=yes
  if [ -n "$failed" ]; then
    rm -f "$report"
    say "the load on $variant failed: see $log"
  fi
  end_all
}

[ "$quick" = 1 ] || warn_of_load
base=$(base_of_descendants)
for count in "${counts[@]}"; do
  make_descendants "$base" "$count" shared
  [[ " $variants" != *" alone"* ]] || make_descendants "$base" "$count" alone
  for cell in $cells; do
    for run in $(seq "$runs"); do
      in_turns "$run" $variants
      for variant in "${order[@]}"; do measure "$count" "$cell" "$variant" "$run"; done
    done
  done
done
keep_in models
python3 bench/models.py table "$results" "$kept"
