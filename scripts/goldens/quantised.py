"""Tiny ready-quantised checkpoints of several tools over the models of tiny.py, each with the golden of its dequantised weights: see README.md.

A case is a row of CASES. GPTQ, AWQ and `quant_method: fp8` are packed here by their documented layouts, word by word, since their tools want a
GPU; compressed-tensors packs by its own library, which must also give the same weights back. Start reading at `make`.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import golden
import tiny
import tiny_tokenizer

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "executor/tests/data/quantised"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Case:
    """base: a family of tiny.py. method: a function below. config: what quantization_config says beside the method's own keys.

    size: inputs of a group, None for a row. zeros: whether codes have zero points. scale: dtype of the scales.
    """

    base: str
    method: str
    bits: int = 4
    size: int | None = 32
    zeros: bool = False
    scale: torch.dtype = torch.float16
    config: dict = field(default_factory=dict)
    strategy: str = "group"
    model: dict = field(default_factory=dict)  # what makes the base smaller
    skip: tuple = ("lm_head",)


SMALL = {"tie_word_embeddings": True, "num_hidden_layers": 1}
SMALLER = SMALL | {"head_dim": 16, "intermediate_size": 80}

CASES: dict[str, Case] = {
    # Groups of 32 in rows of 64 and 112: the last is short. Zero points stored less one.
    "gptq-llama": Case("llama-f16-sharded", "gptq", zeros=True, model=SMALL),
    # Zero points stored as they are, groups in the order of activations; biases.
    "gptq-qwen2-order": Case("qwen2", "gptq", zeros=True, config={"desc_act": True, "checkpoint_format": "gptq_v2"}, model=SMALL),
    # Conv1D is packed as a linear layer is; zero points all in the middle.
    "gptq-gpt2": Case("gpt2", "gptq", model={"n_layer": 1}),
    # Fused matrices, cut by rows.
    "awq-phi3": Case("phi3", "awq", zeros=True, model=SMALL),
    "ct-gemma3-int4": Case("gemma3-softcap", "compressed", size=16, zeros=True, scale=torch.bfloat16,
                           model={"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
    "ct-mistral-int8": Case("mistral", "compressed", bits=8, size=None, strategy="channel", scale=torch.bfloat16,
                            skip=("lm_head", "down_proj"), model=SMALL),
    "ct-qwen3-fp8": Case("qwen3", "compressed", bits=8, size=None, strategy="channel", scale=torch.bfloat16, config={"type": "float"},
                         model=SMALLER),
    "fp8-llama3-tensor": Case("llama3", "fp8", size=None, model=SMALL),
    # Blocks of 48 x 32: rows of 80 inputs and 64 outputs are no whole blocks.
    "fp8-qwen3-blocks": Case("qwen3", "fp8", config={"weight_block_size": [48, 32]}, model=SMALLER),
}


def integers(w: torch.Tensor, case: Case, group_of: torch.Tensor):
    """Codes [N, K], zero points [N, G] (both from 0) and scales [N, G] by least and largest weight of each group."""
    most, groups = 2**case.bits - 1, int(group_of.max()) + 1
    codes = torch.zeros(w.shape, dtype=torch.int32)
    zeros, scales = torch.zeros((w.shape[0], groups), dtype=torch.int32), torch.zeros((w.shape[0], groups), dtype=case.scale)
    for g in range(groups):
        part = w[:, group_of == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if case.zeros:
            scale = ((high - low) / most).to(case.scale)
            zero = (-low / scale.float()).round().clamp(1, most)
        else:
            scale = (torch.maximum(-low, high) / (most // 2)).to(case.scale)
            zero = torch.full_like(low, (most + 1) // 2)
        codes[:, group_of == g] = ((part / scale.float()[:, None]).round() + zero[:, None]).clamp(0, most).int()
        zeros[:, g], scales[:, g] = zero.int(), scale
    return codes, zeros, scales


def words(values: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Packs along the last dimension, the first value (or the one that `order` says) in the lowest bits."""
    count = 32 // bits
    lanes = values.reshape(*values.shape[:-1], -1, count).to(torch.int64)
    if order:
        lanes = lanes[..., order]
    packed = sum(lanes[..., i] << (bits * i) for i in range(count))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous()


def weights_of(codes, zeros, scales, group_of):
    return (codes - zeros[:, group_of]).float() * scales.float()[:, group_of]


def gptq(name: str, w: torch.Tensor, case: Case, generator):
    k = torch.arange(w.shape[1])
    size = case.size or w.shape[1]
    order = torch.randperm(w.shape[1], generator=generator) if case.config.get("desc_act") else k
    group_of = torch.empty_like(k)
    group_of[order] = k // size
    codes, zeros, scales = integers(w, case, group_of)
    stored = zeros if case.config.get("checkpoint_format") == "gptq_v2" else zeros - 1
    parts = {
        "qweight": words(codes, case.bits).T.contiguous(),
        "qzeros": words(stored.T, case.bits),
        "scales": scales.T.contiguous(),
        "g_idx": group_of.int(),
    }
    return parts, weights_of(codes, zeros, scales, group_of)


