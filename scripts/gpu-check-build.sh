#!/usr/bin/env bash
# Gathers what scripts/gpu-check.sh needs on a machine with a card: scripts/gpu-check-build.sh FOLDER. The release binary, and the two test binaries that
# run on a card where ASHLAR_CARD names one; stripped.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
folder=${1:?a folder to build into}
mkdir -p "$folder"
cargo build --release --locked -p ashlar
cargo build --workspace --bins --tests --bench plan --locked
target=${CARGO_TARGET_DIR:-$ROOT/target}
# newest PATTERN: the test binary that was built last under a name.
newest() { ls -t "$target"/debug/deps/$1-* | grep -v '\.d$' | head -1; }
strip -o "$folder/ashlar" "$target/release/ashlar"
# The suite of the device is the newer one of two of its name: the CPU's has no kernels of cards.
for binary in $(ls -t "$target"/debug/deps/ops-* | grep -v '\.d$'); do
  if grep -q ASHLAR_CARD "$binary"; then strip -o "$folder/ops" "$binary"; break; fi
done
strip -o "$folder/executor-tests" "$(newest ashlar_executor_tests)"
cp scripts/gpu-check.sh "$folder/"
say "built into $folder; run $folder/gpu-check.sh $folder OUT on a machine with a card"
