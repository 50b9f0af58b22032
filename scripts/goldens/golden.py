"""How a golden is taken: one prompt through Hugging Face transformers in f32, prefill, then greedy decode over the KV cache.

Knows nothing of families, files of weights or GGUF; tiny.py, gguf_tiny.py and real.py call it.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

PROMPT_TOKENS = 64
DECODE_TOKENS = 16
PROMPT_ROWS = 8  # logits are kept for this many last prompt positions


def setup(threads: int) -> None:
    """One deterministic CPU set-up for every script. The thread count may move a last bit, never a token."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def decode(model, prompt: list[int], steps: int, feed_last: bool = True):
    """Prefill `prompt` in one piece, then take `steps` greedy tokens with the KV cache.

    Returns (tokens, prompt logits [len(prompt), V], step logits [steps, V], margins). Step row i is the logits after token i
    was fed; margins[i] is best minus second best where token i was chosen. Ties go to the lowest id (torch.argmax on CPU).
    No generate(): a generation_config may carry a repetition penalty.
    """
    out = model(input_ids=torch.tensor([prompt]), use_cache=True)
    prompt_logits, cache = out.logits[0], out.past_key_values
    last, tokens, rows, margins = prompt_logits[-1], [], [], []
    for step in range(steps):
        best, second = torch.topk(last, 2).values.tolist()
        margins.append(best - second)
        tokens.append(int(torch.argmax(last)))
        if step + 1 == steps and not feed_last:
            break
        out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[0, -1]
        rows.append(last)
    return tokens, prompt_logits, torch.stack(rows) if rows else None, margins


def take(model, prompt: list[int]) -> tuple[dict, torch.Tensor]:
    """The golden of one prompt: its JSON and the [PROMPT_ROWS + DECODE_TOKENS, V] logits."""
    tokens, prompt_logits, step_logits, margins = decode(model, prompt, DECODE_TOKENS)
    logits = torch.cat([prompt_logits[-PROMPT_ROWS:], step_logits]).contiguous()
    whole = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -(PROMPT_ROWS + DECODE_TOKENS):]
    golden = {
        "prompt": prompt,
        "decode": tokens,
        "margins": [round(m, 4) for m in margins],
        "logits_file": "logits.safetensors",
        "rows": f"rows 0..{PROMPT_ROWS}: prompt positions {len(prompt) - PROMPT_ROWS}..{len(prompt)}; row {PROMPT_ROWS} + i: after decode[i] "
        f"was fed at position {len(prompt)} + i. argmax(row {PROMPT_ROWS - 1}) = decode[0], argmax(row {PROMPT_ROWS} + i) = decode[i + 1]",
        "logits_std": round(float(logits.std()), 4),
        "uncached_max_diff": float((whole - logits).abs().max()),
    }
    return golden, logits


def search(model, vocab: int, seed: int, tries: int = 96, first: int | None = None) -> list[int]:
    """Among seeded random prompts, one whose greedy margins are clear and whose tokens vary (random models like to loop)."""
    generator = torch.Generator().manual_seed(seed)
    best, best_score = None, 0.0
    for _ in range(tries):
        prompt = torch.randint(0, vocab, (PROMPT_TOKENS,), generator=generator).tolist()
        if first is not None:
            prompt[0] = first
        tokens, _, _, margins = decode(model, prompt, DECODE_TOKENS, feed_last=False)
        score = min(min(margins), 0.15) + 0.01 * len(set(tokens))
        if min(margins) > 0.04 and score > best_score:
            best, best_score = prompt, score
    assert best is not None, "no prompt with clear margins"
    return best


def write(folder: Path, golden: dict, logits: torch.Tensor) -> None:
    """golden.json on short lines and logits.safetensors beside it."""
    save_file({"logits": logits}, folder / golden["logits_file"])
    write_json(folder / "golden.json", golden)


def write_json(path: Path, value: dict) -> None:
    """One line for each top-level key, so that diffs and eyes can follow. Lists of dicts get a line an entry."""
    def line(key, item):
        text = json.dumps(key) + ": "
        if isinstance(item, list) and item and isinstance(item[0], dict):
            return text + "[\n  " + ",\n  ".join(json.dumps(i, ensure_ascii=False) for i in item) + "\n ]"
        return text + json.dumps(item, ensure_ascii=False)
    path.write_text("{\n " + ",\n ".join(line(k, v) for k, v in value.items()) + "\n}\n", encoding="utf-8")
