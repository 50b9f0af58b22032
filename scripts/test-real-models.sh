#!/usr/bin/env bash
# Runs the goldens of real models: 64 greedy tokens of each prompt must equal those of transformers (executor/tests/it/real_models.rs).
#
#   scripts/test-real-models.sh [smollm2 | gemma3 | qwen2.5-coder | all]
#
# Fetches what is missing (scripts/fetch-models.sh) to $ASHLAR_MODELS, default ~/.cache/ashlar/models. Weights are held as f32:
# all three take about 3 GB of memory each in turn, and some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-all}
export ASHLAR_MODELS=${ASHLAR_MODELS:-$HOME/.cache/ashlar/models}
scripts/fetch-models.sh "$model"

filter=${model//[^a-z0-9]/_}
[[ $filter == all ]] && filter=
exec "${CARGO:-cargo}" test --package ashlar-executor-tests --lib -- --include-ignored --nocapture --test-threads 1 "real_models::$filter"
