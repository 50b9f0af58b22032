"""Clients that leave, servers that are told to stop, and what the metrics say of it all."""

import json
import shutil
import signal
import socket
import time

import pytest
import queries
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import wait_until

MODEL = "demo/base"
OTHER = "demo/shakespeare-top"
LONG_TOKENS = 400


def test_leaving_frees_the_sequences(server, client):
    generated = server.metric("ashlar_generated_tokens_total")
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=LONG_TOKENS, n=8, stream=True, temperature=1.0, seed=1, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    wait_until("no sequence runs", lambda: server.metric("ashlar_sequences_running") == 0, 5)
    wait_until("no page is in use", lambda: server.metric("ashlar_kv_pages", state="used") == 0, 5)
    assert server.metric("ashlar_generated_tokens_total") - generated < 8 * LONG_TOKENS
    assert server.metric("ashlar_requests_total", code="cancelled") >= 1


def test_leaving_before_the_answer_frees_the_sequence(server):
    """A client of few words: it sends a request and hangs up without reading."""
    host, port = server.url.removeprefix("http://").split(":")
    body = f'{{"model":"{MODEL}","prompt":"A","max_tokens":{LONG_TOKENS},"n":8,"ignore_eos":true}}'
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        wait_until("a sequence runs", lambda: server.metric("ashlar_sequences_running") > 0, 5)
    wait_until("no sequence runs", lambda: server.metric("ashlar_sequences_running") == 0, 5)


def test_told_to_stop_it_finishes_what_runs(zoo, tmp_path):
    serve = servers.Serve(zoo[0], tmp_path / "serve.log")
    try:
        serve.api.wait_for_models([MODEL])
        client = client_of(serve.api)
        expected = complete(client, MODEL, LONG_TOKENS)
        stream = iter(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=LONG_TOKENS, stream=True, **GREEDY))
        text = next(stream).choices[0].text
        serve.process.send_signal(signal.SIGTERM)
        choices = [chunk.choices[0] for chunk in stream]
        assert text + "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == "length"
        assert serve.wait() == 0
        assert serve.complaints() == []
    finally:
        serve.process.kill()


def test_told_twice_to_stop_it_stops_at_once(zoo, tmp_path):
    serve = servers.Serve(zoo[0], tmp_path / "serve.log")
    try:
        serve.api.wait_for_models([MODEL])
        stream = client_of(serve.api).completions.create(model=MODEL, prompt=PROMPT, max_tokens=LONG_TOKENS, n=16, stream=True, **GREEDY)
        next(iter(stream))
        began = time.monotonic()
        serve.process.send_signal(signal.SIGTERM)
        wait_until("it drains", lambda: "REST drains" in serve.log.read_text(), 5)
        serve.process.send_signal(signal.SIGINT)
        assert serve.wait() == 0
        # The stream, which nobody reads on, would have held the drain for its 30 s.
        assert time.monotonic() - began < 10
        assert serve.complaints("asked again to stop") == []
        assert len(serve.complaints()) == 1
    finally:
        serve.process.kill()


@pytest.fixture
def own_serve(tmp_path):
    """A server with a zoo of its own, that may be changed."""
    servers.make_zoo(tmp_path / "zoo")
    serve = servers.Serve(tmp_path / "zoo", tmp_path / "serve.log", "--set", "zoo.refresh_ms=50")
    serve.zoo = tmp_path / "zoo"
    try:
        serve.api.wait_for_models([MODEL, OTHER])
        yield serve
    finally:
        serve.terminate()


def zoo_command(serve, *words):
    done = servers.ashlar("zoo", *words, "--zoo", serve.zoo)
    assert done.returncode == 0, done.stderr


def test_what_runs_outlasts_a_change_of_its_name(own_serve):
    """A name is given to another chain, then removed, while it answers: streams end with the text of the model that they began with."""
    client = client_of(own_serve.api)
    texts = {model: complete(client, model, LONG_TOKENS) for model in (MODEL, OTHER)}
    assert texts[MODEL] != texts[OTHER]
    changes = [("add", servers.DEMO / OTHER.split("/")[1], "--name", MODEL), ("rm", MODEL)]
    for change, now, after in zip(changes, [MODEL, OTHER], [OTHER, None], strict=True):
        resumed = own_serve.api.metric("ashlar_sequence_resumes_total")
        # Many, so that they run long enough.
        streams = [iter(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=LONG_TOKENS, stream=True, **GREEDY)) for _ in range(16)]
        starts = [next(stream).choices[0].text for stream in streams]
        zoo_command(own_serve, *change)
        for start, stream in zip(starts, streams, strict=True):
            assert start + "".join(chunk.choices[0].text for chunk in stream) == texts[now]
        assert own_serve.api.metric("ashlar_sequence_resumes_total") == resumed
        question = {"model": MODEL, "prompt": PROMPT, "max_tokens": LONG_TOKENS, "temperature": 0, "ignore_eos": True}

        def answer():
            status, body = servers.get(f"{own_serve.api.url}/v1/completions", question)
            return json.loads(body)["choices"][0]["text"] if status == 200 else None if status == 404 else "not yet"

        wait_until(f"{MODEL} says what {after} says", lambda: answer() == (texts[after] if after else None), 20)
    wait_until("the old chain's pages are free", lambda: own_serve.api.metric("ashlar_kv_pages", state="used") == 0, 5)
    assert own_serve.complaints() == []


def test_model_whose_numbers_overflow_says_so(own_serve, tmp_path):
    """An adapter of finite numbers, all so large that what comes of them is none: an error that names the model, not a defect of the server."""
    folder = tmp_path / "overflowing"
    shutil.copytree(servers.DEMO / "names-lora", folder)
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    values_at = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:values_at] + b"\x80\x7e" * ((len(data) - values_at) // 2))
    zoo_command(own_serve, "add", folder, "--name", "demo/overflows", "--base", MODEL)
    url, question = f"{own_serve.api.url}/v1/completions", {"model": "demo/overflows", "prompt": PROMPT, "max_tokens": 4}
    wait_until("it is served", lambda: servers.get(url, question)[0] not in (404, 503), 20)
    status, body = servers.get(url, question)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (422, "model_failed")
    assert error["message"].startswith("model demo/overflows failed to choose a token: ")
    assert complete(client_of(own_serve.api), MODEL, 4), "others are as they were"
    assert own_serve.complaints("model demo/overflows failed to choose a token") == []


def test_metrics_have_all_that_dashboard_and_rules_ask_for(server, client):
    complete(client, MODEL)
    assert queries.missing_in(server.metrics()) == []
    assert server.metric("ashlar_blocks_shared") > 0
    assert server.metric("ashlar_blocks_resident") > server.metric("ashlar_blocks_shared")
