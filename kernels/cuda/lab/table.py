"""Tables of a lab run, for docs: table.py FOLDER. Best form of each shape and row count, its share of the ceilings of the same run, and the
vendor's library beside it."""
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
lab = [json.loads(line) for line in (folder / "lab.jsonl").read_text().splitlines()]
torch = [json.loads(line) for line in (folder / "torch.jsonl").read_text().splitlines()]
copy = max(r["gb_s"] for r in lab + torch if "copy" in r["kernel"])
read = max(r["gb_s"] for r in lab if r["kernel"] == "read")
print(f"copy {copy:.0f} GB/s (read plus written), read {read:.0f} GB/s, launch in a graph {next(r['us'] for r in lab if r['kernel'] == 'launch')} us")


def cublas(rows, n, k):
    return next((r for r in torch if r["kernel"] == "cublas_bf16" and (r["rows"], r["n"], r["k"]) == (rows, n, k)), None)


print("\n| kernel | form | rows | n x k | us | GB/s | of copy | of read | tera/s | cuBLAS bf16 us | times faster |\n" + "| --- " * 11 + "|")
best = {}
for r in lab:
    if r["n"] and "grouped" not in r["what"] and "launches" not in r["what"] and not r["kernel"].startswith("decode"):
        key = (r["kernel"], r["n"], r["k"], r["rows"])
        if key not in best or r["us"] < best[key]["us"]:
            best[key] = r
for (kernel, n, k, rows), r in sorted(best.items()):
    c = cublas(rows, n, k)
    versus = f"{c['us']:.1f} | {c['us'] / r['us']:.2f}" if c else " | "
    print(f"| {kernel} | {r['what']} | {rows} | {n} x {k} | {r['us']:.2f} | {r['gb_s']:.0f} | {r['gb_s'] / copy:.2f} | {r['gb_s'] / read:.2f} | {r['tera_s']:.1f} | {versus} |")
print("\n| grouped and attention | rows or batch | us | GB/s | of copy | of read |\n" + "| --- " * 6 + "|")
for r in lab:
    if "grouped" in r["what"] or "launches" in r["what"] or r["kernel"].startswith("decode"):
        print(f"| {r['kernel']}, {r['what']}, {r['n']} | {r['rows']} | {r['us']:.2f} | {r['gb_s']:.0f} | {r['gb_s'] / copy:.2f} | {r['gb_s'] / read:.2f} |")
for r in torch:
    if r["kernel"] != "cublas_bf16":
        print(f"| {r['kernel']}, {r['what']}, {r['n']} x {r['k']} | {r['rows']} | {r['us']:.2f} | {r['gb_s']:.0f} | {r['gb_s'] / copy:.2f} | {r['gb_s'] / read:.2f} |")
