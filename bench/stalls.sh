#!/usr/bin/env bash
# What prompts of 1,500 tokens do to 8 streams that decode: Ashlar with and without chunks and with targets for gaps, llama.cpp's server
# and vLLM, on the same weights, in turns. Prints one table, with the goals that hold and those that do not.
#
#   bench/stalls.sh     VARIANTS="ashlar-int8 ashlar-int8@whole ashlar-int8@gap50 ashlar-int8@gap100 ashlar-int8@gap200
#                                 llama-q8_0 llama-q8_0@128 vllm vllm@256"
#                       RUNS=3 THREADS=<all> KV_FORMAT=bf16 STREAMS=8 LONG=1500 EVERY=2s DURATION=40s UNDISTURBED=10s ALONE=5
#                       QUICK=0 OUT=target/bench/stalls NAME=smollm2 PEERS=target/peers
#
# ashlar-int8        as it is by itself          @whole    a whole prompt in one batch (executor.step_tokens_max): chunking off
#                    @gapN  executor.gap_ms = N  @stepN    executor.step_tokens_max = N
# llama-q8_0         as it is by itself          @N        --batch-size and --ubatch-size N: its stalls are as long as a batch
# vllm               as it is by itself          @N        --max-num-batched-tokens N
#
# Weights and servers are those of bench/peers/run.sh, and OUT may be its folder, so that weights are not made again. Each server is alone, forwards in odd runs
# and backwards in even ones; vLLM starts once for each variant and is halted in between. ASHLAR_BIN names a server's binary; BENCH_BIN
# another that asks. The JSON of each run lies in OUT; the comparison goes to bench/results/stalls/NAME.json, and with QUICK=1, which
# is short and shows only that all works, to OUT.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"
# shellcheck source=peers/servers.sh
source bench/peers/servers.sh

variants=${VARIANTS:-ashlar-int8 ashlar-int8@whole ashlar-int8@gap50 ashlar-int8@gap100 ashlar-int8@gap200 llama-q8_0 llama-q8_0@128 vllm vllm@256}
runs=${RUNS:-3} threads=${THREADS:-$(nproc)} kv_format=${KV_FORMAT:-bf16} quick=${QUICK:-0} name=${NAME:-smollm2} model=smollm2
streams=${STREAMS:-8} long=${LONG:-1500} every=${EVERY:-2s} duration=${DURATION:-40s} undisturbed=${UNDISTURBED:-10s} alone=${ALONE:-5}
out=$(realpath -m "${OUT:-target/bench/stalls}")
results=$out/stalls weights=$out/weights
# Longest that one run may take, and places in llama.cpp for streams and long prompts: with fewer, streams wait for a place.
RUN_SECONDS=1800 SLOTS=16
# Context of a place: a long prompt and its answer, or a stream's prompt and answer.
PLACE_TOKENS=2048

if [ "$quick" = 1 ]; then
  runs=1 duration=4s undisturbed=2s alone=1
fi
for variant in $variants; do
  [[ $variant =~ ^(ashlar-(int8|int4)(@whole|@gap[1-9][0-9]*|@step[1-9][0-9]*)?|(llama-(q8_0|q4_0|q4_1|bf16)|vllm)(@[1-9][0-9]*)?)$ ]] || die "no such variant: $variant"
done

find_ashlar
rm -rf "$results"
mkdir -p "$results/$model" "$weights"
install_among "$results" "$variants"

measure() { # VARIANT RUN
  local variant=$1 run=$2 base=${1%%@*} setting='' flags=() report=$results/$1.$2.json load failed=
  [[ $variant != *@* ]] || setting=${variant#*@}
  log=$results/$model/$variant.$run.log
  case $base in
    ashlar-*)
      # As many tokens as llama.cpp has places for. No prompt is like another, so each would first touch pages of a larger pool.
      mapfile -t flags < <(pages_for $((SLOTS * PLACE_TOKENS)))
      flags+=("${ashlar_flags[@]}")
      case $setting in
        whole) flags+=(--set "executor.step_tokens_max=$((long + 512))") ;;
        gap*) flags+=(--set "executor.gap_ms=${setting#gap}") ;;
        step*) flags+=(--set "executor.step_tokens_max=${setting#step}") ;;
      esac
      ;;
    llama-*)
      flags=(--parallel "$SLOTS" --ctx-size $((SLOTS * PLACE_TOKENS)) "${llama_flags[@]}")
      [ -z "$setting" ] || flags+=(--batch-size "$setting" --ubatch-size "$setting")
      ;;
    vllm)
      flags=("${vllm_flags[@]}")
      [ -z "$setting" ] || flags+=(--max-num-batched-tokens "$setting")
      ;;
  esac
  weigh "$base" "$source" || { say "no weights for $variant"; return 0; }
  load=$(cut -d' ' -f1 /proc/loadavg)
  say "== $variant, run $run of $runs (load $load)"
  serve "$base" "$variant" "${flags[@]}" || { say "$variant did not start: see $log"; return 0; }
  local args=(--url "http://127.0.0.1:$port" --model "hub/$model" --streams "$streams" --long-prompt-tokens "$long" --every "$every"
    --duration "$duration" --undisturbed "$undisturbed" --alone "$alone" --seed 1 --json "$report" --note "threads=$threads"
    --note "load_before=$load" --note "probed_before=${probed:-}" --note "weights=$hash" --note "quick=$quick" --note "flags=${flags[*]}")
  case $base in
    ashlar-*) args+=(--commit "$commit") ;;
    llama-*) args+=(--extra '{"cache_prompt": false}' --note "peer=${version_of[llama]}") ;;
    *) args+=(--note "peer=${version_of[$base]}") ;;
  esac
  timeout "$RUN_SECONDS" "${BENCH_BIN:-$ASHLAR_BIN}" bench stalls "${args[@]}" || failed=yes
  if [ -n "$failed" ]; then
    say "$variant failed: see $log"
    rm -f "$report"
    end_tree "$server"
    server=''
  else
    finish "$base" "$variant"
  fi
}

[ "$quick" = 1 ] || warn_of_load
source=$(source_of "$model")
for run in $(seq "$runs"); do
  in_turns "$run" $variants
  for variant in "${order[@]}"; do steadily measure "$variant" "$run"; done
done
end_all
keep_in stalls
python3 bench/stalls.py "$results" "$kept"
