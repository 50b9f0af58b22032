#!/usr/bin/env bash
# Capacity as Sarathi-Serve's paper (section 5.1) defines it: the largest Poisson rate, requests/s, at which the p99 of all gaps between tokens stays
# within a limit and the median scheduling delay within 2 s. Sought for Ashlar with and without chunks and with targets for gaps, and for llama.cpp's
# server, on the same weights, in turns.
#
#   bench/capacity.sh   VARIANTS="ashlar-int8 ashlar-int8@gap ashlar-int8@whole llama-q8_0 llama-q8_0@128"
#                       LIMITS="strict relaxed" RUNS=3 DURATION=60 PROMPT=64..1500 OUTPUT=16..128 THREADS=<all> KV_FORMAT=bf16
#                       QUICK=0 OUT=target/bench/capacity NAME=smollm2 PEERS=target/peers
#
# ashlar-int8        as it is by itself          @whole    a whole prompt in one batch (executor.step_tokens_max): chunking off
#                    @gap   executor.gap_ms is the limit that capacity is sought for
# llama-q8_0         as it is by itself          @N        --batch-size and --ubatch-size N
# vllm               as it is by itself          @N        --max-num-batched-tokens N
#
# strict, relaxed    5 and 25 times a decode step of 32 sequences that have the middle length of PROMPT, undisturbed: the paper's factors and batch.
#                    The step is Ashlar's (`ashlar bench step`), and the limits that come of it are every server's
# N                  N ms
#
# A probe is DURATION seconds of arrivals at one of a fixed list of rates, each 7 % above the one before, from 1/16 to 64 a second; the same rate is the same
# load for every server. A search doubles or halves from 1 a second until it has a rate that is sustained and one that is not, then
# halves between: 11 probes for a limit at the very most. Later runs begin where the one before ended: 3 where nothing has changed. Weights and servers are those of
# bench/peers/run.sh, and OUT may be its folder. ASHLAR_BIN names a server's binary; BENCH_BIN another that asks. The JSON of each probe lies in
# OUT; the comparison goes to bench/results/capacity/NAME.json, and with QUICK=1, which is short and shows only that all works, to OUT.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"
# shellcheck source=peers/servers.sh
source bench/peers/servers.sh

variants=${VARIANTS:-ashlar-int8 ashlar-int8@gap ashlar-int8@whole llama-q8_0 llama-q8_0@128} name=${NAME:-smollm2} model=smollm2
read -ra limits <<<"${LIMITS:-strict relaxed}"
runs=${RUNS:-3} duration=${DURATION:-60} prompt=${PROMPT:-64..1500} output=${OUTPUT:-16..128}
threads=${THREADS:-$(nproc)} kv_format=${KV_FORMAT:-bf16} quick=${QUICK:-0}
out=$(realpath -m "${OUT:-target/bench/capacity}")
results=$out/capacity weights=$out/weights
# Places in llama.cpp and the context of each: the longest prompt and its answer.
SLOTS=32 PLACE_TOKENS=2048
# Sequences of the decode step that limits are multiples of.
DECODE_SEQUENCES=32
# Prompts that are asked alone, for the time that a prompt of the middle length takes by itself.
ALONE=8
# Neighbouring places of the list of rates: how near the two ends of a search have to come.
fine=1

if [ "$quick" = 1 ]; then
  # Ends that lie a doubling apart.
  runs=1 duration=6 fine=10 ALONE=2
fi
for variant in $variants; do
  [[ $variant =~ ^(ashlar-(int8|int4)(@whole|@gap)?|(llama-(q8_0|q4_0|q4_1|bf16)|vllm)(@[1-9][0-9]*)?)$ ]] || die "no such variant: $variant"
done
for limit in "${limits[@]}"; do [[ $limit =~ ^(strict|relaxed|[1-9][0-9]{0,5})$ ]] || die "no such limit: $limit"; done
[[ $prompt =~ ^([1-9][0-9]*)\.\.([1-9][0-9]*)$ ]] || die "PROMPT is a range as 64..1500, not $prompt"
middle=$(((BASH_REMATCH[1] + BASH_REMATCH[2]) / 2)) longest=${BASH_REMATCH[2]}
[[ $duration =~ ^[1-9][0-9]*$ ]] || die "DURATION is in whole seconds, not $duration"

find_ashlar
rm -rf "$results"
mkdir -p "$results/$model" "$results/searches" "$weights"
install_among "$results" "$variants"

# find_limits: a decode step of Ashlar's own, and what it makes of `limits`, in limits.json.
find_limits() {
  "$ASHLAR_BIN" bench step --zoo "$file" --model "hub/$model" --threads "$threads" --kv-format "$kv_format" --decode "$DECODE_SEQUENCES" --prefill 16 \
    --context "$middle" --json "$results/step.json" >/dev/null
  python3 bench/capacity.py limits "$results/step.json" "$results/limits.json" "${limits[@]}"
}

