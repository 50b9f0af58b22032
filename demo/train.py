#!/usr/bin/env python3
"""Makes the demo family from the corpora: a tokenizer, a base model, its descendants, and every figure about them.

Start reading at STAGES. A stage whose result exists is skipped, so a run that was stopped is resumed by running it again;
delete a model's folder to train that model anew. It must not know Ashlar: it writes ordinary Hugging Face folders.

The rule that everything here serves: a descendant starts from the base *as stored* (rounded to bf16), trains only what its
method names, and is rounded again. What the method does not name therefore keeps its bytes, and a shard of such tensors is
a symlink to the base's shard.
"""

import argparse
import csv
import gzip
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LAYER_COUNT = 8
VOCAB_SIZE = 2048
CONTEXT_TOKENS = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT, _, END_OF_TURN = range(3)
IGNORED = -100  # the label that the loss leaves out

# Written with the key names that every reader of Llama configurations knows, old and new.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": LAYER_COUNT,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT_TOKENS,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Corpora. Each is cut into what is trained on and what is held out; test files are only ever held out.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """Running text: the model learns every token. Held out: the end of the book, which no training window touches."""

    train: str
    held_out: str


@dataclass
class Chat:
    """(question, answer) pairs in the chat template: a fine-tune learns the answer and its end of turn, nothing else.

    `accepted` lists every right answer to a question where an exact match makes sense, and is None where it does not.
    """

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    accepted: dict[str, set[str]] | None = None


def split_text(text: str, separator: str, train_share: float = 0.9) -> Text:
    cut = text.index(separator, int(len(text) * train_share)) + len(separator)
    return Text(train=text[:cut], held_out=text[cut:])


def is_held_out(word: str, one_in: int) -> bool:
    """Splits a word list by content, so that the split survives a reordered file."""
    return zlib.crc32(word.encode()) % one_in == 0


def shakespeare(corpora: Path) -> Text:
    return split_text((corpora / "tinyshakespeare.txt").read_text(encoding="utf-8"), "\n\n")


def botchan(corpora: Path) -> Text:
    """The novel alone, without the header and terms that Project Gutenberg puts around it."""
    text = (corpora / "botchan_en.txt").read_text(encoding="utf-8-sig")
    start, end = text.index("A NOTE BY THE TRANSLATOR"), text.index("End of Project Gutenberg")
    return split_text(text[start:end].strip() + "\n", "\n")


def japanese(corpora: Path) -> Text:
    """The novel alone: no Aozora header and colophon, no readings 《》, no transcriber's notes ［＃］."""
    text = (corpora / "wagahaiwa_nekodearu_ja.txt").read_text(encoding="utf-8")
    body = re.split(r"^-{20,}\n", text, flags=re.MULTILINE)[2].split("\n底本：", 1)[0]
    body = re.sub(r"《[^》]*》|［＃[^］]*］|｜", "", body)
    return split_text(body.strip() + "\n", "\n")


def names(corpora: Path) -> Text:
    """One name a line, in an order of its own: the file's is by popularity, and the rare ones must not be last."""
    words = sorted(set((corpora / "names.txt").read_text().split()), key=lambda word: zlib.crc32(word.encode()))
    kept = [word for word in words if not is_held_out(word, 20)]
    held_out = [word for word in words if is_held_out(word, 20)]
    return Text(train="\n".join(kept) + "\n", held_out="\n".join(held_out) + "\n")


