#!/usr/bin/env bash
# Ashlar against its peers on the same weights: llama.cpp's server, vLLM's CPU build, mistral.rs. Installs what is missing into
# target/peers, says what cannot be had and goes on without it, lets the servers take turns, and prints one table.
#
#   bench/peers/run.sh     MODELS="smollm2 qwen" CELLS="decode prefill streams16 streams32 memory" PEERS_LIST="llama vllm mistralrs"
#                          RUNS=3 THREADS=<all> QUICK=0 KV_FORMAT=bf16 OUT=target/bench/peers SKIP="llama-bf16"
#
# decode     one stream, 128 tokens in, 128 out: int8 against Q8_0; int4 against Q4_0 and Q4_1; Q8_0 and Q4_0 of one file in both
# prefill    one stream, 512 in, 2 out, counted to the first: int8 against the peers' formats
# streamsN   N clients in a closed loop, 128 in, 64 out
# memory     what stays resident after the load of streams32, without weights and KV pages
#
# SKIP leaves out what is known to be slower than another of the same peer. Each server is alone: one is stopped before the next starts,
# forwards in odd runs and backwards in even ones. vLLM, which compiles for minutes, starts once for each model and is halted (SIGSTOP) while it is not its turn. Every prompt of a load is another one, and
# no server answers from a cache of prompts. ASHLAR_BIN names a binary, and ASHLAR_COMMIT what it was built from; without it
# the release build is made. KV_FORMAT is how Ashlar holds keys and values; llama.cpp has f16. ASHLAR_FLAGS, LLAMA_FLAGS and VLLM_FLAGS are added to the servers'. QUICK=1 asks a few requests, to see that all works: its figures mean nothing.
set -euo pipefail
# shellcheck source=../../scripts/lib.sh
source "$(dirname "$0")/../../scripts/lib.sh"
# shellcheck source=servers.sh
source bench/peers/servers.sh

models=${MODELS:-smollm2 qwen} cells=${CELLS:-decode prefill streams16 streams32 memory}
peers=${PEERS_LIST:-llama vllm mistralrs} runs=${RUNS:-3} threads=${THREADS:-$(nproc)} quick=${QUICK:-0} skip=" ${SKIP:-} " kv_format=${KV_FORMAT:-bf16}
out=$(realpath -m "${OUT:-target/bench/peers}")
results=$out/results weights=$out/weights
LOAD_SECONDS=1800
# Context of a stream in the peers' caches: 128 in, 64 out, and some.
STREAM_TOKENS=256

[ "$runs" -ge 3 ] || die "RUNS must be at least 3"
for cell in $cells; do
  [[ $cell =~ ^(decode|prefill|streams[1-9][0-9]?|memory)$ ]] || die "no such cell: $cell"
done

# What is compared in a cell; Ashlar beside the peer that it is held against.
variants_of() {
  case $1 in
    decode) echo ashlar-int8 ashlar-q8_0 llama-q8_0 ashlar-int4 ashlar-q4_0 llama-q4_0 llama-q4_1 ;;
    prefill) echo ashlar-int8 llama-bf16 llama-q8_0 llama-q4_0 vllm mistralrs ;;
    streams*) echo ashlar-int8 llama-bf16 llama-q8_0 llama-q4_0 vllm mistralrs ;;
    memory) echo ashlar-int8 llama-q8_0 ashlar-int4 llama-q4_0 ;;
  esac
}

streams_of() {
  case $1 in
    streams*) echo "${1#streams}" ;;
    memory) echo 32 ;;
    *) echo 1 ;;
  esac
}

# --- what must be there

find_ashlar
rm -rf "$results"
mkdir -p "$results" "$weights"
# shellcheck disable=SC2086 # a list of words
install_peers "$results" $peers

# --- servers

