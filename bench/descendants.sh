# shellcheck shell=bash
# The models of models.sh and prefix.sh: descendants of SmolLM2-135M-Instruct as GGUF files of Q8_0 (gguf/N.gguf) and as zoos of the first so many
# (shared-8, alone-8: hub/m0 to hub/m7), under `weights`. Sourced after scripts/lib.sh and peers/servers.sh, never run.

# base_of_descendants: the file that all are made from.
base_of_descendants() {
  local base=$weights/base.gguf
  [ -f "$base" ] || bench/peers/llama.sh requantise "$(source_of smollm2)" "$base" Q8_0 >&2
  echo "$base"
}

# wait_loaded COUNT: until the server at `port` answers for each of so many models (also of adapters.sh): it is ready before all weights are there.
wait_loaded() {
  timeout "$READY_SECONDS" python3 - "http://127.0.0.1:$port/v1/completions" "$1" <<'PYTHON'
import json, sys, time, urllib.error, urllib.request
for number in range(int(sys.argv[2])):
    body = json.dumps({"model": f"hub/m{number}", "prompt": "a", "max_tokens": 1}).encode()
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"}), timeout=60).read()
            break
        except urllib.error.HTTPError as error:
            if error.code != 503:
                sys.exit(f"hub/m{number} is not served: {error.read().decode()}")
            time.sleep(0.2)
PYTHON
}

# make_descendants BASE COUNT shared|alone: the zoo of so many, and the files that other servers read.
make_descendants() {
  local base=$1 count=$2 form=$3 zoo=$weights/$3-$2 number file how=() recipe
  recipe=$(sha256_of bench/peers/descendants.py)
  # Other descendants than those that lie there: all are made anew.
  if [ "$(cat "$weights/recipe.txt" 2>/dev/null)" != "$recipe" ]; then
    rm -rf "$weights"/{gguf*,shared-*,alone-*}
    echo "$recipe" >"$weights/recipe.txt"
  fi
  mkdir -p "$weights/gguf" "$weights/gguf-$count"
  [ "$form" = shared ] || how=(apart)
  if [ -d "$zoo" ]; then return; fi
  say "making $count descendants ($form)"
  rm -rf "$zoo.partial"
  for number in $(seq 0 $((count - 1))); do
    file=$weights/gguf/$number.gguf
    [ "$form" = shared ] || file=$weights/gguf/apart.gguf
    if [ "$form" = alone ] || [ ! -f "$file" ]; then
      "${PEERS:-$ROOT/target/peers}/llama/bin/python" bench/peers/descendants.py "$base" "$file" "$number" "${how[@]}" >&2
    fi
    "$ASHLAR_BIN" zoo add "$file" --name "hub/m$number" --dtype int8 --zoo "$zoo.partial" >/dev/null 2>"$weights/zoo-add.log" || die "$(tail -1 "$weights/zoo-add.log")"
    if [ "$form" = shared ]; then ln -sf "../gguf/$number.gguf" "$weights/gguf-$count/"; else rm "$file"; fi
  done
  mv "$zoo.partial" "$zoo"
  # Named by what they are: chains of a zoo, bytes of files.
  "$ASHLAR_BIN" zoo list --zoo "$zoo" | sha256sum | cut -c1-16 >"$zoo.hash"
  [ "$form" != shared ] || (cd "$weights/gguf-$count" && sha256sum -- *.gguf) | sha256sum | cut -c1-16 >"$weights/gguf-$count.hash"
}
