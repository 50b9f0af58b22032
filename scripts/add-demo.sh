#!/usr/bin/env bash
# Adds every model of the demo family to a zoo: scripts/add-demo.sh ASHLAR ZOO. The base comes first, so that the others are
# reported against it. Adding again what is there stores nothing new.
set -euo pipefail

ashlar=$1 zoo=$2
demo=$(dirname "$0")/../demo

added=0
for folder in "$demo"/base "$demo"/*/; do
  folder=${folder%/}
  name=$(basename "$folder")
  if [ "$name" = base ] && [ "$added" -gt 0 ]; then continue; fi
  parent=()
  if [ -f "$folder/adapter_config.json" ]; then
    parent=(--base demo/base)
  elif [ ! -f "$folder/config.json" ]; then
    continue
  elif [ "$name" != base ]; then
    parent=(--parent demo/base)
  fi
  "$ashlar" zoo add "$folder" --name "demo/$name" --zoo "$zoo" "${parent[@]}"
  added=$((added + 1))
done
if [ "$added" = 0 ]; then
  echo "error: $demo holds no models" >&2
  exit 1
fi
