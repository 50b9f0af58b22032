"""Trains the fine-tunes of bench/finetunes.sh from OUT/base: python finetunes.py --out OUT [--only NAME,...] [--steps N] [--corpora DIR].

Each starts from the base as stored in bf16, is trained with master weights and moments in f32 (AdamW), and is rounded to bf16 once, at the end. What a
method does not train keeps its bytes. Corpora and batches are those of demo/train.py; nothing of a test file is trained on or scored.

OUT/finetunes.json keeps of each: settings, the loss of every step, the loss on held-out text of the base and of what was stored, and what became
of the bits. A folder that is there is kept. Fails where a fine-tune did not learn, or changed what its method leaves alone."""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))
import train as demo  # noqa: E402 (its folder is no package)

State = dict[str, torch.Tensor]

ROW_TOKENS = 256
TOP_LAYERS = 4
RANK, ALPHA = 16, 32
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETAS = (0.9, 0.999)
WARMUP_SHARE = 0.1
GRADIENT_NORM_MAX = 1.0
HELD_OUT_ONE_IN = 20
HELD_OUT_TEXT_CHARS_MAX, HELD_OUT_CHAT_CHARS_MAX = 16_000, 6_000
PAIRS_MAX = 4_000  # of questions and answers to train on: all are encoded before the first step, and no training here needs more
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class FineTune:
    """One training: on what, which weights, and how fast. `rate` is AdamW's at the end of the warm-up; it falls linearly to nothing. A step has
    `rows` windows of ROW_TOKENS, or of chats as many turns as that has room for, padding included, and at least one."""

    corpus: str
    method: str
    rate: float
    weight_decay: float
    steps: int
    rows: int


FINE_TUNES = {
    "full-a": FineTune("novels", "full", 2e-5, 0.0, steps=60, rows=2),
    "full-c": FineTune("requests", "full", 5e-5, 0.01, steps=30, rows=1),
    "lora": FineTune("sums", "lora", 2e-4, 0.0, steps=30, rows=1),
    "top": FineTune("phonemes", "top", 2e-5, 0.0, steps=40, rows=1),
    "full-b": FineTune("sums", "full", 5e-6, 0.0, steps=30, rows=1),
}
# Text of this repository that stands in where the corpora are not at hand.
STAND_INS = {"novels": "docs/*.md", "requests": "router/src/**/*.rs", "sums": "executor/src/**/*.rs", "phonemes": "zoo/src/**/*.rs"}


def chats(corpus: demo.Chat) -> demo.Chat:
    """A corpus's training file alone, cut in two by checksum."""
    held_out = [pair for pair in corpus.train if demo.is_held_out(pair[0], HELD_OUT_ONE_IN)]
    return demo.Chat([pair for pair in corpus.train if not demo.is_held_out(pair[0], HELD_OUT_ONE_IN)], held_out)


def corpus_of(name: str, corpora: Path) -> demo.Text | demo.Chat:
    """What to train on and what to hold out, the latter bounded in characters."""
    if not corpora.is_dir():
        files = sorted(ROOT.glob(STAND_INS[name]))
        corpus = demo.split_text("\n\n".join(file.read_text(encoding="utf-8") for file in files), "\n\n")
    elif name == "novels":
        both = [demo.shakespeare(corpora), demo.botchan(corpora)]
        half = HELD_OUT_TEXT_CHARS_MAX // 2
        corpus = demo.Text("\n\n".join(book.train for book in both), "\n\n".join(book.held_out[:half] for book in both))
    else:
        # The list of phonemes has no test file: it comes cut by checksum.
        corpus = {
            "requests": lambda: chats(demo.assistant(corpora)),
            "sums": lambda: chats(demo.math_problems(corpora)),
            "phonemes": lambda: demo.phonemes(corpora),
        }[name]()
    if isinstance(corpus, demo.Text):
        return demo.Text(corpus.train, corpus.held_out[:HELD_OUT_TEXT_CHARS_MAX])
    chosen, chars = [], 0
    for pair in random.Random(0).sample(corpus.held_out, k=len(corpus.held_out)):
        chars += len(demo.render(*pair))
        if chars > HELD_OUT_CHAT_CHARS_MAX:
            break
        chosen.append(pair)
    return demo.Chat(random.Random(0).sample(corpus.train, k=min(PAIRS_MAX, len(corpus.train))), chosen)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loss_of(model: torch.nn.Module, tokenizer, corpus: demo.Text | demo.Chat) -> float:
    """Nats a learned token of held-out text."""
    return demo.loss_on(model.eval(), demo.held_out_batches(tokenizer, corpus))


