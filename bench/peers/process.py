"""What a server's processes hold, for bench/peers/run.sh, bench/models.sh and bench/adapters.sh.

    python process.py tree PID                             the process and all that it started, a line each
    python process.py held PID[,PID] REPORT LOG WEIGHTS [METRICS]   adds `held` to the JSON of a load: bytes resident now, of the
                                                           weights' file or folder, and of KV pages where server or log tells
"""

import json
import re
import sys
import urllib.request
from pathlib import Path


def tree(pid: int) -> list[int]:
    children = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [pid, *(one for child in children for one in tree(child))]


def resident_bytes(pid: int) -> int:
    """Shared pages count in equal parts to those who share them, so that the sum over a tree is right."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def kv_bytes_of_metrics(url: str) -> int | None:
    """Of pages that have been written: Ashlar's pool is reserved whole, but a page takes memory when it is first used."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    pages = {state: float(count) for state, count in re.findall(r'^ashlar_kv_pages\{state="(\w+)"\} (\S+)', text, re.MULTILINE)}
    pool = re.search(r"^ashlar_kv_bytes (\S+)", text, re.MULTILINE)
    if not pool or not sum(pages.values()):
        return None
    return round(float(pool[1]) * (1 - pages.get("free", 0) / sum(pages.values())))


def kv_bytes_of_log(text: str) -> int | None:
    """llama.cpp clears its cells when it starts; vLLM names the space that it was given."""
    if found := re.findall(r"llama_kv_cache\S*: size =\s*([\d.]+) MiB", text):
        return round(sum(map(float, found)) * 2**20)
    if found := re.findall(r"set \(([\d.]+)/[\d.]+\) GiB for KV cache", text):
        return round(float(found[-1]) * 2**30)
    return None


def main(pids: list[int], report: Path, log: Path, weights: Path, metrics: str | None):
    kv = kv_bytes_of_metrics(metrics) if metrics else kv_bytes_of_log(log.read_text(errors="replace"))
    held = {"resident_bytes": sum(resident_bytes(one) for pid in pids for one in tree(pid)), "weights_bytes": size_bytes(weights), "kv_bytes": kv}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"held": held}, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tree", pid]:
            print(*tree(int(pid)), sep="\n")
        case ["held", pids, report, log, weights, *metrics]:
            main([int(pid) for pid in pids.split(",")], Path(report), Path(log), Path(weights), metrics[0] if metrics else None)
        case _:
            sys.exit(__doc__)
