"""The table of bench/prefix.sh.

    python prefix.py counters URL                  the server's counters of cached prefixes as JSON
    python prefix.py count REPORT BEFORE URL       adds to REPORT how much they have grown since they were BEFORE
    python prefix.py table RESULTS OUT.json        prints medians of RESULTS/VARIANT.RUN.json and the fall from cold, run by run; writes all to OUT.json

Fails where a request failed, where texts differ, or where a cold run found something cached."""

import json
import re
import sys
import urllib.request
from math import nan
from pathlib import Path
from statistics import median

from compare import interval
from models import PAIRS_MIN
from runs import Runs, keep, read

COUNTERS = ("ashlar_prefix_query_tokens_total", "ashlar_prefix_hit_tokens_total", "ashlar_prefix_cross_model_hit_tokens_total")
FALL_PERCENT_MIN = 60.0


def counters(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = {name: re.search(rf"^{name} (\S+)", text, re.MULTILINE) for name in COUNTERS}
    return {name: float(match[1]) for name, match in found.items() if match}


def count(report: Path, before: Path, url: str):
    earlier = json.loads(before.read_text())
    grown = {name: value - earlier[name] for name, value in counters(url).items()}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"counters": grown}, indent=2) + "\n")


def ttft(run: dict, which: str = "p50") -> float:
    return float((run["all"]["ttft_ms"] or {}).get(which, nan))


def complaints(variants: Runs) -> list[str]:
    every = [run for runs in variants.values() for run in runs.values()]
    found = []
    if failed := sum(run["all"]["failed_count"] for run in every):
        found.append(f"{failed} requests failed")
    if len({(run["schedule_hash"], run["prompts_hash"], run["seed"], run["machine"]) for run in every}) > 1:
        found.append("the runs were not under the same load on the same machine")
    if len(said := {run["output_hash"] for run in every}) > 1:
        found.append(f"the texts are not those of a cold run: {sorted(said)}")
    if any(run["all"]["cached_tokens"] for run in variants.get("cold", {}).values()):
        found.append("a cold run found something cached")
    return found


def table(results: Path, out: Path):
    variants = read(results)
    if not variants.get("cold"):
        sys.exit("there is no cold run to compare with")
    first = variants["cold"][min(variants["cold"])]
    print(f"\n{first['machine']}; {first['notes']['threads']} threads; Ashlar {first['commit']}")
    print(f"{first['all']['request_count']} prompts of {first['all']['input_tokens'] // first['all']['request_count']} tokens, one after another")
    if quick := first["notes"]["quick"] == "1":
        print("QUICK=1: a prompt or two; these figures mean nothing")
    columns = ("runs", "first p50 ms", "first max ms", "cached_tokens", "hit tokens", "of other models")
    print(f"{'':10}" + "".join(f"{name:>18}" for name in columns))
    medians = {}
    for variant, runs in variants.items():
        of = lambda figure: median(map(figure, runs.values()))
        medians[variant] = {
            "ttft_p50_ms": of(ttft),
            "ttft_max_ms": of(lambda run: ttft(run, "max")),
            "cached_tokens": of(lambda run: run["all"]["cached_tokens"]),
            "hit_tokens": of(lambda run: run["counters"].get(COUNTERS[1], nan)),
            "cross_model_hit_tokens": of(lambda run: run["counters"].get(COUNTERS[2], nan)),
        }
        print(f"{variant:10}{len(runs):>18}" + "".join(f"{value:>18.1f}" for value in medians[variant].values()))
    falls = {}
    for variant in [variant for variant in variants if variant != "cold"]:
        both = sorted(variants["cold"].keys() & variants[variant].keys())
        values = [100 * (1 - ttft(variants[variant][run]) / ttft(variants["cold"][run])) for run in both]
        low, high = interval(values)
        falls[variant] = {"percent": values, "median": median(values), "interval": [low, high]}
        verdict = ""
        if variant == "crossed":
            met = low >= FALL_PERCENT_MIN and len(both) >= PAIRS_MIN
            falls[variant] |= {"floor": FALL_PERCENT_MIN, "met": met}
            verdict = f"   goal {FALL_PERCENT_MIN:.0f} " + ("met" if met else "MISSED" if len(both) >= PAIRS_MIN else "too few runs")
        print(f"  {variant}: the first token comes {median(values):.1f}% [{low:.1f}, {high:.1f}] sooner than cold{verdict}")
    wrong = complaints(variants)
    if not wrong:
        print(f"  the texts are the same in all runs: {first['output_hash']}")
    runs = {variant: [run for _, run in sorted(runs.items())] for variant, runs in variants.items()}
    result = {"quick": quick, "medians": medians, "falls": falls, "complaints": wrong, "runs": runs}
    keep(out, result, wrong)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["counters", url]:
            print(json.dumps(counters(url)))
        case ["count", report, before, url]:
            count(Path(report), Path(before), url)
        case ["table", results, out]:
            table(Path(results), Path(out))
        case _:
            sys.exit(__doc__)
