"""The rows of bench/forms.sh: makes the models and the texts, measures each form with the program, and prints tables. One JSON file a row."""

import argparse
import csv
import ctypes
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy
from gguf import GGUFValueType, GGUFWriter

BINARY = os.environ["ASHLAR_BIN"]
WINDOW = 512
RECIPES = ["int8-g32", "int8-g64", "int4-g32", "int4-g64", "int4-g128", "int4m-g32", "int4m-g64", "fp8", "fp8-g64"]
CALIBRATED = ["int4-g32", "int4m-g32", "int4m-g64", "int4-g128"]
# llama.cpp's numbers for them (enum llama_ftype).
LLAMA = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
DELTAS = ["svd:16", "svd:64", "bitdelta"]
SURROGATES = [["--ffn-keep", "0.875"], ["--ffn-keep", "0.75"], ["--ffn-keep", "0.5"], ["--ffn-keep", "0.75", "--blocks", "20..50"]]


def checkpoint(folder: Path) -> dict[str, numpy.ndarray]:
    """All tensors of a checkpoint of one file, as f32."""
    raw = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    head, start = json.loads(raw[8 : 8 + size]), 8 + size
    tensors = {}
    for name, entry in head.items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        bits = numpy.frombuffer(raw[begin:end], numpy.uint16).astype(numpy.uint32) << 16
        tensors[name] = bits.view(numpy.float32).reshape(entry["shape"])
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, numpy.ndarray]) -> None:
    """One file of bf16, rounded to nearest, ties to even."""
    head, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        bits = numpy.ascontiguousarray(tensor, numpy.float32).view(numpy.uint32)
        part = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16).tobytes()
        head[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(parts)


def turn(source: Path, target: Path) -> None:
    """The same function in other weights: with x -> x Q for an orthogonal Q, what writes to the residual stream is turned, and what reads it turned
    back; norms weigh nothing any more, as their weights are in the matrices that read them."""
    tensors = {name: tensor.astype(numpy.float64) for name, tensor in checkpoint(source).items()}
    width = tensors["model.norm.weight"].shape[0]
    q, r = numpy.linalg.qr(numpy.random.default_rng(1).standard_normal((width, width)))
    q *= numpy.sign(numpy.diag(r))
    table = tensors["model.embed_tokens.weight"]
    turned = {
        "model.embed_tokens.weight": table @ q,
        "lm_head.weight": tensors.get("lm_head.weight", table) * tensors["model.norm.weight"] @ q,
        "model.norm.weight": numpy.ones(width),
    }
    for name, tensor in tensors.items():
        if ".layers." not in name:
            continue
        layer = ".".join(name.split(".")[:3])
        if "layernorm" in name:
            turned[name] = numpy.ones(width)
        elif any(role in name for role in ("q_proj", "k_proj", "v_proj")):
            turned[name] = tensor * tensors[f"{layer}.input_layernorm.weight"] @ q
        elif any(role in name for role in ("gate_proj", "up_proj")):
            turned[name] = tensor * tensors[f"{layer}.post_attention_layernorm.weight"] @ q
        elif any(role in name for role in ("o_proj", "down_proj")):
            turned[name] = q.T @ tensor
        else:
            raise SystemExit(f"{name} is no tensor of this family")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    write_checkpoint(target, turned)


def write_gguf(source: Path, target: Path) -> None:
    """A checkpoint of the Llama family as GGUF, matrices in f32: what llama.cpp's quantiser reads. Its vocabulary is not there to be used."""
    config, partial = json.loads((source / "config.json").read_text()), target.with_suffix(".partial")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(partial, "llama")
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokens = [""] * config["vocab_size"]
    kinds = [1] * config["vocab_size"]
    for text, at in tokenizer["model"]["vocab"].items():
        tokens[at] = text
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", kinds)
    writer.add_array("tokenizer.ggml.merges", merges)
    special = {"bos_token_id": "bos", "eos_token_id": "eos"}
    for key, name in special.items():
        value = config[key][0] if isinstance(config.get(key), list) else config.get(key)
        if value is not None:
            writer.add_key_value(f"tokenizer.ggml.{name}_token_id", value, GGUFValueType.UINT32)
    names = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in checkpoint(source).items():
        path = name.removesuffix(".weight")
        if path.startswith("model.layers."):
            _, _, layer, role = path.split(".", 3)
            place = f"blk.{layer}.{names[role]}"
        else:
            place = names[path]
        for role, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if place.endswith(role):
                # The halves that rope turns lie side by side there.
                tensor = tensor.reshape(count, 2, tensor.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{place}.weight", numpy.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


class Parameters(ctypes.Structure):
    """The first fields of llama_model_quantize_params: threads and form; then flags, of which the first allows what was quantised before."""

    _fields_ = [("threads", ctypes.c_int32), ("form", ctypes.c_int32), ("others", ctypes.c_int32 * 2), ("flags", ctypes.c_uint8 * 240)]


class Llama:
    """llama.cpp's quantiser."""

    def __init__(self, libraries: Path):
        def load(name: str) -> ctypes.CDLL:
            found = sorted(libraries.glob(f"{name}.*"))
            if not found:
                raise SystemExit(f"error: {libraries} has no {name}")
            return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)

        load("libggml-base")
        ggml, self.llama = load("libggml"), load("libllama")
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(libraries).encode())
        self.llama.llama_model_quantize_default_params.restype = Parameters
        self.llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
        self.llama.llama_backend_init()

    def quantise(self, source: Path, target: Path, form: int) -> None:
        parameters = self.llama.llama_model_quantize_default_params()
        parameters.threads, parameters.form, parameters.flags[0] = os.cpu_count(), form, 1
        partial = target.with_suffix(".partial")
        if self.llama.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters)) != 0:
            raise SystemExit(f"error: llama.cpp did not write {target}")
        partial.rename(target)


