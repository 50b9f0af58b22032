"""The table of bench/adapters.sh.

    python adapters.py differ URL OUT.json MODEL...    asks each model the same, alone; writes how many texts there are, and how many different ones
    python adapters.py table RESULTS OUT.json          reads RESULTS/sets/SET/CELL/VARIANT.RUN.json, prints medians for each cell and, pair by pair with a
                                                       bootstrap interval, what Ashlar with adapters is held to; writes all to OUT.json

Fails where requests failed, where runs differ in their load, where two adapters say the same, or where one does not say under load what it says alone."""

import json
import sys
import urllib.request
from math import isfinite
from pathlib import Path
from statistics import median

from compare import interval
from models import COLUMNS, PAIRS_MIN, TOTAL
from runs import Runs, introduce, keep, read

ADAPTERS, BASE, PEER = "adapters", "base", "vllm"
PROMPT = "The most important thing to know about the sea is"
# What total tokens/s are held to, by number of adapters and who they are held against.
FLOORS = {(32, BASE): 0.8, (8, PEER): 4.0}


def say(url: str, model: str) -> str:
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 48, "temperature": 0, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())["choices"][0]["text"]


def differ(url: str, out: Path, models: list[str]):
    texts = [say(url, model) for model in models]
    out.write_text(json.dumps({"prompt": PROMPT, "texts": dict(zip(models, texts)), "distinct": len(set(texts))}, indent=1) + "\n")


def count_of(name: str) -> int:
    return int(name.partition("x")[0])


def complaints(where: str, variants: Runs, said_alone: str | None) -> list[str]:
    """What makes a cell no measurement."""
    found = []
    every = [run for runs in variants.values() for run in runs.values()]
    # The base is one model, so its schedule has another name; all draws are made from these.
    loads = {json.dumps({key: value for key, value in run["load"].items() if key != "models"}, sort_keys=True) for run in every}
    if len(loads) > 1 or len({(run["prompts_hash"], run["seed"], run["machine"], run["notes"]["adapters"]) for run in every}) > 1:
        found.append(f"{where}: the runs were not under the same load on the same machine")
    for variant, runs in variants.items():
        if failed := sum(run["all"]["failed_count"] for run in runs.values()):
            found.append(f"{where}: {failed} requests to {variant} failed")
        if short := sum(run["all"]["short_count"] for run in runs.values()):
            found.append(f"{where}: {short} answers of {variant} ended early")
    for variant in (ADAPTERS, BASE):
        said = {run["output_hash"] for run in variants.get(variant, {}).values()}
        if len(said) > 1:
            found.append(f"{where}: {variant} said different things in different runs: {sorted(said)}")
        if variant == ADAPTERS and said_alone and said - {said_alone}:
            found.append(f"{where}: adapters did not say under load what they say alone")
    counted = [(variant, run["all"]) for variant, runs in variants.items() for run in runs.values() if run["all"]["input_tokens"]]
    lengths = {variant: round(every["input_tokens"] / every["request_count"]) for variant, every in counted}
    if lengths and max(lengths.values()) - min(lengths.values()) > 2:
        found.append(f"{where}: the servers count prompts differently: {lengths}")
    return found


def compare(count: int, variants: Runs) -> list[dict]:
    name, figure = TOTAL
    entries = []
    for other in (BASE, PEER):
        both = sorted(variants.get(ADAPTERS, {}).keys() & variants.get(other, {}).keys())
        ratios = [figure(variants[ADAPTERS][run]) / figure(variants[other][run]) for run in both]
        if not ratios:
            continue
        low, high = interval(ratios)
        floor = FLOORS.get((count, other))
        met = floor is not None and all(map(isfinite, ratios)) and low >= floor and len(both) >= PAIRS_MIN
        entries.append({"against": other, "figure": name, "ratios": ratios, "median": median(ratios), "interval": [low, high], "floor": floor, "met": met})
    return entries


def show(name: str, cell: str, variants: Runs) -> dict:
    load = next(iter(next(iter(variants.values())).values()))["load"]
    count, _, ranks = name.partition("x")
    print(f"\n{count} adapters of rank {ranks}, {cell}: {load['prompt_tokens']} in, {load['output_tokens']} out, {load['requests_max']} requests")
    print(f"{'':10}{'runs':>5}" + "".join(f"{title:>16}" for title, _ in COLUMNS))
    medians = {}
    for variant, runs in variants.items():
        medians[variant] = {title: median(map(figure, runs.values())) for title, figure in COLUMNS}
        print(f"{variant:10}{len(runs):>5}" + "".join(f"{value:>16.1f}" for value in medians[variant].values()))
    entries = compare(int(count), variants)
    for one in entries:
        low, high = one["interval"]
        sentence = f"{ADAPTERS} to {one['against']}, {one['figure']}: {one['median']:.2f} [{low:.2f}, {high:.2f}]"
        verdict = "met" if one["met"] else "MISSED" if len(one["ratios"]) >= PAIRS_MIN else "too few runs"
        print(f"  {sentence:64}" + (f" goal {one['floor']:.2f} {verdict}" if one["floor"] else ""))
    return {"medians": medians, "goals": entries}


def table(results: Path, out: Path):
    folders = sorted(results.glob("sets/*/*/"), key=lambda folder: (count_of(folder.parent.name), folder.parent.name, folder.name))
    cells = {(folder.parent.name, folder.name): variants for folder in folders if (variants := read(folder))}
    if not cells:
        sys.exit("no load succeeded: there is nothing to compare")
    every = [run for variants in cells.values() for runs in variants.values() for run in runs.values()]
    commits, peers, quick = introduce(results, every, "a request each")
    told, wrong = {}, []
    for name in dict.fromkeys(name for name, _ in cells):
        said = json.loads((results / "sets" / name / "differ.json").read_text())
        print(f"\n{name}: {len(said['texts'])} models, {said['distinct']} different texts")
        if said["distinct"] < len(said["texts"]):
            wrong.append(f"{name}: of {len(said['texts'])} models some say the same: {said['distinct']} texts")
        alone = json.loads((results / "sets" / name / "alone.json").read_text())
        for cell in [cell for of, cell in cells if of == name]:
            variants = cells[name, cell]
            runs = {variant: [run for _, run in sorted(runs.items())] for variant, runs in variants.items()}
            told.setdefault(name, {"distinct": said["distinct"], "said_alone": alone["output_hash"]})[cell] = show(name, cell, variants) | {"runs": runs}
            wrong += complaints(f"{name}, {cell}", variants, alone["output_hash"] if cell == "closed" else None)
    # One model's figures are many and say little.
    for run in every:
        run.pop("models", None)
    keep(out, {"peers": peers, "quick": quick, "sets": told, "complaints": wrong}, wrong)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["differ", url, out, *models]:
            differ(url, Path(out), models)
        case ["table", results, out]:
            table(Path(results), Path(out))
        case _:
            sys.exit(__doc__)
