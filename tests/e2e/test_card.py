"""Serving from a card that is none: the real code that speaks to NVIDIA's driver, over the emulated one. The tokens are the CPU's, also when the card is
lost while it computes them."""

import re
import threading

from asking import CHAT_MODEL, GREEDY, PROMPT, greedy_texts, stream_together
from servers import BINARY, Cluster, Program, Serve, emulated_card, free_port, get, wait_until
from test_loss import all_hold_the_same

TOKENS = 8
LONG_TOKENS = 150
# Of the card: after so many, each of two streams has some tokens.
STEPS = 40
MODELS = ["demo/base", CHAT_MODEL]
# Pages that are few: the card has a gibibyte, of which all that is taken is written.
SMALL = ["--set", "executor.kv_bytes=4194304", "--set", "executor.step_tokens_max=64"]


def test_a_card_serves_the_tokens_of_the_cpu(client, zoo, tmp_path):
    adapted = [model for model in zoo[1] if model.endswith("-lora")][:1]
    models = [*MODELS, *adapted]
    serve = Serve(zoo[0], tmp_path / "serve.log", "--device", "cuda:0", *SMALL, environment=emulated_card(tmp_path))
    try:
        serve.api.wait_for_models(models)
        assert stream_together(serve.api.url, models, TOKENS) == list(greedy_texts(client, models, TOKENS).values())
    finally:
        status = serve.terminate()
    assert (status, serve.complaints()) == (0, [])
    assert "cuda sm_90a Emulated card" in serve.log.read_text()


def test_streams_go_on_elsewhere_when_a_card_is_lost(client, zoo, tmp_path):
    lost = tmp_path / "lost"
    cards = {0: emulated_card(tmp_path, f"lost-when:{lost}")}
    settings = "[placement]\nreplicas = 2"
    cluster = Cluster(zoo[0], tmp_path, executor_count=2, settings=settings, cards=cards)
    try:
        cluster.api.wait_for_models(MODELS)
        on_card, on_cpu = cluster.executors
        wait_until("both executors hold all blocks", lambda: all_hold_the_same(cluster.executors), 60)
        whole = greedy_texts(client, MODELS, LONG_TOKENS)
        asked = MODELS * 2
        steps = on_card.metric("ashlar_step_seconds_count")
        texts: list[str] = []
        streams = threading.Thread(target=lambda: texts.extend(stream_together(cluster.api.url, asked, LONG_TOKENS)))
        streams.start()
        wait_until("the card generates", lambda: on_card.metric("ashlar_step_seconds_count") > steps + STEPS, 30)
        lost.touch()
        streams.join(timeout=120)
        assert texts == [whole[model] for model in asked]
        assert cluster.api.metric("ashlar_sequence_resumes_total") > 0
        assert cluster.api.metric("ashlar_sequences_lost_total") == 0
        ended, router = cluster.programs[1], cluster.programs[-1]
        assert ended.process.wait(10) != 0
        assert router.complaints("lost an executor", "failed to call an executor") == []
        # One line of the log, and where it happened.
        said = ended.complaints("thread 'device' .* panicked at kernels/cuda/")
        assert len(said) == 1 and "ERROR the device thread failed, and ends the process: the card failed at" in said[0], said
        assert "uncorrectable ECC error encountered (CUDA_ERROR_ECC_UNCORRECTABLE)" in said[0], said
    finally:
        cluster.stop()


def test_a_block_that_finds_no_memory_is_named_and_the_server_lives(zoo, tmp_path):
    """Someone else takes the card's memory after the server began: from then on it has no byte to give."""
    address = f"127.0.0.1:{free_port()}"
    command = [BINARY, "serve", "--zoo", zoo[0], "--registry", "memory:", "--listen", address, "--device", "cuda:0", *SMALL]
    serve = Program(command, tmp_path / "serve.log", emulated_card(tmp_path, "full-after:100"))
    try:
        named = r" ERROR failed to host a span .* error=load block \w{64} \(number \d+ of its chain\) .*put `[a-z.]+` on the device, no device memory for \d+ bytes"
        wait_until("each model has a block that does not fit", lambda: len(re.findall(named, serve.log.read_text())) == len(zoo[1]), 30, serve.why_dead)
        assert get(f"http://{address}/health")[0] == 200
    finally:
        status = serve.terminate()
    assert (status, serve.complaints(named)) == (0, [])