def awq(name: str, w: torch.Tensor, case: Case, generator):
    group_of = torch.arange(w.shape[1]) // case.size
    codes, zeros, scales = integers(w, case, group_of)
    parts = {"qweight": words(codes.T, 4, AWQ_ORDER), "qzeros": words(zeros.T, 4, AWQ_ORDER), "scales": scales.T.contiguous()}
    return parts, weights_of(codes, zeros, scales, group_of)


def scheme(case: Case):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = dict(num_bits=case.bits, type=case.config.get("type", "int"), strategy=case.strategy, symmetric=not case.zeros)
    if case.strategy == "group":
        arguments["group_size"] = case.size
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))


def format_of(case: Case) -> str:
    if case.config.get("type") == "float":
        return "float-quantized"
    return "pack-quantized" if case.bits == 4 else "int-quantized"


def compressed(name: str, w: torch.Tensor, case: Case, generator):
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.load_from_registry(format_of(case))
    group_of = torch.arange(w.shape[1]) // (case.size or w.shape[1])
    if case.config.get("type") == "float":
        scales = (w.abs().amax(1, keepdim=True) / 448).to(case.scale)
        zeros = torch.zeros_like(scales, dtype=torch.int8)
    else:
        _, zeros, scales = integers(w, case, group_of)
        zeros = (zeros - 2 ** (case.bits - 1)).to(torch.int8)
    state = {"weight": w.to(case.scale), "weight_scale": scales}
    if case.zeros:
        state["weight_zero_point"] = zeros
    parts = dict(compressor.compress(state, scheme(case)))
    exact = compressor.decompress({**parts, "weight_scale": scales.float()}, scheme(case))["weight"]
    return {n: t.contiguous() for n, t in parts.items()}, exact.float()


def fp8(name: str, w: torch.Tensor, case: Case, generator):
    rows, cols = case.config.get("weight_block_size", w.shape)
    codes, exact = torch.zeros(w.shape, dtype=torch.float8_e4m3fn), torch.zeros_like(w)
    scales = torch.zeros((-(-w.shape[0] // rows), -(-w.shape[1] // cols)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols))
            scales[i, j] = w[block].abs().max() / 448
            codes[block] = (w[block] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            exact[block] = codes[block].float() * scales[i, j]
    if "weight_block_size" in case.config:
        return {"weight": codes, "weight_scale_inv": scales}, exact
    return {"weight": codes, "weight_scale": scales.reshape(()), "input_scale": torch.tensor(0.5)}, exact


METHODS = {"gptq": gptq, "awq": awq, "compressed": compressed, "fp8": fp8}


def section(case: Case) -> dict:
    """quantization_config, as the tools write it."""
    size = case.size or -1
    if case.method == "gptq":
        return {"quant_method": "gptq", "bits": case.bits, "group_size": size, "desc_act": False, "sym": not case.zeros, "lm_head": False,
                "checkpoint_format": "gptq", "pack_dtype": "int32", **case.config}
    if case.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    if case.method == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic" if case.config else "static", "fmt": "e4m3", **case.config}
    group = json.loads(scheme(case).model_dump_json())
    return {"quant_method": "compressed-tensors", "format": format_of(case), "quantization_status": "compressed", "kv_cache_scheme": None,
            "config_groups": {"group_0": group}, "ignore": list(case.skip), "sparsity_config": {}, "transform_config": {}}


def make(name: str, out: Path) -> None:
    case = CASES[name]
    family = tiny.FAMILIES[case.base]
    family = replace(family, config=family.config | case.model)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = tiny.build(family)
    generator = torch.Generator().manual_seed(family.seed)
    tensors = {n: p.to(family.dtype).contiguous() for n, p in model.named_parameters()}
    for module_name, module in model.named_modules():
        conv = isinstance(module, transformers.pytorch_utils.Conv1D)
        if not (conv or isinstance(module, torch.nn.Linear)) or any(module_name.endswith(skip) for skip in case.skip):
            continue
        weight = module.weight.T if conv else module.weight
        parts, exact = METHODS[case.method](module_name, weight.contiguous(), case, generator)
        del tensors[f"{module_name}.weight"]
        tensors |= {f"{module_name}.{part}": tensor for part, tensor in parts.items()}
        if case.method == "gptq" and module.bias is None:
            tensors[f"{module_name}.bias"] = torch.zeros(exact.shape[0], dtype=torch.float16)  # as older tools write
        module.weight.copy_(exact.T if conv else exact)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    model.config.architectures = [type(model).__name__]
    model.config.dtype = family.dtype
    model.config.to_json_file(folder / "config.json", use_diff=True)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section(case)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tiny_tokenizer.write(folder, family.tokenizer, family.tokenizer_size, family.template_inline)

    prompt = golden.search(model, model.config.vocab_size, family.seed, first=family.first_token)
    result, logits = golden.take(model, prompt)
    result |= {"case": name, "made_with": f"transformers {transformers.__version__}, f32 compute of the dequantised weights, eager attention"}
    golden.write(folder, result, logits)
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:20} {size:8} bytes  least margin {min(result['margins']):.2f}  {len(set(result['decode']))} different tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[], help=f"which (default all): {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: executor/tests/data/quantised of this checkout")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    golden.setup(arguments.threads)
    for name in arguments.cases or CASES:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
