"""Writes the two small tokenizers of the router's tests: byte-level BPE, and SentencePiece-like pieces with byte fallback."""
import json
import pathlib

HERE = pathlib.Path(__file__).parent


def special(token_id, content):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def number(tokens):
    return {token: index for index, token in enumerate(tokens)}


def begin_with(token, token_id):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def write(name, **parts):
    body = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, **parts}
    (HERE / name).write_text(json.dumps(body, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n")


def byte_level():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    of_byte = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("n", "d"), ("Ġa", "nd"), ("o", "n"), ("Ġ", "b"), ("ð", "Ł")]
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocab = number(specials + [of_byte[b] for b in range(256)] + [a + b for a, b in merges])
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write(
        "byte_level.json",
        added_tokens=[special(i, text) for i, text in enumerate(specials)],
        pre_tokenizer=byte,
        post_processor=begin_with("<|endoftext|>", 2),
        decoder=byte,
        model={"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
               "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]},
    )


def pieces():
    specials = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzé.,!"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "b"), ("▁", "▁")]
    vocab = number(specials + [f"<0x{b:02X}>" for b in range(256)] + letters + [a + b for a, b in merges])
    write(
        "pieces.json",
        added_tokens=[special(i, text) for i, text in enumerate(specials)],
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                         {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        post_processor=begin_with("<s>", 1),
        decoder={"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                                                  {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        model={"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
               "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges]},
    )


byte_level()
pieces()
