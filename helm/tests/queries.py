"""PromQL in the dashboard and the rules, and the metric names it needs. Knows no server; scripts/check-metrics.py and the tests
of this folder and of tests/e2e bring the text of /metrics."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "helm/ashlar/dashboards/ashlar.json"
RULES = ROOT / "helm/ashlar/rules/ashlar.yaml"

# Labels that the scrape adds, and Prometheus's own series.
SCRAPE_LABELS = {"namespace", "instance", "job", "pod", "service", "container", "endpoint"}
HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


@dataclass
class Selector:
    """A metric name in an expression, and the labels that the expression matches on."""

    metric: str
    labels: set[str] = field(default_factory=set)


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression with a name for messages; Grafana's variables replaced by values."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            text = target["expr"].replace("$__rate_interval", "5m")
            yield f"panel '{panel['title']}' {target['refId']}", re.sub(r"\$\w+", ".*", text)
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def selectors(text: str) -> Iterator[Selector]:
    """The vector selectors of an expression. Raises ValueError if it is no PromQL or ill-typed."""
    yield from _walk(promql_parser.parse(text))


def _walk(node) -> Iterator[Selector]:
    match node:
        case promql_parser.VectorSelector():
            assert node.name, f"a selector without a metric name: {node}"
            yield Selector(node.name, {matcher.name for matcher in node.matchers.matchers})
        case promql_parser.MatrixSelector():
            yield from _walk(node.vector_selector)
        case promql_parser.Call():
            for argument in node.args:
                yield from _walk(argument)
        case promql_parser.BinaryExpr():
            yield from _walk(node.lhs)
            yield from _walk(node.rhs)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.SubqueryExpr() | promql_parser.UnaryExpr():
            yield from _walk(node.expr)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            pass
        case _:
            raise ValueError(f"unknown kind of expression: {type(node)}")


def exposed(text: str) -> dict[str, set[str]]:
    """Metric names in the text of /metrics, each with the label names of its samples."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if sample := re.match(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+\S", line):
            labels = re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)="', sample[2] or "")
            found.setdefault(sample[1], set()).update(labels)
    return found


def base(name: str) -> str:
    """A histogram's name without its suffix."""
    return next((name.removesuffix(suffix) for suffix in HISTOGRAM_SUFFIXES if name.endswith(suffix)), name)


def documented() -> dict[str, set[str]]:
    """The names under ARCHITECTURE.md's "Names of metrics", each with its labels; `process_*` is left to its library."""
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## Names of metrics")[1].split("\n## ")[0]
    found = {}
    for name, labels in re.findall(r"`((?:ashlar_|vllm:)[a-z0-9_]+)(?:\{([^}]*)\})?`", section):
        if name != "ashlar_":
            found[name] = {label.split("=")[0].strip() for label in labels.split(",") if label}
    return found


def missing_in(metrics_text: str) -> list[str]:
    """What the dashboard and the rules ask for, and what ARCHITECTURE.md names, that this /metrics does not have."""
    names = exposed(metrics_text)
    problems = []
    for where, text in expressions():
        for selector in selectors(text):
            if selector.metric not in names:
                problems.append(f"{where}: no metric {selector.metric}")
            elif unknown := selector.labels - names[selector.metric] - SCRAPE_LABELS:
                problems.append(f"{where}: {selector.metric} has no label {', '.join(sorted(unknown))}")
    for name in documented():
        if not {name, f"{name}_total", f"{name}_bucket"} & names.keys():
            problems.append(f"ARCHITECTURE.md: no metric {name}")
    return sorted(set(problems))
