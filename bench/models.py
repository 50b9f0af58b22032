"""The table of bench/models.sh.

    python models.py rate FOLDER VARIANT SHARE     SHARE of the requests a second that VARIANT (or the best of those that it begins) had in FOLDER
    python models.py table RESULTS OUT.json        reads RESULTS/COUNT/CELL/VARIANT.RUN.json, prints medians for each cell and, pair by pair with a
                                                   bootstrap interval, what Ashlar with sharing is held to; writes all to OUT.json

Fails where requests failed, where runs differ in their load, or where Ashlar did not say the same with sharing and without, in any run."""

import sys
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import median
from typing import Callable

from compare import interval
from runs import Runs, introduce, keep, read

MIB = 2**20
# With fewer no goal is met, whatever the ratio.
PAIRS_MIN = 3
SHARED, ALONE, PEER = "shared", "alone", "llama"
Figure = Callable[[dict], float]


def quantile(name: str, which: str) -> Figure:
    return lambda run: float((run["all"][name] or {}).get(which, nan))


def total_rate(run: dict) -> float:
    """Tokens of prompts and answers; nothing where the server does not count prompts."""
    return (run["all"]["input_tokens_per_second"] or nan) + run["all"]["output_tokens_per_second"]


def cpu(run: dict) -> float:
    return float((run["server"] or {}).get("cpu_seconds_per_million_tokens") or nan)


TOTAL = ("tokens/s", total_rate)
OUTPUT = ("output tokens/s", lambda run: run["all"]["output_tokens_per_second"])
RESIDENT = ("resident MiB", lambda run: run["held"]["resident_bytes"] / MIB)
E2E_P95 = ("whole p95 ms", quantile("e2e_ms", "p95"))
GAP_P50 = ("gap p50 ms", quantile("itl_ms", "p50"))
COLUMNS = [
    RESIDENT,
    TOTAL,
    OUTPUT,
    *((f"first {which} ms", quantile("ttft_ms", which)) for which in ("p50", "p95", "p99")),
    GAP_P50,
    *((f"gap {which} ms", quantile("itl_ms", which)) for which in ("p95", "p99")),
    E2E_P95,
    ("CPU-s/M tokens", cpu),
]


@dataclass
class Goal:
    """That Ashlar with sharing is at least `floor` times as good in a figure as `against`, in cells that begin with `cells`. With `of_ideal` the
    ratio is taken of what the bytes allow."""

    cells: str
    against: str
    figure: tuple[str, Figure]
    floor: float
    more_is_better: bool
    of_ideal: bool = False


# 33.5 % less is BlockLLM's figure against a server for each model.
LESS_BY_A_THIRD = 1 / (1 - 0.335)
GOALS = [
    Goal("closed", PEER, TOTAL, 4.0, more_is_better=True),
    Goal("closed", PEER, RESIDENT, 3.0, more_is_better=False),
    Goal("closed", ALONE, OUTPUT, 0.85, more_is_better=True, of_ideal=True),
    Goal("decode", ALONE, OUTPUT, 0.85, more_is_better=True, of_ideal=True),
    Goal("decode", ALONE, GAP_P50, 0.85, more_is_better=False, of_ideal=True),
    Goal("closed", ALONE, E2E_P95, LESS_BY_A_THIRD, more_is_better=False),
    Goal("decode", PEER, TOTAL, 4.0, more_is_better=True),
    Goal("open", ALONE, E2E_P95, LESS_BY_A_THIRD, more_is_better=False),
]


def complaints(where: str, variants: Runs) -> list[str]:
    """What makes a cell no measurement."""
    found = []
    every = [run for runs in variants.values() for run in runs.values()]
    if len({(run["schedule_hash"], run["prompts_hash"], run["seed"], run["machine"]) for run in every}) > 1:
        found.append(f"{where}: the runs were not under the same load on the same machine")
    for variant, runs in variants.items():
        if failed := sum(run["all"]["failed_count"] for run in runs.values()):
            found.append(f"{where}: {failed} requests to {variant} failed")
        if short := sum(run["all"]["short_count"] for run in runs.values()):
            found.append(f"{where}: {short} answers of {variant} ended early")
    said = {run["output_hash"] for variant in (SHARED, ALONE) for run in variants.get(variant, {}).values()}
    if len(said) > 1:
        found.append(f"{where}: Ashlar did not say the same with sharing and without, or in different runs: {sorted(said)}")
    lengths = {variant: round(run["all"]["input_tokens"] / run["all"]["request_count"]) for variant, runs in variants.items() for run in runs.values() if run["all"]["input_tokens"]}
    if lengths and max(lengths.values()) - min(lengths.values()) > 2:
        found.append(f"{where}: the servers count prompts differently: {lengths}")
    return found


