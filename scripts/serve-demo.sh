#!/usr/bin/env bash
# Builds Ashlar, puts the demo family into ./zoo-data and serves it on localhost: scripts/serve-demo.sh [FLAGS OF ashlar serve].
# Installs what the build needs (protoc, a linker) on Debian and Ubuntu. Stop it with Ctrl-C.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

need_build_packages
cargo build --release --locked -p ashlar
ashlar=${CARGO_TARGET_DIR:-target}/release/ashlar
scripts/add-demo.sh "$ashlar" zoo-data

listen=127.0.0.1:8080 flags=(--listen 127.0.0.1:8080)
for ((index = 1; index <= $#; index++)); do
  case ${!index} in
    --listen) next=$((index + 1)) && listen=${!next:-} flags=() ;;
    --listen=*) listen=${!index#*=} flags=() ;;
  esac
done
say ""
say "Serving on http://$listen. Try, in another terminal:"
say ""
say "  $ashlar chat demo/base"
say "  curl -s http://$listen/v1/models"
say ""
exec "$ashlar" serve --zoo zoo-data "${flags[@]}" "$@"