def calibration(corpora: Path) -> str:
    """Prose, verse, questions and sums, a page of each in turn. None of it is text that forms are judged by."""
    if not corpora.is_dir():
        raise SystemExit(f"error: calibrated forms need a text: CALIBRATION=FILE, or the corpora in {corpora}")
    prose = (corpora / "botchan_en.txt").read_text(encoding="utf-8-sig")
    prose = prose[prose.index("A NOTE BY THE TRANSLATOR") :]
    with gzip.open(corpora / "gsm8k_train.jsonl.gz", "rt") as file:
        sums = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in map(json.loads, file))
    with (corpora / "banking77_train.csv").open() as file:
        questions = "\n".join(row["text"] for row in list(csv.DictReader(file))[::13])
    verse = (corpora / "tinyshakespeare.txt").read_text()
    pages = [[text[at : at + 2000] for at in range(0, 40_000, 2000)] for text in (prose, sums, verse, questions)]
    return "\n\n".join(page for turn in zip(*pages) for page in turn if page)


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.out, self.windows, self.tokens = arguments.out, str(arguments.windows), str(arguments.tokens)
        self.rows, self.zoo, self.text, self.calibration = self.out / "rows", self.out / "zoo", self.out / "text.txt", self.out / "calibration.txt"
        self.rows.mkdir(exist_ok=True)
        if arguments.calibration:
            shutil.copy(arguments.calibration, self.calibration)
        elif not self.calibration.exists() and {"calibrated", "surrogates"} & set(arguments.parts):
            self.calibration.write_text(calibration(arguments.corpora))

    def run(self, *command: str | Path) -> str:
        done = subprocess.run([BINARY, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(map(str, command))}\n{done.stderr.strip().splitlines()[-1]}")
        return done.stdout

    def add(self, source: Path, name: str) -> None:
        if not (self.zoo / f"models/hub/{name}.json").exists():
            self.run("zoo", "add", source, "--name", f"hub/{name}", "--zoo", self.zoo)

    def row(self, name: str, *command: str | Path) -> dict:
        """What a command says in JSON, this time or before."""
        kept = self.rows / f"{name}.json"
        if not kept.exists():
            print(f"measuring {name}", flush=True)
            said = self.run(*command, "--json", "--zoo", self.zoo)
            kept.with_suffix(".partial").write_text(said)
            kept.with_suffix(".partial").rename(kept)
        return json.loads(kept.read_text())

    def on(self) -> list[str | Path]:
        return ["--text", self.text, "--window", str(WINDOW), "--windows", self.windows]

    def quantised(self, model: str, recipe: str, calibrated: bool) -> dict:
        more = ["--calibrate", self.calibration, "--calibration-tokens", self.tokens] if calibrated else []
        name = f"{model}-{recipe}" + ("-gptq" if calibrated else "")
        return self.row(name, "zoo", "quantize", f"hub/{model}", "--recipe", recipe, *more, *self.on())["recipes"][0]

    def of_llama(self, model: str, llama: Llama) -> list[dict]:
        kept = self.rows / f"{model}-llama.json"
        if not kept.exists():
            whole = self.out / f"{model}.gguf"
            models = []
            for form, number in LLAMA.items():
                file = self.out / f"{model}-{form}.gguf"
                if not file.exists():
                    if not whole.exists():
                        write_gguf(self.out / model, whole)
                    llama.quantise(whole, file, number)
                self.add(file, f"{model}-{form}")
                models += ["--model", f"hub/{model}-{form}"]
            print(f"measuring {model} by llama.cpp", flush=True)
            tokens = str(int(self.windows) * WINDOW)
            command = ["bench", "quality", "--zoo", self.zoo, "--baseline", f"hub/{model}", *models, "--text", self.text]
            self.run(*command, "--window", str(WINDOW), "--tokens", tokens, "--json", kept)
        return json.loads(kept.read_text())["models"]


def without_lists(said):
    """What a command said but for what it lists by matrix and block."""
    if isinstance(said, dict):
        return {key: without_lists(value) for key, value in said.items() if key not in ("matrices", "blocks", "given_up", "own", "kept")}
    return [without_lists(one) for one in said] if isinstance(said, list) else said


def row_of(one: dict) -> str:
    mean, error = (one["ln_perplexity_ratio"][key] * 100 for key in ("mean", "standard_error"))
    kl = one["kl"]["mean"] if isinstance(one["kl"], dict) else one["kl"]
    start = f"{one['bytes'] / 1e6:.1f} | {one['perplexity']:.3f} | {mean:+.2f} ± {error:.2f}"
    return f"{start} | {kl:.4f} | {one['same_top_share'] * 100:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--finetunes", type=Path, required=True)
    parser.add_argument("--parts", type=str.split, required=True)
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {"rounded", "calibrated", "llama", "deltas", "surrogates"}:
        raise SystemExit(f"error: no such part: {', '.join(sorted(unknown))}")
    if not (arguments.finetunes / "full-a").is_dir():
        raise SystemExit(f"error: {arguments.finetunes} has no full-a: bench/finetunes.sh makes it")
    bench = Bench(arguments)
    for name in ("base", "full-a", "full-b", "full-c"):
        if name == "full-a" or "deltas" in arguments.parts:
            bench.add(arguments.finetunes / name, name)
    tuned, turned = bench.out / "tuned", bench.out / "turned"
    if not tuned.exists():
        tuned.symlink_to((arguments.finetunes / "full-a").resolve())
    if not turned.exists():
        turn(tuned, turned.with_suffix(".partial"))
        turned.with_suffix(".partial").rename(turned)
    models = ("tuned", "turned")
    for model in models:
        bench.add(bench.out / model, model)
    llama = Llama(arguments.llama.resolve()) if arguments.llama and "llama" in arguments.parts else None

    lines = ["| source | form | method | MB | perplexity | ln of its ratio to the source, % | mean KL | same top, % |", "| --- " * 8 + "|"]
    for model in models:
        if "rounded" in arguments.parts:
            lines += [f"| {model} | {recipe} | rounding | {row_of(bench.quantised(model, recipe, False))}" for recipe in RECIPES]
        if "calibrated" in arguments.parts:
            lines += [f"| {model} | {recipe} | GPTQ | {row_of(bench.quantised(model, recipe, True))}" for recipe in CALIBRATED]
        if llama:
            for one in bench.of_llama(model, llama):
                form = one["model"].rpartition("/")[2].removeprefix(model).removeprefix("-")
                lines.append(f"| {model} | {f'llama.cpp {form}' if form else 'bf16'} | | {row_of(one)}")
    if "surrogates" in arguments.parts:
        lines += ["", "| model | kept | method | MB | work, % | perplexity | mean KL | same top, % |", "| --- " * 8 + "|"]
        for cut in SURROGATES:
            name = "tuned-" + "-".join(word.strip("-") for word in cut)
            command = ["zoo", "surrogate", "hub/tuned", *cut, "--calibrate", bench.calibration, "--calibration-tokens", bench.tokens]
            said = bench.row(name, *command, *bench.on())
            for way in said["ways"]:
                start = f"| tuned | {said['surrogate']} | {way['method']} | {way['bytes'] / 1e6:.1f} | {way['work_share'] * 100:.0f} "
                lines.append(start + f"| {way['perplexity']:.2f} | {way['kl']:.4f} | {way['same_top_share'] * 100:.2f} |")
    if "deltas" in arguments.parts:
        lines += ["", "| model | form | MB | perplexity | mean KL | same top, % |", "| --- " * 6 + "|"]
        for model in ("full-a", "full-b", "full-c"):
            for method in DELTAS:
                name = f"{model}-{method.replace(':', '')}"
                command = ["zoo", "compress-delta", f"hub/{model}", "--method", method, "--base", "hub/base", "--text", bench.text]
                said = bench.row(name, *command)
                if method == DELTAS[0]:
                    alone = said["base_alone"]
                    lines.append(f"| {model} | the base alone | 0 | {alone['perplexity']:.3f} | {alone['kl']:.5f} | {alone['same_top_share'] * 100:.2f} |")
                one = said["compressed"]
                lines.append(f"| {model} | {method} | {said['bytes_after'] / 1e6:.1f} | {one['perplexity']:.3f} | {one['kl']:.5f} | {one['same_top_share'] * 100:.2f} |")
    table = "\n".join(lines)
    print(table)
    if arguments.results:
        digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None  # noqa: E731
        kept = {"text_sha256": digest(bench.text), "calibration_sha256": digest(bench.calibration), "binary_sha256": digest(Path(BINARY))}
        kept["rows"] = {path.stem: without_lists(json.loads(path.read_text())) for path in sorted(bench.rows.glob("*.json"))}
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
