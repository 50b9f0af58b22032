#!/usr/bin/env bash
# Fine-tunes of SmolLM2-135M-Instruct for the storage benchmark, trained here as people train them: all weights at three rates, the upper
# four layers, LoRA of rank 16, and that merged. Prints the loss before and after on text that was held out, and what became of the bits.
#
#   bench/finetunes.sh          ONLY=full-a,top STEPS=<by method> THREADS=1 SEED=1 CORPORA=../shared/data/corpora
#
# Folders go to $ASHLAR_FINETUNES, target/bench/finetunes: base, full-a, full-b, full-c, top, lora, lora-merged, and finetunes.json with what is
# known of each. What is there already is kept, so a run that was stopped goes on; delete a folder to have it made anew. Takes about half
# an hour of one idle core; without CORPORA's files it trains on this repository's own text. PEERS says where Python's packages go (5 GB).
set -euo pipefail
source "$(dirname "$0")/../scripts/lib.sh"

out=${ASHLAR_FINETUNES:-$ROOT/target/bench/finetunes}
threads=${THREADS:-1}
venv=${PEERS:-$ROOT/target/peers}/train
python=$venv/bin/python
export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}

if ! cmp -s bench/requirements-finetunes.txt "$venv/installed.txt"; then
  [ -x "$python" ] || python3 -m venv "$venv"
  say "installing torch and transformers (5 GB)"
  # uv unpacks several at once, pip one after the other.
  "$venv/bin/pip" install --quiet --disable-pip-version-check uv >&2
  "$venv/bin/uv" pip install --quiet --python "$python" -r bench/requirements-finetunes.txt >&2
  cp bench/requirements-finetunes.txt "$venv/installed.txt"
fi

source_gguf=$(scripts/fetch-models.sh smollm2)
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS=$threads
mkdir -p "$out"
if [ ! -d "$out/base" ]; then
  say "making the base, in bf16"
  rm -rf "$out/base.partial"
  "$python" bench/peers/to_hf.py "$source_gguf" "$out/base" bfloat16 >"$out/base.log" 2>&1 || die "$(tail -1 "$out/base.log")"
  rm "$out/base.log"
fi
# Memory that was freed is kept: a step's logits are 100 MB, and first touches of them took a fifth of its time.
export MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
arguments=(--out "$out" --threads "$threads" --seed "${SEED:-1}" --corpora "${CORPORA:-$ROOT/../shared/data/corpora}")
[ -z "${ONLY:-}" ] || arguments+=(--only "$ONLY")
[ -z "${STEPS:-}" ] || arguments+=(--steps "$STEPS")
"$python" bench/finetunes.py "${arguments[@]}"
