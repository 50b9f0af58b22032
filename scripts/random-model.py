#!/usr/bin/env python3
"""Writes a Llama checkpoint with random weights of a known shape, for measuring speed where the real one cannot be had.

    scripts/random-model.py SHAPE FOLDER [--layers N]     SHAPE: smollm2-135m, qwen2.5-0.5b, llama-3-8b

The words that it would say mean nothing; bytes and operations are those of the real model. Needs numpy. The tokenizer is the demo
family's, padded to the shape's vocabulary.
"""
import argparse
import json
import pathlib
import shutil
import struct

import numpy

# width, inner width, layers, heads, key and value heads, vocabulary, tied embeddings
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False),
}


def tensors(width, inner, layers, heads, kv_heads, vocab, tied):
    """Names and shapes, in the order of the file."""
    head = width // heads
    yield "model.embed_tokens.weight", (vocab, width)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (width,)
        yield at + "self_attn.q_proj.weight", (heads * head, width)
        yield at + "self_attn.k_proj.weight", (kv_heads * head, width)
        yield at + "self_attn.v_proj.weight", (kv_heads * head, width)
        yield at + "self_attn.o_proj.weight", (width, heads * head)
        yield at + "post_attention_layernorm.weight", (width,)
        yield at + "mlp.gate_proj.weight", (inner, width)
        yield at + "mlp.up_proj.weight", (inner, width)
        yield at + "mlp.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    if not tied:
        yield "lm_head.weight", (vocab, width)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    options = parser.parse_args()
    width, inner, layers, heads, kv_heads, vocab, tied = SHAPES[options.shape]
    layers = options.layers or layers
    options.folder.mkdir(parents=True)

    demo = pathlib.Path(__file__).resolve().parent.parent / "demo" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, options.folder / name)
    config = json.loads((demo / "config.json").read_text())
    config |= {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width // heads,
        "max_position_embeddings": 8192, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied,
    }
    (options.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    header, at = {}, 0
    listed = list(tensors(width, inner, layers, heads, kv_heads, vocab, tied))
    for name, shape in listed:
        size = 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = numpy.random.default_rng(0)
    with open(options.folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in listed:
            if name.endswith("norm.weight"):
                values = numpy.ones(shape, numpy.float32)
            else:
                values = random.standard_normal(shape, numpy.float32) * numpy.float32(0.02)
            file.write((values.view(numpy.uint32) >> 16).astype("<u2").tobytes())
    print(options.folder)


if __name__ == "__main__":
    main()