# begin VARIANT CELL: the server for it runs, at its best settings known here.
begin() {
  local streams flags=()
  streams=$(streams_of "$2")
  case $1 in
    ashlar-*)
      flags=("${ashlar_flags[@]}")
      # Pages taken ahead are pages, but no figure of the server's tells how many.
      kv_touch_bytes=''
      [ "$2" != memory ] || kv_touch_bytes=0
      ;;
    llama-*)
      # The context is of all slots together.
      local context=$((streams * STREAM_TOKENS)) told=3
      [ "$streams" != 1 ] || context=1024
      [ "$2" != memory ] || told=4 # tells the size of its cache
      flags=(--parallel "$streams" --ctx-size "$context" --verbosity "$told" "${llama_flags[@]}")
      ;;
    vllm) flags=("${vllm_flags[@]}") ;;
    mistralrs) flags=(--max-seqs 32) ;;
  esac
  serve "$1" "$1" "${flags[@]}"
}

# --- the loads

measure() { # CELL VARIANT RUN SOURCE
  local cell=$1 variant=$2 run=$3 streams requests input=128 output=128 warmup=2 name=hub/$model report load pid
  report=$results/$model/$cell/$variant.$run.json
  log=${report%.json}.log
  streams=$(streams_of "$cell")
  case $cell in
    decode) requests=8 ;;
    prefill) requests=12 input=512 output=2 ;;
    *) requests=$((streams * 4)) output=64 ;;
  esac
  if [ "$quick" = 1 ]; then
    requests=$((streams == 1 ? 2 : streams)) warmup=1
    [ "$cell" = prefill ] || output=8
  fi
  [ "$variant" != mistralrs ] || name=default
  mkdir -p "$(dirname "$report")"
  weigh "$variant" "$4" || { say "no weights for $variant"; return 0; }
  load=$(cut -d' ' -f1 /proc/loadavg)
  say "== $model, $cell, $variant, run $run of $runs (load $load)"
  begin "$variant" "$cell" || { say "$variant did not start: see $log"; return 0; }
  local args=(--url "http://127.0.0.1:$port" --model "$name" --concurrency "$streams" --requests "$requests" --prompt-tokens "$input"
    --output-tokens "$output" --ignore-eos --seed 1 --warmup "$warmup" --json "$report"
    --note "threads=$threads" --note "load_before=$load" --note "probed_before=${probed:-}" --note "weights=$hash" --note "quick=$quick")
  for pid in $(tree_of "$server"); do args+=(--server-pid "$pid"); done
  case $variant in
    ashlar-*) args+=(--commit "$commit" --note "flags=${ashlar_flags[*]}") ;;
    llama-*) args+=(--extra '{"cache_prompt": false}' --note "peer=${version_of[llama]}" --note "flags=${llama_flags[*]}") ;;
    *) args+=(--note "peer=${version_of[$variant]}") ;;
  esac
  local held=("$server" "$report" "$log" "$file") failed=
  [[ $variant != ashlar-* ]] || held+=("http://127.0.0.1:$port/metrics")
  timeout "$LOAD_SECONDS" "$ASHLAR_BIN" bench load "${args[@]}" || failed=yes
  [ -n "$failed" ] || python3 bench/peers/process.py held "${held[@]}" || failed=yes
  if [ -n "$failed" ]; then
    rm -f "$report"
    say "the load on $variant failed: see $log"
    end_tree "$server"
    server=''
  else
    finish "$variant" "$variant"
  fi
}

[ "$quick" = 1 ] || warn_of_load

for model in $models; do
  source=$(source_of "$model")
  rm -rf "$weights/$model"/zoo-* # another build of Ashlar may store them otherwise
  for cell in $cells; do
    for run in $(seq "$runs"); do
      wanted=()
      for variant in $(variants_of "$cell"); do
        [[ $skip == *" $variant "* ]] || wanted+=("$variant")
      done
      in_turns "$run" "${wanted[@]}"
      for variant in "${order[@]}"; do steadily measure "$cell" "$variant" "$run" "$source"; done
    done
  done
  end_all
done
python3 bench/peers/table.py "$results"