def is_trained(method: str, name: str, layers: int) -> bool:
    """Whether a method trains this tensor of the base."""
    if method == "full":
        return True
    if method == "lora":
        return name.split(".")[-2] in PROJECTIONS
    return any(name.startswith(f"model.layers.{layer}.") for layer in range(layers - TOP_LAYERS, layers))


def fit(model: torch.nn.Module, batches: Iterator[demo.Batch], one: FineTune, steps: int, label: str) -> list[float]:
    """Trains whatever requires a gradient. Returns the loss of each step's batch, before the step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    # Norms do not decay, as is usual.
    groups = [{"params": decayed, "weight_decay": one.weight_decay}]
    if rest := [parameter for parameter in trained if parameter.ndim < 2]:
        groups.append({"params": rest, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=one.rate, betas=BETAS, fused=True)
    warmup = max(1, round(steps * WARMUP_SHARE))
    share = lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    curve, began = [], time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM_MAX)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        curve.append(round(loss.item(), 4))
        if step % 10 == 0 or step == steps:
            recent = curve[-10:]
            seconds = (time.monotonic() - began) / step
            print(f"{label}: step {step}/{steps}, loss {sum(recent) / len(recent):.3f}, {seconds:.1f} s a step", file=sys.stderr, flush=True)
    return curve


def ordinals(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers the values of bf16 in their order, so that neighbours differ by one; both zeros are 0."""
    bits = tensor.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def difference(before: State, after: State) -> dict:
    """What became of the bits: shares of all weights by how many units in the last place they moved, root mean squares in f32, and the
    entropy of the moves (bits a weight), which a coder without context cannot go below."""
    steps, change, weight = torch.zeros(1 << 17, dtype=torch.int64), 0.0, 0.0
    same = 0
    for name, old in before.items():
        new = after[name]
        same += demo.same_bytes(old, new)
        steps += torch.bincount((ordinals(new) - ordinals(old)).flatten() + (1 << 16), minlength=1 << 17)
        change += (new.double() - old.double()).square().sum().item()
        weight += old.double().square().sum().item()
    count = steps.sum().item()
    by_size = steps[1 << 16 :].clone()
    by_size[1:] += steps[1 : 1 << 16].flip(0)
    shares = steps[steps > 0].double() / count
    bounds = {"0": (0, 1), "1": (1, 2), "2": (2, 3), "3 to 7": (3, 8), "8 and more": (8, None)}
    return {
        "weights": count,
        "tensors": len(before),
        "tensors_same": same,
        "units_in_the_last_place": {name: round(by_size[low:high].sum().item() / count, 6) for name, (low, high) in bounds.items()},
        "entropy_bits": round(-(shares * shares.log2()).sum().item(), 4),
        "rms_change": (change / count) ** 0.5,
        "rms_weight": (weight / count) ** 0.5,
    }


def write(folder: Path, tensors: State, file: str, beside: Path | None, config: dict | None = None):
    """A folder of one file of weights; what else makes a model is copied from `beside`, or is `config`, of an adapter. There or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in beside.iterdir() if beside else []:
        if path.name != WEIGHTS:
            shutil.copyfile(path, partial / path.name)
    if config:
        demo.write_json(partial / "adapter_config.json", config)
    demo.write_shard(partial / file, tensors)
    partial.rename(folder)


def wrap(base: torch.nn.Module) -> peft.PeftModel:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PROJECTIONS, bias="none", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def write_adapter(folder: Path, model: peft.PeftModel):
    """As PEFT has it, with its factors in bf16."""
    config = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": "ashlar-finetunes/base"}
    config["target_modules"] = sorted(config["target_modules"])  # a set in memory
    factors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in factors.items()}
    write(folder, tensors, ADAPTER, None, json.loads(json.dumps(config, default=lambda value: getattr(value, "value", str(value)))))


def merge(base: Path, adapter: Path, folder: Path):
    """Merges the factors as stored: each weight is the base's plus scale times B A in f32, rounded once."""
    merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    write(folder, demo.stored_state(merged), WEIGHTS, base)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(out: Path, name: str, method: str, layers: int) -> dict:
    """A folder of whole weights against the base, with what its method has to leave alone."""
    before, after = load_file(out / "base" / WEIGHTS), load_file(out / name / WEIGHTS)
    assert before.keys() == after.keys(), f"{name} has other tensors than the base"
    for tensor in before:
        same = demo.same_bytes(before[tensor], after[tensor])
        assert same or is_trained(method, tensor, layers), f"{name}: {tensor} changed, and {method} does not train it"
    return {"sha256": sha256(out / name / WEIGHTS), "bytes": (out / name / WEIGHTS).stat().st_size} | difference(before, after)


