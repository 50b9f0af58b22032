"""Writes a descendant of a GGUF file of Q8_0: python descendants.py BASE.gguf OUT.gguf NUMBER [apart].

A descendant differs from the base in the top quarter of its layers (rounded up): every matrix there has noise of a twentieth of its own
deviation added, as a fine-tune of all weights would, drawn from NUMBER alone. All else is the base's, byte for byte.

`apart` writes the same descendant so that no block of it is another's, and so nothing can be shared, while it computes the same. In each layer the
inner units of the feed-forward, and the dimensions of each head's values, change places within their groups of 32: rows of one matrix and
columns of the next. A sum over a group is one of whole numbers, whose order is free, and nothing leaves its group, so not a bit of what comes
out differs. Queries and keys turn their signs together, by pairs of dimensions that rotate together. The token table, which has no order to spare,
has one weight of the row of a token that texts do not hold moved by one step. Only the norms, a thousandth of all bytes, stay alike.

Prints the file's SHA-256."""

import hashlib
import math
import shutil
import sys
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

Q8_0 = GGMLQuantizationType.Q8_0
GROUP = 32
# A group's bytes: a scale of f16, then its weights.
SCALE_BYTES, GROUP_BYTES = 2, 34
CHANGE = 0.05
SEED = 1
TOP_SHARE = 0.25
# A special token of SmolLM2's that ordinary text has no use for.
SPARE_TOKEN = 3


class Tensors:
    """The matrices of a file that may be changed in place: bytes of rows."""

    def __init__(self, path: Path):
        reader = self.reader = GGUFReader(path, "r+")
        self.by_name = {tensor.name: tensor for tensor in reader.tensors}
        arch = reader.fields["general.architecture"].contents()
        number = lambda key: int(reader.fields[f"{arch}.{key}"].contents())
        self.layers, self.heads, self.kv_heads = number("block_count"), number("attention.head_count"), number("attention.head_count_kv")

    def matrices_of(self, layer: int) -> list[str]:
        return [name for name, one in self.by_name.items() if name.startswith(f"blk.{layer}.") and len(one.shape) == 2]

    def rows(self, name: str) -> numpy.ndarray:
        tensor = self.by_name[name]
        assert tensor.tensor_type == Q8_0, f"{name} is no Q8_0: make the base with requantise.py"
        return tensor.data


def tune(tensors: Tensors, number: int):
    changed = math.ceil(tensors.layers * TOP_SHARE)
    for layer in range(tensors.layers - changed, tensors.layers):
        for place, name in enumerate(sorted(tensors.matrices_of(layer))):
            rows = tensors.rows(name)
            values = dequantize(rows, Q8_0)
            draw = numpy.random.default_rng([SEED, number, layer, place])
            values += draw.standard_normal(values.shape, numpy.float32) * numpy.float32(CHANGE * values.std())
            rows[:] = quantize(values, Q8_0)


def reorder(tensors: Tensors, makers: list[str], user: str, orders: numpy.ndarray):
    """Rows of `makers` and columns of `user` change places within groups: `orders[group]` names for each new place the old one. Where
    columns have more groups than rows, several heads read the same values."""
    moved = numpy.arange(len(orders))[:, None] * GROUP + orders
    for name in makers:
        rows = tensors.rows(name)
        assert len(rows) == moved.size, f"{name} has {len(rows)} rows"
        rows[:] = rows[moved.reshape(-1)]
    rows = tensors.rows(user)
    groups = rows.reshape(len(rows), -1, GROUP_BYTES)
    of_head = len(orders) // tensors.kv_heads
    shared = groups.shape[1] // len(orders)
    for group in range(groups.shape[1]):
        # Head h reads the values of key and value head h / shared.
        own = (group // of_head // shared) * of_head + group % of_head if shared > 1 else group
        groups[:, group, SCALE_BYTES:] = groups[:, group, SCALE_BYTES + orders[own]]


def turn_signs(tensors: Tensors, at: str, draw: numpy.random.Generator):
    """Of the same pairs of dimensions in keys and in the queries that meet them; rows 2i and 2i + 1 of a head are a pair."""
    keys = tensors.rows(at + "attn_k.weight")
    signs = numpy.repeat(draw.choice(numpy.array([-1, 1], numpy.int8), len(keys) // 2), 2).reshape(tensors.kv_heads, -1)
    for name, heads in (("attn_k", tensors.kv_heads), ("attn_q", tensors.heads)):
        rows = tensors.rows(f"{at}{name}.weight")
        weights = rows.reshape(len(rows), -1, GROUP_BYTES)[:, :, SCALE_BYTES:].view(numpy.int8)
        weights *= numpy.repeat(signs, heads // tensors.kv_heads, axis=0).reshape(-1, 1, 1)


def set_apart(tensors: Tensors, number: int):
    for layer in range(tensors.layers):
        at = f"blk.{layer}."
        draw = numpy.random.default_rng([SEED, number, layer, 1 << 20])
        orders = lambda name: numpy.array([draw.permutation(GROUP) for _ in range(len(tensors.rows(name)) // GROUP)])
        reorder(tensors, [at + "ffn_gate.weight", at + "ffn_up.weight"], at + "ffn_down.weight", orders(at + "ffn_gate.weight"))
        reorder(tensors, [at + "attn_v.weight"], at + "attn_output.weight", orders(at + "attn_v.weight"))
        turn_signs(tensors, at, draw)
    weights = tensors.rows("token_embd.weight")[SPARE_TOKEN].reshape(-1, GROUP_BYTES)[0, SCALE_BYTES:].view(numpy.int8)
    weights[number] += -1 if weights[number] > 0 else 1


def main(base: Path, out: Path, number: int, apart: bool):
    assert 0 <= number < GROUP, "so many weights of the spare token can be told apart"
    partial = out.with_suffix(".partial")
    shutil.copyfile(base, partial)
    tensors = Tensors(partial)
    tune(tensors, number)
    if apart:
        set_apart(tensors, number)
    tensors.reader.data.flush()
    partial.rename(out)
    print(hashlib.sha256(out.read_bytes()).hexdigest(), out.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["apart"])
