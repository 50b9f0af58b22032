"""Tiny seeded models of every family as Hugging Face directories, each with its golden: see README.md.

A family is a row of FAMILIES; everything below the table is the same for all. Start reading at `make`.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import golden
import tiny_tokenizer

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "executor/tests/data/tiny"


@dataclass
class Family:
    """config: arguments of the config class, in the words of transformers 5.

    written: None writes config.json as transformers 5 does; a dict is written as it stands, in the older form, and must
    read back to the same logits. template_inline: chat template in tokenizer_config.json, or as a file beside it.
    """

    config: dict
    dtype: torch.dtype
    tokenizer: str
    tokenizer_size: int
    seed: int
    written: dict | None = None
    generation: dict | None = None
    shards: int = 1
    template_inline: bool = True
    first_token: int | None = None
    extra: dict = field(default_factory=dict)


def rope(theta: float, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **more}


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, Family] = {
    # Grouped queries, f32 weights, vocabulary larger than the tokenizer's and no multiple of 16.
    "llama": Family(
        dict(model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters=rope(10000.0),
             bos_token_id=1, eos_token_id=2),
        torch.float32, "gpt2", 292, 11),
    # Llama 3.1's frequencies: with head_dim 32 and 64 original positions, the first two stay, the third is blended, the others are divided.
    "llama3": Family(
        dict(model_type="llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=[2, 4],
             rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}),
        torch.bfloat16, "llama3", 320, 12,
        written=dict(architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=[2, 4],
                     head_dim=32, hidden_act="silu", hidden_size=64, initializer_range=0.02, intermediate_size=96,
                     max_position_embeddings=512, mlp_bias=False, model_type="llama", num_attention_heads=4, num_hidden_layers=2,
                     num_key_value_heads=2, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling={**LLAMA3_ROPE, "rope_type": "llama3"},
                     rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.45.0",
                     use_cache=True, vocab_size=320),
        generation=dict(bos_token_id=1, do_sample=True, eos_token_id=[2, 4], temperature=0.6, top_p=0.9)),
    # Every projection has a bias; the head is the embedding.
    "llama-bias": Family(
        dict(model_type="llama", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-6, attention_bias=True, mlp_bias=True,
             tie_word_embeddings=True, rope_parameters=rope(100000.0), bos_token_id=1, eos_token_id=2),
        torch.bfloat16, "smollm", 288, 13),
    # f16 in two files with an index; the older config form with rope_scaling null.
    "llama-f16-sharded": Family(
        dict(model_type="llama", vocab_size=304, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=8,
             num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters=rope(10000.0),
             bos_token_id=1, eos_token_id=2),
        torch.float16, "gpt2", 304, 14, shards=2,
        written=dict(architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=64,
                     initializer_range=0.02, intermediate_size=112, max_position_embeddings=128, model_type="llama",
                     num_attention_heads=8, num_hidden_layers=2, num_key_value_heads=4, pretraining_tp=1, rms_norm_eps=1e-5,
                     rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0",
                     use_cache=True, vocab_size=304)),
    # Every layer looks back 16 tokens, itself included. As in Mistral 7B's config.json, no head_dim.
    "mistral": Family(
        dict(model_type="mistral", vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=16, rope_parameters=rope(10000.0),
             bos_token_id=1, eos_token_id=2),
        torch.bfloat16, "gpt2", 288, 15,
        written=dict(architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=64,
                     initializer_range=0.02, intermediate_size=128, max_position_embeddings=256, model_type="mistral",
                     num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0,
                     sliding_window=16, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0",
                     use_cache=True, vocab_size=288)),
    # Bias on q, k and v only. sliding_window is in the file and must be ignored, since use_sliding_window is false.
    "qwen2": Family(
        dict(model_type="qwen2", vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_parameters=rope(1000000.0), bos_token_id=301, eos_token_id=302),
        torch.bfloat16, "qwen", 305, 16,
        written=dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=301, eos_token_id=302, hidden_act="silu",
                     hidden_size=64, initializer_range=0.02, intermediate_size=128, max_position_embeddings=256, max_window_layers=1,
                     model_type="qwen2", num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
                     rope_theta=1000000.0, sliding_window=16, tie_word_embeddings=True, torch_dtype="bfloat16",
                     transformers_version="4.43.1", use_cache=True, use_sliding_window=False, vocab_size=320)),
    # Norms of q and k for each head, head_dim twice width / heads. A large eps, so that a wrong one shows.
    "qwen3": Family(
        dict(model_type="qwen3", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rms_norm_eps=1e-3, tie_word_embeddings=False,
             rope_parameters=rope(1000000.0), bos_token_id=301, eos_token_id=302),
        torch.bfloat16, "qwen", 305, 17, template_inline=False),
    # Qwen's windows: use_sliding_window is true, so layers from max_window_layers on look back 16 tokens; the others see all.
    "qwen3-window": Family(
        dict(model_type="qwen3", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
             use_sliding_window=True, sliding_window=16, max_window_layers=1, attention_bias=True,
             rope_parameters=rope(10000.0), bos_token_id=284, eos_token_id=285),
        torch.bfloat16, "qwen", 288, 18),
    # Layers local, local, global, local; two thetas; head_dim 24; scores scaled by 1/sqrt(40); width 96 so that sqrt(width) is not exact.
    "gemma3": Family(
        dict(model_type="gemma3_text", vocab_size=400, hidden_size=96, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-6, query_pre_attn_scalar=40,
             sliding_window=16, bos_token_id=2, eos_token_id=1, pad_token_id=0,
             layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={"full_attention": rope(1000000.0), "sliding_attention": rope(10000.0)}),
        torch.bfloat16, "gemma", 400, 19, first_token=2,
        written=dict(architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
                     bos_token_id=2, cache_implementation="hybrid", eos_token_id=[1, 5], final_logit_softcapping=None, head_dim=24,
                     hidden_activation="gelu_pytorch_tanh", hidden_size=96, initializer_range=0.02, intermediate_size=48,
                     max_position_embeddings=256, model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=4,
                     num_key_value_heads=2, pad_token_id=0, query_pre_attn_scalar=40, rms_norm_eps=1e-6, rope_local_base_freq=10000,
                     rope_scaling=None, rope_theta=1000000, sliding_window=16, sliding_window_pattern=3, torch_dtype="bfloat16",
                     transformers_version="4.50.0.dev0", use_cache=True, vocab_size=400)),
    # Logits capped by tanh, global frequencies divided by 8 (Gemma 3 4B and larger), one kv head, a large eps.
    "gemma3-softcap": Family(
        dict(model_type="gemma3_text", vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, max_position_embeddings=256, rms_norm_eps=1e-3, query_pre_attn_scalar=24,
             sliding_window=16, final_logit_softcapping=5.0, bos_token_id=2, eos_token_id=1, pad_token_id=0,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={"full_attention": rope(1000000.0) | {"rope_type": "linear", "factor": 8.0},
                              "sliding_attention": rope(10000.0)}),
        torch.bfloat16, "gemma", 384, 20, first_token=2),
    # Scores and logits capped; layer 0 local, layer 1 global. Older form: no layer_types, no sliding_window_pattern.
    "gemma2": Family(
        dict(model_type="gemma2", vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-6, query_pre_attn_scalar=20,
             sliding_window=16, final_logit_softcapping=6.0, attn_logit_softcapping=2.0, bos_token_id=2, eos_token_id=1,
             pad_token_id=0, rope_parameters=rope(10000.0)),
        torch.bfloat16, "gemma", 384, 21, first_token=2,
        written=dict(architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=2.0,
                     bos_token_id=2, cache_implementation="hybrid", eos_token_id=1, final_logit_softcapping=6.0, head_dim=24,
                     hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=64, initializer_range=0.02,
                     intermediate_size=96, max_position_embeddings=256, model_type="gemma2", num_attention_heads=4,
                     num_hidden_layers=3, num_key_value_heads=2, pad_token_id=0, query_pre_attn_scalar=20, rms_norm_eps=1e-6,
                     rope_theta=10000.0, sliding_window=16, torch_dtype="bfloat16", transformers_version="4.42.4", use_cache=True,
                     vocab_size=384)),
    # qkv_proj and gate_up_proj are fused; a window of 16; half of each head is rotated, as in Phi-4-mini.
    "phi3": Family(
        dict(model_type="phi3", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=128, rms_norm_eps=1e-5,
             sliding_window=16, rope_parameters=rope(10000.0, partial_rotary_factor=0.5), bos_token_id=1, eos_token_id=2,
             pad_token_id=0),
        torch.bfloat16, "smollm", 300, 22),
    # LayerNorm with bias, learned positions, Conv1D ([in, out]) weights. Names without "transformer." and the causal-mask
    # buffers h.N.attn.bias, as in the file of the original checkpoint.
    "gpt2": Family(
        dict(model_type="gpt2", vocab_size=293, n_positions=80, n_embd=64, n_layer=2, n_head=4, n_inner=None,
             activation_function="gelu_new", layer_norm_epsilon=1e-5, bos_token_id=1, eos_token_id=2),
        torch.float16, "gpt2", 293, 23, extra={"strip": "transformer.", "mask_buffers": True},
        written=dict(activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=1, embd_pdrop=0.1,
                     eos_token_id=2, initializer_range=0.02, layer_norm_epsilon=1e-5, model_type="gpt2", n_ctx=80, n_embd=64,
                     n_head=4, n_layer=2, n_positions=80, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1,
                     summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, vocab_size=293)),
}


def randomise(model, seed: int) -> None:
    """Seeded weights that leave nothing neutral: norms away from 1 (or 0), biases away from 0, attention neither flat nor one-hot,
    each residual branch comparable with the stream, logits with a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width, gemma = config.hidden_size, config.model_type.startswith("gemma")
    tied = config.tie_word_embeddings

    def normal(p, std):
        p.copy_(torch.randn(p.shape, generator=generator) * std)

    for name, p in sorted(model.named_parameters()):
        fan_in = p.shape[0] if config.model_type == "gpt2" and p.dim() == 2 else p.shape[-1]
        if p.dim() == 1 and name.endswith("weight"):  # a norm
            loud = gemma and ("post_" in name or name == "model.norm.weight")  # else the scaled embedding drowns the branches
            p.copy_(torch.rand(p.shape, generator=generator) * 1.2 + (-0.5 if gemma else 0.4) + (1.0 if loud else 0.0))
        elif p.dim() == 1:  # a bias
            normal(p, 0.25)
        elif "embed_tokens" in name or "wte" in name:
            normal(p, (1.0 if gemma else 2.2) / math.sqrt(width) if tied else 1.0)
        elif "wpe" in name:
            normal(p, 0.3)
        elif "lm_head" in name:
            normal(p, 2.0 / math.sqrt(width))
        elif any(n in name for n in ("o_proj", "down_proj", "c_proj", "v_proj")):
            normal(p, 2.0 / math.sqrt(fan_in))
        else:
            normal(p, 1.3 / math.sqrt(fan_in))


