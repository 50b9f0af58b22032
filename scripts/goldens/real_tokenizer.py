"""The tokenizer of a GGUF file, built by the rules of the model's original tokenizer.json, which the file does not carry whole.

What a GGUF leaves out and this adds: Qwen2's NFC; SmolLM2's split into single digits (transformers' own GGUF path has none, and so
differs on runs of spaces before a digit); Gemma's order of whitespace merges (transformers' differs past 31 spaces). `--against`
compares with another tokenizer.json over any text files; README.md says what was compared.
"""

import argparse
import gzip
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tiny_tokenizer import QWEN_SPLIT

CONTROL, USER_DEFINED, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
SPACE = "\u2581"


def fields(path: Path) -> dict:
    """All metadata of a GGUF file as plain values."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def build(meta: dict) -> Tokenizer:
    kind, pre = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if kind == "llama":
        tokenizer = _gemma(meta, tokens, types)
    else:
        tokenizer = _byte_level(pre, tokens, types, meta["tokenizer.ggml.merges"])
    added = []
    for token, of_type in zip(tokens, types):
        if of_type in (CONTROL, USER_DEFINED):
            token = token.replace(" ", SPACE) if kind == "llama" else token
            added.append(AddedToken(token, special=of_type == CONTROL, normalized=False))
    tokenizer.add_special_tokens([t for t in added if t.special])
    tokenizer.add_tokens([t for t in added if not t.special])
    return tokenizer


def _byte_level(pre: str, tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    vocab = {t: i for i, (t, of_type) in enumerate(zip(tokens, types)) if of_type != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        raise ValueError(f"no rule for pre-tokenizer {pre}")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gemma(meta: dict, tokens: list[str], types: list[int]) -> Tokenizer:
    tokens = [t.replace(" ", SPACE) for t in tokens]
    vocab = {t: i for i, t in enumerate(tokens)}

    def splits(token):
        return [(token[:k], token[k:]) for k in range(len(token) - 1, 0, -1) if token[:k] in vocab and token[k:] in vocab]

    runs = [t for t, of_type in zip(tokens, types) if of_type == USER_DEFINED and len(t) > 1 and set(t) <= {"\n", "\t", SPACE}]
    merges = sorted((m for t in runs for m in splits(t)), key=lambda m: (-len(m[0]), -len(m[1])))
    kept, skipped = set(runs), (CONTROL, gguf.TokenType.BYTE)
    merges += [m for t, of_type in zip(tokens, types) if of_type not in skipped and t not in kept for m in splits(t)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = meta["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("texts", nargs="*", type=Path, help="text files (or .gz) to encode with both")
    parser.add_argument("--against", type=Path, required=True, help="a tokenizer.json")
    arguments = parser.parse_args()
    ours, theirs = build(fields(arguments.gguf)), Tokenizer.from_file(str(arguments.against))
    chunks = []
    for path in arguments.texts:
        text = (gzip.open(path) if path.suffix == ".gz" else open(path, "rb")).read(1 << 20).decode("utf-8", "replace")
        chunks += [text[i : i + 2000] for i in range(0, len(text), 2000)]
    pairs = zip(chunks, ours.encode_batch(chunks), theirs.encode_batch(chunks))
    bad = [(t, a.ids, b.ids) for t, a, b in pairs if a.ids != b.ids]
    print(f"{len(chunks)} chunks of up to 2000 characters, {len(bad)} differ")
    for text, a, b in bad[:5]:
        at = next(i for i, (x, y) in enumerate(zip(a + [-1], b + [-1])) if x != y)
        print(f"  token {at}: {a[at : at + 6]} against {b[at : at + 6]} near {ours.decode(a[max(0, at - 3) : at + 3])!r}")


if __name__ == "__main__":
    main()
