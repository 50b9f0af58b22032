"""Clients that leave, servers that are told to stop, and what the metrics say of it all."""

import signal
import socket

import queries
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import wait_until

MODEL = "demo/base"
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


def test_metrics_have_all_that_dashboard_and_rules_ask_for(server, client):
    complete(client, MODEL)
    assert queries.missing_in(server.metrics()) == []
    assert server.metric("ashlar_blocks_shared") > 0
    assert server.metric("ashlar_blocks_resident") > server.metric("ashlar_blocks_shared")
