"""Tiny PEFT adapters over the tiny models of tiny.py, each with the golden that PEFT computes for it: see README.md.

An adapter is a row of ADAPTERS; everything below the table is the same for all. Start reading at `make`.
"""

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft would ask the hub for the base's configuration

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import golden
import tiny

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "executor/tests/data/adapters"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Row:
    """base: a family of tiny.py. lora: arguments of LoraConfig. dtype: of the file; it is computed in f32."""

    base: str
    lora: dict
    seed: int
    dtype: torch.dtype = torch.float32


ADAPTERS: dict[str, Row] = {
    # The commonest: one rank, two matrices.
    "llama-qv": Row("llama", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), 31),
    # All seven with ranks 3 to 8 and alphas by module, one by a regular expression; the scale is alpha / sqrt(rank).
    "llama-patterns": Row(
        "llama",
        dict(r=8, lora_alpha=6, use_rslora=True, target_modules=SEVEN,
             rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 5, r".*\.(k|v)_proj": 4},
             alpha_pattern={"model.layers.0.self_attn.o_proj": 2, "up_proj": 3.5}),
        32, torch.bfloat16),
    # Another family, biases beneath, one layer only.
    "qwen2-layer": Row("qwen2", dict(r=6, lora_alpha=6, target_modules=SEVEN, layers_to_transform=[1]), 33, torch.float16),
    # Fused projections: one A for q, k and v.
    "phi3-fused": Row("phi3", dict(r=4, lora_alpha=16, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]), 34, torch.bfloat16),
    "gpt2-fused": Row("gpt2", dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), 35),
    # Whole tensors beside the factors: every bias, and a head of its own over a base whose head is the embedding.
    "llama-bias-whole": Row("llama-bias", dict(r=4, lora_alpha=8, target_modules=["o_proj"], bias="all", modules_to_save=["lm_head"]),
                            36, torch.bfloat16),
}


def randomise(model, row: Row) -> None:
    """Seeded factors whose change is about half as large as what it is added to; other trained tensors move by as much."""
    generator = torch.Generator().manual_seed(row.seed)
    scales = {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        if ".lora_A." in name:
            p.copy_(noise / p.shape[1] ** 0.5)
        elif ".lora_B." in name:
            p.copy_(noise * 0.6 / (p.shape[1] ** 0.5 * scales[name.split(".lora_B.")[0]]))
        elif noise is not None:
            p.add_(noise * 0.5 * p.std())
        if noise is not None:
            p.copy_(p.to(row.dtype).float())


def make(name: str, bases: Path, out: Path) -> None:
    row = ADAPTERS[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    base = tiny.load(bases / row.base)
    base.config._name_or_path = base.name_or_path = f"ashlar-tiny/{row.base}"
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **row.lora)).eval()
    randomise(model, row)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set, in the order of this run's hashes
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file({n: t.to(row.dtype).contiguous() for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})

    prompt = golden.search(model, base.config.vocab_size, row.seed)
    result, logits = golden.take(model, prompt)
    fresh = PeftModel.from_pretrained(tiny.load(bases / row.base), folder).eval()
    again, logits_again = golden.take(fresh, prompt)
    assert torch.equal(logits, logits_again), f"{name}: the written adapter reads to other logits, by {(logits - logits_again).abs().max()}"
    with fresh.disable_adapter():
        plain = golden.take(fresh, prompt)[0]["decode"]
    result |= {
        "base": row.base,
        "seed": row.seed,
        "made_with": f"peft {peft.__version__}, transformers {transformers.__version__}, f32 compute, eager attention",
    }
    golden.write(folder, result, logits)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    size = sum(f.stat().st_size for f in folder.iterdir())
    differ = sum(a != b for a, b in zip(plain, result["decode"]))
    print(f"{name:18} {size:7} bytes  logits std {result['logits_std']:.2f}  least margin {min(result['margins']):.2f}  "
          f"{differ} of {len(plain)} tokens differ from the base's")
    assert size < 1 << 17 and differ > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", nargs="*", default=[], help=f"which (default all): {', '.join(ADAPTERS)}")
    parser.add_argument("--bases", type=Path, default=tiny.DEFAULT_OUT, help="where the tiny models are")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: executor/tests/data/adapters of this checkout")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    golden.setup(arguments.threads)
    for name in arguments.adapters or ADAPTERS:
        make(name, arguments.bases, arguments.out)


if __name__ == "__main__":
    main()
