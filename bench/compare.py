"""Two servers' runs of `ashlar bench load`, pair by pair: python compare.py FOLDER A B [FLOOR]. Reads FOLDER/A.1.json, FOLDER/B.1.json
and so on, prints medians, ratios and a bootstrap interval of the ratio of decode speeds, writes FOLDER/comparison.json, and fails
where the interval's lower end is under FLOOR."""

import json
import random
import sys
from fractions import Fraction
from pathlib import Path
from statistics import median

RESAMPLES = 10_000


def runs(folder: Path, name: str) -> list[dict]:
    files = sorted(folder.glob(f"{name}.*.json"), key=lambda file: int(file.suffixes[-2][1:]))
    return [json.loads(file.read_text()) for file in files]


def decode_rate(run: dict) -> float:
    """Tokens a second of one stream after its first token."""
    return 1000 / float(run["all"]["tpot_ms"]["p50"])


FIGURES = {
    "decode, tokens/s of a stream": decode_rate,
    "output, tokens/s": lambda run: run["all"]["output_tokens_per_second"],
    "first token p50, ms": lambda run: float(run["all"]["ttft_ms"]["p50"]),
    "gap p99, ms": lambda run: float(run["all"]["itl_ms"]["p99"]),
    "CPU-s per million tokens": lambda run: (run["server"] or {}).get("cpu_seconds_per_million_tokens") or float("nan"),
    "peak memory, MiB": lambda run: (run["server"] or {"peak_rss_bytes": float("nan")})["peak_rss_bytes"] / 2**20,
}


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, 95 %."""
    draw = random.Random(1)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES * 25 // 1000], medians[RESAMPLES * 975 // 1000 - 1]


def main(folder: Path, a: str, b: str, floor: float):
    runs_a, runs_b = runs(folder, a), runs(folder, b)
    assert len(runs_a) == len(runs_b) > 0, f"{len(runs_a)} runs of {a} and {len(runs_b)} of {b}"
    for name, run in [(a, run) for run in runs_a] + [(b, run) for run in runs_b]:
        if run["all"]["failed_count"] or run["all"]["short_count"]:
            sys.exit(f"no comparison: {run['all']['failed_count']} requests to {name} failed, {run['all']['short_count']} ended early")
        for key in ("schedule_hash", "prompts_hash", "machine"):
            assert run[key] == runs_a[0][key], f"the runs differ in {key}"
    loads = ", ".join(run["notes"].get("load_before", "?") for run in runs_a + runs_b)
    print(f"\n{runs_a[0]['machine']}; {len(runs_a)} pairs; medians; load before each run {loads}")
    print(f"{'':30}{a:>12}{b:>12}{'ratio':>9}")
    for name, figure in FIGURES.items():
        of_a, of_b = median(map(figure, runs_a)), median(map(figure, runs_b))
        print(f"{name:30}{of_a:>12.1f}{of_b:>12.1f}{of_a / of_b:>9.3f}")
    ratios = [decode_rate(one) / decode_rate(other) for one, other in zip(runs_a, runs_b)]
    low, high = interval(ratios)
    print(f"decode ratio {a}/{b}: {median(ratios):.3f}, 95% interval {low:.3f} to {high:.3f}; pairs {', '.join(f'{r:.3f}' for r in ratios)}")
    notes = {a: {"commit": runs_a[0]["commit"]} | runs_a[0]["notes"], b: runs_b[0]["notes"]}
    result = {"machine": runs_a[0]["machine"], "notes": notes, "ratios": ratios, "median": median(ratios), "interval": [low, high], "floor": floor}
    (folder / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    if low < floor:
        sys.exit(f"the lower end {low:.3f} is under the floor {floor:.3f}")
    print(f"at or above the floor {floor:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(Fraction(sys.argv[4])) if len(sys.argv) > 4 else 0.0)
