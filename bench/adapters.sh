#!/usr/bin/env bash
# Many LoRA adapters at once: all of them over SmolLM2-135M-Instruct, all asked at the same time, served by Ashlar and by vLLM's CPU build, beside the
# base model alone under the same load. Servers take turns; one table, with its goals.
#
#   bench/adapters.sh   SETS="8x16 32x8,16,32,64" VARIANTS="adapters base vllm" CELLS="closed decode"
#                       RUNS=3 THREADS=<all> KV_FORMAT=bf16 QUICK=0 OUT=target/bench/adapters NAME=smollm2 PEERS=target/peers
#
# NxR,R,...  N adapters, whose ranks come in turn, over the seven matrices of each layer (peers/make_adapters.py)
# adapters   Ashlar with the base in int8 and the adapters over it
# base       Ashlar with the base only, which all streams ask
# vllm       vLLM with the same adapters over the same weights in its own format; starts once for each set, which takes minutes, and is halted in between
#
# closed     a stream for each adapter, 128 tokens in, 64 out, 6 requests each: its next request when it has its answer
# decode     the same with 16 in, 128 out, 3 requests each
#
# Before the loads of a set every adapter is asked one thing, alone: no two may say the same, nor what the base says. Then Ashlar gets the requests of
# `closed` one by one: each text has to be that of every run of the load.
# ASHLAR_BIN names a server's binary; BENCH_BIN another that asks. The JSON of each run lies in OUT, with the adapters; the
# comparison goes to bench/results/adapters/NAME.json, and with QUICK=1, which is short and shows only that all works, to OUT.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"
# shellcheck source=peers/servers.sh
source bench/peers/servers.sh
# shellcheck source=descendants.sh
source bench/descendants.sh

read -ra sets <<<"${SETS:-8x16 32x8,16,32,64}"
variants=${VARIANTS:-adapters base vllm} cells=${CELLS:-closed decode}
runs=${RUNS:-3} threads=${THREADS:-$(nproc)} kv_format=${KV_FORMAT:-bf16} quick=${QUICK:-0} name=${NAME:-smollm2} model=smollm2
out=$(realpath -m "${OUT:-target/bench/adapters}")
results=$out/adapters weights=$out/weights
# Longest that one load may take: vLLM with 32 adapters may need a third of an hour.
RUN_SECONDS=3600

[ "$quick" != 1 ] || runs=1
for set in "${sets[@]}"; do [[ $set =~ ^([2-9]|[1-9][0-9])x(8|16|32|64)(,(8|16|32|64))*$ ]] || die "no such set, as 8x16 or 32x8,16,32,64: $set"; done
for variant in $variants; do [[ $variant =~ ^(adapters|base|vllm)$ ]] || die "no such variant: $variant"; done
for cell in $cells; do [[ $cell =~ ^(closed|decode)$ ]] || die "no such cell: $cell"; done

find_ashlar
rm -rf "$results"
mkdir -p "$results/$model" "$weights"
: >"$results/peers.tsv"
# Reads the file that shapes come from.
python=$(bench/peers/gguf.sh)
if [[ " $variants " == *" vllm "* ]]; then install_peers "$results" vllm; fi

# make_adapters SET: their folders, and the zoo of the base with them; sets `adapters`, `zoo` and `adapters_hash`.
make_adapters() {
  local number recipe
  adapters=$weights/adapters-$1 zoo=$weights/zoo-$1
  recipe=$(sha256_of bench/peers/make_adapters.py)
  if [ "$(cat "$adapters/recipe.txt" 2>/dev/null)" != "$recipe" ]; then
    say "making adapters ($1)"
    rm -rf "$adapters" "$adapters.partial" "$zoo"
    "$python" bench/peers/make_adapters.py "$source" "$adapters.partial" "${1#*x}" "${1%x*}" >"$weights/adapters-$1.txt"
    echo "$recipe" >"$adapters.partial/recipe.txt"
    mv "$adapters.partial" "$adapters"
  fi
  adapters_hash=$(sha256_of "$weights/adapters-$1.txt")
  if [ -d "$zoo" ]; then return; fi
  rm -rf "$zoo.partial"
  add() { "$ASHLAR_BIN" zoo add "$@" --zoo "$zoo.partial" >/dev/null 2>"$weights/zoo-add.log" || die "$(tail -1 "$weights/zoo-add.log")"; }
  add "$source" --dtype int8 --name "hub/$model"
  for number in $(seq 0 $((${1%x*} - 1))); do add "$adapters/$number" --base "hub/$model" --name "hub/m$number"; done
  mv "$zoo.partial" "$zoo"
}