def ideal(variants: Runs) -> float:
    """How many times fewer bytes of weights a step of all models touches that reads what they share once."""
    stored = lambda name: next(iter(variants[name].values()))["held"]["weights_bytes"]
    return stored(ALONE) / stored(SHARED) if variants.get(ALONE) and variants.get(SHARED) else nan


def compare(cell: str, variants: Runs) -> list[dict]:
    entries = []
    for goal in GOALS:
        if not cell.startswith(goal.cells):
            continue
        (name, figure), found = goal.figure, []
        for other in [variant for variant in variants if variant.startswith(goal.against)]:
            both = sorted(variants.get(SHARED, {}).keys() & variants[other].keys())
            pairs = [(figure(variants[SHARED][run]), figure(variants[other][run])) for run in both]
            ratios = [mine / theirs if goal.more_is_better else theirs / mine for mine, theirs in pairs]
            best = ideal(variants) if goal.of_ideal else 1.0
            ratios = [ratio / best for ratio in ratios]
            if not ratios:
                continue
            low, high = interval(ratios)
            # A figure that a run lacks shows nothing.
            met = all(map(isfinite, ratios)) and low >= goal.floor and len(both) >= PAIRS_MIN
            told = {"against": other, "figure": name, "of_ideal": best if goal.of_ideal else None, "ratios": ratios, "median": median(ratios)}
            found.append(told | {"interval": [low, high], "floor": goal.floor, "more_is_better": goal.more_is_better, "met": met})
        # The best of the peer's settings first: that is what is to be held against.
        entries += sorted(found, key=lambda one: one["median"])
    return entries


def show(where: str, cell: str, variants: Runs) -> dict:
    every = next(iter(next(iter(variants.values())).values()))
    arrivals = every["load"]["arrivals"]
    told = f"{arrivals['poisson_rate']} requests/s" if "poisson_rate" in arrivals else f"{arrivals['closed_concurrency']} streams"
    print(f"\n{where}: {told}, {every['load']['prompt_tokens']} in, {every['load']['output_tokens']} out, {every['load']['requests_max']} requests")
    print(f"{'':10}{'runs':>5}" + "".join(f"{name:>16}" for name, _ in COLUMNS))
    medians = {}
    for variant, runs in variants.items():
        medians[variant] = {name: median(map(figure, runs.values())) for name, figure in COLUMNS}
        print(f"{variant:10}{len(runs):>5}" + "".join(f"{value:>16.1f}" for value in medians[variant].values()))
    print(f"  bytes of weights without sharing over those with it: {ideal(variants):.2f}")
    entries = compare(cell, variants)
    for one in entries:
        low, high = one["interval"]
        better = "more" if one["more_is_better"] else "less"
        of = f" of {one['of_ideal']:.2f}" if one["of_ideal"] else ""
        sentence = f"{SHARED} to {one['against']}, {one['figure']} ({better} is better){of}: {one['median']:.2f} [{low:.2f}, {high:.2f}]"
        verdict = "met" if one["met"] else "MISSED" if len(one["ratios"]) >= PAIRS_MIN else "too few runs"
        print(f"  {sentence:88} goal {one['floor']:.2f} {verdict}")
    return {"medians": medians, "ideal": ideal(variants), "goals": entries}


def table(results: Path, out: Path):
    # In the order of the measurement: open loads come last.
    folders = sorted((folder for folder in results.glob("*/*/")), key=lambda folder: (int(folder.parent.name), folder.name))
    cells = {(folder.parent.name, folder.name): variants for folder in folders if (variants := read(folder))}
    if not cells:
        sys.exit("no load succeeded: there is nothing to compare")
    every = [run for variants in cells.values() for runs in variants.values() for run in runs.values()]
    commits, peers, quick = introduce(results, every, "a request each")
    told, wrong = {}, []
    for (count, cell), variants in cells.items():
        where = f"{count} models, {cell}"
        told.setdefault(count, {})[cell] = show(where, cell, variants) | {"runs": {variant: [run for _, run in sorted(runs.items())] for variant, runs in variants.items()}}
        wrong += complaints(where, variants)
    result = {"peers": peers, "quick": quick, "models": told, "complaints": wrong}
    # One model's figures are many and say little.
    for run in every:
        run.pop("models", None)
    keep(out, result, wrong)


def rate(folder: Path, name: str, share: float):
    rates = [median(run["all"]["requests_per_second"] for run in runs.values()) for variant, runs in read(folder).items() if variant.startswith(name)]
    if not rates:
        sys.exit(f"an open load takes its rate of {name} in closed, which was not measured: name a rate as open-2.5")
    print(f"{max(rates) * share:.3g}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["rate", folder, name, share]:
            rate(Path(folder), name, float(share))
        case ["table", results, out]:
            table(Path(results), Path(out))
        case _:
            sys.exit(__doc__)
