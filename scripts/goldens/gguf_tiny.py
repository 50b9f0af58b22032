"""Tiny GGUF files of several architectures and tensor types with their goldens, and dequant.safetensors: blocks of every type.

A golden is the logits of transformers with the values that gguf.quants.dequantize gives, put back under their Hugging Face names
by the maps below (the inverse of what llama.cpp's converter does); transformers' own GGUF loader must agree, see LOADER_MISSES. Start at `make`.
"""

import argparse
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as T
from gguf import quants
from safetensors.numpy import save_file as save_numpy
from transformers import AutoConfig, AutoModelForCausalLM

import golden
import kquant
import tiny
import tiny_tokenizer
from tiny import Family, rope

F32, F16, BF16 = T.F32, T.F16, T.BF16
Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 = T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1
Q4_K, Q5_K, Q6_K = T.Q4_K, T.Q5_K, T.Q6_K

# name -> (architecture, family, types of matrices in the order of their names, cycled; types by name)
FILES: dict[str, tuple[str, Family, list[T], dict[str, T]]] = {
    # Q and K rows permuted; every type with blocks of 32.
    "gguf-llama": ("llama", Family(
        dict(model_type="llama", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_parameters=rope(10000.0),
             bos_token_id=1, eos_token_id=2),
        torch.float32, "gpt2", 288, 31),
        [Q8_0, Q5_0, F32, Q4_0, Q4_1, Q5_1, BF16, F16], {"token_embd.weight": F16, "output.weight": Q8_0}),
    # The K types, and Llama 3.1's frequencies as rope_freqs.weight (divisors), with no metadata for them.
    "gguf-llama-k": ("llama", Family(
        dict(model_type="llama", vocab_size=288, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8,
             num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
             rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **tiny.LLAMA3_ROPE}),
        torch.float32, "llama3", 288, 32),
        [Q4_K, Q5_K, Q6_K], {"token_embd.weight": Q4_K, "output.weight": Q6_K}),
    # Biases; no output.weight, so the head is the embedding.
    "gguf-qwen2": ("qwen2", Family(
        dict(model_type="qwen2", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_parameters=rope(1000000.0), bos_token_id=284, eos_token_id=285),
        torch.float32, "qwen", 288, 33),
        [Q5_0, Q8_0, Q4_0], {"token_embd.weight": Q8_0}),
    # q and k norms, head_dim in attention.key_length.
    "gguf-qwen3": ("qwen3", Family(
        dict(model_type="qwen3", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_parameters=rope(1000000.0), bos_token_id=284, eos_token_id=285),
        torch.float32, "qwen", 288, 34),
        [Q8_0, BF16, Q4_1], {"token_embd.weight": Q8_0}),
    # As the real file: no pattern and no local theta in the metadata (every sixth layer is global, 10000), norms stored plus one,
    # sentencepiece tokenizer with scores.
    "gguf-gemma3": ("gemma3", Family(
        dict(model_type="gemma3_text", vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=7, num_attention_heads=2,
             num_key_value_heads=1, head_dim=32, max_position_embeddings=128, rms_norm_eps=1e-6, query_pre_attn_scalar=32,
             sliding_window=16, bos_token_id=2, eos_token_id=1, pad_token_id=0,
             rope_parameters={"full_attention": rope(1000000.0), "sliding_attention": rope(10000.0)}),
        torch.float32, "gemma", 384, 35, first_token=2),
        [Q5_0, Q8_0, Q4_1], {"token_embd.weight": Q8_0}),
    # attn_qkv fused with bias, learned positions, LayerNorm biases; matrices stored [out, in].
    "gguf-gpt2": ("gpt2", Family(
        dict(model_type="gpt2", vocab_size=293, n_positions=96, n_embd=64, n_layer=2, n_head=4, layer_norm_epsilon=1e-5,
             bos_token_id=1, eos_token_id=2),
        torch.float32, "gpt2", 293, 36),
        [Q8_0, Q5_1], {"token_embd.weight": Q8_0, "position_embd.weight": F32}),
    # attn_qkv fused; ffn_up holds gate and up.
    "gguf-phi3": ("phi3", Family(
        dict(model_type="phi3", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=128, rms_norm_eps=1e-5,
             rope_parameters=rope(10000.0), bos_token_id=1, eos_token_id=2, pad_token_id=0),
        torch.float32, "smollm", 288, 37),
        [Q8_0, Q4_0], {"token_embd.weight": Q8_0, "output.weight": Q8_0}),
}

# What transformers' GGUF loader does not take from the file, and so must be told before its logits can equal ours.
LOADER_MISSES = {
    "gguf-llama-k": ["rope_parameters"],  # rope_freqs.weight is ignored
    "gguf-qwen3": ["head_dim"],  # attention.key_length is ignored: 128
    "gguf-gemma3": ["query_pre_attn_scalar"],  # 256, where llama.cpp takes attention.key_length
    "gguf-gpt2": ["max_position_embeddings"],  # context_length is ignored: 1024
    "gguf-phi3": ["pad_token_id"],  # 32000, outside a small vocabulary
}