# begin VARIANT SET: the server for it runs.
begin() {
  local flags=() number ranks
  case $1 in
    adapters) file=$zoo ;;
    base) weigh ashlar-int8 "$source" ;;
    vllm)
      weigh vllm "$source"
      ranks=$(tr , '\n' <<<"${2#*x}" | sort -n | tail -1)
      flags=(--enable-lora --max-loras "${2%x*}" --max-lora-rank "$ranks" "${vllm_flags[@]}" --lora-modules)
      for number in $(seq 0 $((${2%x*} - 1))); do flags+=("{\"name\": \"hub/m$number\", \"path\": \"$adapters/$number\"}"); done
      serve vllm "vllm-$2" "${flags[@]}"
      return
      ;;
  esac
  serve ashlar-int8 "$1" "${ashlar_flags[@]}" || return
  [ "$1" = base ] || wait_loaded "${2%x*}"
}

# ask VARIANT SET CELL REPORT STREAMS: the cell's load.
ask() {
  local variant=$1 count=${2%x*} input=128 output=64 requests number pid
  requests=$((count * 6))
  if [ "$3" = decode ]; then input=16 output=128 requests=$((count * 3)); fi
  if [ "$quick" = 1 ]; then requests=$count output=$((output / 4)); fi
  local args=(--url "http://127.0.0.1:$port" --in-turn --ignore-eos --seed 1 --warmup 1 --json "$4" --concurrency "$5" --requests "$requests"
    --timeout "$RUN_SECONDS" --prompt-tokens "$input" --output-tokens "$output" --note "threads=$threads" --note "load_before=$load" --note "probed_before=${probed:-}"
    --note "quick=$quick" --note "adapters=$adapters_hash")
  if [ "$variant" = base ]; then
    args+=(--model "hub/$model")
  else
    for number in $(seq 0 $((count - 1))); do args+=(--model "hub/m$number"); done
  fi
  if [ "$variant" = vllm ]; then
    args+=(--note "peer=${version_of[vllm]}" --note "flags=${vllm_flags[*]}")
  else
    args+=(--commit "$commit" --note "flags=${ashlar_flags[*]}")
  fi
  for pid in $(tree_of "$server"); do args+=(--server-pid "$pid"); done
  timeout "$RUN_SECONDS" "${BENCH_BIN:-$ASHLAR_BIN}" bench load "${args[@]}" | sed -n '3,12p'
}

measure() { # SET CELL VARIANT RUN
  local report=$results/sets/$1/$2/$3.$4.json load failed=''
  log=${report%.json}.log
  mkdir -p "$(dirname "$report")"
  load=$(cut -d' ' -f1 /proc/loadavg)
  say "== $1, $2, $3, run $4 of $runs (load $load)"
  begin "$3" "$1" || { end_server; say "$3 did not start: see $log"; return 0; }
  local held=("$server" "$report" "$log" "$file")
  [ "$3" = vllm ] || held+=("http://127.0.0.1:$port/metrics")
  ask "$3" "$1" "$2" "$report" "${1%x*}" || failed=yes
  [ -n "$failed" ] || python3 bench/peers/process.py held "${held[@]}" || failed=yes
  if [ -n "$failed" ]; then
    rm -f "$report"
    say "the load on $3 failed: see $log"
    end_server
  elif [ "$3" = vllm ]; then
    finish vllm "vllm-$1"
  else
    end_server
  fi
}

end_server() {
  [ -z "$server" ] || end_tree "$server"
  server=''
}

# check SET: what adapters say, and what they say alone.
check() {
  local folder=$results/sets/$1 load number names=("hub/$model")
  log=$folder/alone.log
  mkdir -p "$folder"
  load=$(cut -d' ' -f1 /proc/loadavg)
  for number in $(seq 0 $((${1%x*} - 1))); do names+=("hub/m$number"); done
  say "== $1: what adapters say alone"
  begin adapters "$1" || die "the server did not start: see $log"
  python3 bench/adapters.py differ "http://127.0.0.1:$port" "$folder/differ.json" "${names[@]}"
  ask adapters "$1" closed "$folder/alone.json" 1 || die "the load failed: see $log"
  end_server
}

[ "$quick" = 1 ] || warn_of_load
source=$(source_of "$model")
for set in "${sets[@]}"; do
  make_adapters "$set"
  check "$set"
  for cell in $cells; do
    for run in $(seq "$runs"); do
      in_turns "$run" $variants
      for variant in "${order[@]}"; do steadily measure "$set" "$cell" "$variant" "$run"; done
    done
  done
  end_all
done
keep_in adapters
python3 bench/adapters.py table "$results" "$kept"
