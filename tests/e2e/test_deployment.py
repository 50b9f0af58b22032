"""Targets of a deployment, set while the server runs, reach the executor with the requests that come from then on."""

from pathlib import Path

import pytest
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import wait_until

MODEL = "demo/base"
OTHER = "demo/shakespeare-top"
LONG_TOKENS = 400
GAP_MS = 7


@pytest.fixture
def lasting_serve(zoo, tmp_path):
    """A server whose registry other commands can change."""
    serve = servers.Serve(zoo[0], tmp_path / "serve.log", registry=f"file:{tmp_path / 'registry.json'}")
    try:
        serve.api.wait_for_models([MODEL, OTHER])
        yield serve
    finally:
        serve.terminate()
    assert serve.complaints() == []


def deploy(serve, zoo: Path, *words) -> str:
    done = servers.ashlar("deploy", *words, "--registry", serve.registry, "--zoo", zoo)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def targeted(api) -> dict[str, float]:
    """Sequences so far that came with a target, by its kind."""
    return {target: api.metric("ashlar_targeted_sequences_total", target=target) for target in ("gap", "ttft")}


def gap_while_it_streams(serve, model: str) -> float:
    """The gap that the executor keeps while an answer of this model streams."""
    stream = iter(client_of(serve.api).completions.create(model=model, prompt=PROMPT, max_tokens=LONG_TOKENS, n=8, stream=True, **GREEDY))
    next(stream)
    gap = serve.api.metric("ashlar_gap_target_ms")
    assert serve.api.metric("ashlar_sequences_running") > 0, "it was still running"
    stream.close()
    wait_until("no sequence runs", lambda: serve.api.metric("ashlar_sequences_running") == 0, 10)
    return gap


def wait_for_targets(serve, model: str, are_there: bool):
    """Until a request that comes now has targets, or has none any more."""
    client = client_of(serve.api)

    def holds() -> bool:
        before = targeted(serve.api)
        complete(client, model, 1)
        return (targeted(serve.api) != before) == are_there

    wait_until(f"targets of {model}", holds, 20)


def test_targets_are_in_force_from_set_to_clear(lasting_serve, zoo):
    serve = lasting_serve
    client = client_of(serve.api)
    text = complete(client, MODEL)
    assert targeted(serve.api) == {"gap": 0, "ttft": 0}
    assert gap_while_it_streams(serve, MODEL) == 0

    assert deploy(serve, zoo[0], "set", MODEL, "--gap-ms", GAP_MS, "--ttft-ms", 900) == f"{MODEL}  first token: 900 ms  gap: {GAP_MS} ms  blocks: exact\n"
    wait_for_targets(serve, MODEL, True)
    before = targeted(serve.api)
    assert complete(client, MODEL) == text
    assert targeted(serve.api) == {"gap": before["gap"] + 1, "ttft": before["ttft"] + 1}
    assert gap_while_it_streams(serve, MODEL) == GAP_MS

    before = targeted(serve.api)
    complete(client, OTHER)
    assert targeted(serve.api) == before, "targets are of one name"
    assert gap_while_it_streams(serve, OTHER) == 0

    deploy(serve, zoo[0], "set", MODEL, "--ttft-ms", 0)
    wait_until("no target for first tokens", lambda: only_gaps(serve, client), 20)

    deploy(serve, zoo[0], "clear", MODEL)
    wait_for_targets(serve, MODEL, False)
    assert gap_while_it_streams(serve, MODEL) == 0


def only_gaps(serve, client) -> bool:
    before = targeted(serve.api)
    complete(client, MODEL, 1)
    after = targeted(serve.api)
    return after["gap"] == before["gap"] + 1 and after["ttft"] == before["ttft"]