# ask REPORT ARGS...: a load on the server that runs, perhaps without success.
ask() {
  local report=$1 pid args=(--url "http://127.0.0.1:$port" --model "hub/$model" --ignore-eos --json "$1" --note "threads=$threads"
    --note "load_before=$(cut -d' ' -f1 /proc/loadavg)" --note "probed_before=${probed:-}" --note "weights=$hash" --note "quick=$quick" --note "flags=${flags[*]}")
  shift
  for pid in $(tree_of "$server"); do args+=(--server-pid "$pid"); done
  case $variant in
    ashlar-*) args+=(--commit "$commit") ;;
    llama-*) args+=(--extra '{"cache_prompt": false}' --note "peer=${version_of[llama]}") ;;
    *) args+=(--note "peer=${version_of[vllm]}") ;;
  esac
  rm -f "$report"
  "${BENCH_BIN:-$ASHLAR_BIN}" bench load "${args[@]}" "$@" >"$report.txt" 2>&1 || tail -1 "$report.txt" >&2
}

# search VARIANT RUN LIMIT...: probes in results/searches/VARIANT[:LIMIT]/RUN until each limit's capacity is known.
search() {
  local variant=$1 run=$2 setting='' title=$1 flags=() folder place rate next
  shift 2
  [[ $variant != *@* ]] || setting=${variant#*@}
  [ "$setting" != gap ] || title=$variant:$1
  folder=$results/searches/$title/$run
  log=$results/$model/$title.$run.log
  case $variant in
    ashlar-*)
      # No two prompts of a search are alike, but a probe that is repeated has those of its first time.
      mapfile -t flags < <(pages_for $((SLOTS * PLACE_TOKENS)))
      flags+=(--set executor.prefix_cache=false "${ashlar_flags[@]}")
      case $setting in
        whole) flags+=(--set "executor.step_tokens_max=$((longest + 512))") ;;
        gap) flags+=(--set "executor.gap_ms=$(python3 bench/capacity.py limit "$results/limits.json" "$1")") ;;
      esac
      ;;
    llama-*)
      flags=(--parallel "$SLOTS" --ctx-size $((SLOTS * PLACE_TOKENS)) "${llama_flags[@]}")
      [ -z "$setting" ] || flags+=(--batch-size "$setting" --ubatch-size "$setting")
      ;;
    vllm*)
      flags=("${vllm_flags[@]}")
      [ -z "$setting" ] || flags+=(--max-num-batched-tokens "$setting")
      ;;
  esac
  weigh "${variant%%@*}" "$source" || { say "no weights for $variant"; return 0; }
  say "== $title, run $run of $runs"
  serve "${variant%%@*}" "$title" "${flags[@]}" || { say "$title did not start: see $log"; return 0; }
  mkdir -p "$folder"
  steadily ask "$folder/alone.json" --concurrency 1 --requests "$ALONE" --prompt-tokens "$middle" --output-tokens 2 --seed 1000 --warmup 2
  while [ -f "$folder/alone.json" ]; do
    next=$(python3 bench/capacity.py next "$folder" "$results/limits.json" "$fine" "$duration" "$@")
    [ -n "$next" ] || break
    read -r place rate <<<"$next"
    # Requests that have no answer long after the last arrival would only hold up the search: they have failed.
    steadily ask "$folder/$place.json" --rate "$rate" --duration "$duration" --prompt-tokens "$prompt" --output-tokens "$output" --seed "$place" \
      --timeout "$((duration * 2 + 30))"
    [ -f "$folder/$place.json" ] || break
    python3 bench/capacity.py told "$folder" "$place" "$results/limits.json" "$@" >&2
  done
  if [ ! -f "$folder/alone.json" ] || [ -n "$next" ]; then
    say "the search for $title ended early: see $log"
    rm -rf "$folder"
    end_tree "$server"
    server=''
  else
    finish "${variant%%@*}" "$title"
  fi
}

[ "$quick" = 1 ] || warn_of_load
source=$(source_of "$model")
weigh ashlar-int8 "$source"
steadily find_limits
for run in $(seq "$runs"); do
  in_turns "$run" $variants
  for variant in "${order[@]}"; do
    if [[ $variant != *@gap ]]; then
      search "$variant" "$run" "${limits[@]}"
    else
      for limit in "${limits[@]}"; do search "$variant" "$run" "$limit"; done
    fi
  done
done
end_all
keep_in capacity
python3 bench/capacity.py table "$results" "$kept"
