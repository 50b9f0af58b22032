#!/usr/bin/env bash
# The main job, seen: adds SmolLM2-135M-Instruct (from its Python package) and the demo family to a new zoo, serves them all in one
# process, and talks to each with the official openai client, streaming, then to eight at once. Ends with what went wrong, if
# anything did. Takes the release build: bench/smoke.sh
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

scripts/setup-tests.sh
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
gguf=$(scripts/fetch-models.sh smollm2)
cargo build --release --locked -p ashlar
ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar exec .venv/bin/python bench/smoke.py "$gguf"
