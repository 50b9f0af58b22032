"""The talking half of smoke.sh: a zoo, a server, and the official client: smoke.py GGUF, with ASHLAR_BIN set."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/e2e"))

import asking  # noqa: E402
import openai  # noqa: E402
import servers  # noqa: E402

SMOLLM = "hub/smollm2-135m-instruct"


def talk(client: openai.OpenAI, model: str):
    """Streams one answer to the terminal and tells how fast it came."""
    began, first, tokens = time.monotonic(), 0.0, 0
    print(f"\n{model}:")
    if model in (SMOLLM, asking.CHAT_MODEL):
        stream = client.chat.completions.create(model=model, messages=asking.QUESTION, max_tokens=48, temperature=0, stream=True)
    else:
        stream = client.completions.create(model=model, prompt=asking.PROMPT, max_tokens=48, temperature=0, stream=True)
    for chunk in stream:
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        text = choice.text if hasattr(choice, "text") else choice.delta.content
        if text:
            first = first or time.monotonic() - began
            tokens += 1
            print(text, end="", flush=True)
    seconds = time.monotonic() - began
    print(f"\n  [first text after {first * 1000:.0f} ms, {tokens / max(seconds - first, 1e-9):.0f} pieces/s]")
    assert tokens, f"{model} said nothing"


def main():
    with tempfile.TemporaryDirectory() as scratch:
        zoo = Path(scratch) / "zoo"
        models = [SMOLLM, *servers.make_zoo(zoo)]
        subprocess.run([servers.BINARY, "zoo", "add", sys.argv[1], "--name", SMOLLM, "--zoo", zoo], check=True)
        serve = servers.Serve(zoo, Path(scratch) / "serve.log")
        try:
            serve.api.wait_for_models(models)
            client = openai.OpenAI(base_url=f"{serve.api.url}/v1", api_key="none", max_retries=0)
            listed = sorted(model.id for model in client.models.list())
            assert listed == sorted(models), listed
            for model in models:
                talk(client, model)
            alone = asking.greedy_texts(client, models)
            asked = [models[index % len(models)] for index in range(8)]
            began = time.monotonic()
            together = asking.stream_together(serve.api.url, asked)
            seconds = time.monotonic() - began
            assert together == [alone[model] for model in asked], "a text differs from what its model said alone"
            print(f"\neight streams at once, {len(set(asked))} models: the same texts as alone, {seconds:.1f} s")
            print(f"blocks resident {serve.api.metric('ashlar_blocks_resident'):.0f}, of these shared {serve.api.metric('ashlar_blocks_shared'):.0f}")
        finally:
            status = serve.terminate()
        complaints = serve.complaints()
        assert status == 0 and not complaints, f"exit status {status}, log: {complaints}"


if __name__ == "__main__":
    main()
