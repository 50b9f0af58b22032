"""`ashlar check` against servers that run, that have ended, and that were never there."""

import re

import pytest
import servers
from asking import complete
from conftest import client_of
from servers import wait_until

MODEL = "demo/base"
LINE = re.compile(r"(\S+)  (127\.0\.0\.1:\d+)  ok  pages: (\d+) used, (\d+) cached, (\d+) free")


@pytest.fixture
def serve(zoo, tmp_path):
    """A server with a registry that other commands find it by."""
    serve = servers.Serve(zoo[0], tmp_path / "serve.log", registry=f"file:{tmp_path / 'registry.json'}")
    try:
        serve.api.wait_for_models([MODEL])
        yield serve
    finally:
        serve.terminate()
    assert serve.complaints() == []


def pages(api) -> list[int]:
    return [int(api.metric("ashlar_kv_pages", state=state)) for state in ("used", "cached", "free")]


def test_server_is_found_by_its_registry_until_it_ends(serve):
    complete(client_of(serve.api), MODEL, 40)
    wait_until("no page is in use", lambda: pages(serve.api)[0] == 0, 5)
    done = servers.ashlar("check", "--registry", serve.registry)
    assert (done.returncode, done.stderr) == (0, "")
    found = LINE.fullmatch(done.stdout.rstrip("\n"))
    assert found, done.stdout
    assert [int(count) for count in found.groups()[2:]] == pages(serve.api)
    assert int(found[4]) > 0, "what was computed is cached"

    named = servers.ashlar("check", "--executor", found[2])
    assert (named.returncode, named.stdout) == (0, done.stdout)

    assert serve.terminate() == 0
    gone = servers.ashlar("check", "--registry", serve.registry)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "no `ashlar serve` runs on registry" in gone.stderr


def test_server_that_was_killed_cannot_be_reached(serve):
    serve.process.kill()
    serve.process.wait()
    done = servers.ashlar("check", "--registry", serve.registry)
    assert done.returncode == 1
    assert re.fullmatch(r"exe_\S+  127\.0\.0\.1:\d+  cannot be reached: .*\n", done.stdout), done.stdout
    assert "1 of 1 has a fault or cannot be reached" in done.stderr
