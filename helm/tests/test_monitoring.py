"""Rules and dashboard: promtool's own tests, Grafana's own type, and no metric that ARCHITECTURE.md does not name."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import queries
import yaml
from conftest import run

DATA = Path(__file__).parent / "data"
EXPRESSIONS = list(queries.expressions())


def test_rules_are_valid():
    result = run("promtool", "check", "rules", queries.RULES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_fire_on_their_stories():
    result = run("promtool", "test", "rules", DATA / "rules-test.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_rule_has_a_story_in_which_it_fires():
    rules = {rule["alert"] for group in yaml.safe_load(queries.RULES.read_text())["groups"] for rule in group["rules"]}
    stories = yaml.safe_load((DATA / "rules-test.yaml").read_text())["tests"]
    fired = {one["alertname"] for story in stories for one in story["alert_rule_test"] if one["exp_alerts"]}
    assert fired == rules


def test_rules_reach_the_cluster_unchanged(render):
    rule = render("monitoring").one("PrometheusRule", "demo-ashlar")
    assert rule["spec"] == yaml.safe_load(queries.RULES.read_text())


def test_dashboard_reaches_the_cluster_unchanged(render):
    config = render("monitoring").one("ConfigMap", "demo-ashlar-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["ashlar.json"]) == json.loads(queries.DASHBOARD.read_text())


@pytest.fixture
def dashboard():
    return json.loads(queries.DASHBOARD.read_text())


@pytest.fixture
def grafana():
    return jsonschema.Draft7Validator(json.loads((DATA / "grafana-dashboard.schema.json").read_text()))


def test_dashboard_is_of_grafanas_type(dashboard, grafana):
    problems = [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in grafana.iter_errors(dashboard)]
    assert problems == []


def test_names_of_vllm_are_those_that_users_read():
    page = (queries.ROOT / "docs/api.md").read_text()
    assert set(re.findall(r"`(vllm:\w+)`", page)) == {name for name in queries.documented() if name.startswith("vllm:")}


def test_grafanas_type_refuses_slips(dashboard, grafana):
    for slip in ({"title": 7}, {"pannels": []}, {"panels": [{"type": "timeseries", "gridpos": {}}]}):
        wrong = copy.deepcopy(dashboard) | slip
        assert not grafana.is_valid(wrong), slip


def test_panels_are_told_apart_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken = {}
    for panel in panels:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in taken, f"'{panel['title']}' covers '{taken[(x, y)]}'"
                taken[(x, y)] = panel["title"]
        assert panel["type"] == "row" or panel["description"], f"'{panel['title']}' does not say what it shows"


@pytest.mark.parametrize(("where", "text"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_expression_is_valid_and_names_documented_metrics(where, text):
    documented = queries.documented()
    for selector in queries.selectors(text):
        if selector.metric.startswith("process_"):
            continue
        name = queries.base(selector.metric)
        assert name in documented, f"{where}: ARCHITECTURE.md does not name {name}"
        unknown = selector.labels - documented[name] - queries.SCRAPE_LABELS
        assert not unknown, f"{where}: {name} has no label {unknown}"


def test_error_codes_in_expressions_exist():
    """A code that was renamed must not silence an alert."""
    codes = set(re.findall(r'^    \w+ "(\w+)" 5\d\d ', (queries.ROOT / "wire/src/code.rs").read_text(), re.MULTILINE))
    named = {code for _, text in EXPRESSIONS for alternatives in re.findall(r'code=~"([^"]*)"', text) for code in alternatives.split("|")}
    assert named and named <= codes


def test_parser_refuses_an_ill_typed_expression():
    with pytest.raises(ValueError):
        list(queries.selectors("rate(ashlar_requests_total)"))


def test_every_documented_metric_of_ours_is_shown():
    shown = {queries.base(selector.metric) for _, text in EXPRESSIONS for selector in queries.selectors(text)}
    ours = {name for name in queries.documented() if name.startswith("ashlar_")}
    assert ours - shown == set()


def made_up_metrics() -> str:
    lines = ["# TYPE process_cpu_seconds_total counter", "process_cpu_seconds_total 1", "process_resident_memory_bytes 1"]
    for name, labels in queries.documented().items():
        inside = ",".join(f'{label}="x"' for label in sorted(labels))
        for suffix in ("", "_bucket", "_sum", "_count"):
            lines.append(f"{name}{suffix}{{{inside}}} 1")
    return "\n".join(lines)


def test_missing_metrics_are_told():
    text = made_up_metrics()
    assert queries.missing_in(text) == []
    without = "\n".join(line for line in text.splitlines() if not line.startswith("ashlar_preemptions_total"))
    problems = queries.missing_in(without)
    assert problems == ["ARCHITECTURE.md: no metric ashlar_preemptions_total", "panel 'Preemptions' A: no metric ashlar_preemptions_total"]
    unlabelled = text.replace('ashlar_kv_pages{state="x"}', "ashlar_kv_pages")
    assert any("has no label state" in problem for problem in queries.missing_in(unlabelled))
