"""The official client against `ashlar serve` with the demo family: what it asks for is what it gets."""

import json

import openai
import pytest
from asking import CHAT_MODEL, GREEDY, PROMPT, QUESTION, complete, greedy_texts, stream_together
from servers import get

BASE = "demo/base"


def chat(client, **parameters):
    return client.chat.completions.create(model=CHAT_MODEL, messages=QUESTION, max_tokens=24, **parameters)


def test_models_name_their_family(client, models):
    listed = {model.id: model for model in client.models.list()}
    assert sorted(listed) == models
    assert len(models) >= 6
    for model in listed.values():
        assert model.object == "model"
        assert {"root", "parent"} <= model.model_extra.keys()
    assert listed[BASE].model_extra["parent"] is None
    assert listed[CHAT_MODEL].model_extra["parent"] == BASE
    assert listed[CHAT_MODEL].model_extra["root"] == BASE
    assert client.models.retrieve(BASE).id == BASE


def test_chat(client):
    answer = chat(client, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == CHAT_MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_streamed_chat_says_the_same(client):
    whole = chat(client, **GREEDY).choices[0]
    chunks = list(chat(client, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [whole.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_and_its_usage(client):
    answer = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=20, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


def test_streamed_usage_comes_last(client):
    chunks = list(client.completions.create(model=BASE, prompt=PROMPT, max_tokens=9, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(client.completions.create(model=BASE, prompt=PROMPT, max_tokens=9, stream=True, **GREEDY))
    assert all(chunk.choices for chunk in without)


def test_choices_differ_and_repeat_with_their_seed(client):
    def texts(seed):
        answer = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=24, n=2, seed=seed, temperature=1.0)
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.text for choice in answer.choices]

    first = texts(7)
    assert first[0] != first[1]
    assert texts(7) == first
    assert texts(8) != first


def test_streamed_choices_are_told_apart(client):
    whole = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=12, n=3, seed=5, temperature=1.0)
    streamed = ["", "", ""]
    for chunk in client.completions.create(model=BASE, prompt=PROMPT, max_tokens=12, n=3, seed=5, temperature=1.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_and_is_not_shown(client, stream):
    text = complete(client, BASE, 48)
    # From the middle of a word to the middle of the next, so that it lies across tokens.
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 3]
    answer = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=48, stop=[stop, "\0"], stream=stream, **GREEDY)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_chat_logprobs(client):
    choice = chat(client, logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 24
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace").startswith(choice.message.content[:20])
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
        assert [top.logprob for top in token.top_logprobs] == sorted((top.logprob for top in token.top_logprobs), reverse=True)


def test_completion_logprobs(client):
    choice = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=8, logprobs=2, **GREEDY).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 8
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_bias_forces_a_token(client):
    biased = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=4, logit_bias={"40": 100}, logprobs=1, **GREEDY)
    assert len(set(biased.choices[0].logprobs.tokens)) == 1


def test_sampling_parameters_are_taken(client):
    parameters = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 3}
    more = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    first = complete(client, BASE, 16, **parameters, extra_body=more)
    assert first
    assert complete(client, BASE, 16, **parameters, extra_body=more) == first


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="demo/nobody", messages=QUESTION)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("parameters", "param", "code"),
    [
        ({"temperature": 5}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"n": -1}, "n", "invalid_value"),
        ({"top_p": "much"}, "top_p", "invalid_value"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": 100_000}, "messages", "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_parameter_is_named(client, parameters, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=CHAT_MODEL, messages=QUESTION, **({"max_tokens": 4} | parameters))
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_prompt_over_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="word " * 5000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_eight_streams_at_once_say_what_each_says_alone(server, client, models):
    alone = greedy_texts(client, models)
    asked = [models[index % len(models)] for index in range(8)]
    assert stream_together(server.url, asked) == [alone[model] for model in asked]


def test_tokens_go_there_and_back(server):
    text = "Grüße, 吾輩は猫 \U0001f408, to the end."
    status, body = get(f"{server.url}/tokenize", {"model": BASE, "prompt": text})
    assert status == 200, body
    status, body = get(f"{server.url}/detokenize", {"model": BASE, "tokens": json.loads(body)["tokens"]})
    assert (status, json.loads(body)) == (200, {"prompt": text})


def test_health_and_unknown_routes(server):
    assert get(f"{server.url}/health")[0] == 200
    assert get(f"{server.url}/ready")[0] == 200
    status, body = get(f"{server.url}/v1/nothing")
    assert status == 404 and '"not_found"' in body
