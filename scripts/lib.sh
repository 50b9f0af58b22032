# shellcheck shell=bash
# Shared by the scripts of this folder: where the repository is, and how system packages are had. Sourced, never run.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
export ROOT

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

APT_UPDATED=
apt_update_once() {
  [ -n "$APT_UPDATED" ] || as_root apt-get update -q >&2 || die "apt-get update failed"
  APT_UPDATED=yes
}

# need_packages PACKAGE...: installs those that are missing.
need_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  command -v apt-get >/dev/null || die "needs ${missing[*]}, and this is no Debian or Ubuntu: install them by hand"
  say "installing ${missing[*]}"
  apt_update_once
  DEBIAN_FRONTEND=noninteractive as_root apt-get install -q -y --no-install-recommends "${missing[@]}" >&2 \
    || die "failed to install ${missing[*]}"
}

# need_server_program PROGRAM PACKAGE FOLDER: the program on the PATH, or unpacked from its package into FOLDER. Unpacked and not
# installed, because installing these packages also starts a daemon.
need_server_program() {
  local program=$1 package=$2 folder=$3 scratch
  if command -v "$program" >/dev/null || [ -x "$folder/$program" ]; then return; fi
  say "unpacking $program from the package $package"
  apt_update_once
  scratch=$(mktemp -d)
  chmod 755 "$scratch"
  (cd "$scratch" && apt-get download -q "$package" >&2 && dpkg-deb -x "$package"_*.deb unpacked) || die "failed to fetch the package $package"
  install -D -m 755 "$scratch/unpacked/usr/bin/$program" "$folder/$program"
  rm -rf "$scratch"
}

# What cargo needs beside Rust: a linker, and protoc with its well-known types for etcd's protocol.
need_build_packages() {
  command -v cargo >/dev/null || die "needs Rust (cargo) on the PATH"
  local packages=(protobuf-compiler libprotobuf-dev)
  command -v cc >/dev/null || packages+=(build-essential)
  need_packages "${packages[@]}"
}
