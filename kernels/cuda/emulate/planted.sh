#!/usr/bin/env bash
# Plants a fault in a copy of the kernels and expects emulation to find it: a missing barrier, a missing wait, an index beyond the end.
# Usage: kernels/cuda/emulate/planted.sh FOLDER (scratch). 0 if every fault is found and the unharmed copy passes.
set -uo pipefail
folder=${1:?a scratch folder}
here=$(cd "$(dirname "$0")/.." && pwd)
failed=0

# try NAME EXPECTED FILE SED: EXPECTED is pass, wrong (outputs differ), or stop (the emulation stops the program).
try() {
  local name=$1 expected=$2 file=$3 edit=$4 copy=$folder/$1 main=main.cc rc result
  [ "$file" = chunk.cu ] && main=chunk.cc
  rm -rf "$copy" && mkdir -p "$copy" && cp -r "$here"/*.cu "$here"/*.cuh "$here"/*.h "$here/lab" "$here/emulate" "$copy/"
  sed -i "$edit" "$copy/$file"
  if [ "$expected" != pass ] && cmp -s "$here/$file" "$copy/$file"; then echo "$name: the edit matches nothing in $file"; failed=1; return; fi
  g++ -O1 -march=x86-64-v3 -ffp-contract=off -std=c++17 -fno-strict-aliasing -w -DEMULATE_BRIEFLY -o "$copy/run" "$copy/emulate/$main" -lpthread || { failed=1; return; }
  "$copy/run" 0 1 7 >"$copy/out.txt" 2>"$copy/err.txt"
  rc=$?
  case $rc in 0) result=pass ;; 1) result=wrong ;; 3 | 4) result=stop ;; *) result="exit $rc" ;; esac
  printf '%-28s expected %-5s got %-5s %s\n' "$name" "$expected" "$result" "$(grep -h -m1 -e FAIL -e emulation: "$copy/out.txt" "$copy/err.txt" | head -1 | cut -c1-110)"
  [ "$result" = "$expected" ] || failed=1
}

try unharmed pass linear_integer.cu ''
# The sums of slices are read by other warps than wrote them.
try missing_barrier_sums wrong linear_integer.cu '0,/    __syncthreads();/s///'
# Stages are overwritten while slower warps still read them.
try missing_barrier_stages wrong linear_bf16.cu '/cp_async_wait<STAGES - 2>();/{n;s/__syncthreads();//}'
# The copy of a stage may not have landed.
try missing_wait wrong linear_bf16.cu 's/cp_async_wait<STAGES - 2>/cp_async_wait<STAGES - 1>/'
# Keys are overwritten before every lane has read them.
try missing_warp_sync wrong attention.cu '/            __syncwarp();/{N;s/            __syncwarp();\n            load(segment + W, keys/            load(segment + W, keys/}'
# A chunk beyond the end of the weights.
try read_beyond_weights stop linear_integer.cu 's/FULL ? next < slices : next \* SLICE + (c + DEPTH - CHUNKS) \* 64 < padded/true/'
# The page after the last of a table.
try read_beyond_table stop attention.cu 's/segment < end \&\& holds(segment \* PAGES + p) ? table\[(segment \* PAGES + p) \/ pieces\] : 0/table[segment * PAGES + p + 4000]/'
# Some lanes leave before a shuffle.
try parted_warp stop attention.cu 's/float greatest = fmaxf(x0, x1);/float greatest = fmaxf(x0, x1); if (lane == 5) return;/'

try unharmed_chunk pass chunk.cu ''
# The values, or keys, of a segment are overwritten while slower warps still read them; a tile is read before it is whole; a copy may not have landed.
try missing_barrier_values wrong chunk.cu 's/__syncthreads(); \/\/ the values of.*//'
try missing_barrier_keys wrong chunk.cu 's/__syncthreads(); \/\/ the keys were.*//'
try missing_barrier_tile wrong chunk.cu '/        look_up(segment + 1);/{n;s/__syncthreads();//}'
try missing_wait_chunk wrong chunk.cu 's/cp_async_wait<0>();/cp_async_wait<1>();/'
# A row sees the token after its own; what it does not see adds 0 to -0; a segment is merged with the factors of the others.
try mask_off_by_one wrong chunk.cu 's/seen_at\[2 \* line + 1\] = past;/seen_at[2 * line + 1] = past + 1;/'
try masked_adds_zero wrong chunk.cu 's/if (!(weight < 0.0f)) add(i, weight, v);/add(i, weight < 0.0f ? 0.0f : weight, v);/'
try merged_in_another_order wrong chunk.cu 's/older = rises ? factor : 1.0f;/older = rises ? 1.0f : factor;/'
exit $failed
