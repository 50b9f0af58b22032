#!/usr/bin/env bash
# Where a server's processor time goes under 32 streams: kernels, what is around them, and threads that wait for work. Goal: all that is
# not kernels stays under a tenth of kernels and it together.
#
#   bench/shares.sh        STREAMS=32 SECONDS_MEASURED=20 THREADS=<all> MODEL_DTYPE=int8 KV_MIB=1024
#
# The pool is small and has its memory before the load begins, as that of a server that has run for a while has: what first touches of
# pages cost is `executor.kv_touch_bytes`' affair (docs/configuration.md).
# Samples the serving process with `perf` (package linux-perf, or linux-tools of the running kernel) while `ashlar bench load` drives it,
# and sorts the samples by the function that they fell into (bench/shares.py). ASHLAR_BIN names a binary with symbols; without it the
# release build is made. JSON: target/bench/shares/shares.json.
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

streams=${STREAMS:-32} seconds=${SECONDS_MEASURED:-20} threads=${THREADS:-$(nproc)} dtype=${MODEL_DTYPE:-int8}
kv_bytes=$((${KV_MIB:-1024} << 20))
out=$ROOT/target/bench/shares
model=hub/smollm2
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
command -v perf >/dev/null || die "needs perf: install the package linux-perf"

if [ -z "${ASHLAR_BIN:-}" ]; then
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
fi
mkdir -p "$out"
if [ ! -d "$out/zoo-$dtype" ]; then
  "$ASHLAR_BIN" zoo add "$(scripts/fetch-models.sh smollm2)" --name "$model" --dtype "$dtype" --zoo "$out/zoo-$dtype.partial"
  mv "$out/zoo-$dtype.partial" "$out/zoo-$dtype"
fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
ASHLAR_EXECUTOR_THREADS=$threads ASHLAR_EXECUTOR_KV_FORMAT=bf16 ASHLAR_EXECUTOR_KV_BYTES=$kv_bytes ASHLAR_EXECUTOR_KV_TOUCH_BYTES=$kv_bytes \
  "$ASHLAR_BIN" serve --zoo "$out/zoo-$dtype" --registry memory: --listen "127.0.0.1:$port" >"$out/serve.log" 2>&1 &
server=$! load=''
trap 'kill $server $load 2>/dev/null || true; wait' EXIT
for _ in $(seq 300); do
  if python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)' "http://127.0.0.1:$port/ready" 2>/dev/null; then break; fi
  kill -0 "$server" 2>/dev/null || { tail -5 "$out/serve.log" >&2; die "the server did not start"; }
  sleep 0.1
done

# 5 ms a MiB where the system has to get it back from a hypervisor.
sleep $((kv_bytes >> 20))e-2
# Longer than it is measured: the first seconds, which are prompts only, are not counted.
"$ASHLAR_BIN" bench load --url "http://127.0.0.1:$port" --model "$model" --concurrency "$streams" --duration $((seconds + 12)) \
  --prompt-tokens 128 --output-tokens 64 --ignore-eos --seed 1 --server-pid "$server" --json "$out/load.json" >"$out/load.log" 2>&1 &
load=$!
sleep 5
perf record --quiet -F 997 --pid "$server" --output "$out/perf.data" -- sleep "$seconds"
wait "$load" || { tail -5 "$out/load.log" >&2; die "the load failed"; }
load=''
perf report --input "$out/perf.data" --no-children --call-graph none --sort symbol --percent-limit 0 --stdio -F sample,symbol 2>/dev/null >"$out/report.txt"
python3 bench/shares.py "$out/report.txt" "$out/shares.json" --streams "$streams" --seconds "$seconds" --binary "$(sha256sum "$ASHLAR_BIN" | cut -c1-12)"
