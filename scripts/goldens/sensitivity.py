"""What the tiny goldens can see: switch one property off at a time and print how far the logits of the golden rows move.

A mistake whose line shows a small number would slip through a loose tolerance. Nothing is written.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import golden
import tiny


def distance(model, folder: Path) -> tuple[float, int]:
    """Largest difference of a logit on the golden rows (teacher-forced) and how many of the greedy tokens stay."""
    pinned = json.loads((folder / "golden.json").read_text())
    logits = load_file(folder / "logits.safetensors")["logits"]
    rows = model(input_ids=torch.tensor([pinned["prompt"] + pinned["decode"]]), use_cache=False).logits[0, -len(logits):]
    chosen = rows[golden.PROMPT_ROWS - 1 : -1].argmax(-1)
    return float((rows - logits).abs().max()), int((chosen == torch.tensor(pinned["decode"])).sum())


def changed(folder: Path, change) -> "torch.nn.Module":
    config = AutoConfig.from_pretrained(folder)
    change(config)
    return tiny.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()


def config_changes(config) -> dict:
    """Name -> mutation of the config, for what this config has."""
    def put(**values):
        return lambda c: [setattr(c, k, v) for k, v in values.items()]

    changes = {}
    if window := getattr(config, "sliding_window", None):
        changes |= {f"sliding_window {window} -> {w}": put(sliding_window=w) for w in (window - 1, window + 1, 4096)}
    ropes = getattr(config, "rope_parameters", None)
    if ropes:
        nested = {k: v for k, v in ropes.items() if isinstance(v, dict)} or {None: ropes}
        for layer, parameters in nested.items():
            def theta(c, layer=layer):
                (c.rope_parameters[layer] if layer else c.rope_parameters)["rope_theta"] *= 1.1
            def plain(c, layer=layer):
                (c.rope_parameters[layer] if layer else c.rope_parameters).update(rope_type="default")
            def whole(c, layer=layer):
                (c.rope_parameters[layer] if layer else c.rope_parameters).update(partial_rotary_factor=1.0)
            changes[f"rope_theta x 1.1 {layer or ''}"] = theta
            if parameters["rope_type"] != "default":
                changes[f"rope scaling {parameters['rope_type']} off {layer or ''}"] = plain
            if parameters.get("partial_rotary_factor", 1.0) != 1.0:
                changes["partial_rotary_factor off"] = whole
        if len(nested) == 2:
            changes["layer pattern rotated by one"] = lambda c: setattr(c, "layer_types", c.layer_types[1:] + c.layer_types[:1])
    if hasattr(config, "query_pre_attn_scalar"):
        changes["query_pre_attn_scalar -> head_dim"] = put(query_pre_attn_scalar=config.head_dim)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            changes[f"{name} off"] = put(**{name: None})
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if hasattr(config, name):
            other = "gelu" if "gelu" in getattr(config, name) else "gelu_pytorch_tanh"
            changes[f"{name} -> {other}"] = put(**{name: other})
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if hasattr(config, name):
            changes[f"{name} x 10"] = put(**{name: getattr(config, name) * 10})
    return changes


def weight_changes(model) -> dict:
    """Name -> parameters to make neutral: each kind of norm and of bias by itself."""
    groups = {}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            groups.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[])
    parser.add_argument("--data", type=Path, default=tiny.DEFAULT_OUT)
    arguments = parser.parse_args()
    golden.setup(1)
    print("| family | change | largest logit difference | greedy tokens kept of 16 |\n| --- | --- | --- | --- |")
    for name in arguments.families or tiny.FAMILIES:
        folder = arguments.data / name
        model = tiny.load(folder)
        neutral = 0.0 if model.config.model_type.startswith("gemma") else 1.0
        rows = [("none", distance(model, folder))]
        for what, change in config_changes(model.config).items():
            rows.append((what, distance(changed(folder, change), folder)))
        for what, names in weight_changes(model).items():
            altered = tiny.load(folder)
            for n in names:
                altered.get_parameter(n).fill_(0.0 if n.endswith("bias") else neutral)
            rows.append((f"{what} neutral", distance(altered, folder)))
        for what, scale in (("rounded to bf16", lambda t: t.bfloat16()), ("off", torch.ones_like)):
            altered = tiny.load(folder)
            if hasattr(altered.get_input_embeddings(), "embed_scale"):
                altered.get_input_embeddings().embed_scale.copy_(scale(altered.get_input_embeddings().embed_scale))
                rows.append((f"embedding scale {what}", distance(altered, folder)))
        for what, (difference, kept) in rows:
            print(f"| {name} | {what} | {difference:.2g} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
