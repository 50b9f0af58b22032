"""Tenants and what they have cached: to one that asks what another has asked, no count and no computed row tells of it, unless an operator
put both into a common cache domain. Rows are counted, not times: what is computed is what takes time."""

import itertools

import openai
import pytest
import servers
from servers import wait_until

MODEL, SIBLING = "public/base", "public/shakespeare-top"
TENANTS = ["acme", "blue", "coral"]
PROMPT_TOKENS, ANSWER_TOKENS = 200, 8
# Full pages of 16 tokens before the prompt's last one.
CACHED_TOKENS = 192
COUNTERS = ["prefix_query_tokens", "prefix_hit_tokens", "prefix_cross_model_hit_tokens", "segment_rows"]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """A server with two public models that share blocks."""
    folder = tmp_path_factory.mktemp("isolation")
    for model in (MODEL, SIBLING):
        added = servers.ashlar("zoo", "add", servers.DEMO / model.split("/")[1], "--name", model, "--zoo", folder / "zoo")
        assert added.returncode == 0, added.stderr
    serve = servers.Serve(folder / "zoo", folder / "serve.log", registry=f"file:{folder / 'registry.json'}")
    try:
        serve.api.wait_for_models([MODEL, SIBLING])
        yield serve
    finally:
        serve.terminate()
    assert serve.complaints("the server is closed now") == []


def tenant(serve, *words) -> str:
    done = servers.ashlar("tenant", *words, "--registry", serve.registry)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def clients(serve) -> dict[str, openai.OpenAI]:
    """A client of each tenant, with its key."""
    for name in TENANTS:
        tenant(serve, "add", name)
    keys = {name: tenant(serve, "key", name).strip() for name in TENANTS}
    clients = {name: openai.OpenAI(base_url=f"{serve.api.url}/v1", api_key=key, max_retries=0, timeout=120) for name, key in keys.items()}

    def all_are_known() -> bool:
        try:
            return all(client.models.list() for client in clients.values())
        except openai.AuthenticationError:
            return False

    question = {"model": MODEL, "prompt": "A", "max_tokens": 1}
    wait_until("without a key nobody is let in", lambda: servers.get(f"{serve.api.url}/v1/completions", question)[0] == 401, 20)
    wait_until("every key is known", all_are_known, 20)
    return clients


def prompt(number: int) -> list[int]:
    """A long prompt that begins like no other one."""
    return [(37 * place + 101 * number) % 2000 + 3 for place in range(PROMPT_TOKENS)]


def counters(api) -> dict[str, int]:
    # The engine's numbers are copied when it has nothing else to do.
    wait_until("no sequence runs", lambda: api.metric("ashlar_sequences_running") == 0, 10)
    return {name: int(api.metric(f"ashlar_{name}_total")) for name in COUNTERS}


def ask(serve, client, number: int, model: str = MODEL) -> dict:
    """What a request shows: what its client is told, and by how much each counter moves."""
    before = counters(serve.api)
    parameters = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model=model, prompt=prompt(number), **parameters)
    assert answer.usage.completion_tokens == ANSWER_TOKENS
    moved = {name: count - before[name] for name, count in counters(serve.api).items()}
    return {"text": answer.choices[0].text, "cached": answer.usage.prompt_tokens_details.cached_tokens} | moved


def shown(cached: int, cross_model: int, segments: int, text: str) -> dict:
    """What `ask` returns where so many tokens are cached in all segments."""
    rows = (PROMPT_TOKENS - cached + ANSWER_TOKENS - 1) * segments
    counts = dict(zip(COUNTERS, [PROMPT_TOKENS, cached, cross_model, rows], strict=True))
    return {"text": text, "cached": cached} | counts


def test_a_tenant_cannot_tell_what_another_has_asked(serve, clients):
    acme, blue, coral = (clients[name] for name in TENANTS)
    cold = ask(serve, acme, 1)
    # Where the two models part and meet again a segment ends.
    segments = cold["segment_rows"] // (PROMPT_TOKENS + ANSWER_TOKENS - 1)
    assert segments >= 2
    assert cold == shown(0, 0, segments, cold["text"])
    warm = shown(CACHED_TOKENS, 0, segments, cold["text"])
    assert ask(serve, acme, 1) == warm, "to itself it tells"

    assert ask(serve, blue, 1) == cold, "another tenant sees, and has computed, what who came first did"
    assert ask(serve, blue, 1) == warm, "from then on it has its own"
    assert ask(serve, acme, 1) == warm

    # Nor by a model that shares the lower blocks: what another tenant's request left at the fork is not found.
    by_sibling = ask(serve, coral, 1, SIBLING)
    assert by_sibling == shown(0, 0, segments, by_sibling["text"])
    by_own_sibling = ask(serve, acme, 1, SIBLING)
    assert by_own_sibling["text"] == by_sibling["text"]
    assert 0 < by_own_sibling["cached"] == by_own_sibling["prefix_hit_tokens"] == by_own_sibling["prefix_cross_model_hit_tokens"]
    assert by_own_sibling["segment_rows"] < by_sibling["segment_rows"]


def test_members_of_a_common_domain_share_and_others_do_not(serve, clients):
    numbers = itertools.count(10)
    acme, blue, coral = (clients[name] for name in TENANTS)

    def blue_shares() -> bool:
        number = next(numbers)
        ask(serve, acme, number)
        return ask(serve, blue, number)["cached"] > 0

    assert not blue_shares()
    for name in ["acme", "blue"]:
        tenant(serve, "add", name, "--cache-domain", "coral")
    assert "cache domain coral" in tenant(serve, "list")
    wait_until("both are in the domain", blue_shares, 30)

    number = next(numbers)
    cold = ask(serve, acme, number)
    segments = cold["segment_rows"] // (PROMPT_TOKENS + ANSWER_TOKENS - 1)
    assert cold == shown(0, 0, segments, cold["text"])
    assert ask(serve, blue, number) == shown(CACHED_TOKENS, 0, segments, cold["text"])
    assert ask(serve, coral, number) == cold, "a tenant that is called as the domain is not in it"

    tenant(serve, "add", "blue", "--cache-domain", "")
    wait_until("blue is for itself again", lambda: not blue_shares(), 30)
    number = next(numbers)
    cold = ask(serve, acme, number)
    assert ask(serve, blue, number) == cold
