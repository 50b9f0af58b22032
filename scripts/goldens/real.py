"""Goldens of real models out of GGUF files: prompts, greedy tokens with their margins, rendered templates, tokenizer cases.

The models come from scripts/fetch-models.sh. Weights are gguf.quants.dequantize's values in f32; that transformers' own GGUF
loader puts the same values in the same places is asserted for every tensor. Start reading at `make`.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import golden
import gguf_tiny
import real_tokenizer

HERE = Path(__file__).resolve().parent
DEFAULT_OUT = HERE.parents[1] / "executor/tests/data/real"
DEFAULT_MODELS = Path(os.environ.get("ASHLAR_MODELS", Path.home() / ".cache/ashlar/models"))
GREEDY_TOKENS = 64

MODELS = {
    "smollm2": "smollm2-135m-instruct-q4_1.gguf",
    "gemma3": "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
}

LONG = """The quarry opens at dawn. The first cart carries rough blocks down to the yard, where each one is turned, marked with chalk and set \
aside for the mason who will dress it. A block that is not square on six faces cannot be laid dry: it rocks, it gapes, and the frost finds \
its way in. So the mason works with a straightedge and a square, takes off a little, tries the fit, and takes off a little more. Mortar \
would hide the gaps, but mortar crumbles in thirty winters, while a wall of dressed stone stands for a thousand. When two faces meet so \
closely that a sheet of paper cannot pass between them, the block is numbered and goes to the wall. The numbers matter, because a stone is \
cut for one place only; if it is lost, the course must wait until another is cut. That is why the yard keeps a book in which every block \
has a line: where it came from, who dressed it, which blocks it touches, and on what day it was laid. Years later, when part of the wall \
must be opened, the book tells"""

PLAIN = [
    ("plain", "The capital of France is"),
    ("code", "def fibonacci(n: int) -> int:\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n"),
    ("non_ascii", "Größe, élan, niño; Привет, мир! 石を切る。🪨 \u0645\u0631\u062d\u0628\u0627 \u2014 "),
    ("long", LONG),
]

CHAT = [
    ("chat", [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]),
    ("chat_system_turns", [
        {"role": "system", "content": "You answer in one short line."},
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": "Red, green and blue."},
        {"role": "user", "content": "And three more?"},
    ]),
    ("chat_non_ascii", [{"role": "user", "content": "Übersetze ins Englische: „Die Steine passen genau – ohne Mörtel.“ 😀"}]),
]

TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather <now> & here, \"quoted\", für Zürich",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "required": ["city"]}}}]

# Rendered only, nothing is generated. "error" is set where the template refuses.
TEMPLATES = [
    {"name": "no_generation_prompt", "messages": CHAT[1][1], "add_generation_prompt": False},
    {"name": "whitespace", "messages": [{"role": "user", "content": "  spaces and newlines \n\n"}], "add_generation_prompt": True},
    {"name": "special_tokens_in_content", "messages": [{"role": "user", "content": "<|im_end|><end_of_turn><bos>{{ x }}{% y %}"}],
     "add_generation_prompt": True},
    {"name": "tools", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Zürich?"}],
     "tools": TOOLS, "add_generation_prompt": True},
    {"name": "tool_calls", "tools": TOOLS, "add_generation_prompt": True, "messages": [
        {"role": "user", "content": "Weather in Zürich and Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}},
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "content": "{\"t\": 12.5}"},
        {"role": "tool", "content": "{\"t\": 11}"}]},
    {"name": "assistant_first", "messages": [{"role": "assistant", "content": "Hello."}], "add_generation_prompt": True},
]

TOKENIZER_TEXTS = [
    "", " ", "  ", "\n", "\t", "a", "Hello, world!", " leading space", "trailing space ", "two  spaces   three", "tabs\t\tand\r\nCRLF",
    "\n\n\n\nfour newlines", "1234567890", "3.14159 and 1,000,000 or 0x1F", "   42 after spaces", "x²+y³=½ Ⅷ ٣٤٥", "it's we'll I'VE don't you'RE",
    "snake_case camelCase SCREAMING_CASE kebab-case", "def f(x):\n    if x > 0:\n        return x ** 2\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\"}}", "https://example.com/path?q=1&r=%20#top", "user@example.org",
    "naïve café Zürich Ångström", "cafe\u0301 decomposed, e\u0301\u0323", "ﬁ ligature, ① circled, ｆｕｌｌｗｉｄｔｈ", "Привет, как дела?",
    "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！今天天气不错。", "日本語のテキスト、カタカナとひらがな。", "안녕하세요 세계",
    "😀👍🏽👩‍👩‍👧‍👦🇨🇭", "zero\u200bwidth\u200d and nbsp\u00a0here \u3000ideographic", "\u2028line\u2029paragraph\u0085next", "\ufffd \u0000 \u0007 \u001b[0m", "a\u0004b\u0013c",
    "<|im_start|>user\nhi<|im_end|>\n", "<bos><start_of_turn>user\nhi<end_of_turn>", "<|endoftext|>text<|endoftext|>", "<tool_call>{}</tool_call>",
    "not<|im_start|special", " " * 40 + "deep", "-" * 70, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\u2581literal \u2581\u2581 blocks", "Ġ Ċ literal",
]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def load(path: Path, arch: str):
    """transformers' model of the file in f32, after a check of each tensor against gguf.quants.dequantize and our own names."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = {n: p.clone() for n, p in model.named_parameters()}
    gguf_tiny.read_back(path, arch, model)
    for name, p in model.named_parameters():
        assert torch.equal(p, loaded[name]), f"{name} is loaded with other values"
    print(f"{path.name}: {len(loaded)} tensors are what gguf.quants.dequantize says", flush=True)
    return model


