"""Adapters that are loaded and unloaded while a server runs: those who stream notice nothing, copies cost nothing, names that are there are
safe, and a restart and a cluster know what is there."""

import json
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import servers
from asking import GREEDY, PROMPT, complete
from conftest import client_of
from servers import get, wait_until

BASE = "demo/base"
ADAPTER = "demo/names-lora"
LONG_TOKENS = 400
STREAM_COUNT = 8


def post(api, route: str, **body) -> tuple[int, str]:
    return get(f"{api.url}/v1/{route}_lora_adapter", body)


def load(api, name: str, path: str, **more):
    status, body = post(api, "load", lora_name=name, lora_path=path, **({"base_model_name": BASE} | more))
    assert status == 200, body


def unload(api, name: str):
    status, body = post(api, "unload", lora_name=name)
    assert status == 200, body


def code_of(text: str) -> str:
    error = json.loads(text)["error"]
    return f"{error['code']} {error['param']}"


def tensors_of(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensors(path: Path, header: dict, data: bytes):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_config(folder: Path, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def make_shelf(shelf: Path):
    """The demo's adapter twice, with twice the effect twice, with no effect, and one that brings a norm whole."""
    for copy in ("one", "again", "twice", "twice-again", "zero", "whole"):
        shutil.copytree(servers.DEMO / "names-lora", shelf / copy)
    for copy in ("twice", "twice-again"):
        change_config(shelf / copy, lora_alpha=16)
    file = shelf / "zero/adapter_model.safetensors"
    header, data = tensors_of(file)
    write_tensors(file, header, bytes(len(data)))
    norms, data = tensors_of(servers.DEMO / "base/norm.safetensors")
    halved = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    whole = {f"base_model.model.{name}": entry for name, entry in norms.items() if name != "__metadata__"}
    write_tensors(shelf / "whole/adapter_model.safetensors", whole, halved)
    change_config(shelf / "whole", target_modules=None, layers_to_transform=None, modules_to_save=["norm"])
    shutil.copytree(servers.DEMO / "names-lora", shelf.parent / "outside")
    (shelf / "link").symlink_to(shelf.parent / "outside")
    (shelf / "inner").symlink_to("one")
    (shelf / "empty").mkdir()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a zoo of the demo's models and a shelf of adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    make_shelf(folder / "shelf")
    servers.make_zoo(folder / "zoo")
    return folder


@pytest.fixture
def start(place, tmp_path):
    """Starts servers one after another over the same zoo; nothing is left loaded in it."""
    running = []

    def one(registry: str = "memory:"):
        if running:
            running[-1].terminate()
        flags = ["--set", f"router.adapters_dir={place / 'shelf'}"]
        running.append(servers.Serve(place / "zoo", tmp_path / f"serve-{len(running)}.log", *flags, registry=registry))
        return running[-1]

    yield one
    for serve in running:
        assert serve.terminate() == 0
        assert serve.complaints("the server is closed now") == []


@pytest.fixture
def api(start):
    api = start().api
    # All of them, or what is resident still grows while a test counts it.
    api.wait_for_models(servers.demo_models())
    return api


class Streams:
    """So many clients that each stream the same prompt of their own again and again, until they are told to end or find no model."""

    def __init__(self, api, model: str):
        self.api, self.model = api, model
        self.prompts = [f"{PROMPT}{index}" for index in range(STREAM_COUNT)]
        self.alone = [self.stream(prompt) for prompt in self.prompts]
        self.told = threading.Event()
        self.pool = ThreadPoolExecutor(STREAM_COUNT)

    def stream(self, prompt: str) -> str:
        chunks = client_of(self.api).completions.create(model=self.model, prompt=prompt, max_tokens=LONG_TOKENS, stream=True, **GREEDY)
        return "".join(chunk.choices[0].text for chunk in chunks)

    def one(self, index: int) -> set[str]:
        texts = set()
        while not self.told.is_set():
            try:
                texts.add(self.stream(self.prompts[index]))
            except (openai.NotFoundError, openai.InternalServerError) as error:
                # Asked for while it went: refused before it began, never broken off.
                assert error.status_code in (404, 503), error
                return texts
        return texts

    def __enter__(self):
        self.running = [self.pool.submit(self.one, index) for index in range(STREAM_COUNT)]
        wait_until("all run", lambda: self.api.metric("ashlar_sequences_running") >= STREAM_COUNT, 60)
        return self

    def __exit__(self, *_):
        self.told.set()
        self.pool.shutdown()

    def texts(self) -> list[set[str]]:
        self.told.set()
        return [one.result() for one in self.running]


def test_streams_of_the_base_are_those_without_a_load(api):
    client = client_of(api)
    with Streams(api, BASE) as streams:
        load(api, "demo/one", "one")
        assert complete(client, "demo/one", 8) == complete(client, ADAPTER, 8), "at once"
        load(api, "demo/twice", "twice")
        unload(api, "demo/one")
        unload(api, "demo/twice")
        assert streams.texts() == [{text} for text in streams.alone]


def test_running_ones_end_and_new_ones_find_no_model(api):
    load(api, "demo/twice", "twice")
    with Streams(api, "demo/twice") as streams:
        unload(api, "demo/twice")
        with pytest.raises(openai.NotFoundError):
            complete(client_of(api), "demo/twice")
        assert streams.texts() == [{text} for text in streams.alone], "those that ran ended as if nothing had been"
    status, text = post(api, "unload", lora_name="demo/twice")
    assert (status, code_of(text)) == (404, "model_not_found lora_name")


def test_two_copies_cost_one(api):
    client = client_of(api)
    resident = lambda: [api.metric(f"ashlar_{name}") for name in ("adapters_resident", "blocks_resident", "weight_bytes")]  # noqa: E731
    before = resident()
    load(api, "demo/one", "one")
    load(api, "again", "inner")
    assert complete(client, "demo/one") == complete(client, "public/again") == complete(client, ADAPTER)
    assert resident() == before, "what the zoo's own adapter has is there"
    load(api, "demo/twice", "twice")
    with_one = resident()
    assert (with_one[0] > before[0], with_one[1]) == (True, before[1])
    load(api, "demo/twice-again", "twice-again")
    assert resident() == with_one
    assert complete(client, "demo/twice") == complete(client, "demo/twice-again") != complete(client, "demo/one")
    unload(api, "demo/twice")
    assert complete(client, "demo/twice-again") != complete(client, BASE), "the other is served as before"
    for name in ("demo/twice-again", "demo/one", "again"):
        unload(api, name)
    wait_until("nothing is left", lambda: resident() == before, 20)
    assert api.metric("ashlar_adapter_changes_total", action="load", code="ok") == 4


def test_adapters_without_factors_are_served_right(api):
    client = client_of(api)
    for name in ("zero", "whole"):
        load(api, f"demo/{name}", name)
    assert complete(client, "demo/zero") == complete(client, BASE)
    assert complete(client, "demo/whole") != complete(client, BASE)
    for name in ("zero", "whole"):
        unload(api, f"demo/{name}")


def test_what_was_loaded_outlasts_a_restart_and_what_was_unloaded_does_not(start):
    api = start().api
    load(api, "demo/twice", "twice")
    load(api, "demo/one", "one")
    text = complete(client_of(api), "demo/twice")
    unload(api, "demo/one")
    api = start().api
    api.wait_for_models(["demo/twice"])
    client = client_of(api)
    assert complete(client, "demo/twice") == text
    with pytest.raises(openai.NotFoundError):
        complete(client, "demo/one")
    unload(api, "demo/twice")


def test_names_that_are_there_are_safe(api):
    load(api, "demo/one", "one")
    load(api, "demo/one", "one")
    for body, expected in [
        ({"lora_name": "demo/one", "lora_path": "twice"}, "model_exists lora_name"),
        ({"lora_name": BASE, "lora_path": "twice", "load_inplace": True}, "model_exists lora_name"),
    ]:
        status, text = post(api, "load", **({"base_model_name": BASE} | body))
        assert (status, code_of(text)) == (400, expected)
    assert complete(client_of(api), "demo/one") == complete(client_of(api), ADAPTER)
    with ThreadPoolExecutor(2) as pool:
        ask = lambda path: post(api, "load", lora_name="demo/raced", lora_path=path, base_model_name=BASE)  # noqa: E731
        answers = list(pool.map(ask, ["one", "twice"]))
    assert sorted(status for status, _ in answers) == [200, 400], answers
    assert [code_of(text) for status, text in answers if status == 400] == ["model_exists lora_name"]
    load(api, "demo/raced", "again", load_inplace=True)
    for name in ("demo/one", "demo/raced"):
        unload(api, name)
    for name in (BASE, ADAPTER):
        status, text = post(api, "unload", lora_name=name)
        assert (status, code_of(text)) == (400, "not_loaded lora_name"), text
    assert complete(client_of(api), ADAPTER)


def test_what_cannot_be_loaded_says_why(api, place):
    outside = "is nothing in the folder that adapters are loaded from"
    for body, expected in [
        ({"lora_path": "../outside"}, outside),
        ({"lora_path": str(place / "outside")}, outside),
        ({"lora_path": "link"}, outside),
        ({"lora_path": "none"}, outside),
        ({"lora_path": "."}, outside),
        ({"lora_path": "empty"}, "it has no adapter_config.json"),
        ({"base_model_name": "demo/none"}, "the model `demo/none` does not exist"),
        ({"base_model_name": ADAPTER}, "has adapters of its own"),
        ({"lora_name": "a b"}, "must be NAME or TENANT/NAME"),
    ]:
        status, text = post(api, "load", **({"lora_name": "x", "lora_path": "one", "base_model_name": BASE} | body))
        assert status in (400, 404) and expected in text, (body, status, text)
    load(api, "x", str(place / "shelf/one"))
    unload(api, "x")


def test_administrators_alone_load(start, tmp_path):
    serve = start(registry=f"file:{tmp_path / 'registry.json'}")
    for words in (["add", "ops", "--admin"], ["add", "blue"]):
        done = servers.ashlar("tenant", *words, "--registry", serve.registry)
        assert done.returncode == 0, done.stderr
    keys = {name: servers.ashlar("tenant", "key", name, "--registry", serve.registry).stdout.strip() for name in ("ops", "blue")}
    body = {"lora_name": "blue/mail", "lora_path": "one", "base_model_name": BASE}

    def ask(tenant: str, route: str, **body) -> int:
        client = openai.OpenAI(base_url=f"{serve.api.url}/v1", api_key=keys.get(tenant, "ask_x"), max_retries=0, timeout=60)
        try:
            client.post(f"/{route}_lora_adapter", body=body, cast_to=object)
            return 200
        except openai.APIStatusError as error:
            return error.status_code

    wait_until("keys are known", lambda: ask("blue", "load", **body) == 403, 20)
    assert [ask(tenant, "load", **body) for tenant in ("nobody", "blue", "ops")] == [401, 403, 200]
    assert [ask(tenant, "unload", lora_name="blue/mail") for tenant in ("nobody", "blue", "ops")] == [401, 403, 200]


def test_load_reaches_the_executors_of_a_cluster(place, tmp_path):
    router = f"adapters_dir = \"{place / 'shelf'}\""
    cluster = servers.Cluster(place / "zoo", tmp_path, 2, "[placement]\nspans_per_chain = 2", router)
    try:
        api = cluster.api
        api.wait_for_models([BASE, ADAPTER])
        client = client_of(api)
        load(api, "demo/one", "one")
        load(api, "demo/twice", "twice")
        assert complete(client, "demo/one") == complete(client, ADAPTER) != complete(client, "demo/twice")
        unload(api, "demo/one")
        with pytest.raises(openai.NotFoundError):
            complete(client, "demo/one")
        unload(api, "demo/twice")
    finally:
        statuses = cluster.stop()
    etcd, *ours = cluster.programs
    assert [program.complaints() for program in ours] == [[] for _ in ours]
    assert statuses[1:] == [0] * len(ours)
