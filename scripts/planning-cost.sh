#!/usr/bin/env bash
# Counts what planning costs in retired instructions, which depend on no clock and on nothing else that a machine does, and fails where a pass
# costs more than is stated here, or a row of many sequences more than one of few: scripts/planning-cost.sh [BENCHMARK]. It takes the benchmark
# `plan` as the tests are built, so that a test run builds nothing twice, or one that is given. SEQUENCES (4096) are the many: half as many take
# half the time. docs/scheduling.md, "What planning costs".
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# Instructions of a pass of 256 sequences that decode, over 32 models and 64 segments: plans, and results of batches.
PASS_MAX=2000000
SEQUENCES=${SEQUENCES:-4096}
# A row of that many sequences over a row of 256, in hundredths.
LINEAR_MAX=115
LOADS=(decodes prompts targets tenants claims pages shares abreast)

command -v valgrind >/dev/null || need_packages valgrind
bench=${1:-}
[ -n "$bench" ] || bench=$(cargo build --workspace --bins --tests --bench plan --locked --message-format json-render-diagnostics \
  | grep -o '"executable":"[^"]*/plan-[^"]*"' | cut -d'"' -f4 | tail -n 1)
[ -x "$bench" ] || die "the benchmark plan was not built"

# row LOAD SEQUENCES PASSES: instructions of the engine for each row of a pass.
row() {
  local count
  count=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect='*counted_*' "$bench" "$@" 2>&1 >/dev/null \
    | sed -n 's/.*Collected : \([0-9]*\).*/\1/p')
  [ "${count:-0}" -gt 0 ] || die "callgrind counted nothing for: $*"
  echo $((count / ($2 * 4 * $3)))
}

# count LOAD: both counts of a load. A page of tokens, so that what comes once a page counts once.
count() { row "$1" 256 32 > "$counts/$1-256" && row "$1" "$SEQUENCES" 16 > "$counts/$1-many"; }

# Two loads at a time: how many instructions retire does not depend on that.
counts=$(mktemp -d)
trap 'rm -rf "$counts"' EXIT
for ((index = 0; index < ${#LOADS[@]}; index += 2)); do
  count "${LOADS[index]}" &
  count "${LOADS[index + 1]}"
  wait $!
done

failed=0
printf '%-8s  %s\n' load 'instructions for each row of a pass: of 256 sequences, of '"$SEQUENCES"
for load in "${LOADS[@]}"; do
  few=$(<"$counts/$load-256")
  many=$(<"$counts/$load-many")
  printf '%-8s  %6d  %6d\n' "$load" "$few" "$many"
  if [ $((many * 100)) -gt $((few * LINEAR_MAX)) ]; then
    say "$load: a row of $SEQUENCES sequences costs more than $LINEAR_MAX% of one of 256"
    failed=1
  fi
  if [ "$load" = decodes ] && [ $((few * 4 * 256)) -gt "$PASS_MAX" ]; then
    say "a pass of 256 sequences costs $((few * 4 * 256)) instructions, more than $PASS_MAX"
    failed=1
  fi
done
exit "$failed"