def make(name: str, one: FineTune, out: Path, steps: int, seed: int, corpora: Path) -> dict:
    """Trains and writes one, and returns what is to be kept of it by the names of the folders."""
    torch.manual_seed(seed)
    random.seed(f"{seed} {name}")
    tokenizer, corpus = AutoTokenizer.from_pretrained(out / "base"), corpus_of(one.corpus, corpora)
    model = load(out / "base")
    layers = model.config.num_hidden_layers
    before = loss_of(model, tokenizer, corpus)
    print(f"{name}: {before:.4f} nats a held-out token before", file=sys.stderr, flush=True)
    if isinstance(corpus, demo.Chat):
        batches = demo.chat_batches(tokenizer, corpus.train, batch_tokens=one.rows * ROW_TOKENS)
    else:
        batches = demo.text_batches({"": demo.encode_text(tokenizer, corpus)}, {"": 1.0}, one.rows, ROW_TOKENS)
    if one.method == "lora":
        model = wrap(model)
    else:
        for tensor, parameter in model.named_parameters():
            parameter.requires_grad = is_trained(one.method, tensor, layers)
    began = time.process_time()
    curve = fit(model, batches, one, steps, name)
    kept = vars(one) | {"steps": steps, "step_tokens": one.rows * ROW_TOKENS, "seed": seed, "from_repository": not corpora.is_dir()}
    kept |= {"cpu_seconds": round(time.process_time() - began), "versions": versions(), "loss_of_steps": curve, "held_out_before": round(before, 4)}
    if one.method == "lora":
        write_adapter(out / name, model)
        told = {name: kept | {"sha256": sha256(out / name / ADAPTER), "bytes": (out / name / ADAPTER).stat().st_size, "rank": RANK, "alpha": ALPHA}}
        name += "-merged"
        merge(out / "base", out / "lora", out / name)
        kept = {"method": "merged", "from": "lora", "held_out_before": kept["held_out_before"]}
    else:
        write(out / name, demo.stored_state(model), WEIGHTS, out / "base")
        told = {}
    after = loss_of(load(out / name), tokenizer, corpus)
    assert after < before, f"{name} did not learn: {before:.4f} nats before, {after:.4f} after"
    told[name] = kept | {"held_out_after": round(after, 4)} | describe(out, name, one.method, layers)
    return told


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__, "threads": str(torch.get_num_threads())}


def table(told: dict):
    print("| model | trained | on | steps of tokens | rate | held-out loss | moved by 0 units, % | 1 | 2 | 3 to 7 | 8 and more | entropy, bits | tensors as the base's |")
    print("|" + " --- |" * 13)
    for name, one in sorted(told.items()):
        if "entropy_bits" not in one:
            continue
        of = told[one.get("from", name)]
        units = " | ".join(f"{100 * share:.1f}" for share in one["units_in_the_last_place"].values())
        print(
            f"| {name} | {of['method']} | {of['corpus']} | {of['steps']} of {of['step_tokens']} | {of['rate']:g} | {one['held_out_before']:.3f} to {one['held_out_after']:.3f} "
            f"| {units} | {one['entropy_bits']:.2f} | {one['tensors_same']} of {one['tensors']} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(FINE_TUNES), help="names, with commas")
    parser.add_argument("--steps", type=int, help="of each training, in place of its own number")
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared/data/corpora")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - FINE_TUNES.keys():
        parser.error(f"no fine-tune is called {', '.join(sorted(unknown))}: there are {', '.join(FINE_TUNES)}")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error("--steps is at least 1")
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    file = arguments.out / "finetunes.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        one = FINE_TUNES[name]
        folders = [name, f"{name}-merged"] if one.method == "lora" else [name]
        if all(folder in told and (arguments.out / folder).is_dir() for folder in folders):
            continue
        for folder in folders:
            shutil.rmtree(arguments.out / folder, ignore_errors=True)
        told |= make(name, one, arguments.out, arguments.steps or one.steps, arguments.seed, arguments.corpora)
        partial = file.with_suffix(".partial")
        demo.write_json(partial, told)
        partial.rename(file)
    table(told)


if __name__ == "__main__":
    main()
