#!/usr/bin/env bash
# Prints the path of a Python that reads and writes GGUF files and checkpoints; makes it in target/peers/gguf where it is not there.
set -euo pipefail
# shellcheck source=../../scripts/lib.sh
source "$(dirname "$0")/../../scripts/lib.sh"

venv=${PEERS:-$ROOT/target/peers}/gguf wanted=bench/peers/requirements-gguf.txt
if ! cmp -s "$wanted" "$venv/installed.txt"; then
  need_packages python3-venv
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$wanted" >&2
  cp "$wanted" "$venv/installed.txt"
fi
echo "$venv/bin/python"