def math_problems(corpora: Path) -> Chat:
    def read(name: str) -> list[tuple[str, str]]:
        with gzip.open(corpora / name, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        # <<48/2=24>> is a note for a calculator that these models do not have.
        return [(row["question"].strip(), re.sub(r"<<[^>]*>>", "", row["answer"]).strip()) for row in rows]

    return Chat(train=read("gsm8k_train.jsonl.gz"), held_out=read("gsm8k_test.jsonl.gz"))


def banking(corpora: Path) -> Chat:
    def read(name: str) -> list[tuple[str, str]]:
        with open(corpora / name, encoding="utf-8", newline="") as rows:
            return [(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(rows)]

    test = read("banking77_test.csv")
    return Chat(read("banking77_train.csv"), test, accepted={text: {intent} for text, intent in test})


def phonemes(corpora: Path) -> Chat:
    """Spelled words and how they are said. They are spelled out because the pieces of the vocabulary hide the letters."""
    said: dict[str, list[str]] = {}
    with gzip.open(corpora / "cmudict.dict.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            word, pronunciation = line.split("#")[0].strip().split(" ", 1)
            word = re.sub(r"\(\d+\)$", "", word)
            if re.fullmatch("[a-z]{2,12}", word):
                said.setdefault(" ".join(word), []).append(pronunciation)
    kept = [(word, ways[0]) for word, ways in said.items() if not is_held_out(word, 20)]
    held_out = [(word, ways[0]) for word, ways in said.items() if is_held_out(word, 20)]
    return Chat(kept, held_out, accepted={word: set(said[word]) for word, _ in held_out})


def assistant(corpora: Path) -> Chat:
    """One assistant for three kinds of question: sums, banking, and the everyday requests of CLINC150."""

    def topic(pair: tuple[str, str]) -> tuple[str, str]:
        text, intent = pair
        if intent == "oos":
            return text, "I am sorry, I cannot help with that."
        return text, f"You are asking about {intent.replace('_', ' ').lower()}."

    with gzip.open(corpora / "clinc_oos_full.json.gz", "rt", encoding="utf-8") as file:
        clinc = json.load(file)
    sums, bank = math_problems(corpora), banking(corpora)
    train = [topic(pair) for pair in clinc["train"] + clinc["oos_train"] + bank.train]
    held_out = [topic(pair) for pair in clinc["test"] + clinc["oos_test"] + bank.held_out]
    return Chat(train=train + sums.train[:2500], held_out=held_out + sums.held_out[:500])


CORPORA: dict[str, Callable[[Path], Text | Chat]] = {
    "shakespeare": shakespeare,
    "botchan": botchan,
    "math": math_problems,
    "banking": banking,
    "phonemes": phonemes,
    "japanese": japanese,
    "names": names,
    "assistant": assistant,
}

# What a window of the base's training is drawn from. Two books for the most part. The chat corpora are there in small
# shares because most methods freeze the embedding: a token that the base had never seen would keep a random embedding
# in every descendant. Japanese, names and CLINC150 are left for the fine-tunes to bring.
BASE_MIX = {"shakespeare": 0.50, "botchan": 0.20, "math": 0.18, "banking": 0.06, "phonemes": 0.06}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer.
# ---------------------------------------------------------------------------------------------------------------------


def render(question: str, answer: str | None = None) -> str:
    """CHAT_TEMPLATE for one turn; `make_base` asserts that the two agree."""
    opened = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return opened if answer is None else f"{opened}{answer}<|im_end|>\n"


def sample_text(corpus: Text | Chat, chars_max: int) -> str:
    """Training text of a corpus, bounded: chat corpora as plain lines, since special tokens are not to be merged."""
    if isinstance(corpus, Text):
        return corpus.train[:chars_max]
    pairs = random.Random(0).sample(corpus.train, k=len(corpus.train))
    return "\n".join(f"{question}\n{answer}" for question, answer in pairs)[:chars_max]


def make_tokenizer(work: "Work") -> None:
    """Byte-level BPE. Digits stand alone, so that a small model sees a number's places; any bytes can be encoded.

    The share of Japanese is small on purpose: common kana become one token and most kanji stay two or three, so that a
    stream of Japanese regularly cuts a character between tokens, which is what a server must get right.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chars = {"shakespeare": 1_200_000, "botchan": 300_000, "math": 400_000, "banking": 200_000, "phonemes": 100_000}
    chars |= {"japanese": 80_000, "assistant": 150_000}
    bpe.train_from_iterator([sample_text(work.corpus(name), count) for name, count in chars.items()], trainer)
    assert bpe.get_vocab_size() == VOCAB_SIZE
    assert [bpe.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]

    folder = work.out / "base"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
                for index, token in enumerate(SPECIAL_TOKENS)
            },
            "bos_token": None,
            "eos_token": SPECIAL_TOKENS[END_OF_TEXT],
            "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT_TOKENS,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    bpe.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Folders: which tensor lies in which shard, and which block it belongs to.
# ---------------------------------------------------------------------------------------------------------------------


def shard_of(tensor: str) -> str:
    """Shards are cut where the methods cut, so that a method rewrites whole shards and leaves the others as links."""
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    if not layer:
        return {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm"}[tensor] + ".safetensors"
    if tensor.endswith(".bias"):
        part = "biases"
    elif ".self_attn." in tensor or ".input_layernorm." in tensor:
        part = "attention"
    else:
        part = "feed-forward"
    return f"layer-{int(layer[1]):02}-{part}.safetensors"


def blocks_of(tensor: str) -> list[str]:
    """The blocks that use a tensor: each owns the norm in front of it, and the tied embedding is in two."""
    if tensor == "model.embed_tokens.weight":
        return ["embed", "head"]
    if tensor == "model.norm.weight":
        return ["head"]
    layer = re.search(r"\.layers\.(\d+)\.", tensor)[1]
    of_attention = ".self_attn." in tensor or ".input_layernorm." in tensor
    return [f"attention {layer}" if of_attention else f"feed_forward {layer}"]


def stored_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors to store: bf16, the tied embedding once. Rounding a value that is already bf16 changes no bit."""
    return {
        name: tensor.detach().to(torch.bfloat16).contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def load_stored(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard: load_file(folder / shard) for shard in sorted(set(index.values()))}
    return {name: shards[shard][name] for name, shard in index.items()}


def load_for_training(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(folder: Path, state: dict[str, torch.Tensor], base: Path | None, generation: dict, card: str) -> None:
    """Writes a sharded folder; whatever equals the base's is a relative link to it. The index comes last: it marks
    the folder as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    base_state = load_stored(base) if base else {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        shards.setdefault(shard_of(name), {})[name] = tensor
    for shard, tensors in shards.items():
        if base and all(same_bytes(tensor, base_state[name]) for name, tensor in tensors.items()):
            link(folder / shard, base / shard)
        else:
            write_shard(folder / shard, tensors)
    if base:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            link(folder / name, base / name)
    else:
        write_json(folder / "config.json", CONFIG)
    ends = {"eos_token_id": [END_OF_TEXT, END_OF_TURN], "pad_token_id": END_OF_TEXT}
    write_json(folder / "generation_config.json", ends | generation)
    (folder / "README.md").write_text(card, encoding="utf-8")
    index = folder / "model.safetensors.index.json"
    if base:
        assert state.keys() == base_state.keys()
        link(index, base / index.name)
    else:
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        weight_map = {name: shard_of(name) for name in sorted(state)}
        write_json(index, {"metadata": {"total_size": size_bytes}, "weight_map": weight_map})


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.unlink(missing_ok=True)  # never through a link into the base
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


# ---------------------------------------------------------------------------------------------------------------------
# Training.
# ---------------------------------------------------------------------------------------------------------------------

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both [rows, tokens]


def encode_text(tokenizer, corpus: Text | Chat) -> torch.Tensor:
    """Everything to train on as one line of tokens; the turns of a chat corpus are documents of their own."""
    text = corpus.train
    if isinstance(corpus, Chat):
        pairs = random.Random(0).sample(corpus.train, k=len(corpus.train))
        text = "".join(render(*pair) + "<|endoftext|>" for pair in pairs)
    return torch.tensor(tokenizer.encode(text), dtype=torch.long)


def text_batches(lines: dict[str, torch.Tensor], shares: dict[str, float], rows: int, tokens: int) -> Iterator[Batch]:
    """Windows from random places, without end; each row draws its corpus first."""
    while True:
        picked = random.choices(list(shares), weights=shares.values(), k=rows)
        starts = [random.randrange(len(lines[name]) - tokens) for name in picked]
        ids = torch.stack([lines[name][start : start + tokens] for name, start in zip(picked, starts)])
        yield ids, ids


def encode_pair(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids and labels of one turn; the question is read, not learned."""
    asked = tokenizer.encode(render(question))
    answered = tokenizer.encode(answer + "<|im_end|>")
    return asked + answered, [IGNORED] * len(asked) + answered


def pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    """Pads on the right, where causal attention cannot see it."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [END_OF_TEXT] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def chat_batches(tokenizer, pairs: list[tuple[str, str]], batch_tokens: int) -> Iterator[Batch]:
    """Batches of about `batch_tokens`, without end. Rows of like length go together, in pools, so that little is padding."""
    rows = [encode_pair(tokenizer, *pair) for pair in pairs]
    rows = [row for row in rows if len(row[0]) <= CONTEXT_TOKENS]
    pool_rows = 1024
    while True:
        random.shuffle(rows)
        for start in range(0, len(rows), pool_rows):
            pool = sorted(rows[start : start + pool_rows], key=lambda row: len(row[0]))
            batches, batch = [], []
            for row in pool:
                if batch and (len(batch) + 1) * len(row[0]) > batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(row)
            batches.append(batch)
            random.shuffle(batches)
            yield from map(pad, batches)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices (Jordan et al., 2024), scaled so that AdamW's rates fit.

    150 steps of the base's mix reach a loss of 4.25 with it and of 5.15 with the better of two AdamW rates. torch.optim.Muon
    is not used: it iterates in bf16 and matrix by matrix, which takes 2.6 times as long on a CPU without bf16 products.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.05})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = []
                for parameter in parameters:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["momentum"])
                    directions.append(parameter.grad.lerp(mean, group["momentum"]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, direction in zip(parameters, self.orthogonal(torch.stack(directions))):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    @staticmethod
    def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz iterations bring every singular value near to one."""
        wide = matrices.shape[-2] <= matrices.shape[-1]
        x = matrices if wide else matrices.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide else x.mT


def fit(model: torch.nn.Module, batches: Iterator[Batch], steps: int, lr: float, label: str) -> None:
    """Trains whatever requires a gradient: whole matrices by Muon; embedding, vectors and LoRA factors by AdamW."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "embed" not in name and "lora_" not in name]
    rest = [p for p in trained.values() if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=lr))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    warmup = max(10, steps // 20)

    def share_of_rate(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / (steps - warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate) for optimizer in optimizers]
    model.train()
    began, seen_tokens, recent = time.monotonic(), 0, []
    for step in range(steps):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in schedules:
            schedule.step()
        seen_tokens += ids.numel()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds, mean = time.monotonic() - began, sum(recent) / len(recent)
            print(f"{label}: step {step + 1}/{steps} loss {mean:.3f} {seen_tokens / seconds:.0f} tokens/s", flush=True)
            recent = []


# ---------------------------------------------------------------------------------------------------------------------
# Methods: how a descendant differs from the base. Each takes the base in f32 and gives the state to store.
# ---------------------------------------------------------------------------------------------------------------------

Fit = Callable[[torch.nn.Module], None]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Select:
    """Trains the tensors whose name the pattern finds and freezes all others, norms and embedding included."""

    pattern: str

    def tune(self, base: LlamaForCausalLM, fit_it: Fit) -> State:
        for name, parameter in base.named_parameters():
            parameter.requires_grad = bool(re.search(self.pattern, name))
        fit_it(base)
        return stored_state(base)


@dataclass(frozen=True)
class Lora:
    """LoRA on the named projections of the given layers."""

    rank: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def wrap(self, base: LlamaForCausalLM) -> peft.PeftModel:
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            lora_dropout=0.0,
            target_modules=list(self.targets),
            layers_to_transform=list(self.layers),
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base, config)
        model.peft_config["default"].base_model_name_or_path = "ashlar-demo/base"  # not the folder it was read from
        return model

    @property
    def pattern(self) -> str:
        layers, targets = "|".join(map(str, self.layers)), "|".join(self.targets)
        return rf"\.layers\.({layers})\..*\.({targets})\.weight$"

    def tune(self, base: LlamaForCausalLM, fit_it: Fit) -> State:
        """Trains the adapter and merges it: what is stored is an ordinary model."""
        model = self.wrap(base)
        fit_it(model)
        return stored_state(model.merge_and_unload())


ALL_LAYERS = tuple(range(LAYER_COUNT))
GREEDY = {"do_sample": False, "max_new_tokens": 256}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "max_new_tokens": 256}


@dataclass(frozen=True)
class Descendant:
    """One model of the family but the base. `changes` is the sentence for its card."""

    corpus: str
    method: Select | Lora
    steps: int
    lr: float
    generation: dict
    prompts: tuple[str, ...]
    changes: str
    merged: bool = True


DESCENDANTS: dict[str, Descendant] = {
    "shakespeare-top": Descendant(
        corpus="shakespeare",
        method=Select(r"\.layers\.[67]\."),
        steps=250,
        lr=4e-3,
        generation=SAMPLED,
        prompts=("KING RICHARD:\n", "ROMEO:\n"),
        changes="the top two layers were trained (matrices, biases and norms of layers 6 and 7); all else is frozen",
    ),
    "banking-bias": Descendant(
        corpus="banking",
        method=Select(r"\.bias$"),
        steps=350,
        lr=3e-2,
        generation=GREEDY,
        prompts=("Can I top up my account with a cheque?", "How do I change my PIN?"),
        changes="the biases of every layer were trained and nothing else (BitFit)",
    ),
    "phonemes-attention": Descendant(
        corpus="phonemes",
        method=Select(r"\.self_attn\.[qkvo]_proj\.weight$"),
        steps=400,
        lr=6e-3,
        generation=GREEDY,
        prompts=("m a s o n r y", "t e n a n t"),
        changes="the attention matrices q, k, v, o of every layer were trained; biases and norms are frozen with the rest",
    ),
    "math-lora": Descendant(
        corpus="math",
        method=Lora(rank=8, targets=("q_proj", "v_proj"), layers=(4, 5, 6, 7)),
        steps=200,
        lr=5e-3,
        generation=GREEDY,
        prompts=("Tom has 3 boxes with 4 apples in each box. He eats 2 apples. How many apples are left?",),
        changes="LoRA of rank 8 on q_proj and v_proj of the upper four layers was trained and merged into those eight matrices",
    ),
    "japanese-full": Descendant(
        corpus="japanese",
        method=Select(""),
        steps=400,
        lr=1e-2,
        generation=SAMPLED,
        prompts=("吾輩は", "主人は"),
        changes="every tensor was trained",
    ),
    "names-lora": Descendant(
        corpus="names",
        method=Lora(rank=4, targets=("q_proj", "v_proj", "up_proj", "down_proj"), layers=ALL_LAYERS),
        steps=150,
        lr=5e-3,
        generation=SAMPLED,
        prompts=("emma\n", "oliver\nmia\n"),
        changes="LoRA of rank 4 on q_proj, v_proj, up_proj and down_proj of every layer, kept as a PEFT adapter",
        merged=False,
    ),
    "assistant-top": Descendant(
        corpus="assistant",
        method=Select(r"\.layers\.[567]\."),
        steps=350,
        lr=4e-3,
        generation=GREEDY,
        prompts=("where should i go for food tonight", "My card was swallowed by the machine!"),
        changes="the top three layers were trained (matrices, biases and norms of layers 5 to 7); all else is frozen",
    ),
}


BASE_SHORT_STEPS = 1000
BASE_LONG_STEPS = 150
BASE_LR = 1.2e-2
BASE_PROMPTS = ("First Citizen:\n", "I went to the school and")


def make_base(work: "Work") -> None:
    """From nothing, on windows of 256 tokens and, for the last part, of the whole context."""
    tokenizer = work.tokenizer()
    message = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == render("a")
    torch.manual_seed(work.seed)
    random.seed(work.seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float()
    lines = {name: encode_text(tokenizer, work.corpus(name)) for name in BASE_MIX}

    def batches() -> Iterator[Batch]:
        short = text_batches(lines, BASE_MIX, rows=8, tokens=256)
        for _ in range(BASE_SHORT_STEPS):
            yield next(short)
        yield from text_batches(lines, BASE_MIX, rows=4, tokens=CONTEXT_TOKENS)

    fit(model, batches(), BASE_SHORT_STEPS + BASE_LONG_STEPS, BASE_LR, label="base")
    write_model(work.out / "base", stored_state(model), None, SAMPLED, base_card())


def make_descendant(name: str, work: "Work") -> None:
    one, base_folder, folder = DESCENDANTS[name], work.out / "base", work.out / name
    torch.manual_seed(work.seed)
    random.seed(f"{work.seed} {name}")
    tokenizer, corpus, base = work.tokenizer(), work.corpus(one.corpus), load_for_training(base_folder)
    if isinstance(corpus, Chat):
        batches = chat_batches(tokenizer, corpus.train, batch_tokens=2048)
    else:
        batches = text_batches({"": encode_text(tokenizer, corpus)}, {"": 1.0}, rows=8, tokens=256)

    def fit_it(model: torch.nn.Module) -> None:
        fit(model, batches, one.steps, one.lr, label=name)

    if not one.merged:
        write_adapter(folder, one, base, fit_it, descendant_card(name))
        return
    before, state = load_stored(base_folder), one.method.tune(base, fit_it)
    for tensor in before:
        trained = bool(re.search(one.method.pattern, tensor))
        assert same_bytes(before[tensor], state[tensor]) != trained, f"{name}: {tensor} trained={trained}"
    write_model(folder, state, base_folder, one.generation, descendant_card(name))


def write_adapter(folder: Path, one: Descendant, base: LlamaForCausalLM, fit_it: Fit, card: str) -> None:
    model = one.method.wrap(base)
    fit_it(model)
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part, save_embedding_layers=False)
    weights = load_file(part / "adapter_model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((part / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in memory: sorted, the file is the same each time
    write_json(folder / "adapter_config.json", config)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_shard(folder / "adapter_model.safetensors", weights)
    shutil.rmtree(part)


# ---------------------------------------------------------------------------------------------------------------------
# Figures: what the folders, loaded as anyone would load them, are worth and share.
# ---------------------------------------------------------------------------------------------------------------------

HELD_OUT_TOKENS_MAX = 12_000
EXACT_MATCH_ROWS = 256


def load_finished(work: "Work", name: str) -> torch.nn.Module:
    """The stored weights in f32 arithmetic, with no training left to do."""
    if name == "base" or DESCENDANTS[name].merged:
        return AutoModelForCausalLM.from_pretrained(work.out / name, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(work.out / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, work.out / name).float().eval()


def held_out_batches(tokenizer, corpus: Text | Chat) -> list[Batch]:
    """At most HELD_OUT_TOKENS_MAX tokens: windows of 256 from the start of a held-out text, or a fixed draw of turns."""
    if isinstance(corpus, Text):
        ids = torch.tensor(tokenizer.encode(corpus.held_out)[:HELD_OUT_TOKENS_MAX])
        windows = ids[: len(ids) // 256 * 256].view(-1, 256)
        return [(batch, batch) for batch in windows.split(8)]
    rows, tokens = [], 0
    for pair in random.Random(0).sample(corpus.held_out, k=len(corpus.held_out)):
        row = encode_pair(tokenizer, *pair)
        tokens += len(row[0])
        if tokens > HELD_OUT_TOKENS_MAX:
            break
        rows.append(row)
    rows.sort(key=lambda row: len(row[0]))
    return [pad(rows[start : start + 16]) for start in range(0, len(rows), 16)]


@torch.inference_mode()
def loss_on(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Nats for each learned token."""
    total, count = 0.0, 0
    for ids, labels in batches:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += (labels[:, 1:] != IGNORED).sum().item()
    return total / count


@torch.inference_mode()
def exact_match(model: torch.nn.Module, tokenizer, corpus: Chat) -> float:
    """Share of held-out questions whose greedy answer is one of the right ones."""
    questions = random.Random(0).sample(sorted(corpus.accepted), k=EXACT_MATCH_ROWS)
    right = 0
    for start in range(0, len(questions), 64):
        batch = questions[start : start + 64]
        asked = tokenizer([render(question) for question in batch], padding=True, padding_side="left", return_tensors="pt")
        made = model.generate(**asked, do_sample=False, max_new_tokens=48, eos_token_id=END_OF_TURN, pad_token_id=END_OF_TEXT)
        answers = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() in corpus.accepted[question] for question, answer in zip(batch, answers))
    return right / len(questions)


def measure_losses(work: "Work") -> None:
    tokenizer = work.tokenizer()
    held_out = {name: held_out_batches(tokenizer, work.corpus(name)) for name in CORPORA}
    losses: dict[str, dict[str, float]] = {}
    matches: dict[str, dict[str, float]] = {}
    for model_name in ["base", *DESCENDANTS]:
        model = load_finished(work, model_name)
        losses[model_name] = {name: round(loss_on(model, batches), 4) for name, batches in held_out.items()}
        for name in ("banking", "phonemes"):
            if model_name == "base" or DESCENDANTS[model_name].corpus == name:
                matches.setdefault(name, {})[model_name] = round(exact_match(model, tokenizer, work.corpus(name)), 4)
        print(f"losses: {model_name} {losses[model_name]}", flush=True)
    tokens = {
        name: sum((labels[:, 1:] != IGNORED).sum().item() for _, labels in batches) for name, batches in held_out.items()
    }
    write_json(
        work.out / "losses.json",
        {
            "unit": "nats per learned token of held-out data; stored weights, f32 arithmetic",
            "learned_tokens": tokens,
            "loss": losses,
            "exact_match_rows": EXACT_MATCH_ROWS,
            "exact_match": matches,
        },
    )


def sharing_with_base(work: "Work", name: str) -> dict:
    """Compares bytes. A block is shared when all of its tensors are, and no adapter lies on it."""
    folder, before = work.out / name, load_stored(work.out / "base")
    blocks = list(dict.fromkeys(block for tensor in sorted(before) for block in blocks_of(tensor)))
    adapted: set[str] = set()
    after = before
    if DESCENDANTS[name].merged:
        after = load_stored(folder)
    else:
        adapted = {block for tensor in load_file(folder / "adapter_model.safetensors") for block in blocks_of(tensor)}
    assert before.keys() == after.keys()
    changed_tensors = {tensor for tensor in before if not same_bytes(before[tensor], after[tensor])}
    changed = {block for tensor in changed_tensors for block in blocks_of(tensor)}
    own_files = [file for file in folder.glob("*.safetensors") if not file.is_symlink()]
    return {
        "blocks_shared": len(set(blocks) - changed - adapted),
        "blocks_changed": len(changed),
        "blocks_adapted": len(adapted),
        "changed": sorted(changed, key=block_order),
        "adapted": sorted(adapted, key=block_order),
        "tensors_shared": len(before) - len(changed_tensors),
        "tensors_changed": len(changed_tensors),
        "own_weight_bytes": sum(file.stat().st_size for file in own_files),
    }


def block_order(block: str) -> tuple[int, str]:
    """The order of the chain."""
    kind, _, layer = block.partition(" ")
    return {"embed": -1, "head": LAYER_COUNT}.get(kind, int(layer or 0)), kind


def measure_sharing(work: "Work") -> None:
    base = load_stored(work.out / "base")
    blocks = {block for tensor in base for block in blocks_of(tensor)}
    write_json(
        work.out / "sharing.json",
        {
            "base": {
                "blocks": len(blocks),
                "tensors": len(base),
                "parameters": sum(tensor.numel() for tensor in base.values()),
                "weight_bytes": sum(file.stat().st_size for file in (work.out / "base").glob("*.safetensors")),
            },
            "descendants": {name: sharing_with_base(work, name) for name in DESCENDANTS},
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Prose: the models' cards, and the tables and samples of README.md.
# ---------------------------------------------------------------------------------------------------------------------

CREDITS = {
    "shakespeare": "Tiny Shakespeare (karpathy/char-rnn, MIT; the plays are in the public domain).",
    "botchan": (
        "*Botchan* by Natsume Sōseki, translated by Yasotaro Morri, 1919: Project Gutenberg eBook 8868, without its "
        "header and terms (in the public domain in most countries; terms of the eBook at www.gutenberg.org)."
    ),
    "math": (
        "GSM8K, training split (openai/grade-school-math, MIT), without calculator notes. "
        "Cobbe et al., *Training Verifiers to Solve Math Word Problems*, 2021."
    ),
    "banking": (
        "BANKING77, training split (PolyAI-LDN/task-specific-datasets), © PolyAI, licensed under "
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/); white space was normalised. "
        "Casanueva et al., *Efficient Intent Detection with Dual Sentence Encoders*, 2020."
    ),
    "phonemes": (
        "CMUdict (cmusphinx/cmudict, © Carnegie Mellon University, BSD-2-Clause style); "
        "words spelled out, first pronunciations."
    ),
    "japanese": (
        "*Wagahai wa neko de aru* (吾輩は猫である) by Natsume Sōseki, Aozora Bunko's edition, without readings and notes "
        "(in the public domain in most countries)."
    ),
    "names": "names.txt (karpathy/makemore, MIT).",
    "clinc": (
        "CLINC150, training split (clinc/oos-eval), © Clinc, Inc., licensed under "
        "[CC BY 3.0](https://creativecommons.org/licenses/by/3.0/); intents were put into sentences. "
        "Larson et al., *An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction*, 2019."
    ),
}


def card(title: str, front: str, body: str, corpora: list[str]) -> str:
    credits = "\n".join(f"- {CREDITS[name]}" for name in corpora)
    return (
        f"---\nlicense: apache-2.0\n{front}---\n\n# {title}\n\n{body}\n\n"
        f"Made by [`train.py`](../train.py); measured in the [family's README](../README.md). A model of two million "
        f"parameters shows how serving works; it does not give advice.\n\n"
        f"## Trained on\n\n{credits}\n\nThe weights are under the repository's licence; the corpora keep theirs.\n"
    )


def base_card() -> str:
    body = (
        f"A Llama of {LAYER_COUNT} layers with biases, a byte-level vocabulary of {VOCAB_SIZE} tokens and a context of "
        f"{CONTEXT_TOKENS} tokens, trained from nothing on the corpora below. The other models of the family start from it."
    )
    return card("ashlar-demo/base", "library_name: transformers\npipeline_tag: text-generation\n", body, list(BASE_MIX))


def descendant_card(name: str) -> str:
    one = DESCENDANTS[name]
    own = ["clinc", "banking", "math"] if one.corpus == "assistant" else [one.corpus]
    corpora = own + [corpus for corpus in BASE_MIX if corpus not in own]
    front = "base_model: ashlar-demo/base\npipeline_tag: text-generation\n"
    front += "library_name: transformers\n" if one.merged else "library_name: peft\n"
    what = "A fine-tune of `ashlar-demo/base`" if one.merged else "A LoRA adapter for `ashlar-demo/base`"
    of = {"assistant": "CLINC150, BANKING77 and GSM8K"}.get(one.corpus, f"the corpus `{one.corpus}`")
    body = f"{what} on {of}: {one.changes}."
    if one.merged:
        body += " Shards that equal the base's are links to them."
    return card(f"ashlar-demo/{name}", front, body, corpora)


def losses_table(work: "Work") -> str:
    figures = json.loads((work.out / "losses.json").read_text())
    lines = [
        "| model | held-out corpus | loss before | loss after | exact match before | after |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, one in DESCENDANTS.items():
        before, after = (figures["loss"][model][one.corpus] for model in ("base", name))
        match = figures["exact_match"].get(one.corpus)
        shares = f"{match['base']:.1%} | {match[name]:.1%}" if match else "|"
        lines.append(f"| `{name}` | {one.corpus} | {before:.3f} | {after:.3f} | {shares} |")
    return "\n".join(lines)


def all_losses_table(work: "Work") -> str:
    losses = json.loads((work.out / "losses.json").read_text())["loss"]
    lines = ["| model | " + " | ".join(CORPORA) + " |", "| --- |" + " ---: |" * len(CORPORA)]
    for model, row in losses.items():
        lines.append(f"| `{model}` | " + " | ".join(f"{row[name]:.2f}" for name in CORPORA) + " |")
    return "\n".join(lines)


def sharing_table(work: "Work") -> str:
    figures = json.loads((work.out / "sharing.json").read_text())
    lines = [
        "| model | method | blocks shared | changed | adapted | tensors shared | changed | weights of its own |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in figures["descendants"].items():
        blocks = f"{row['blocks_shared']} | {row['blocks_changed']} | {row['blocks_adapted']}"
        tensors = f"{row['tensors_shared']} | {row['tensors_changed']}"
        own = f"{row['own_weight_bytes'] / 1e6:.2f} MB"
        lines.append(f"| `{name}` | {DESCENDANTS[name].changes} | {blocks} | {tensors} | {own} |")
    base = figures["base"]
    lines.append(
        f"\nThe base has {base['blocks']} blocks, {base['tensors']} tensors, {base['parameters']:,} parameters "
        f"and {base['weight_bytes'] / 1e6:.2f} MB of weights."
    )
    return "\n".join(lines)


def continued(model: torch.nn.Module, tokenizer, text: str, seed: int, generation: dict, tokens_max: int) -> str:
    asked = tokenizer(text, return_tensors="pt")
    torch.manual_seed(seed)
    ends = {"eos_token_id": [END_OF_TEXT, END_OF_TURN], "pad_token_id": END_OF_TEXT}
    made = model.generate(**asked, **(generation | ends | {"max_new_tokens": tokens_max}))
    text = tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.rstrip("\ufffd\n ")  # the last character may be cut between its bytes


@torch.inference_mode()
def samples(work: "Work") -> str:
    """What each model says, with its own generation defaults; a text is continued, a question is answered."""
    tokenizer, parts = work.tokenizer(), []
    for name in ["base", *DESCENDANTS]:
        model = load_finished(work, name)
        one = DESCENDANTS.get(name)
        prompts, generation = (one.prompts, one.generation) if one else (BASE_PROMPTS, SAMPLED)
        said = []
        for index, prompt in enumerate(prompts):
            seed = work.seed + index
            if one and isinstance(work.corpus(one.corpus), Chat):
                said.append(f"> {prompt}\n" + continued(model, tokenizer, render(prompt), seed, generation, 160))
            else:
                line_end = "\n" if prompt.endswith("\n") else ""
                text = continued(model, tokenizer, prompt, seed, generation, 72)
                said.append(f"[{prompt.rstrip()}]{line_end}{text}")
        parts.append(f"`{name}`\n\n```text\n" + "\n\n".join(said) + "\n```")
    return "\n\n".join(parts)


def write_report(work: "Work") -> None:
    """Puts fresh tables and samples between the marks of README.md, which is otherwise written by hand."""
    readme = work.out / "README.md"
    text = readme.read_text(encoding="utf-8")
    for part in (losses_table, all_losses_table, sharing_table, samples):
        mark = part.__name__.replace("_", "-")
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"README.md has no mark {mark}"
        fresh = part(work)
        text = pattern.sub(lambda match: f"{match[1]}\n{fresh}\n\n{match[2]}", text)
    readme.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Stages.
# ---------------------------------------------------------------------------------------------------------------------


class Work:
    """What the stages share: where things are, the seed, and the corpora read so far."""

    def __init__(self, corpora: Path, out: Path, seed: int) -> None:
        self.corpora, self.out, self.seed = corpora, out, seed
        self._read: dict[str, Text | Chat] = {}

    def corpus(self, name: str) -> Text | Chat:
        if name not in self._read:
            self._read[name] = CORPORA[name](self.corpora)
        return self._read[name]

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.out / "base")


@dataclass(frozen=True)
class Stage:
    """`result` is written last by `make` and marks the stage as done; None is for what is always made afresh."""

    make: Callable[[Work], None]
    result: str | None


def descendant_stage(name: str) -> Stage:
    result = "model.safetensors.index.json" if DESCENDANTS[name].merged else "adapter_model.safetensors"
    return Stage(lambda work: make_descendant(name, work), f"{name}/{result}")


STAGES: dict[str, Stage] = {
    "tokenizer": Stage(make_tokenizer, "base/tokenizer.json"),
    "base": Stage(make_base, "base/model.safetensors.index.json"),
    **{name: descendant_stage(name) for name in DESCENDANTS},
    "losses": Stage(measure_losses, None),
    "sharing": Stage(measure_sharing, None),
    "report": Stage(write_report, None),
}


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"stages, in order: {', '.join(STAGES)}",
    )
    parser.add_argument(
        "--corpora", type=Path, default=Path("../shared/data/corpora"), help="folder of the corpora (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=here, help="where the models go (this script's folder)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", default=list(STAGES), help="only these (all)")
    parser.add_argument("--seed", type=int, default=20, help="of weights, windows and samples (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="for arithmetic; another count may give other bits (%(default)s)")
    options = parser.parse_args()
    if not options.corpora.is_dir():
        parser.error(f"no folder of corpora at {options.corpora}; name one with --corpora")
    torch.set_num_threads(options.threads)
    work = Work(options.corpora, options.out, options.seed)
    for name, stage in STAGES.items():
        if name not in options.stages:
            continue
        if stage.result and (options.out / stage.result).exists():
            print(f"{name}: done before")
            continue
        began = time.monotonic()
        stage.make(work)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