# Hugging Face name -> GGUF name; `{i}` is the layer.
DENSE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q", "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v", "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm", "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
    "model.layers.{i}.self_attn.qkv_proj": "blk.{i}.attn_qkv",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate", "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn_up", "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}
NAMES = {
    "gemma3": DENSE | {
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
        "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
        "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
    },
    "gpt2": {
        "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
        "transformer.h.{i}.ln_1": "blk.{i}.attn_norm", "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
        "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output", "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
        "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up", "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
}


def gguf_name(arch: str, name: str) -> str:
    """The GGUF name of a Hugging Face parameter."""
    stem, suffix = name.rsplit(".", 1)
    layer = next((part for part in stem.split(".") if part.isdigit()), None)
    key = stem.replace(f".{layer}.", ".{i}.") if layer else stem
    return NAMES.get(arch, DENSE)[key].replace("{i}", layer or "") + "." + suffix


def permute(w: np.ndarray, heads: int, inverse: bool = False) -> np.ndarray:
    """llama.cpp's order of Q and K rows for architecture llama: in each head, row j of the first half and row j of the second half
    become neighbours, because its rotation turns neighbours (2j, 2j + 1) where Hugging Face's turns (j, j + head_dim / 2)."""
    half = w.shape[0] // heads // 2
    shape = (heads, half, 2) if inverse else (heads, 2, half)
    return w.reshape(*shape, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def convert(arch: str, config, name: str, value: np.ndarray, inverse: bool = False) -> np.ndarray:
    """What llama.cpp's converter does to a tensor's values (or its inverse); `name` is the GGUF name."""
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return permute(value, heads, inverse)
    if arch == "gemma3" and name.endswith("norm.weight"):
        return value + np.float32(-1.0 if inverse else 1.0)
    if arch == "gpt2" and value.ndim == 2 and name.startswith("blk."):
        return value.T
    return value


def metadata(writer: gguf.GGUFWriter, arch: str, config) -> None:
    """The keys that llama.cpp's converter writes for the architecture."""
    writer.add_name("tiny model")  # llama.cpp looks for tokens that ours lacks where the name says phi3
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if arch == "phi3":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(0)  # the converter's way to say none


def tokenizer_metadata(writer: gguf.GGUFWriter, style: str, tokenizer, config) -> None:
    """tokenizer.ggml.*: byte-level BPE as tokens and merges, gemma's as tokens with scores (a merge's rank, negated)."""
    import json

    described = json.loads(tokenizer.to_str())
    special = {t["id"] for t in described["added_tokens"]}
    texts = {i: t for t, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    merges = [" ".join(m) if isinstance(m, list) else m for m in described["model"]["merges"]]
    kinds = gguf.TokenType
    types = [kinds.CONTROL if i in special else kinds.NORMAL if i in texts else kinds.UNUSED for i in range(len(tokens))]
    if style == "gemma":
        rank = {m.replace(" ", ""): -float(r + 1) for r, m in reversed(list(enumerate(merges)))}
        types = [kinds.BYTE if t.startswith("<0x") else k for t, k in zip(tokens, types)]
        types[tokens.index("<unk>")] = kinds.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([rank.get(t, -1000.0) for t in tokens])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(3)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre({"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen": "qwen2", "smollm": "smollm"}[style])
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_chat_template(tiny_tokenizer.TEMPLATE)
    writer.add_token_types(types)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(style in ("gemma", "llama3"))


def write_file(path: Path, arch: str, family: Family, kinds: list[T], by_name: dict[str, T], model, tokenizer) -> None:
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch, model.config)
    tokenizer_metadata(writer, family.tokenizer, tokenizer, model.config)
    parameters = {gguf_name(arch, n): p.numpy() for n, p in model.named_parameters()}
    turn = 0
    for name, value in sorted(parameters.items()):
        value = np.ascontiguousarray(convert(arch, model.config, name, value))
        kind = by_name.get(name, F32 if value.ndim == 1 else None)
        if kind is None:
            kind, turn = kinds[turn % len(kinds)], turn + 1
        if kind in (F32, F16):
            writer.add_tensor(name, value.astype(np.float32 if kind == F32 else np.float16))
        else:
            writer.add_tensor(name, kquant.quantize(value, kind), raw_dtype=kind)
    if arch == "llama" and model.config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_freqs(config) -> np.ndarray:
    """The divisors of Llama 3.1's frequencies, [head_dim / 2], as llama.cpp's converter computes them (in double, stored f32)."""
    p, dim = config.rope_parameters, config.head_dim
    original = p["original_max_position_embeddings"]
    low, high = original / p["low_freq_factor"], original / p["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * p["rope_theta"] ** (i / dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(p["factor"])
        else:
            smooth = (original / wavelength - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def read_back(path: Path, arch: str, model) -> None:
    """Fill `model` with the dequantised values of the file."""
    found = {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape.tolist()[::-1]) for t in gguf.GGUFReader(path).tensors}
    found.pop("rope_freqs.weight", None)
    for name, p in model.named_parameters():
        stored = gguf_name(arch, name)
        value = convert(arch, model.config, stored, found.pop(stored), inverse=True)
        p.copy_(torch.from_numpy(np.array(value, order="C")))
    assert not found, f"tensors left over: {sorted(found)}"


def make(name: str, out: Path) -> None:
    arch, family, kinds, by_name = FILES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, tokenizer = tiny.build(family), tiny_tokenizer.build(family.tokenizer, family.tokenizer_size)
    path = folder / "model.gguf"
    write_file(path, arch, family, kinds, by_name, model, tokenizer)
    read_back(path, arch, model)
    prompt = golden.search(model, model.config.vocab_size, family.seed, first=family.first_token)
    result, logits = golden.take(model, prompt)
    config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    for key in LOADER_MISSES.get(name, ()):
        setattr(config, key, getattr(model.config, key))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, config=config, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager").eval()
    apart = float((golden.take(theirs, prompt)[1] - logits).abs().max())  # not 0 for gpt2: its eps comes back as f32's 1e-5
    assert apart < 1e-4, f"{name}: transformers' GGUF loader disagrees by {apart}"
    result |= {
        "family": name,
        "seed": family.seed,
        "made_with": f"transformers {transformers.__version__}, f32 compute, eager attention, weights by gguf.quants.dequantize",
        "tensor_types": {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1},
        "tokenizer": tiny_tokenizer.cases(tokenizer),
    }
    golden.write(folder, result, logits)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:20} {size:8} bytes  logits std {result['logits_std']:.2f}  least margin {min(result['margins']):.2f}  "
          f"{len(set(result['decode']))} different tokens  transformers' loader within {apart:.1e}")
    assert size < 1 << 20


def make_blocks(path: Path, seed: int = 5, count: int = 6) -> None:
    """`<type>.raw` [blocks, bytes] and `<type>.f32` [blocks, values] of every type that gguf.quants can read: random bytes with
    scales in a sane range, then one block whose half-precision scales are subnormal, then one of zero bytes."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        if kind not in quants._type_traits:
            continue
        per_row = max(1, 32 // values)  # so that BF16 has rows, too
        kept = []
        while len(kept) < count:
            raw = generator.integers(0, 256, (512, per_row * size), dtype=np.uint8)
            with np.errstate(all="ignore"):
                peak = np.abs(quants.dequantize(raw, kind)).max(-1)
            kept.extend(raw[np.isfinite(peak) & (kind == BF16 or (peak > 1e-2) & (peak < 1e2))])
        subnormal = kept[0].copy()
        for at in HALF_SCALES.get(kind, ()):
            subnormal[at : at + 2] = np.array([3e-6 * (at + 1)], np.float16).view(np.uint8)
        raw = np.stack([*kept[:count], subnormal, np.zeros_like(subnormal)])
        tensors[f"{kind.name.lower()}.raw"] = raw
        tensors[f"{kind.name.lower()}.f32"] = quants.dequantize(raw, kind).astype(np.float32)
        assert np.isfinite(tensors[f"{kind.name.lower()}.f32"]).all()
    save_numpy(tensors, path)
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(tensors) // 2} types: {', '.join(sorted(n[:-4] for n in tensors if n.endswith('.raw')))}")


# Where the half-precision scales lie in a block.
HALF_SCALES = {
    Q4_0: (0,), Q4_1: (0, 2), Q5_0: (0,), Q5_1: (0, 2), Q8_0: (0,), T.Q2_K: (80, 82), T.Q3_K: (108,), Q4_K: (0, 2), Q5_K: (0, 2),
    Q6_K: (208,), T.IQ4_NL: (0,), T.IQ4_XS: (0,), T.IQ2_XXS: (0,), T.IQ2_XS: (0,), T.IQ2_S: (0,), T.IQ3_XXS: (0,), T.IQ3_S: (0,),
    T.IQ1_S: (0,), T.TQ1_0: (52,), T.TQ2_0: (64,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[], help=f"which (default all): dequant, {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, default=tiny.DEFAULT_OUT, help="default: executor/tests/data/tiny of this checkout")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    golden.setup(arguments.threads)
    for name in arguments.files or ["dequant", *FILES]:
        if name == "dequant":
            make_blocks(arguments.out / "dequant.safetensors")
        else:
            make(name, arguments.out)


if __name__ == "__main__":
    main()
