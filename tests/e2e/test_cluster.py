"""Router and executors as processes that find each other through a real etcd, with every chain cut over two executors: the
same tokens as in one process."""

import re

import pytest
import servers
from asking import greedy_texts, stream_together
from conftest import client_of

# A cut chain, whatever the memory would allow.
SETTINGS = "[placement]\nspans_per_chain = 2"


@pytest.fixture(scope="module")
def cluster(zoo, tmp_path_factory):
    cluster = servers.Cluster(zoo[0], tmp_path_factory.mktemp("cluster"), executor_count=2, settings=SETTINGS)
    try:
        cluster.api.wait_for_models(zoo[1])
        yield cluster
    finally:
        statuses = cluster.stop()
    etcd, *ours = cluster.programs
    assert [program.complaints() for program in ours] == [[] for _ in ours]
    assert statuses[1:] == [0] * len(ours)


def test_cut_chains_give_the_same_tokens(cluster, client, models):
    whole = greedy_texts(client, models)
    assert greedy_texts(client_of(cluster.api), models) == whole
    assert stream_together(cluster.api.url, models) == [whole[model] for model in models]


def test_both_executors_compute(cluster):
    assert [executor.metric("ashlar_step_seconds_count") > 0 for executor in cluster.executors] == [True, True]


def test_all_obey_one_plan(cluster):
    generations = {executor.metric("ashlar_plan_generation") for executor in cluster.executors}
    assert len(generations) == 1 and generations.pop() > 0


def test_check_asks_both_executors(cluster):
    done = servers.ashlar("check", "--registry", cluster.registry)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    line = re.compile(r"exe_\S+  127\.0\.0\.1:\d+  ok  pages: 0 used, \d+ cached, \d+ free")
    assert len(lines) == 2 and all(map(line.fullmatch, lines)), done.stdout

    nobody = f"127.0.0.1:{servers.free_port()}"
    some = [found.split("  ")[1] for found in lines] + [nobody]
    done = servers.ashlar("check", *(word for address in some for word in ("--executor", address)))
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == lines
    assert done.stdout.splitlines()[2].startswith(f"?  {nobody}  cannot be reached: ")
    assert "1 of 3 has a fault or cannot be reached" in done.stderr
