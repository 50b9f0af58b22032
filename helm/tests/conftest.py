"""The real helm, by its name on the PATH or in .venv (scripts/setup-tests.sh puts it there)."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/ashlar"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
os.environ["PATH"] = f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"


def run(*command: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), input=stdin, capture_output=True, text=True, timeout=120)


def template(*arguments: str | Path) -> subprocess.CompletedProcess:
    return run("helm", "template", "demo", CHART, "--namespace", "prod", *arguments)


class Rendered:
    """The objects of one rendering, by kind and name."""

    def __init__(self, text: str):
        self.text = text
        self.objects = [one for one in yaml.safe_load_all(text) if one]

    def one(self, kind: str, name: str) -> dict:
        found = [one for one in self.objects if one["kind"] == kind and one["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} objects {kind} {name}"
        return found[0]

    def of(self, kind: str) -> list[dict]:
        return [one for one in self.objects if one["kind"] == kind]

    def pods(self) -> list[dict]:
        return [one["spec"]["template"]["spec"] for one in self.objects if one["kind"] in ("Deployment", "StatefulSet")]


@pytest.fixture
def render():
    """Renders with a case of ci/ by name and further --set arguments."""

    def render(case: str, *settings: str) -> Rendered:
        arguments = [part for setting in settings for part in ("--set", setting)]
        result = template("-f", CHART / "ci" / f"{case}-values.yaml", *arguments)
        assert result.returncode == 0, result.stderr
        return Rendered(result.stdout)

    return render
