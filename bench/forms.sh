#!/usr/bin/env bash
# What forms of a real model cost: in 8 and 4 bits, rounded and calibrated, beside llama.cpp's; as compressed differences to its base; with fewer
# columns. Perplexity of a text, and divergence of every next-token distribution from the model's own, all by this program.
#
#   bench/forms.sh              PARTS="rounded calibrated llama deltas surrogates" WINDOWS=8 TOKENS=16384 TEXT=<this repository's documents>
#                               CALIBRATION=<of CORPORA> CORPORA=../shared/data/corpora LLAMA_LIBRARIES=<none> RESULTS=<none>
#
# The models are those of bench/finetunes.sh ($ASHLAR_FINETUNES). `full-a` is "tuned"; "turned" computes the same in weights that lie near no grid:
# norms folded into the matrices behind them, the residual stream turned by a random orthogonal matrix (bench/forms.py). The part `llama` needs a
# folder with llama.cpp's libllama.so and libggml*.so, which write its forms; without one it is left out.
#
# Figures depend on weights and texts, not on the machine's speed: it may be busy. Takes some two hours of two cores. What is measured already lies
# in OUT, target/bench/forms, one file a row, and is not measured again; delete it for a new binary. ASHLAR_BIN names one; else the release build is made.
set -euo pipefail
# shellcheck source=../scripts/lib.sh
source "$(dirname "$0")/../scripts/lib.sh"

out=$(realpath -m "${OUT:-target/bench/forms}")
if [ -z "${ASHLAR_BIN:-}" ]; then
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
fi
python=$(bench/peers/gguf.sh)
mkdir -p "$out"
if [ -n "${TEXT:-}" ]; then
  cp "$TEXT" "$out/text.txt"
elif [ ! -f "$out/text.txt" ]; then
  # English that is always at hand, and under the repository's own licence.
  cat README.md ARCHITECTURE.md demo/README.md docs/*.md >"$out/text.txt"
fi
ASHLAR_BIN=$(realpath "$ASHLAR_BIN") "$python" bench/forms.py --out "$out" --finetunes "${ASHLAR_FINETUNES:-target/bench/finetunes}" \
  --parts "${PARTS:-rounded calibrated llama deltas surrogates}" --windows "${WINDOWS:-8}" --tokens "${TOKENS:-16384}" \
  --corpora "${CORPORA:-../shared/data/corpora}" ${CALIBRATION:+--calibration "$CALIBRATION"} ${LLAMA_LIBRARIES:+--llama "$LLAMA_LIBRARIES"} \
  ${RESULTS:+--results "$RESULTS"}
