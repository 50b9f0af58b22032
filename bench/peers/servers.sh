# shellcheck shell=bash
# Ashlar and its peers as servers that take turns, for run.sh and the scripts of the folder above: what each is served from, how it starts and ends. Sourced
# after scripts/lib.sh, never run. Whoever sources it sets `model`, `results` and `weights` (folders), `threads` and `kv_format`, and adds
# `kv_touch_bytes` (of Ashlar, where it is not to be what it is by itself), `ashlar_flags`, `llama_flags` and `vllm_flags`, as ASHLAR_FLAGS, LLAMA_FLAGS and VLLM_FLAGS have them, where they belong.
#
# `server` is the process that runs now, at `port`, with the weights in `file`, whose hash is `hash`, and writes to `log`.

export ASHLAR_MODELS=${ASHLAR_MODELS:-$ROOT/target/models}
READY_SECONDS=${READY_SECONDS:-900}
# An idle Ashlar takes memory for KV pages ahead; its peers took theirs before they were ready.
SETTLE_SECONDS=${SETTLE_SECONDS:-8}
given_commit=${ASHLAR_COMMIT:-}
read -ra ashlar_flags <<<"${ASHLAR_FLAGS:-}"
read -ra llama_flags <<<"${LLAMA_FLAGS:-}"
read -ra vllm_flags <<<"${VLLM_FLAGS:-}"
# The server takes what begins like its settings for settings, and refuses those that it does not know.
unset ASHLAR_COMMIT ASHLAR_FLAGS

server='' port='' log='' file='' hash='' commit=''
declare -A version_of=() sleeping=() sleeping_port=()

# find_ashlar: sets ASHLAR_BIN, the release build where it is not given, and `commit`, what it was built from.
find_ashlar() {
  if [ -n "${ASHLAR_BIN:-}" ]; then
    commit=${given_commit:-binary-$(sha256sum "$ASHLAR_BIN" | cut -c1-12)}
    return
  fi
  need_build_packages
  cargo build --release --locked -p ashlar
  ASHLAR_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release/ashlar
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
  if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit+=-changed; fi
}

# install_peers FOLDER PEER...: installs what can be had; `version_of` tells it, FOLDER/peers.tsv too, with the reason where one is absent.
install_peers() {
  local folder=$1 peer told
  shift
  for peer; do
    if told=$("bench/peers/$peer.sh" install 2> >(tee "$folder/$peer.install.log" >&2)); then
      version_of[$peer]=$told
    else
      told=$(grep -m1 '^error: ' "$folder/$peer.install.log" || tail -1 "$folder/$peer.install.log")
      told="absent: ${told#error: }"
      say "going on without $peer: $told"
    fi
    printf '%s\t%s\n' "$peer" "$told" >>"$folder/peers.tsv"
  done
}

# source_of MODEL: the GGUF file that all its weights are made from.
source_of() {
  case $1 in
    smollm2) scripts/fetch-models.sh smollm2 ;;
    qwen) scripts/fetch-models.sh qwen2.5-coder ;;
    *) die "no such model: $1" ;;
  esac
}

sha256_of() { sha256sum "$1" | cut -c1-16; }

# weigh VARIANT SOURCE: makes its weights where they are not there yet; sets `file` and `hash`.
weigh() {
  local variant=$1 source=$2 folder=$weights/$model kind=${1#*-}
  mkdir -p "$folder"
  case $variant in
    ashlar-*)
      file=$folder/zoo-$kind
      if [ ! -d "$file" ]; then
        local from=(--dtype "$kind" "$source")
        # llama.cpp's own file, whose codes and scales the zoo keeps as they are.
        if [[ $kind == q* ]]; then
          weigh "llama-$kind" "$source"
          from=("$file") file=$folder/zoo-$kind
        fi
        "$ASHLAR_BIN" zoo add "${from[@]}" --name "hub/$model" --zoo "$file.partial" >&2
        mv "$file.partial" "$file"
      fi
      hash=$("$ASHLAR_BIN" zoo show "hub/$model" --zoo "$file" | awk '$1 == "chain" { print substr($2, 1, 16) }')
      ;;
    llama-*)
      file=$folder/$kind.gguf
      [ -f "$file" ] || bench/peers/llama.sh requantise "$source" "$file" "${kind^^}"
      hash=$(sha256_of "$file")
      ;;
    vllm | mistralrs)
      local dtype=float32
      [ "$variant" = mistralrs ] || dtype=$(bench/peers/vllm.sh dtype)
      file=$folder/$dtype
      [ -d "$file" ] || VLLM_DTYPE=$dtype bench/peers/vllm.sh folder "$source" "$file"
      hash=$(sha256_of "$file/model.safetensors")
      ;;
  esac
}

tree_of() { python3 bench/peers/process.py tree "$1" 2>/dev/null || true; }

end_tree() { # PID
  local pids pid
  mapfile -t pids < <(tree_of "$1")
  # A process that was halted cannot hear that it should end.
  for pid in "${pids[@]}"; do kill -CONT "$pid" 2>/dev/null || true; done
  kill "$1" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
  wait "$1" 2>/dev/null || true
}

end_all() {
  local pid
  for pid in $server "${sleeping[@]}"; do end_tree "$pid"; done
  server='' sleeping=()
}
trap end_all EXIT
trap 'exit 130' INT TERM

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_ready() { # URL
  local until=$((SECONDS + READY_SECONDS))
  while [ $SECONDS -lt $until ]; do
    if python3 -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)' "$1" 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || break
    sleep 0.2
  done
  tail -5 "$log" >&2
  return 1
}

