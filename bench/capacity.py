"""Searches for capacities, and the table of bench/capacity.sh.

    python capacity.py limits STEP.json OUT.json LIMIT...            limits in ms, from a decode step of `ashlar bench step`
    python capacity.py limit LIMITS.json LIMIT                       one of them, in whole ms
    python capacity.py next FOLDER LIMITS.json FINE SECONDS LIMIT... place and rate of the next probe, of so many seconds; nothing when the search is done
    python capacity.py told FOLDER PLACE LIMITS.json LIMIT...        what came of a probe, in a line
    python capacity.py table RESULTS OUT.json                        reads RESULTS/searches/VARIANT[:LIMIT]/RUN/PLACE.json, prints capacities and, run
                                                                     by run with a bootstrap interval, Ashlar's over others; writes all to OUT.json

Fails where servers had different loads at one rate, or where Ashlar said different things to one load."""

import json
import sys
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from statistics import median

from compare import interval
from runs import introduce, keep

# Place p of the list of rates is 2^((p - FIRST) / DOUBLING) requests a second.
FIRST, DOUBLING, LAST = 40, 10, 100
# Requests that a probe of the lowest rate has to have: of fewer there is no median to speak of.
REQUESTS_MIN = 4
# How far a search goes at first; one that follows another begins near its end.
STRIDE, STRIDE_AGAIN = DOUBLING, 2
# Of the paper: what limits are, in decode steps, and the bound of the median scheduling delay.
FACTORS = {"strict": 5.0, "relaxed": 25.0}
DELAY_MS_MAX = 2000.0
WHOLE = "@whole"


def rate(place: int) -> float:
    return round(2 ** ((place - FIRST) / DOUBLING), 4)


@dataclass
class Probe:
    """One rate, and what a server made of it."""

    place: int
    report: dict
    alone_ms: float

    def quantile(self, name: str, which: str) -> float:
        # A failure is infinite, and so are all gaps where there is none.
        return float((self.report["all"][name] or {}).get(which, inf))

    @property
    def delay_ms(self) -> float:
        """At least the median scheduling delay, which no client sees: the median first token, less what a prompt of the middle length takes alone. What
        a prompt loses to others while it is computed is in it too."""
        return self.quantile("ttft_ms", "p50") - self.alone_ms

    def breaks(self, limit_ms: float) -> list[str]:
        """What is not sustained."""
        found = []
        if self.report["all"]["failed_count"]:
            found.append("failures")
        if self.quantile("itl_ms", "p99") > limit_ms:
            found.append("gaps")
        if self.delay_ms > DELAY_MS_MAX:
            found.append("delay")
        return found

    def kept(self) -> dict:
        """What a comparison keeps of it."""
        every = self.report["all"]
        tokens = (every["input_tokens"] or 0) + every["output_tokens"]
        told = {"rate": rate(self.place), "requests": every["request_count"], "failed": every["failed_count"], "delay_ms": self.delay_ms}
        told |= {f"{name}_{which}": self.quantile(f"{name}_ms", which) for name in ("ttft", "itl") for which in ("p50", "p99", "max")}
        told |= {"tokens_per_second": tokens / self.report["elapsed_s"], "lag_p99": self.quantile("lag_ms", "p99"), "elapsed_s": self.report["elapsed_s"]}
        return told | {key: self.report[key] for key in ("schedule_hash", "output_hash", "server", "client_cpu_seconds", "notes")}


def probes(folder: Path) -> dict[int, Probe]:
    """Of one search, by place."""
    alone = json.loads((folder / "alone.json").read_text())["all"]
    # Where they failed nothing is taken off.
    alone_ms = 0.0 if alone["failed_count"] else float(alone["ttft_ms"]["p50"])
    return {int(file.stem): Probe(int(file.stem), json.loads(file.read_text()), alone_ms) for file in folder.glob("[0-9]*.json")}


def bracket(found: dict[int, Probe], limit_ms: float) -> tuple[int | None, int | None]:
    """The highest rate that is sustained below the lowest that is not, and that one."""
    failed = min((place for place, probe in found.items() if probe.breaks(limit_ms)), default=None)
    held = [place for place in found if failed is None or place < failed]
    return max(held, default=None), failed


