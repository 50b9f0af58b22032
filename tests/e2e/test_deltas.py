"""A fine-tune as a compressed difference of its base, served beside the base and the fine-tune: each gives what it gives alone."""

import subprocess

import pytest
import servers
from asking import greedy_texts, stream_together
from conftest import client_of

BASE, TUNED = "demo/base", "demo/japanese-full"
COMPRESSED = {"demo/japanese-bits": "bitdelta", "demo/japanese-svd": "svd:16"}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deltas")
    zoo = folder / "zoo"
    servers.make_zoo(zoo)
    for name, method in COMPRESSED.items():
        command = [servers.BINARY, "zoo", "--zoo", zoo, "compress-delta", TUNED, "--base", BASE, "--method", method, "--apply", "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and f"{name} is chain " in done.stdout, done.stdout + done.stderr
    serve = servers.Serve(zoo, folder / "serve.log")
    serve.api.wait_for_models([BASE, TUNED, *COMPRESSED])
    yield serve.api
    assert serve.terminate() == 0
    assert serve.complaints() == []


def test_compressed_fine_tunes_are_served_together_with_their_base(api):
    models = [BASE, TUNED, *COMPRESSED]
    alone = greedy_texts(client_of(api), models)
    assert len(set(alone.values())) >= 3, alone
    assert api.metric("ashlar_adapters_resident") > 0 and api.metric("ashlar_blocks_shared") > 0
    assert stream_together(api.url, models * 3) == [alone[model] for model in models * 3]
