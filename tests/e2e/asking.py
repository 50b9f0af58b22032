"""The questions that several tests ask, with the answers that must not depend on who else is asking."""

import asyncio

import openai

CHAT_MODEL = "demo/assistant-top"
PROMPT = "First Citizen:\n"
QUESTION = [{"role": "user", "content": "what is the weather like in tokyo"}]
# Sampling that always picks the likeliest token, and goes on to the end.
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


def complete(client: openai.OpenAI, model: str, tokens: int = 32, **parameters) -> str:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=tokens, **(GREEDY | parameters))
    return answer.choices[0].text


def greedy_texts(client: openai.OpenAI, models: list[str], tokens: int = 32) -> dict[str, str]:
    """Each model's text, asked one after another."""
    return {model: complete(client, model, tokens) for model in models}


def stream_together(url: str, models: list[str], tokens: int = 32) -> list[str]:
    """The text of one stream for each entry of `models`, all at once."""

    async def one(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.completions.create(model=model, prompt=PROMPT, max_tokens=tokens, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, model) for model in models))

    return asyncio.run(all_of_them())
