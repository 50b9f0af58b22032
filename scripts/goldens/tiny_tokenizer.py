"""Tiny tokenizers in the styles met in the wild, trained on a few sentences written for the purpose.

Styles: gpt2 (byte level, its regex), smollm (single digits first), llama3 (own regex, BOS by post-processor, ignore_merges),
qwen (NFC, own regex, special tokens after the vocabulary), gemma (spaces as U+2581, byte fallback, BOS).
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from golden import write_json

TEXT = """Dressed stone is cut so exactly that it joins without mortar. The mason measures twice, cuts once, and the wall stands.
A request goes to the server; the server answers with tokens, one after another, and the same request gives the same tokens.
def measure(stone, width=12, height=34): return stone.cut(width * 2, height + 56)  # 7890
if (x != 0) { y += x / 2; } else { y = -1; }
Die Steine passen genau; l'eau coule, où est la clé? El niño mañana. Привет, мир. 石を切る。切石。
How many stones are in the wall? There are 1234 stones, and there were 5678 stones before. It's the mason's, isn't it?
"""

CASES = [
    "The mason cuts the stone.",
    "  two leading spaces and a trailing one ",
    "tabs\tand\nlines\n\n\nthree",
    "1234567890 and 3.14",
    "def f(x):\n    return x != 0",
    "naïve café, où? cafe\u0301",
    "石を切る 🪨👩‍👧",
    "it's the mason's, ISN'T it?",
    "<|user|>hello<|end|>\n<|assistant|>",
    "",
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

SPECIALS = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GEMMA_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def build(style: str, vocab_size: int) -> Tokenizer:
    """A tokenizer of one style with at most `vocab_size` entries, special ones included."""
    if style == "gemma":
        return _gemma(vocab_size)
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style in ("gpt2", "smollm"))
    before = {
        "gpt2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")],
        "qwen": [pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")],
    }[style]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    last = style == "qwen"
    if last:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (len(SPECIALS) if last else 0),
        special_tokens=[] if last else SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if last:
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    if style == "llama3":
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]),
        ])
    assert tokenizer.get_vocab_size() <= vocab_size
    return tokenizer


def _gemma(vocab_size: int) -> Tokenizer:
    split = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizers.Replace(" ", "\u2581"), split
    learner.train_from_iterator(
        [line.replace(" ", "\u2581") for line in TEXT.split("\n")],
        trainers.BpeTrainer(vocab_size=vocab_size - 256 - len(GEMMA_SPECIALS), show_progress=False, max_token_length=8),
    )
    import json

    learned = json.loads(learner.to_str())["model"]
    names = GEMMA_SPECIALS + [f"<0x{b:02X}>" for b in range(256)] + sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {name: index for index, name in enumerate(names)}
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Replace(" ", "\u2581"), split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in GEMMA_SPECIALS])
    return tokenizer


def config(style: str, template_inline: bool = True) -> dict:
    """tokenizer_config.json of a style, in the form that checkpoints on the hub have."""
    if style == "gemma":
        names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        kind = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True}
    else:
        names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = {"chat_template": TEMPLATE} if template_inline and style != "gemma" else {}
    return {**kind, **names, "clean_up_tokenization_spaces": False, "model_max_length": 128, **template}


def cases(tokenizer: Tokenizer) -> list[dict]:
    """Strings with their ids (special tokens parsed, BOS where the post-processor adds it) and the text that the ids decode to."""
    result = []
    for text in CASES:
        ids = tokenizer.encode(text).ids
        result.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)})
    return result


def write(folder: Path, style: str, vocab_size: int, template_inline: bool = True) -> Tokenizer:
    """tokenizer.json, tokenizer_config.json and, where the template is not inline, chat_template.jinja."""
    tokenizer = build(style, vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", config(style, template_inline))
    if not template_inline:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return tokenizer
