"""The table of bench/quality.sh, and its verdict: python quality.py FOLDER. Reads FOLDER/ashlar.json and, where it is there,
FOLDER/llama.json, and fails where a form costs more than its format allows or the two f32 forms do not agree."""

import json
import sys
from pathlib import Path

# Mean KL from f32, in nats a token: about one and a half times what was measured when this was written (0, 0.00006, 0.0032, 0.0043,
# 0.28), so that another text passes, and int8 in groups of 64 (0.008) would not. bf16, being so near, has more room.
KL_MAX = {"hub/f32": 0.0, "hub/bf16": 2e-4, "hub/keep": 5e-3, "hub/int8": 6.5e-3, "hub/int4": 4e-1}
# Of ln(perplexity) of one text, between two engines that compute the same weights in f32: they differ in the order of sums alone.
ENGINES_APART_MAX = 1e-3


def row(engine: str, model: dict) -> str:
    ratio, kl = model["ln_perplexity_ratio"], model["kl"]
    mean, median, most = (max(0.0, figure) for figure in (kl["mean"], model["kl_p50"], model["kl_p99"]))  # llama.cpp's rounding gives -1e-6
    return (
        f"| {engine} {model['model'].removeprefix('hub/')} | {model['bytes'] / 1e6:.0f} | {model['perplexity']:.3f} "
        f"| {100 * ratio['mean']:+.2f} ± {100 * ratio['standard_error']:.2f} | {mean:.5f} ± {kl['standard_error']:.5f} "
        f"| {median:.5f} | {most:.5f} | {100 * model['same_top_share']:.2f} |"
    )


def main(folder: Path) -> int:
    ours = json.loads((folder / "ashlar.json").read_text())
    models = {model["model"]: model for model in ours["models"]}
    f32 = models["hub/f32"]
    theirs_file = folder / "llama.json"
    theirs = json.loads(theirs_file.read_text()) if theirs_file.exists() else None
    print(f"Ashlar {ours['version']} at {ours['commit']}{', ' + theirs['peer'] if theirs else ''}; {ours['device']}; {ours['machine']}")
    print(f"text {ours['text_blake3'][:12]}; keys and values {ours.get('kv_format', 'f32')}; bf16 weights from {ours.get('bf16_compute', 'f32')} activations")
    print(f"{f32['rows']} predictions in {ours['windows']} windows of {ours['window_tokens']} tokens; perplexity ± {f32['perplexity_standard_error']:.2f}")
    print("| form | MB | perplexity | ln of its ratio to f32, % | mean KL | median KL | KL, 99th percentile | same top, % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in models.values():
        print(row("Ashlar", model))
    failures = [
        f"{name} is {models[name]['kl']['mean']:.6f} from f32, at most {most}" for name, most in KL_MAX.items() if not models[name]["kl"]["mean"] <= most
    ]
    if theirs:
        for model in theirs["models"]:
            print(row("llama.cpp", model))
        apart = abs(f32["perplexity"] / theirs["models"][0]["perplexity"] - 1)
        if not apart <= ENGINES_APART_MAX:
            failures.append(f"the f32 perplexities of the two engines are {100 * apart:.3f} % apart: other windows, or other arithmetic")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
