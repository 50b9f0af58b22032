"""Writes gguf_dequant.safetensors: random blocks of every GGUF format we read and what the `gguf` package makes of them.

Run with gguf 0.19, numpy and safetensors installed. Tensors: `<name>.bytes` u8 [rows, bytes], `<name>.f32` [rows, 512].
"""
import numpy as np
from gguf import GGMLQuantizationType as T, GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Byte offsets of the f16 fields of each block: they are drawn finite, all other bytes are drawn uniformly.
HALVES = {T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
rng = np.random.default_rng(7)
out = {}
for kind, halves in HALVES.items():
    columns, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (3 * 512 // columns, size), dtype=np.uint8)
    for at in halves:
        scale = (rng.standard_normal(len(blocks)) * 10.0 ** rng.integers(-6, 3, len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    rows = blocks.reshape(3, -1)
    name = kind.name.lower()
    out[f"{name}.bytes"] = rows
    out[f"{name}.f32"] = dequantize(rows, kind).astype(np.float32)
save_file(out, "gguf_dequant.safetensors")
