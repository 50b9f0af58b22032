"""What a family of models takes on disk in each way of storing it, and how fast the zoo takes it in and gives it back.

Exact: bytes. `as it came`: all safetensors files of all models. `files`: each distinct file once (SHA-256). `tensors`: the zoo's files of tensors with
`zoo add --raw`. `stored`: the same with encodings, each model over its parent. `zstd -3`: each distinct file, compressed alone.
Timed: `zoo add` of the whole family on one core and on all, bytes as they came over seconds; reading back by `ashlar bench storage`; zstd by its own `-b3`.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASHLAR = os.environ["ASHLAR_BIN"]


def family(name, finetunes):
    """Models of a family as (name, folder, parent), the base first; adapters are left out: they store next to nothing."""
    folder = ROOT / "demo" if name == "demo" else pathlib.Path(finetunes)
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    models.sort(key=lambda path: path.name != "base")
    if not models or models[0].name != "base":
        sys.exit(f"{folder} has no `base`: run bench/finetunes.sh first")
    return [(path.name, path, None if path.name == "base" else "base") for path in models]


def weights(folder):
    """The safetensors files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def run(*command, cores=None):
    """Runs a command, on so many cores; returns its output and seconds."""
    if cores:
        command = ("taskset", "-c", f"0-{cores - 1}", *command)
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout + done.stderr, seconds


def folder_bytes(folder):
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def add_all(models, zoo, cores, raw):
    """Adds a family to a new zoo; returns the seconds it took."""
    shutil.rmtree(zoo, ignore_errors=True)
    seconds = 0.0
    for name, folder, parent in models:
        options = (["--raw"] if raw else []) + (["--parent", f"bench/{parent}"] if parent else [])
        seconds += run(ASHLAR, "zoo", "add", folder, "--name", f"bench/{name}", "--zoo", zoo, *options, cores=cores)[1]
    return seconds


def zstd(files, cores):
    """`zstd -3` on files in memory: ratio and bytes a second in and out, of the largest file."""
    largest = max(files, key=lambda path: path.stat().st_size).resolve()
    text, _ = run("zstd", "-b3", "-i5", f"-T{cores}", largest, cores=cores)
    # Overwrites its line as it goes; the last whole one holds.
    ratio, ingest, restore = re.findall(r"\(x([\d.]+)\),\s*([\d.]+) MB/s\s*,\s*([\d.]+) MB/s", text)[-1]
    return {"file": largest.name, "ratio": float(ratio), "compress_bytes_per_second": 1e6 * float(ingest), "restore_bytes_per_second": 1e6 * float(restore)}


def measure(name, models, arguments):
    """All figures of one family."""
    files = [file for _, folder, _ in models for file in weights(folder)]
    distinct = {}
    for file in files:
        distinct.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
    came = sum(file.stat().st_size for file in files)
    all_cores = os.cpu_count()
    result = {"models": [model for model, _, _ in models], "bytes": {"as it came": came, "files": sum(f.stat().st_size for f in distinct.values())}}
    zstd_bytes = 0
    for file in distinct.values():
        with subprocess.Popen(["zstd", "-3", "-q", "-c", file.resolve()], stdout=subprocess.PIPE) as process:
            while part := process.stdout.read(1 << 20):
                zstd_bytes += len(part)
    result["bytes"]["zstd -3 of files"] = zstd_bytes
    zoo = pathlib.Path(arguments.scratch) / name
    result["add_bytes_per_second"] = {}
    for raw in (True, False):
        for cores in sorted({1, all_cores}):
            seconds = add_all(models, zoo, cores, raw)
            result["add_bytes_per_second"][f"{'raw' if raw else 'encoded'}, {cores} cores"] = came / seconds
        result["bytes"]["tensors" if raw else "stored"] = folder_bytes(zoo / "tensors")
    report = zoo.with_suffix(".json")
    print(run(ASHLAR, "bench", "storage", "--zoo", zoo, "--rounds", str(arguments.rounds), "--json", report)[0])
    result["restore"] = json.loads(report.read_text())
    result["zstd"] = {f"{cores} cores": zstd(files, cores) for cores in sorted({1, all_cores})}
    print(run(ASHLAR, "zoo", "verify", "--zoo", zoo)[0])
    shutil.rmtree(zoo)
    return result


def table(name, result):
    """Prints a family's bytes and speeds."""
    came = result["bytes"]["as it came"]
    print(f"\n{name}: {', '.join(result['models'])}")
    print(f"{'':24}  {'MB':>8}  {'saved':>7}")
    for kind, count in result["bytes"].items():
        print(f"{kind:24}  {count / 1e6:8.2f}  {100 * (1 - count / came):5.1f} %")
    for kind, speed in result["add_bytes_per_second"].items():
        print(f"add, {kind:19}  {speed / 1e9:8.2f} GB/s")
    for kind, figures in result["zstd"].items():
        print(f"zstd -3, {kind:15}  {figures['compress_bytes_per_second'] / 1e9:8.2f} GB/s in, {figures['restore_bytes_per_second'] / 1e9:.2f} out")


def main():
    """Measures each family and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--families", default="demo finetunes")
    parser.add_argument("--finetunes", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.families.split():
        results[name] = measure(name, family(name, arguments.finetunes), arguments)
        table(name, results[name])
    if arguments.results:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        path = pathlib.Path(arguments.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"commit": commit, "families": results}, indent=1) + "\n")


main()
