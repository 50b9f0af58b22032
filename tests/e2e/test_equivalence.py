"""Blocks that stand for others: measured from the command line, served where the deployment allows it, and revoked while sequences run."""

import json
import shutil
import threading

import openai
import pytest
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import wait_until

MODEL, OTHER = "demo/shakespeare-top", "demo/base"


@pytest.fixture(scope="module")
def measured(zoo, tmp_path_factory):
    """A zoo of its own with a record, and the record."""
    folder = tmp_path_factory.mktemp("equivalence") / "zoo"
    shutil.copytree(zoo[0], folder)
    words = ["zoo", "equivalence", MODEL, OTHER, "--windows", "2", "--kl-max", "10", "--cosine-min", "0", "--json", "--zoo", folder]
    done = servers.ashlar(*words)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def ask(client, model: str):
    """The chain that served, and the text."""
    raw = client.completions.with_raw_response.create(model=model, prompt=PROMPT, max_tokens=16, **GREEDY)
    answer = raw.parse()
    chain = raw.headers["x-ashlar-chain"]
    assert answer.system_fingerprint == f"fp_{chain[:12]}"
    return chain, answer.choices[0].text


def test_the_record_says_what_was_measured(measured):
    record = measured[1]["record"]
    assert (record["model"], record["other"]) == (MODEL, OTHER)
    steps = record["steps"]
    assert steps == sorted(steps, key=lambda step: (step["alone"]["kl"]["mean"], step["block_index"]))
    assert steps[0]["together"] == steps[0]["alone"], "the first is alone"
    assert all(step["together"]["rows"] == 126 for step in steps)
    # With the last step all that differs is exchanged: the chain says what the other model says.
    assert steps[-1]["together"]["kl"]["mean"] > steps[0]["together"]["kl"]["mean"] > 0
    listed = servers.ashlar("zoo", "equivalence", "--json", "--zoo", measured[0])
    assert json.loads(listed.stdout) == [measured[1]]


def test_a_record_is_used_where_the_deployment_allows_it_until_it_is_revoked(measured, tmp_path):
    folder = tmp_path / "zoo"
    shutil.copytree(measured[0], folder)
    digest, record = measured[1]["digest"], measured[1]["record"]
    last = record["steps"][-1]
    registry = f"file:{tmp_path / 'registry.json'}"
    serve = servers.Serve(folder, tmp_path / "serve.log", registry=registry)
    try:
        serve.api.wait_for_models([MODEL, OTHER])
        client = client_of(serve.api)
        exact_chain, exact_text = ask(client, MODEL)
        assert exact_chain == record["chain"], "a record alone changes nothing"
        bound = last["together"]["kl"]["mean"] * 1.01
        done = servers.ashlar("deploy", "set", MODEL, "--equivalent-kl", bound, "--registry", registry, "--zoo", folder)
        assert done.returncode == 0, done.stderr
        wait_until("the exchanged chain serves", lambda: ask_when_ready(client) == last["chain"], 60)
        text = ask(client, MODEL)[1]
        base_chain, base_text = ask(client, OTHER)
        assert base_chain == record["other_chain"]
        # All blocks that differ are exchanged, so the two chains are the same blocks.
        assert text == base_text

        # A stream that runs while the record goes ends as it began.
        stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=400, stream=True, **GREEDY)
        first = next(iter(stream))
        rest = []
        reader = threading.Thread(target=lambda: rest.extend(chunk.choices[0].text for chunk in stream if chunk.choices))
        reader.start()
        done = servers.ashlar("zoo", "equivalence", "--revoke", digest[:10], "--zoo", folder)
        assert done.returncode == 0, done.stderr
        wait_until("the exact chain serves", lambda: ask_when_ready(client) == record["chain"], 60)
        reader.join(timeout=120)
        assert not reader.is_alive()
        assert first.choices[0].text + "".join(rest) == complete(client, OTHER, 400)
        assert ask(client, MODEL)[1] == exact_text
    finally:
        assert serve.terminate() == 0


def ask_when_ready(client) -> str | None:
    """The chain that serves; None while it is loading."""
    try:
        return ask(client, MODEL)[0]
    except openai.InternalServerError as error:
        assert error.code == "model_not_ready", error
        return None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo/base", "demo/base"], "have no two different blocks"),
        (["demo/base", "demo/names-lora"], "demo/names-lora is base and adapters"),
        (["demo/base", "demo/none"], "demo/none"),
        (["demo/base", "demo/math-lora", "--text", "/nonexistent"], "read /nonexistent"),
        (["--revoke", "zzzz"], "0 records have a digest that begins so"),
        (["--revoke", ""], "give at least 4 digits of the record's digest"),
    ],
)
def test_what_cannot_be_measured_is_named(zoo, words, said):
    done = servers.ashlar("zoo", "equivalence", *words, "--zoo", zoo[0])
    assert done.returncode == 1
    assert said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
