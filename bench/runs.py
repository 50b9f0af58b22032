"""Runs of servers in turns, as bench scripts leave them in a folder, and the comparison that is kept of them."""

import json
import sys
from pathlib import Path

# By variant, then by number of the run: the report of `ashlar bench`.
Runs = dict[str, dict[int, dict]]


def read(folder: Path) -> Runs:
    """The reports VARIANT.RUN.json of a folder."""
    variants: Runs = {}
    for file in sorted(folder.glob("*.*.json")):
        variant, number, _ = file.name.rsplit(".", 2)
        variants.setdefault(variant, {})[int(number)] = json.loads(file.read_text())
    return variants


def keep(out: Path, result: dict, wrong: list[str]) -> None:
    """Writes a comparison, and exits with what makes it no measurement, if something does."""
    # NaN is no JSON: what is missing is null.
    text = json.dumps(result, indent=1)
    out.write_text(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1) + "\n")
    print(f"\nwritten: {out}")
    if wrong:
        sys.exit("no measurement:\n  " + "\n  ".join(wrong))
