#!/usr/bin/env python3
"""Checks that a server's /metrics has all that the dashboard, the rules and ARCHITECTURE.md name: check-metrics.py FILE_OR_URL.

A histogram or counter with labels appears at its first observation, so send the server a request before. Runs in .venv.
"""

import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helm/tests"))

import queries  # noqa: E402


def main(source: str) -> int:
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(source, timeout=10) as reply:
            text = reply.read().decode()
    else:
        text = Path(source).read_text()
    problems = queries.missing_in(text)
    for problem in problems:
        print(problem)
    print(f"{len(list(queries.expressions()))} expressions, {len(queries.exposed(text))} metrics, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
