"""Writes a GGUF file as the Hugging Face folder that vLLM and mistral.rs read: python to_hf.py IN.gguf FOLDER bfloat16|float32. Weights are the
file's, dequantised; configuration and tokenizer come out of its metadata."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: Path, target: Path, dtype: torch.dtype):
    partial = target.with_suffix(".partial")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # What was loaded calls itself quantised, and so will not be saved, though its weights are plain: they move to a fresh model.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    config.dtype = dtype
    model.to(dtype).save_pretrained(partial)
    AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
    # Where transformers kept it until its version 5, and mistral.rs looks for it.
    file = partial / "config.json"
    told = json.loads(file.read_text())
    if "rope_theta" in (rope := told.get("rope_parameters") or {}):
        file.write_text(json.dumps(told | {"rope_theta": rope["rope_theta"]}, indent=2) + "\n")
    partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]))
