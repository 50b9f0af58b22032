"""An executor is killed while it computes: every stream goes on with the same tokens, and the executor may come back."""

import threading

import pytest
import servers
from asking import greedy_texts, stream_together
from conftest import client_of
from servers import wait_until

# Each chain whole on two executors.
SETTINGS = "[placement]\nreplicas = 2"
LONG_TOKENS = 400
STREAMS_PER_MODEL = 2
# Each chain cut over both.
CUT = "[placement]\nspans_per_chain = 2"


@pytest.fixture
def cluster(zoo, tmp_path, request):
    cluster = servers.Cluster(zoo[0], tmp_path, executor_count=2, settings=getattr(request, "param", SETTINGS))
    try:
        cluster.api.wait_for_models(zoo[1])
        yield cluster
    finally:
        cluster.stop()


def all_hold_the_same(executors) -> bool:
    held = {executor.metric("ashlar_blocks_resident") for executor in executors}
    return len(held) == 1 and held.pop() > 0


def test_streams_go_on_when_an_executor_is_killed(cluster, client, models):
    wait_until("both executors hold all blocks", lambda: all_hold_the_same(cluster.executors), 60)
    whole = greedy_texts(client, models, LONG_TOKENS)
    asked = models * STREAMS_PER_MODEL
    killed, router = cluster.programs[1], cluster.programs[-1]
    steps = cluster.executors[0].metric("ashlar_step_seconds_count")
    texts: list[str] = []
    streams = threading.Thread(target=lambda: texts.extend(stream_together(cluster.api.url, asked, LONG_TOKENS)))
    streams.start()
    # Prompts take a step or two: after 20 tokens are on their way.
    wait_until("the first executor generates", lambda: cluster.executors[0].metric("ashlar_step_seconds_count") > steps + 20, 30)
    killed.process.kill()
    streams.join(timeout=120)
    assert not streams.is_alive()
    assert texts == [whole[model] for model in asked]
    assert cluster.api.metric("ashlar_sequence_resumes_total") > 0
    assert cluster.api.metric("ashlar_sequences_lost_total") == 0

    back = cluster.restart(killed)
    wait_until("it holds all blocks again", lambda: all_hold_the_same(cluster.executors), 60, back.why_dead)
    alone = greedy_texts(client_of(cluster.api), models)
    assert stream_together(cluster.api.url, asked) == [alone[model] for model in asked]
    assert router.complaints("lost an executor", "failed to call an executor") == []


@pytest.mark.parametrize("cluster", [CUT], indirect=True)
@pytest.mark.parametrize("index", [1, 2], ids=["first started", "second started"])
def test_requests_outlast_the_restart_of_a_hop(cluster, client, models, index):
    """The process that answers at the old address is another: what it does not hold yet is asked for again."""
    whole = greedy_texts(client, models)
    killed = cluster.programs[index]
    killed.process.kill()
    cluster.restart(killed)
    assert stream_together(cluster.api.url, models) == [whole[model] for model in models]
