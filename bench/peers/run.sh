#!/usr/bin/env bash
# Ashlar against its peers on the same weights: llama.cpp's server, vLLM's CPU build, mistral.rs. Installs what is missing into
# target/peers, says what cannot be had and goes on without it, lets the servers take turns, and prints one table.
#
#   bench/peers/run.sh     MODELS="smollm2 qwen" CELLS="decode prefill streams16 streams32 memory" PEERS_LIST="llama vllm mistralrs"
#                          RUNS=3 THREADS=<all> QUICK=0 KV_FORMAT=bf16 OUT=target/bench/peers SKIP="llama-bf16"
#
# decode     one stream, 128 tokens in, 128 out: int8 against Q8_0; int4 against Q4_0 and Q4_1
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

models=${MODELS:-smollm2 qwen} cells=${CELLS:-decode prefill streams16 streams32 memory}
peers=${PEERS_LIST:-llama vllm mistralrs} runs=${RUNS:-3} threads=${THREADS:-$(nproc)} quick=${QUICK:-0} skip=" ${SKIP:-} " kv_format=${KV_FORMAT:-bf16}
out=$(realpath -m "${OUT:-target/bench/peers}")
results=$out/results weights=$out/weights
read -ra ashlar_flags <<<"${ASHLAR_FLAGS:-}"
read -ra llama_flags <<<"${LLAMA_FLAGS:-}"
read -ra vllm_flags <<<"${VLLM_FLAGS:-}"
given_commit=${ASHLAR_COMMIT:-}
# The server takes what begins like its settings for settings, and refuses those that it does not know.
unset ASHLAR_COMMIT ASHLAR_FLAGS
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
READY_SECONDS=${READY_SECONDS:-900} LOAD_SECONDS=1800
# Context of a stream in the peers' caches: 128 in, 64 out, and some.
STREAM_TOKENS=256

[ "$runs" -ge 3 ] || die "RUNS must be at least 3"
for cell in $cells; do
  [[ $cell =~ ^(decode|prefill|streams[1-9][0-9]?|memory)$ ]] || die "no such cell: $cell"
done

# What is compared in a cell; Ashlar beside the peer that it is held against.
variants_of() {
  case $1 in
    decode) echo ashlar-int8 llama-q8_0 ashlar-int4 llama-q4_0 llama-q4_1 ;;
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

if [ -n "${ASHLAR_BIN:-}" ]; then
  commit=${given_commit:-binary-$(sha256sum "$ASHLAR_BIN" | cut -c1-12)}
else
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
  if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit+=-changed; fi
fi

rm -rf "$results"
mkdir -p "$results" "$weights"
declare -A version_of=()
for peer in $peers; do
  if told=$("bench/peers/$peer.sh" install 2> >(tee "$results/$peer.install.log" >&2)); then
    version_of[$peer]=$told
  else
    told=$(grep -m1 '^error: ' "$results/$peer.install.log" || tail -1 "$results/$peer.install.log")
    told="absent: ${told#error: }"
    say "going on without $peer: $told"
  fi
  printf '%s\t%s\n' "$peer" "$told" >>"$results/peers.tsv"
done

sha256_of() { sha256sum "$1" | cut -c1-16; }

# weigh VARIANT SOURCE: makes its weights where they are not there yet; sets `file` and `hash`.
weigh() {
  local variant=$1 source=$2 folder=$weights/$model kind=${1#*-}
  mkdir -p "$folder"
  case $variant in
    ashlar-*)
      file=$folder/zoo-$kind
      if [ ! -d "$file" ]; then
        "$ASHLAR_BIN" zoo add "$source" --name "hub/$model" --dtype "$kind" --zoo "$file.partial" >&2
        mv "$file.partial" "$file"
      fi
      hash=$("$ASHLAR_BIN" zoo show "hub/$model" --zoo "$file" | awk '$1 == "chain" { print substr($2, 1, 16) }')
      ;;
    llama-*)
      file=$folder/$kind.gguf
      [ -f "$file" ] || bench/peers/llama.sh requantise "$source" "$file" "${kind^^}"
      hash=$(sha256_of "$file")
      ;;
    vllm | mistralrs)
      local dtype=float32
      [ "$variant" = mistralrs ] || dtype=$(bench/peers/vllm.sh dtype)
      file=$folder/$dtype
      [ -d "$file" ] || VLLM_DTYPE=$dtype bench/peers/vllm.sh folder "$source" "$file"
      hash=$(sha256_of "$file/model.safetensors")
      ;;
  esac
}

# --- servers: `server` is the process that runs now, `sleeping` the halted vLLM

