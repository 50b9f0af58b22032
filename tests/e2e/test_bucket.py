"""A zoo in a bucket is a zoo: the same commands, the same tokens, a cache that spares the bucket, and a bucket that may go."""

import json
import subprocess

import pytest
import servers
from asking import complete, greedy_texts
from bucket import Bucket
from conftest import client_of
from servers import BINARY, DEMO, Serve, ashlar, wait_until

FOLDERS = {"demo/base": "base", "demo/assistant-top": "assistant-top", "demo/names-lora": "names-lora"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    bucket = Bucket(tmp_path_factory.mktemp("bucket"))
    try:
        with bucket.past_the_door():
            for name, folder in FOLDERS.items():
                base = ["--base", "demo/base"] if folder == "names-lora" else []
                run("add", DEMO / folder, "--name", name, "--zoo", bucket.place, *base)
        yield bucket
    finally:
        bucket.stop()


def run(*words) -> str:
    done = ashlar("zoo", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(bucket, folder, log: str, *flags: str) -> Serve:
    cache = ["--set", f"zoo.cache={folder / 'cache'}", "--set", "zoo.refresh_ms=200"]
    return Serve(bucket.place, folder / log, *cache, *flags)


def test_the_commands_say_of_a_bucket_what_they_say_of_a_directory(bucket, zoo):
    listed = [one["model"] for one in json.loads(run("list", "--json", "--zoo", bucket.place))]
    assert sorted(listed) == sorted(FOLDERS)
    for name in listed:
        bucket_s, local = (json.loads(run("show", name, "--json", "--zoo", place)) for place in (bucket.place, zoo[0]))
        assert bucket_s["name"]["chain"] == local["name"]["chain"]
    run("add", DEMO / "base", "--name", "demo/short-lived", "--dtype", "f32", "--zoo", bucket.place)
    run("rm", "demo/short-lived", "--zoo", bucket.place)
    before = bucket.door.count("DELETE", "/")
    run("gc", "--zoo", bucket.place)
    assert bucket.door.count("DELETE", "/") == before, "all of it is young"
    run("gc", "--grace", "0", "--zoo", bucket.place)
    assert bucket.door.count("DELETE", "/tensors/") > 0
    with bucket.past_the_door():
        assert "sound" in run("verify", "--zoo", bucket.place)


def test_a_bucket_mends_a_directory(bucket, tmp_path):
    local = tmp_path / "zoo"
    run("add", DEMO / "base", "--name", "demo/base", "--zoo", local)
    torn = max((local / "tensors").glob("*/*"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert ashlar("zoo", "verify", "--zoo", local).returncode == 3
    assert "sound" in run("verify", "--repair", bucket.place, "--zoo", local)


def test_what_is_served_from_a_bucket_is_the_same_and_a_restart_asks_for_no_tensor(bucket, client, tmp_path):
    expected = greedy_texts(client, list(FOLDERS))
    for log in ("first", "second"):
        asked = bucket.door.count("GET", "/tensors/")
        server = serve(bucket, tmp_path, f"{log}.log")
        try:
            server.api.wait_for_models(list(FOLDERS))
            assert greedy_texts(client_of(server.api), list(FOLDERS)) == expected
        finally:
            assert server.terminate() == 0
        assert server.complaints() == []
        assert (bucket.door.count("GET", "/tensors/") > asked) == (log == "first")
        assert "secret-of-the-test" not in server.log.read_text()


def test_of_two_adds_of_one_name_at_a_time_one_wins_and_nothing_is_lost(bucket):
    words = ["zoo", "add", DEMO / "base", "--name", "demo/raced", "--zoo", bucket.place, "--json", "--dtype"]
    both = [subprocess.Popen([str(word) for word in [BINARY, *words, dtype]], stdout=-1, stderr=-1, text=True) for dtype in ("f32", "int8")]
    ended = [(*one.communicate(timeout=120), one.returncode) for one in both]
    added = {json.loads(out)["chain"] for out, _, status in ended if status == 0}
    assert added and all(status == 0 or "changed by others" in complaint for _, complaint, status in ended), ended
    shown = json.loads(run("show", "demo/raced", "--json", "--zoo", bucket.place))
    assert shown["name"]["chain"] in added
    assert {shown["name"]["chain"], *(past["chain"] for past in shown["name"].get("history", []))} == added
    run("rm", "demo/raced", "--zoo", bucket.place)


def test_a_bucket_that_is_gone_stops_nothing_that_runs_and_is_named(bucket, tmp_path):
    server = serve(bucket, tmp_path, "serve.log")
    try:
        server.api.wait_for_models(list(FOLDERS))
        client = client_of(server.api)
        expected = complete(client, "demo/base")
        bucket.door.is_shut = lambda method, path: method == "GET" and "/tensors/" in path
        with bucket.past_the_door():
            run("add", DEMO / "base", "--raw", "--name", "demo/late", "--dtype", "f32", "--zoo", bucket.place)
        failed = r"failed to read tensor \w+ \(`[\w.]+` of block \w+\) from s3://zoos/a/zoo"
        wait_until("the failure", lambda: server.complaints() != [], 60, server.why_dead)
        assert complete(client, "demo/base") == expected
        bucket.door.is_shut = lambda method, path: True
        wait_until("the catalog's failure", lambda: "failed to read the zoo" in server.log.read_text(), 60, server.why_dead)
        assert complete(client, "demo/base") == expected
        refused = ashlar("zoo", "list", "--zoo", bucket.place)
        assert refused.returncode == 1 and bucket.place in refused.stderr, refused.stderr
        bucket.door.is_shut = lambda method, path: False
        server.api.wait_for_models(["demo/late"])
    finally:
        bucket.door.is_shut = lambda method, path: False
        status = server.terminate()
    assert status == 0
    assert server.complaints(failed, "failed to read the zoo") == []
    assert any(servers.re.search(failed, line) for line in server.complaints())


def test_a_bucket_needs_a_registry_and_a_cache_is_advised(bucket, tmp_path):
    refused = ashlar("serve", "--zoo", bucket.place)
    assert refused.returncode == 1 and "name the registry" in refused.stderr, refused.stderr
    server = Serve(bucket.place, tmp_path / "serve.log")
    assert server.terminate() == 0
    assert len(server.complaints()) == 1 and "no zoo.cache is set" in server.complaints()[0]


def test_a_place_that_cannot_be_used_is_named(bucket):
    for place, complaint in [
        ("gs://zoos", "gs://"),
        ("s3://user:word@zoos", "AWS_* variables"),
        ("s3://no-such-bucket/zoo", "no-such-bucket"),
    ]:
        refused = ashlar("zoo", "list", "--zoo", place)
        assert refused.returncode != 0 and complaint in refused.stderr, refused.stderr
