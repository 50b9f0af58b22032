"""Writes LoRA adapters of a model in the PEFT format: python make_adapters.py MODEL.gguf FOLDER RANK[,RANK...] COUNT.

Adapter N goes to FOLDER/N: the seven matrices of every layer have factors in bf16, drawn from N alone, of the N-th of the ranks, which come in turn. Their
product changes each weight by noise of a fixed deviation, whatever the rank: enough that no two adapters say the same. Only names and shapes are
taken from the file, so it may hold any quantisation of the model.

Prints the SHA-256 of each adapter's weights."""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy
from gguf import GGUFReader

SEED = 1
# Deviation of the change of a weight; those of SmolLM2's matrices are around 0.2.
CHANGE = 0.02
# alpha over rank: what the product is multiplied with.
SCALE = 2
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def bf16(values: numpy.ndarray) -> bytes:
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix, by PEFT's name of it."""
    found = {}
    for tensor in GGUFReader(model).tensors:
        match tensor.name.split("."):
            case ["blk", layer, name, "weight"] if name in MODULES:
                found[f"base_model.model.model.layers.{layer}.{MODULES[name]}"] = (int(tensor.shape[0]), int(tensor.shape[1]))
    assert found, f"{model} has no layers of the names known here"
    return found


def safetensors(tensors: dict[str, tuple[list[int], bytes]]) -> bytes:
    header, at = {}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, data in tensors.values())


def write(folder: Path, number: int, rank: int, modules: dict[str, tuple[int, int]]) -> str:
    tensors = {}
    for place, (name, (inputs, outputs)) in enumerate(sorted(modules.items())):
        draw = numpy.random.default_rng([SEED, number, place])
        a = draw.standard_normal((rank, inputs), numpy.float32) / numpy.float32(math.sqrt(inputs))
        # A sum over the rank of products: its deviation is CHANGE after the scale.
        b = draw.standard_normal((outputs, rank), numpy.float32) * numpy.float32(CHANGE * math.sqrt(inputs / rank) / SCALE)
        tensors[f"{name}.lora_A.weight"] = ([rank, inputs], bf16(a))
        tensors[f"{name}.lora_B.weight"] = ([outputs, rank], bf16(b))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": rank}
    config |= {"lora_alpha": SCALE * rank, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(name.split(".")[-1] for name in MODULES.values())}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    data = safetensors(tensors)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main(model: Path, target: Path, ranks: list[int], count: int):
    modules = shapes(model)
    for number in range(count):
        print(write(target / str(number), number, ranks[number % len(ranks)], modules), number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(rank) for rank in sys.argv[3].split(",")], int(sys.argv[4]))