def next_place(found: dict[int, Probe], limit_ms: float, start: int, stride: int, fine: int, lowest: int) -> int | None:
    held, failed = bracket(found, limit_ms)
    if held is None and failed is None:
        return max(start, lowest)
    # Further with each step, up to a doubling.
    reached = abs((failed if held is None else held) - start)
    stride = min(max(stride, reached), DOUBLING)
    if failed is None:
        return min(held + stride, LAST) if held < LAST else None
    if held is None:
        return max(failed - stride, lowest) if failed > lowest else None
    return (held + failed) // 2 if failed - held > fine else None


def next_probe(folder: Path, limits: dict[str, float], fine: int, seconds: float):
    found = probes(folder)
    lowest = next(place for place in range(LAST + 1) if rate(place) * seconds >= REQUESTS_MIN or place == LAST)
    earlier = max((run for run in folder.parent.iterdir() if int(run.name) < int(folder.name)), key=lambda run: int(run.name), default=None)
    for limit_ms in limits.values():
        start, stride = FIRST, STRIDE
        if earlier:
            start, stride = bracket(probes(earlier), limit_ms)[0] or 0, STRIDE_AGAIN
        if (place := next_place(found, limit_ms, start, stride, fine, lowest)) is not None:
            print(place, rate(place))
            return


def line(probe: Probe, limits: dict[str, float]) -> str:
    verdicts = [f"{name} ({limit:.0f} ms): {', '.join(probe.breaks(limit)) or 'held'}" for name, limit in limits.items()]
    return f"{rate(probe.place):8.3f}/s  p99 gap {probe.quantile('itl_ms', 'p99'):8.1f} ms  delay {probe.delay_ms:8.1f} ms  {'; '.join(verdicts)}"


def read(results: Path, limits: dict[str, float]) -> dict[str, dict[str, dict[int, dict[int, Probe]]]]:
    """By limit, variant and run: the probes of a search."""
    found = {limit: {} for limit in limits}
    for folder in sorted(results.glob("searches/*/*/")):
        variant, _, only = folder.parent.name.partition(":")
        for limit in [only] if only else limits:
            found[limit].setdefault(variant, {})[int(folder.name)] = probes(folder)
    return found


def capacity(found: dict[int, Probe], limit_ms: float) -> float:
    """Nothing where even the lowest rate is not sustained."""
    held, _ = bracket(found, limit_ms)
    return 0.0 if held is None else rate(held)


def complaints(every: list[tuple[str, Probe]]) -> list[str]:
    found = []
    if len(machines := {(probe.report["machine"], probe.report["notes"]["threads"]) for _, probe in every}) > 1:
        found.append(f"not all on the same machine: {sorted(machines)}")
    for place in sorted({probe.place for _, probe in every}):
        here = [(variant, probe) for variant, probe in every if probe.place == place]
        if len({(probe.report["schedule_hash"], probe.report["prompts_hash"]) for _, probe in here}) > 1:
            found.append(f"not the same load for all at {rate(place)} a second")
        # Settings say when it computes, not what.
        for form in sorted({variant.partition("@")[0] for variant, _ in here if variant.startswith("ashlar")}):
            said = {probe.report["output_hash"] for variant, probe in here if variant.partition("@")[0] == form and not probe.report["all"]["failed_count"]}
            if len(said) > 1:
                found.append(f"{form} said different things to the same load at {rate(place)} a second: {sorted(said)}")
        if any(probe.report["all"]["cached_tokens"] for _, probe in here):
            found.append(f"something came from a cache at {rate(place)} a second")
    return found


