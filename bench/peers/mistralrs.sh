#!/usr/bin/env bash
# mistral.rs, as a peer to measure against:
#
#   bench/peers/mistralrs.sh install                      into target/peers/mistralrs; prints its version
#   bench/peers/mistralrs.sh serve FOLDER THREADS PORT [FLAGS OF mistralrs serve]
#
# Its Python package has no server, so it is built from its crate, which takes an hour of two cores: only with BUILD_MISTRALRS=1.
# `serve` becomes the server. FOLDER is a Hugging Face folder; f32 is the fastest of its types on a CPU without bf16 instructions.
set -euo pipefail
# shellcheck source=../../scripts/lib.sh
source "$(dirname "$0")/../../scripts/lib.sh"

version=0.8.1
home=${PEERS:-$ROOT/target/peers}/mistralrs

install_peer() {
  if [ ! -x "$home/bin/mistralrs" ]; then
    [ "${BUILD_MISTRALRS:-0}" = 1 ] || die "not installed: BUILD_MISTRALRS=1 builds it"
    command -v cargo >/dev/null || die "needs Rust (cargo) on the PATH"
    say "building mistral.rs (about an hour on two cores)"
    CARGO_TARGET_DIR=$home/build RUSTFLAGS="-C target-cpu=native" cargo install --locked --root "$home" "mistralrs-cli@$version" >&2
    rm -rf "$home/build"
  fi
  echo "mistralrs-cli $version"
}

case ${1:-} in
  install) install_peer ;;
  serve)
    [ $# -ge 4 ] || die "usage: mistralrs.sh serve FOLDER THREADS PORT [FLAGS]"
    folder=$2 threads=$3 port=$4
    shift 4
    export RAYON_NUM_THREADS=$threads HF_HUB_OFFLINE=1
    exec "$home/bin/mistralrs" serve --model-id "$folder" --host 127.0.0.1 --port "$port" --cpu --dtype f32 "$@"
    ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
