"""The table of bench/stalls.sh: python stalls.py RESULTS OUT.json. Reads RESULTS/VARIANT.RUN.json, prints medians for each variant and,
pair by pair with a bootstrap interval, what Ashlar is held to: against itself with whole prompts, against every peer, and against its
own undisturbed rate. Writes all to OUT.json. Fails where requests failed, where runs differ in their load, or where Ashlar said different
things in different runs."""

import json
import sys
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Callable

from compare import interval
from runs import Runs, introduce, keep, read

# With fewer no goal is met, whatever the ratio.
PAIRS_MIN = 3
WHOLE = "@whole"
Figure = Callable[[dict], float]


def of(name: str) -> Figure:
    return lambda stalls: float("nan") if stalls[name] is None else float(stalls[name])


def quantile(name: str, which: str) -> Figure:
    return lambda stalls: float((stalls[name] or {}).get(which, "nan"))


LONGEST = ("longest gap ms", of("longest_gap_ms"))
AT_PREFILL = ("p99 gap at prefill ms", quantile("gaps_at_prefill_ms", "p99"))
STEADY = ("streams' tokens/s", of("disturbed_tokens_per_second"))
TOTAL = ("total tokens/s", of("total_tokens_per_second"))
KEPT = ("kept", of("rate_kept"))
COLUMNS = [
    LONGEST,
    AT_PREFILL,
    ("p99 of all gaps ms", quantile("gaps_ms", "p99")),
    ("undisturbed tokens/s", of("undisturbed_tokens_per_second")),
    STEADY,
    KEPT,
    ("1 - u", of("rate_floor")),
    TOTAL,
    ("alone ms", quantile("alone_ttft_ms", "p50")),
    ("prompt p50 ms", quantile("long_ttft_ms", "p50")),
    ("prompt p95 ms", quantile("long_ttft_ms", "p95")),
]


@dataclass
class Goal:
    """That Ashlar is at least `floor` times as good in a figure as itself with whole prompts (`own`), or as every peer."""

    figure: tuple[str, Figure]
    floor: float
    more_is_better: bool
    own: bool


GOALS = [
    Goal(LONGEST, 5.0, more_is_better=False, own=True),
    Goal(AT_PREFILL, 5.0, more_is_better=False, own=True),
    Goal(TOTAL, 0.95, more_is_better=True, own=True),
    Goal(LONGEST, 5.0, more_is_better=False, own=False),
    Goal(AT_PREFILL, 5.0, more_is_better=False, own=False),
    Goal(STEADY, 2.0, more_is_better=True, own=False),
]


def complaints(variants: Runs) -> list[str]:
    """What makes this no measurement."""
    found = []
    every = [run for runs in variants.values() for run in runs.values()]
    loads = {json.dumps({key: value for key, value in run["load"].items() if key != "extra"}, sort_keys=True) for run in every}
    if len(loads) > 1 or len({(run["prompts_hash"], run["seed"], run["machine"]) for run in every}) > 1:
        found.append("the runs were not under the same load on the same machine")
    for variant, runs in variants.items():
        if failed := sum(run["failed_count"] for run in runs.values()):
            found.append(f"{failed} requests to {variant} failed")
    # The settings of one server differ in when it computes, not in what.
    for form in sorted({variant.partition("@")[0] for variant in variants if variant.startswith("ashlar")}):
        hashes = {run["output_hash"] for variant, runs in variants.items() if variant.partition("@")[0] == form for run in runs.values()}
        if len(hashes) > 1:
            found.append(f"{form} said different things in different runs: {sorted(hashes)}")
    counted = {variant: run["stalls"]["long_input_tokens"] for variant, runs in variants.items() for run in runs.values()}
    lengths = [count for count in counted.values() if count is not None]
    if lengths and max(lengths) - min(lengths) > 2:
        found.append(f"the servers count prompts differently: {counted}")
    return found


def entry(ours: str, other: str, goal: Goal, variants: Runs) -> dict | None:
    """One comparison, run by run."""
    name, figure = goal.figure
    both = sorted(variants[ours].keys() & variants.get(other, {}).keys())
    ratios = []
    for run in both:
        mine, theirs = figure(variants[ours][run]["stalls"]), figure(variants[other][run]["stalls"])
        ratio = (mine, theirs) if goal.more_is_better else (theirs, mine)
        ratios.append(ratio[0] / ratio[1] if ratio[1] > 0 else float("inf"))
    if not ratios:
        return None
    low, high = interval(ratios)
    # A figure that a run lacks, or a ratio to nothing, shows nothing.
    met = all(map(isfinite, ratios)) and low >= goal.floor and len(both) >= PAIRS_MIN
    told = {"ours": ours, "other": other, "figure": name, "ratios": ratios, "median": median(ratios), "interval": [low, high]}
    return told | {"floor": goal.floor, "met": met}


def compare(variants: Runs) -> list[dict]:
    peers = [variant for variant in variants if not variant.startswith("ashlar")]
    entries = []
    for ours in [variant for variant in variants if variant.startswith("ashlar") and not variant.endswith(WHOLE)]:
        for goal in GOALS:
            others = [ours.partition("@")[0] + WHOLE] if goal.own else peers
            found = [one for other in others if (one := entry(ours, other, goal, variants))]
            entries += sorted(found, key=lambda one: one["median"])
        # The same run tells both sides, so this is a difference: at least 0 where 1 - u is kept.
        over = [run["stalls"]["rate_kept"] - run["stalls"]["rate_floor"] for run in variants[ours].values() if run["stalls"]["rate_kept"] is not None]
        if over:
            low, high = interval(over)
            told = {"ours": ours, "other": "1 - u", "figure": "kept above it", "ratios": over, "median": median(over), "interval": [low, high]}
            entries.append(told | {"floor": 0.0, "met": low >= 0 and len(over) >= PAIRS_MIN})
    return entries


def main(results: Path, out: Path):
    variants = read(results)
    if not variants:
        sys.exit("no run succeeded: there is nothing to compare")
    every = [run for runs in variants.values() for run in runs.values()]
    commits, peers, quick = introduce(results, every, "short runs")
    load = every[0]["load"]
    print(f"{load['streams']} streams, {load['long_count']} prompts of {load['long_prompt_tokens']} tokens, one every {load['every_s']:g} s")
    width = max(map(len, variants)) + 2
    print(f"\n{'':{width}}{'runs':>5}" + "".join(f"{name:>22}" for name, _ in COLUMNS))
    medians = {}
    for variant, runs in variants.items():
        medians[variant] = {name: median(figure(run["stalls"]) for run in runs.values()) for name, figure in COLUMNS}
        print(f"{variant:{width}}{len(runs):>5}" + "".join(f"{value:>22.{3 if abs(value) < 10 else 1}f}" for value in medians[variant].values()))
    print()
    entries = compare(variants)
    for one in entries:
        low, high = one["interval"]
        sentence = f"{one['ours']} to {one['other']}, {one['figure']}: {one['median']:.2f} [{low:.2f}, {high:.2f}]"
        verdict = "met" if one["met"] else "MISSED" if len(one["ratios"]) >= PAIRS_MIN else "too few runs"
        print(f"  {sentence:88} goal {one['floor']:.2f} {verdict}")
    wrong = complaints(variants)
    runs = {variant: [run for _, run in sorted(runs.items())] for variant, runs in variants.items()}
    result = {"commits": commits, "peers": peers, "quick": quick, "medians": medians, "goals": entries, "complaints": wrong, "runs": runs}
    keep(out, result, wrong)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
