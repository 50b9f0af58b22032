"""Runs of servers in turns, as bench scripts leave them in a folder, and the comparison that is kept of them."""

import json
import sys
from pathlib import Path
from statistics import median

# By variant, then by number of the run: the report of `ashlar bench`.
Runs = dict[str, dict[int, dict]]


def read(folder: Path) -> Runs:
    """The reports VARIANT.RUN.json of a folder."""
    variants: Runs = {}
    for file in sorted(folder.glob("*.*.json")):
        variant, number, _ = file.name.rsplit(".", 2)
        variants.setdefault(variant, {})[int(number)] = json.loads(file.read_text())
    return variants


def introduce(results: Path, every: list[dict], quick_runs: str) -> tuple[list[str], dict[str, str], bool]:
    """Prints what all reports have in common, and returns Ashlar's commits, the peers' versions, and whether they are `quick_runs`, which mean nothing."""
    commits = sorted({run["commit"] for run in every if run["commit"]})
    loads = [float(run["notes"]["load_before"]) for run in every]
    peers = dict(line.split("\t", 1) for line in (results / "peers.tsv").read_text().splitlines())
    quick = any(run["notes"]["quick"] == "1" for run in every)
    print(f"\n{every[0]['machine']}; {every[0]['notes']['threads']} threads; Ashlar {', '.join(commits)}")
    print(f"load average before a run: median {median(loads):.2f}, most {max(loads):.2f}")
    for peer, version in peers.items():
        print(f"{peer}: {version}")
    if quick:
        print(f"QUICK=1: {quick_runs}; these figures mean nothing")
    return commits, peers, quick


def keep(out: Path, result: dict, wrong: list[str]) -> None:
    """Writes a comparison, and exits with what makes it no measurement, if something does."""
    # NaN is no JSON: what is missing is null.
    text = json.dumps(result, indent=1)
    out.write_text(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1) + "\n")
    print(f"\nwritten: {out}")
    if wrong:
        sys.exit("no measurement:\n  " + "\n  ".join(wrong))