def build(family: Family):
    """The model in memory: seeded, rounded to the dtype of its file, computing in f32."""
    arguments = dict(family.config)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, family.seed)
    for p in model.parameters():
        p.copy_(p.to(family.dtype).float())
    return model


def load(folder: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def save_weights(model, family: Family, folder: Path) -> None:
    strip = family.extra.get("strip", "")
    tensors = {n.removeprefix(strip): p.to(family.dtype).contiguous() for n, p in model.named_parameters()}  # a tied head is not listed
    if family.extra.get("mask_buffers"):
        n = model.config.max_position_embeddings
        for i in range(model.config.num_hidden_layers):
            tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, n, n))
    if family.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    cut = [names[i * len(names) // family.shards : (i + 1) * len(names) // family.shards] for i in range(family.shards)]
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}, "weight_map": {}}
    for i, part in enumerate(cut):
        file = f"model-{i + 1:05}-of-{family.shards:05}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= {n: file for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def make(name: str, out: Path) -> None:
    family = FAMILIES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = build(family)
    if family.written is None:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = family.dtype
        model.config.to_json_file(folder / "config.json", use_diff=True)
    else:
        (folder / "config.json").write_text(json.dumps(family.written, indent=2) + "\n")
    if family.generation:
        (folder / "generation_config.json").write_text(json.dumps(family.generation, indent=2) + "\n")
    save_weights(model, family, folder)
    tokenizer = tiny_tokenizer.write(folder, family.tokenizer, family.tokenizer_size, family.template_inline)

    prompt = golden.search(model, model.config.vocab_size, family.seed, first=family.first_token)
    result, logits = golden.take(model, prompt)
    again, logits_again = golden.take(load(folder), prompt)
    assert torch.equal(logits, logits_again), f"{name}: the written directory reads to other logits, by {(logits - logits_again).abs().max()}"
    result |= {
        "family": name,
        "seed": family.seed,
        "made_with": f"transformers {transformers.__version__}, f32 compute, eager attention",
        "tokenizer": tiny_tokenizer.cases(tokenizer),
    }
    golden.write(folder, result, logits)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:20} {size:8} bytes  logits std {result['logits_std']:.2f}  least margin {min(result['margins']):.2f}  {len(set(result['decode']))} different tokens  "
          f"cache against none {result['uncached_max_diff']:.1e}")
    assert size < 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[], help=f"which (default all): {', '.join(FAMILIES)}")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: executor/tests/data/tiny of this checkout")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    golden.setup(arguments.threads)
    for name in arguments.families or FAMILIES:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