server='' sleeping='' sleeping_port='' port='' log=''

tree_of() { python3 bench/peers/process.py tree "$1" 2>/dev/null || true; }

end_tree() { # PID
  local pids pid
  mapfile -t pids < <(tree_of "$1")
  # A process that was halted cannot hear that it should end.
  for pid in "${pids[@]}"; do kill -CONT "$pid" 2>/dev/null || true; done
  kill "$1" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  wait "$1" 2>/dev/null || true
}

end_all() {
  [ -z "$server" ] || end_tree "$server"
  [ -z "$sleeping" ] || end_tree "$sleeping"
  server='' sleeping=''
}
trap end_all EXIT
trap 'exit 130' INT TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_ready() { # URL
  local until=$((SECONDS + READY_SECONDS))
  while [ $SECONDS -lt $until ]; do
    if python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)' "$1" 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || break
    sleep 0.2
  done
  tail -5 "$log" >&2
  return 1
}

# begin VARIANT CELL: the server for it runs, at its best settings known here.
begin() {
  local variant=$1 streams ready=/health
  streams=$(streams_of "$2")
  if [ "$variant" = vllm ] && [ -n "$sleeping" ]; then
    local pid
    for pid in $(tree_of "$sleeping"); do kill -CONT "$pid"; done
    server=$sleeping port=$sleeping_port log=$results/$model/vllm.log sleeping=''
    return
  fi
  port=$(free_port)
  case $variant in
    ashlar-*)
      ASHLAR_EXECUTOR_THREADS=$threads ASHLAR_EXECUTOR_KV_FORMAT=$kv_format \
        "$ASHLAR_BIN" serve --zoo "$file" --listen "127.0.0.1:$port" "${ashlar_flags[@]}" >"$log" 2>&1 &
      ready=/ready
      ;;
    llama-*)
      # The context is of all slots together. A buffer that the slots share, and prompts kept in memory, only cost.
      local context=$((streams * STREAM_TOKENS)) told=3
      [ "$streams" != 1 ] || context=1024
      [ "$2" != memory ] || told=4 # tells the size of its cache
      bench/peers/llama.sh serve "$file" "$threads" "$port" --alias "hub/$model" --parallel "$streams" --ctx-size "$context" \
        --no-kv-unified --cache-ram 0 --verbosity "$told" "${llama_flags[@]}" >"$log" 2>&1 &
      ;;
    vllm)
      log=$results/$model/vllm.log
      say "vLLM starts, which takes minutes"
      bench/peers/vllm.sh serve "$file" "$threads" "$port" --served-model-name "hub/$model" --no-enable-prefix-caching \
        "${vllm_flags[@]}" >"$log" 2>&1 &
      ;;
    mistralrs) bench/peers/mistralrs.sh serve "$file" "$threads" "$port" --max-seqs 32 >"$log" 2>&1 & ;;
  esac
  server=$!
  wait_ready "http://127.0.0.1:$port$ready" || { end_tree "$server"; server=''; return 1; }
}

# finish VARIANT: it no longer takes part.
finish() {
  local pid
  if [ "$1" = vllm ]; then
    for pid in $(tree_of "$server"); do kill -STOP "$pid"; done
    sleeping=$server sleeping_port=$port
  else
    end_tree "$server"
  fi
  server=''
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
    --note "threads=$threads" --note "load_before=$load" --note "weights=$hash" --note "quick=$quick")
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
    finish "$variant"
  fi
}

if [ "$quick" != 1 ] && awk '{ exit !($1 > 0.5) }' /proc/loadavg; then
  say "warning: the load is $(cut -d' ' -f1 /proc/loadavg) before anything began: these figures will not be worth keeping"
fi

for model in $models; do
  case $model in
    smollm2) source=$(scripts/fetch-models.sh smollm2) ;;
    qwen) source=$(scripts/fetch-models.sh qwen2.5-coder) ;;
    *) die "no such model: $model" ;;
  esac
  rm -rf "$weights/$model"/zoo-* # another build of Ashlar may store them otherwise
  for cell in $cells; do
    for run in $(seq "$runs"); do
      order=()
      for variant in $(variants_of "$cell"); do
        peer=${variant%%-*}
        [[ $skip != *" $variant "* ]] || continue
        [ "$peer" = ashlar ] || [ -n "${version_of[$peer]:-}" ] || continue
        if [ $((run % 2)) = 1 ]; then order+=("$variant"); else order=("$variant" "${order[@]}"); fi
      done
      for variant in "${order[@]}"; do measure "$cell" "$variant" "$run" "$source"; done
    done
  done
  end_all
done
python3 bench/peers/table.py "$results"