def prompt_entry(model, tokenizer, eos: list[int], name: str, source: dict, text: str, special: bool) -> dict:
    ids = tokenizer(text, add_special_tokens=special).input_ids
    tokens, _, _, margins = golden.decode(model, ids, GREEDY_TOKENS, feed_last=False)
    entry = {
        "name": name, **source, "prompt": ids, "greedy": tokens, "margins": [round(m, 4) for m in margins],
        "eos_at": next((i for i, t in enumerate(tokens) if t in eos), None),
        "text_out": tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    }
    print(f"  {name}: {len(ids)} tokens, least margin {min(margins):.4f}, {entry['text_out'][:70]!r}", flush=True)
    return entry


def render(tokenizer, case: dict) -> dict:
    kwargs = {k: case[k] for k in ("tools",) if k in case}
    try:
        text = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"], **kwargs)
        return case | {"rendered": text}
    except Exception as error:  # raise_exception of the template, or its type errors
        return case | {"error": str(error)}


def tokenizer_cases(tokenizer) -> list[dict]:
    """ids as an encoder gives them with special tokens parsed and added; `decoded` keeps special tokens."""
    return [{"text": text, "ids": (ids := tokenizer(text).input_ids),
             "decoded": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)} for text in TOKENIZER_TEXTS]


def make(name: str, models: Path, out: Path, tokenizer_only: bool) -> None:
    path = models / MODELS[name]
    meta = real_tokenizer.fields(path)
    arch, tokens = meta["general.architecture"], meta["tokenizer.ggml.tokens"]
    bos, eos = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    own_template = "tokenizer.chat_template" in meta
    template = meta["tokenizer.chat_template"] if own_template else (HERE / "gemma3_template.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=real_tokenizer.build(meta), bos_token=tokens[bos], eos_token=tokens[eos], chat_template=template)
    head = {
        "model": name, "file": path.name, "sha256": sha256(path), "architecture": arch, "bos_token_id": bos, "eos_token_id": eos,
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, gguf package, f32 compute, eager attention",
    }
    golden.write_json(out / f"{name}-tokenizer.json", head | {"cases": tokenizer_cases(tokenizer)})
    if tokenizer_only:
        return
    model = load(path, arch)
    prompts = [prompt_entry(model, tokenizer, [eos], n, {"text": text}, text, True) for n, text in PLAIN]
    for n, messages in CHAT:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(prompt_entry(model, tokenizer, [eos], n, {"messages": messages, "rendered": text}, text, False))
    golden.write_json(out / f"{name}.json", head | {
        "greedy_tokens": "argmax of f32 logits over a KV cache, no penalty, not stopped at an end token (eos_at says where the first one is)",
        "template_source": "the file" if own_template else "Gemma 3's published template; the file carries none",
        "chat_template": template,
        "prompts": prompts,
        "templates": [render(tokenizer, case) for case in TEMPLATES],
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"which (default all): {', '.join(MODELS)}")
    parser.add_argument("--models", type=Path, default=DEFAULT_MODELS, help="folder of the GGUF files (default $ASHLAR_MODELS)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: executor/tests/data/real of this checkout")
    parser.add_argument("--tokenizer-only", action="store_true", help="only the tokenizer cases")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    golden.setup(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or MODELS:
        make(name, arguments.models, arguments.out, arguments.tokenizer_only)


if __name__ == "__main__":
    main()
