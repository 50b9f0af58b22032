"""Sorts a perf report's samples by what the functions belong to, and prints shares: python shares.py REPORT JSON [--NAME VALUE ...].

Waiting (threads that spin for their next piece of work) is told apart: it costs processor time, but no one else's.
Shares are of all that is not waiting."""

import json
import re
import sys

# First match wins.
GROUPS = [
    ("waiting", r"pool::work|pool::Pool|pool::park|pool::Close|spin_loop|core::hint"),
    ("kernels", r"ashlar_kernels::"),
    ("sampling", r"model::sampler"),
    ("forward pass, beside its kernels", r"ashlar_executor::model"),
    ("engine", r"ashlar_executor::state"),
    ("executor", r"ashlar_executor::"),
    ("router", r"ashlar_router::|ashlar_registry::|ashlar_wire::"),
    ("tokenizer", r"tokenizers::|esaxx|spm_precompiled|onig"),
    ("http and async", r"hyper|axum|h2::|tonic|tower|tokio|mio::|http::|prost"),
    ("json", r"serde"),
    ("memory", r"malloc|free|memmove|memcpy|memset|alloc::|_int_"),
    ("operating system", r"^\[k\]"),
]


def samples_of(report):
    for line in report:
        found = re.match(r"\s*(\d+)\s+\[(.)\]\s+(.*\S)", line)
        if found:
            count, level, symbol = found.groups()
            yield int(count), symbol if level == "." else f"[k] {symbol}"


def main():
    report, out, *notes = sys.argv[1:]
    totals, largest = {}, {}
    with open(report, encoding="utf-8") as lines:
        for count, symbol in samples_of(lines):
            group = next((name for name, pattern in GROUPS if re.search(pattern, symbol)), "other")
            totals[group] = totals.get(group, 0) + count
            largest.setdefault(group, []).append((count, symbol))
    waiting, every = totals.pop("waiting", 0), sum(totals.values())
    if not every:
        sys.exit("error: the report has no samples: was the binary built with symbols?")
    print(f"{'':<34} {'share':>7}  largest")
    for group, count in sorted(totals.items(), key=lambda item: -item[1]):
        name = max(largest[group])[1]
        print(f"{group:<34} {count / every:>7.1%}  {name[:80]}")
    outside = 1 - totals.get("kernels", 0) / every
    print(f"{'all but kernels':<34} {outside:>7.1%}  goal: under 10%")
    print(f"beside it, {waiting / (waiting + every):.1%} of the samples were threads that wait")
    result = {name.removeprefix("--"): value for name, value in zip(notes[::2], notes[1::2])}
    result |= {"samples": every, "waiting": waiting, "shares": {group: count / every for group, count in totals.items()}, "outside_kernels": outside}
    with open(out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=2)
        file.write("\n")


main()