def show(limit: str, limit_ms: float, variants: dict[str, dict[int, dict[int, Probe]]]) -> dict:
    print(f"\n{limit}: p99 gap at most {limit_ms:.0f} ms, median delay at most {DELAY_MS_MAX:.0f} ms")
    columns = ("p99 gap ms", "delay ms", "first p50 ms", "tokens/s")
    print(f"{'':20}{'runs':>5}{'requests/s':>12}" + "".join(f"{name:>14}" for name in columns) + "   the next rate breaks")
    capacities, told = {}, {}
    for variant, runs in variants.items():
        capacities[variant] = {run: capacity(found, limit_ms) for run, found in runs.items()}
        value = median(capacities[variant].values())
        brackets = {run: bracket(found, limit_ms) for run, found in runs.items()}
        at = [runs[run][held].kept() for run, (held, _) in brackets.items() if held is not None]
        why = sorted({reason for run, (_, failed) in brackets.items() if failed is not None for reason in runs[run][failed].breaks(limit_ms)})
        figures = [median([one[key] for one in at] or [nan]) for key in ("itl_p99", "delay_ms", "ttft_p50", "tokens_per_second")]
        print(f"{variant:20}{len(runs):>5}{value:>12.2f}" + "".join(f"{figure:>14.1f}" for figure in figures) + f"   {', '.join(why) or 'nothing: it is more'}")
        told[variant] = {"median": value, "runs": list(capacities[variant].values()), "breaks": why, "ends": [list(ends) for ends in brackets.values()]}
    ratios = []
    for ours in [variant for variant in variants if variant.startswith("ashlar") and not variant.endswith(WHOLE)]:
        for other in [variant for variant in variants if not variant.startswith("ashlar") or variant == ours.partition("@")[0] + WHOLE]:
            both = sorted(capacities[ours].keys() & capacities[other].keys())
            values = [capacities[ours][run] / capacities[other][run] if capacities[other][run] else inf for run in both]
            if values:
                low, high = interval(values)
                ratios.append({"ours": ours, "other": other, "ratios": values, "median": median(values), "interval": [low, high]})
                print(f"  {ours} to {other}: {median(values):.2f} [{low:.2f}, {high:.2f}]")
    return {"limit_ms": limit_ms, "capacities": told, "ratios": ratios}


def table(results: Path, out: Path):
    limits = json.loads((results / "limits.json").read_text())
    searches = read(results, limits["limits"])
    every = [(variant, probe) for runs in searches.values() for variant, found in runs.items() for one in found.values() for probe in one.values()]
    if not every:
        sys.exit("no search succeeded: there is nothing to compare")
    first = every[0][1].report
    commits, peers, quick = introduce(results, [probe.report for _, probe in every], "some seconds each")
    load = first["load"]
    print(f"prompts of {load['prompt_tokens']}, answers of {load['output_tokens']} tokens, {load['duration_s']:g} s of arrivals")
    print(f"a decode step of {limits['sequences']} sequences with {limits['context_tokens']} tokens each: {limits['decode_ms']:.1f} ms")
    print(f"the client was late by {max(probe.quantile('lag_ms', 'p99') for _, probe in every):.1f} ms at worst (p99 of a probe)")
    told = {limit: show(limit, limits["limits"][limit], runs) for limit, runs in searches.items()}
    wrong = complaints(every)
    kept = {}
    for folder in sorted(results.glob("searches/*/*/")):
        found = [probe.kept() for _, probe in sorted(probes(folder).items())]
        kept.setdefault(folder.parent.name, []).append({"alone_ms": next(iter(probes(folder).values())).alone_ms, "probes": found})
    head = {"machine": first["machine"], "commits": commits, "peers": peers, "quick": quick, "load": load, "delay_ms_max": DELAY_MS_MAX, "decode": limits}
    keep(out, head | {"limits": told, "complaints": wrong, "searches": kept}, wrong)


def find_limits(step: Path, out: Path, names: list[str]):
    report = json.loads(step.read_text())
    cell = next(cell for cell in report["cells"] if cell["step"].startswith("decode"))
    decode_ms = cell["median_seconds"] * 1e3
    limits = {name: decode_ms * FACTORS[name] if name in FACTORS else float(name) for name in names}
    told = {"decode_ms": decode_ms, "sequences": cell["tokens"], "context_tokens": report["context"], "limits": limits}
    out.write_text(json.dumps(told, indent=2) + "\n")
    print(f"a decode step takes {decode_ms:.1f} ms: " + ", ".join(f"{name} {limit:.0f} ms" for name, limit in limits.items()), file=sys.stderr)


def limits_of(file: str, names: list[str]) -> dict[str, float]:
    limits = json.loads(Path(file).read_text())["limits"]
    return {name: limits[name] for name in names}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["limits", step, out, *names]:
            find_limits(Path(step), Path(out), names)
        case ["limit", limits, name]:
            print(int(limits_of(limits, [name])[name]))
        case ["next", folder, limits, fine, seconds, *names]:
            next_probe(Path(folder), limits_of(limits, names), int(fine), float(seconds))
        case ["told", folder, place, limits, *names]:
            print(line(probes(Path(folder))[int(place)], limits_of(limits, names)))
        case ["table", results, out]:
            table(Path(results), Path(out))
        case _:
            sys.exit(__doc__)
