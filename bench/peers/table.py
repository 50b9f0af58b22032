"""The table of bench/peers/run.sh: python table.py RESULTS. Reads RESULTS/MODEL/CELL/VARIANT.RUN.json, prints for each cell the
medians, the ratios to every peer pair by pair with a bootstrap interval, and whether the goal holds at the interval's lower end;
writes RESULTS/comparison.json. Fails where Ashlar's texts differ from run to run, or where requests failed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compare import decode_rate, interval  # noqa: E402
from runs import Runs, read  # noqa: E402

MIB = 2**20
# With fewer no goal is met, whatever the ratio.
PAIRS_MIN = 3


def prefill_rate(run: dict) -> float:
    """Tokens of a prompt over the median time to the first token."""
    return run["all"]["input_tokens"] / run["all"]["request_count"] / float(run["all"]["ttft_ms"]["p50"]) * 1000


def of_all(name: str, quantile: str) -> Callable[[dict], float]:
    return lambda run: float(run["all"][name][quantile])


def held(name: str) -> Callable[[dict], float]:
    return lambda run: float("nan") if run["held"][name] is None else run["held"][name] / MIB


def rest(run: dict) -> float:
    """What a server holds beside the stored weights and KV pages, MiB: its code, buffers and second copies of weights."""
    return held("resident_bytes")(run) - held("weights_bytes")(run) - held("kv_bytes")(run)


OUTPUT = ("output tokens/s", lambda run: run["all"]["output_tokens_per_second"])
TTFT = ("first token p50 ms", of_all("ttft_ms", "p50"))
GAP_P50 = ("gap p50 ms", of_all("itl_ms", "p50"))
GAP_P99 = ("gap p99 ms", of_all("itl_ms", "p99"))
RESIDENT = ("resident MiB", held("resident_bytes"))
DECODE = ("decode tokens/s", decode_rate)
PREFILL = ("prompt tokens/s", prefill_rate)
REST = ("beside them MiB", rest)

COLUMNS = {
    "decode": [DECODE, TTFT, GAP_P99, RESIDENT],
    "prefill": [PREFILL, TTFT, RESIDENT],
    "streams": [OUTPUT, TTFT, GAP_P50, GAP_P99, RESIDENT],
    "memory": [RESIDENT, ("weights MiB", held("weights_bytes")), ("KV pages MiB", held("kv_bytes")), REST],
}


@dataclass
class Goal:
    """That `ours` is at least `floor` times as good in `figure` as each of `peers`, and so as the best of them."""

    ours: str
    peers: tuple[str, ...]
    figure: tuple[str, Callable[[dict], float]]
    floor: float
    more_is_better: bool = True


PEERS = ("llama", "vllm", "mistralrs")
GOALS = {
    "decode": [
        Goal("ashlar-int8", ("llama-q8_0",), DECODE, 1.6),
        Goal("ashlar-q8_0", ("llama-q8_0",), DECODE, 1.6),
        Goal("ashlar-int4", ("llama-q4_0", "llama-q4_1"), DECODE, 2.0),
        Goal("ashlar-q4_0", ("llama-q4_0",), DECODE, 2.0),
    ],
    "prefill": [Goal("ashlar-int8", PEERS, PREFILL, 1.5)],
    "streams": [Goal("ashlar-int8", PEERS, OUTPUT, 2.0), Goal("ashlar-int8", PEERS, GAP_P99, 1.0, more_is_better=False)],
    "memory": [
        Goal("ashlar-int8", ("llama-q8_0",), REST, 1.0, more_is_better=False),
        Goal("ashlar-int4", ("llama-q4_0",), REST, 1.0, more_is_better=False),
    ],
}


def complaints(where: str, variants: Runs) -> list[str]:
    """What makes a cell no measurement."""
    found = []
    for variant, runs in variants.items():
        if failed := sum(run["all"]["failed_count"] for run in runs.values()):
            found.append(f"{where}: {failed} requests to {variant} failed")
        if len({run["load"]["requests_max"] for run in runs.values()} | {run["prompts_hash"] for run in runs.values()}) != 2:
            found.append(f"{where}: the runs of {variant} were not under the same load")
        if variant.startswith("ashlar") and len({run["output_hash"] for run in runs.values()}) > 1:
            found.append(f"{where}: {variant} said different things in different runs")
    lengths = {variant: round(run["all"]["input_tokens"] / run["all"]["request_count"]) for variant, runs in variants.items() for run in runs.values()}
    if max(lengths.values()) - min(lengths.values()) > 2:
        found.append(f"{where}: the servers count prompts differently: {lengths}")
    return found


def compare(goal: Goal, variants: Runs) -> list[dict]:
    """One entry for each peer, the best peer first."""
    name, figure = goal.figure
    entries = []
    for variant, runs in variants.items():
        both = sorted(runs.keys() & variants.get(goal.ours, {}).keys())
        if not variant.startswith(goal.peers) or not both:
            continue
        pairs = [(figure(variants[goal.ours][run]), figure(runs[run])) for run in both]
        if goal.more_is_better:
            ratios = [ours / theirs for ours, theirs in pairs]
        else:
            ratios = [theirs / ours if ours > 0 else float("inf") for ours, theirs in pairs]
        low, high = interval(ratios)
        entry = {"ours": goal.ours, "peer": variant, "figure": name, "ratios": ratios, "median": median(ratios)}
        entries.append(entry | {"interval": [low, high], "floor": goal.floor, "met": low >= goal.floor and len(both) >= PAIRS_MIN})
    return sorted(entries, key=lambda entry: entry["median"])


def show(where: str, kind: str, variants: Runs) -> dict:
    columns = COLUMNS[kind]
    print(f"\n{where}\n{'':14}{'runs':>5}" + "".join(f"{name:>20}" for name, _ in columns))
    rows = {}
    for variant, runs in variants.items():
        rows[variant] = {name: median(map(figure, runs.values())) for name, figure in columns}
        short = sum(run["all"]["short_count"] for run in runs.values())
        note = f"   {short} answers ended early" if short else ""
        print(f"{variant:14}{len(runs):>5}" + "".join(f"{value:>20.1f}" for value in rows[variant].values()) + note)
    goals = []
    for goal in GOALS[kind]:
        entries = compare(goal, variants)
        for place, entry in enumerate(entries):
            (low, high), best = entry["interval"], "the best peer" if len(entries) > 1 and place == 0 else ""
            better = "more" if goal.more_is_better else "less"
            sentence = f"{goal.ours} to {entry['peer']}, {entry['figure']} ({better} is better): {entry['median']:.2f} [{low:.2f}, {high:.2f}]"
            print(f"  {sentence:92}goal {goal.floor:.1f} {'met' if entry['met'] else 'MISSED':7}{best}".rstrip())
        if not entries:
            print(f"  no peer to hold {goal.ours} against")
        goals.append({"ours": goal.ours, "figure": goal.figure[0], "met": bool(entries) and all(e["met"] for e in entries), "peers": entries})
    return {"medians": rows, "goals": goals}


def main(results: Path):
    cells = {}
    for folder in sorted(results.glob("*/*/"), key=lambda folder: folder.parts):
        if variants := read(folder):
            cells[folder.parent.name, folder.name] = variants
    if not cells:
        sys.exit("no load succeeded: there is nothing to compare")
    every = [run for variants in cells.values() for runs in variants.values() for run in runs.values()]
    machines = sorted({run["machine"] for run in every})
    commits = sorted({run["commit"] for run in every if run["commit"]})
    loads = [float(run["notes"]["load_before"]) for run in every]
    peers = dict(line.split("\t", 1) for line in (results / "peers.tsv").read_text().splitlines())
    threads = sorted({run["notes"]["threads"] for run in every})
    print(f"\n{'; '.join(machines)}; {', '.join(threads)} threads; Ashlar {', '.join(commits)}")
    print(f"load average before a run: median {median(loads):.2f}, most {max(loads):.2f}")
    for peer, told in peers.items():
        print(f"{peer}: {told}")
    if any(run["notes"].get("quick") == "1" for run in every):
        print("QUICK=1: a few requests each; these figures mean nothing")
    told, wrong = {}, []
    for (model, cell), variants in cells.items():
        kind = "streams" if cell.startswith("streams") else cell
        told.setdefault(model, {})[cell] = show(f"{model}, {cell}", kind, variants) | {
            "weights": {variant: next(iter(runs.values()))["notes"]["weights"] for variant, runs in variants.items()},
            "prompts_hash": sorted({run["prompts_hash"] for runs in variants.values() for run in runs.values()}),
            "output_hashes": {variant: sorted({run["output_hash"] for run in runs.values()}) for variant, runs in variants.items()},
            "load_before": {variant: [run["notes"]["load_before"] for run in runs.values()] for variant, runs in variants.items()},
        }
        wrong += complaints(f"{model}, {cell}", variants)
    result = {"machine": machines, "commit": commits, "threads": threads, "peers": peers, "cells": told, "complaints": wrong}
    (results / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {results / 'comparison.json'}")
    if wrong:
        sys.exit("no measurement:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