# serve VARIANT NAME [FLAGS]: the server for it runs, at its best settings known here. Servers of one NAME have the same FLAGS.
serve() {
  local variant=$1 name=$2 ready=/health pid
  shift 2
  if [ -n "${sleeping[$name]:-}" ]; then
    for pid in $(tree_of "${sleeping[$name]}"); do kill -CONT "$pid"; done
    server=${sleeping[$name]} port=${sleeping_port[$name]} log=$results/$model/$name.log
    unset "sleeping[$name]"
    return
  fi
  port=$(free_port)
  case $variant in
    ashlar-*)
      env ASHLAR_EXECUTOR_THREADS="$threads" ASHLAR_EXECUTOR_KV_FORMAT="$kv_format" ${kv_touch_bytes:+"ASHLAR_EXECUTOR_KV_TOUCH_BYTES=$kv_touch_bytes"} \
        "$ASHLAR_BIN" serve --zoo "$file" --listen "127.0.0.1:$port" "$@" >"$log" 2>&1 &
      ready=/ready
      ;;
    llama-*)
      # A buffer that the slots share, and prompts kept in memory, only cost.
      bench/peers/llama.sh serve "$file" "$threads" "$port" --alias "hub/$model" --no-kv-unified --cache-ram 0 "$@" >"$log" 2>&1 &
      ;;
    vllm)
      log=$results/$model/$name.log
      say "vLLM starts, which takes minutes"
      bench/peers/vllm.sh serve "$file" "$threads" "$port" --served-model-name "hub/$model" --no-enable-prefix-caching "$@" >"$log" 2>&1 &
      ;;
    mistralrs) bench/peers/mistralrs.sh serve "$file" "$threads" "$port" "$@" >"$log" 2>&1 & ;;
  esac
  server=$!
  wait_ready "http://127.0.0.1:$port$ready" || { end_tree "$server"; server=''; return 1; }
  sleep "$SETTLE_SECONDS"
}

# pages_for TOKENS: settings of Ashlar, one a line, for pages of so many tokens of SmolLM2 (30 layers, 3 heads of 64), which have their memory from the start
# on, as the peers' keys and values have once every place was used.
pages_for() {
  local bytes=$(($1 * 30 * 2 * 3 * 64 * 2))
  [ "$kv_format" != f32 ] || bytes=$((2 * bytes))
  printf '%s\n' --set "executor.kv_bytes=$bytes" --set "executor.kv_touch_bytes=$bytes"
}

# finish VARIANT NAME: it no longer takes part. vLLM, which compiles for minutes at each start, is halted.
finish() {
  local pid
  if [ "$1" = vllm ]; then
    for pid in $(tree_of "$server"); do kill -STOP "$pid"; done
    sleeping[$2]=$server sleeping_port[$2]=$port
  else
    end_tree "$server"
  fi
  server=''
}

# install_among RESULTS VARIANTS: llama.cpp and vLLM, if a variant is theirs.
install_among() {
  local peer wanted=()
  for peer in llama vllm; do
    [[ " $2" != *" $peer"* ]] || wanted+=("$peer")
  done
  : >"$1/peers.tsv"
  install_peers "$1" "${wanted[@]}"
}

# in_turns RUN VARIANT...: sets `order`: those whose server is here, forwards in odd runs and backwards in even ones, so that a run of one pairs with the same
# run of another.
in_turns() {
  local run=$1 variant peer
  shift
  order=()
  for variant in "$@"; do
    peer=${variant%%[-@]*}
    [[ ! $peer =~ ^(llama|vllm|mistralrs)$ ]] || [ -n "${version_of[$peer]:-}" ] || continue
    if [ $((run % 2)) = 1 ]; then order+=("$variant"); else order=("$variant" "${order[@]}"); fi
  done
}

# keep_in FOLDER: sets `kept`, where the comparison of all runs goes: to the results of that name, and with QUICK=1 to where the runs are.
keep_in() {
  kept=bench/results/$1/$name.json
  [ "$quick" != 1 ] || kept=$results/comparison.json
  mkdir -p "$(dirname "$kept")"
}

warn_of_load() {
  if awk '{ exit !($1 > 0.5) }' /proc/loadavg; then
    say "warning: the load is $(cut -d' ' -f1 /proc/loadavg) before anything began: these figures will not be worth keeping"
  fi
}

# steadily COMMAND...: measures while the threads have whole cores, else again. On a rented machine two threads may be given one core for
# minutes (two hyperthreads of it), and whoever is measured then is half as fast: so the peak of int8 arithmetic is probed before and
# after, against the most that it was. After four times the last one stays.
steadily() {
  local attempt
  [ "$quick" != 1 ] || { "$@"; return; }
  for attempt in 1 2 3 4; do
    await_cores
    "$@"
    probe
    ! lacks_cores || { say "the cores were not whole at the end ($probed): once more"; continue; }
    return 0
  done
}

# Sets `probed`, what is printed, and `peak`, GOP/s; remembers the most.
probe() {
  probed=$("$ASHLAR_BIN" bench kernels --threads "$threads" --rows 1 --shapes 64x64 --dtypes int8g32 | sed -n 2p)
  peak=$(sed -nE 's/.*int8 dot ([0-9]+).*/\1/p' <<<"$probed")
  [ "$peak" -le "${most_peak:-0}" ] || most_peak=$peak
}

lacks_cores() { [ "$((peak * 100))" -lt "$((most_peak * 90))" ]; }

# Waits for whole cores, five minutes at most.
await_cores() {
  local tries
  if [ -z "${most_peak:-}" ]; then
    for tries in 1 2 3 4 5; do
      probe
      sleep 2
    done
  fi
  for tries in $(seq 100); do
    probe
    lacks_cores || return 0
    [ $((tries % 10)) != 1 ] || say "waiting for whole cores: $probed"
    sleep 3
  done
}
