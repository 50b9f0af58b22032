"""Adapters that are loaded and unloaded while a server runs."""

import shutil

import openai
import pytest
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import get, wait_until

BASE = "demo/base"
ADAPTER = "names-lora"
LONG_TOKENS = 400


def post(api, route: str, **body) -> tuple[int, str]:
    return get(f"{api.url}/v1/{route}_lora_adapter", body)


@pytest.fixture
def administered(tmp_path):
    """A server of its own, whose folder of adapters has copies of the demo's."""
    shelf = tmp_path / "shelf"
    for copy in ("one", "again"):
        shutil.copytree(servers.DEMO / ADAPTER, shelf / copy)
    shutil.copytree(servers.DEMO / "math-lora", tmp_path / "outside")
    (shelf / "link").symlink_to(tmp_path / "outside")
    (shelf / "empty").mkdir()
    servers.make_zoo(tmp_path / "zoo")
    flags = ["--set", f"router.adapters_root={shelf}"]
    running = []

    def start(registry: str = "memory:"):
        running.append(servers.Serve(tmp_path / "zoo", tmp_path / f"serve-{len(running)}.log", *flags, registry=registry))
        running[-1].api.wait_for_models([BASE, f"demo/{ADAPTER}"])
        return running[-1]

    yield start
    for serve in running:
        serve.terminate()
        assert serve.complaints() == []


def test_adapter_comes_and_goes_while_others_stream(administered):
    serve = administered()
    client = client_of(serve.api)
    texts = {model: complete(client, model) for model in (BASE, f"demo/{ADAPTER}")}
    assert texts[BASE] != texts[f"demo/{ADAPTER}"]
    whole = complete(client, BASE, LONG_TOKENS)
    stream = iter(client.completions.create(model=BASE, prompt=PROMPT, max_tokens=LONG_TOKENS, stream=True, **GREEDY))
    text = next(stream).choices[0].text
    before = serve.api.metric("ashlar_blocks_resident")

    status, body = post(serve.api, "load", lora_name="demo/one", lora_path="one", base_model_name=BASE)
    assert status == 200, body
    assert complete(client, "demo/one") == texts[f"demo/{ADAPTER}"], "at once, and what the same adapter says that was there"
    status, body = post(serve.api, "load", lora_name="again", lora_path="again", base_model_name=BASE)
    assert status == 200, body
    assert complete(client, "public/again") == texts[f"demo/{ADAPTER}"]
    assert serve.api.metric("ashlar_blocks_resident") == before, "copies of an adapter cost nothing"
    assert {"demo/one", "public/again"} <= {model.id for model in client.models.list()}

    status, body = post(serve.api, "unload", lora_name="demo/one")
    assert status == 200, body
    with pytest.raises(openai.NotFoundError):
        complete(client, "demo/one")
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole

    serve.terminate()
    after = client_of(administered().api)
    wait = lambda: get(f"{after.base_url}completions", {"model": "public/again", "prompt": PROMPT, "max_tokens": 1})[0] == 200  # noqa: E731
    wait_until("it outlasts a restart", wait, 20)
    assert complete(after, "public/again") == texts[f"demo/{ADAPTER}"]


def test_what_cannot_be_loaded_says_why(administered):
    api = administered().api
    outside = "is nothing in this server's folder of adapters"
    for body, expected in [
        ({"lora_path": "../outside"}, outside),
        ({"lora_path": str(servers.DEMO / "math-lora")}, outside),
        ({"lora_path": "link"}, outside),
        ({"lora_path": "none"}, outside),
        ({"lora_path": "."}, outside),
        ({"lora_path": "empty"}, "holds no PEFT adapter"),
        ({"lora_path": "one", "base_model_name": "demo/none"}, "demo/none is not in the zoo"),
        ({"lora_path": "one", "base_model_name": BASE, "lora_name": BASE}, "is there already"),
        ({"lora_path": "one", "base_model_name": BASE, "lora_name": "a b"}, "must be NAME or TENANT/NAME"),
    ]:
        status, text = post(api, "load", **({"lora_name": "x"} | body))
        assert status == 400 and expected in text, (body, status, text)
    for name, expected in [("demo/none", (404, "does not exist")), (BASE, (400, "is no adapter"))]:
        status, text = post(api, "unload", lora_name=name)
        assert (status, expected[1] in text) == (expected[0], True), (name, text)
