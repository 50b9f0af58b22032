#!/usr/bin/env bash
# What a zoo saves on disk, and what that costs: bytes of a family as it came, after dedup of files, of tensors, and as stored; GB/s of adding
# and of reading back on one core and on all, beside what `zstd -3` and a copy in memory reach in the same run.
#
#   bench/storage.sh            FAMILIES="demo finetunes" ROUNDS=5 RESULTS=bench/results/storage/NAME.json
#
# `finetunes` is what bench/finetunes.sh made ($ASHLAR_FINETUNES). ASHLAR_BIN is the release binary. Needs zstd, taskset and 4 GB of disk; the machine
# should have nothing else to do.
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

export ASHLAR_BIN=${ASHLAR_BIN:-$ROOT/target/release/ashlar}
[ -x "$ASHLAR_BIN" ] || die "$ASHLAR_BIN is not there: cargo build --release -p ashlar"
need_packages zstd
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/ashlar-storage.XXXXXX")
# shellcheck disable=SC2064 # the folder of now
trap "rm -rf '$scratch'" EXIT

python3 bench/storage.py --scratch "$scratch" --families "${FAMILIES:-demo finetunes}" --rounds "${ROUNDS:-5}" \
  --finetunes "${ASHLAR_FINETUNES:-$ROOT/target/bench/finetunes}" ${RESULTS:+--results "$RESULTS"}
