//! Checkpoints that lie, lack something or cannot be served: one error that names it, and nothing written.

use crate::support::{Checkpoint, VOCAB, add_dir, tokenizer};
use ashlar_zoo::ingest::Recipe;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

/// The error and what caused it, as people see it.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

type Break = Box<dyn Fn(&mut Checkpoint)>;

fn config(key: &'static str, value: Value) -> Break {
    Box::new(move |checkpoint| checkpoint.config[key] = value.clone())
}

fn tensor(name: &'static str, change: impl Fn(&mut (Vec<usize>, Vec<f32>)) + 'static) -> Break {
    Box::new(move |checkpoint| change(checkpoint.tensors.get_mut(name).unwrap()))
}

#[tokio::test]
async fn each_is_refused_by_name_before_anything_is_written() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let cases: Vec<(&str, Break, &str)> = vec![
        ("unknown architecture", config("architectures", json!(["MambaForCausalLM"])), "architecture `MambaForCausalLM` is not supported"),
        ("missing key", Box::new(|c| drop(c.config.as_object_mut().unwrap().remove("hidden_size"))), "`hidden_size` is missing"),
        ("wrong type", config("hidden_size", json!("64")), "`hidden_size` is \"64\", expected an integer from 1 to 4294967295"),
        ("negative", config("num_hidden_layers", json!(-1)), "`num_hidden_layers` is -1"),
        ("absurd layers", config("num_hidden_layers", json!(1_000_000)), "at most 2047 layers"),
        ("absurd width", config("hidden_size", json!(4_000_000_000u32)), "makes no sense for the embed block: `width` is out of range"),
        ("zero heads", config("num_attention_heads", json!(0)), "`num_attention_heads` is 0"),
        ("heads do not divide", config("num_key_value_heads", json!(3)), "makes no sense for the attention block of layer 0: `kv_heads`"),
        ("unknown rope", config("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})), "\"yarn\" is not supported"),
        ("bad rope", config("rope_scaling", json!({"rope_type": "linear"})), "`factor` is missing"),
        ("rope of no object", config("rope_scaling", json!(3)), "`rope_scaling` is 3, expected an object"),
        ("experts", config("num_local_experts", json!(8)), "`num_local_experts` = 8 is not supported"),
        ("quantised", config("quantization_config", json!({"quant_method": "gptq"})), "`quantization_config.bits` is missing"),
        ("tiny rope base", config("rope_theta", json!(1e-300)), "`rope.theta` is out of range"),
        ("tiny rope factor", config("rope_scaling", json!({"rope_type": "linear", "factor": 1e-300})), "`rope.factor` is out of range"),
        ("unknown activation", config("hidden_act", json!("xielu")), "`hidden_act` = xielu"),
        ("negative eps", config("rms_norm_eps", json!(-1.0)), "`norm.eps` is out of range"),
        (
            "missing tensor",
            Box::new(|c| drop(c.tensors.remove(Q))),
            "tensor `model.layers.0.self_attn.q_proj.weight` is missing (it is `q.weight` of the attention block of layer 0)",
        ),
        (
            "unexpected tensor",
            Box::new(|c| drop(c.tensors.insert("model.layers.0.extra".to_owned(), (vec![2], vec![0.0; 2])))),
            "tensor `model.layers.0.extra` is not part of a llama model",
        ),
        ("more layers than stated", config("num_hidden_layers", json!(1)), "is not part of a llama model (and 8 more)"),
        ("mis-shaped", tensor(Q, |t| t.0 = vec![32, 128]), "has shape [32, 128], the configuration implies [64, 64]"),
        ("rank 3", tensor(Q, |t| t.0 = vec![1, 64, 64]), "has shape [1, 64, 64]"),
        ("vocabulary", config("vocab_size", json!(VOCAB + 1)), "the configuration implies [271, 64]"),
        ("NaN", tensor(Q, |t| t.1[70] = f32::NAN), "tensor `model.layers.0.self_attn.q_proj.weight` holds NaN (element 70)"),
        (
            "infinity",
            tensor("model.norm.weight", |t| t.1[3] = f32::NEG_INFINITY),
            "tensor `model.norm.weight` holds an infinity (element 3)",
        ),
        ("untied", config("tie_word_embeddings", json!(true)), "`lm_head.weight` differs from it"),
        (
            "large tokenizer",
            Box::new(|c| drop(c.files.insert("tokenizer.json".to_owned(), tokenizer(VOCAB + 5)))),
            "has id 274, but the embedding has 270 rows",
        ),
        ("no tokenizer", Box::new(|c| drop(c.files.remove("tokenizer.json"))), "tokenizer.json is missing"),
        (
            "broken tokenizer",
            Box::new(|c| drop(c.files.insert("tokenizer.json".to_owned(), b"{}".to_vec()))),
            "tokenizer.json cannot be loaded",
        ),
        (
            "index of nothing",
            Box::new(|c| {
                drop(c.files.insert("model.safetensors.index.json".to_owned(), br#"{"weight_map":{"a":"../a.safetensors"}}"#.to_vec()))
            }),
            "shard name `../a.safetensors` is not a plain file name",
        ),
        (
            "index without map",
            Box::new(|c| drop(c.files.insert("model.safetensors.index.json".to_owned(), b"{}".to_vec()))),
            "not a valid shard index",
        ),
        (
            "index of a missing shard",
            Box::new(|c| {
                drop(c.files.insert("model.safetensors.index.json".to_owned(), br#"{"weight_map":{"a":"b.safetensors"}}"#.to_vec()))
            }),
            "b.safetensors",
        ),
        (
            "index of a missing tensor",
            Box::new(|c| {
                drop(c.files.insert("model.safetensors.index.json".to_owned(), br#"{"weight_map":{"a":"model.safetensors"}}"#.to_vec()))
            }),
            "tensor `a` is in no shard",
        ),
        (
            "generation config",
            Box::new(|c| drop(c.files.insert("generation_config.json".to_owned(), br#"{"temperature":"hot"}"#.to_vec()))),
            "`temperature` is \"hot\"",
        ),
        (
            "generation defaults that no request may ask for",
            Box::new(|c| drop(c.files.insert("generation_config.json".to_owned(), br#"{"top_p":9}"#.to_vec()))),
            "`top_p` is 9, expected a number from 0 to 1",
        ),
        (
            "no JSON",
            Box::new(|c| drop(c.files.insert("tokenizer_config.json".to_owned(), b"[".to_vec()))),
            "tokenizer_config.json is not a JSON object",
        ),
    ];
    for (what, change, message) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoint = Checkpoint::llama(1);
        change(&mut checkpoint);
        checkpoint.write(&dir.path().join("a"));
        let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
        let error = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.expect_err(what);
        let error = chain(&error);
        assert!(error.contains(message), "{what}: {error}");
        let written: Vec<_> = std::fs::read_dir(dir.path().join("zoo")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(written, ["format.json"], "{what}");
    }
}

/// A pipe without a writer would be waited for without end.
#[cfg(unix)]
#[tokio::test]
async fn files_that_are_no_plain_files_are_refused() {
    for name in ["model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        Checkpoint::llama(1).write(&path);
        drop(std::fs::remove_file(path.join(name)));
        assert!(std::process::Command::new("mkfifo").arg(path.join(name)).status().unwrap().success());
        let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
        let error = chain(&add_dir(&zoo, &path, "demo/a", Recipe::Keep).await.expect_err(name));
        assert!(error.contains("not a plain file") && error.contains(name), "{name}: {error}");
    }
}

#[tokio::test]
async fn weights_files_that_lie_are_refused() {
    let good = Checkpoint::llama(1).safetensors();
    let mut long = good.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for (what, bytes, message) in [
        ("truncated", good[..good.len() / 2].to_vec(), "lies outside the file"),
        ("empty", Vec::new(), "ends within its header"),
        ("huge header", long, "claims"),
        ("pickle", b"\x80\x02}q\x00.........".to_vec(), "not valid safetensors"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        Checkpoint::llama(1).write(&dir.path().join("a"));
        std::fs::write(dir.path().join("a/model.safetensors"), &bytes).unwrap();
        let gguf = dir.path().join("b.gguf");
        std::fs::write(&gguf, &bytes).unwrap();
        let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
        let error = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.expect_err(what);
        assert!(chain(&error).contains(message), "{what}: {error}");
        let error = add_dir(&zoo, &gguf, "demo/a", Recipe::Keep).await.expect_err(what);
        assert!(chain(&error).contains("does not begin with GGUF"), "{what}: {error}");
    }
}

#[tokio::test]
async fn paths_without_a_checkpoint_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    std::fs::write(dir.path().join("x.bin"), b"x").unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    std::fs::create_dir(dir.path().join("pickled")).unwrap();
    std::fs::write(dir.path().join("pickled/config.json"), b"{}").unwrap();
    for (path, message) in [
        ("nowhere", "failed to read"),
        ("x.bin", "neither a directory nor a .gguf file"),
        ("empty", "no config.json"),
        ("pickled", "pickled weights are never read"),
    ] {
        let error = add_dir(&zoo, &dir.path().join(path), "demo/a", Recipe::Keep).await.expect_err(path).to_string();
        assert!(error.contains(message), "{path}: {error}");
    }
}

#[tokio::test]
async fn a_weight_outside_the_range_of_the_wanted_dtype_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    // Scales are f16: 127 or 8 times the largest is the most that a group of codes reaches.
    let cases = [
        (f32::MAX, Recipe::Bf16, "holds 3.4028235e38 (element 70), which would be inf in bf16: add it with another --dtype"),
        (1e9, Recipe::Int8, "holds 1e9 (element 70), which would be 8.319008e6 in int8g32"),
        (-4e6, Recipe::Int4, "holds -4e6 (element 70), which would be -5.24032e5 in int4g32"),
        (6e5, Recipe::Int4, "holds 6e5 (element 70), which would be "),
    ];
    for (value, recipe, sentence) in cases {
        let mut checkpoint = Checkpoint::llama(1);
        checkpoint.tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap().1[70] = value;
        checkpoint.write(&dir.path().join("a"));
        let error = add_dir(&zoo, &dir.path().join("a"), "demo/a", recipe).await.unwrap_err();
        let sentence = format!("tensor `model.layers.0.self_attn.q_proj.weight` {sentence}");
        assert!(chain(&error).contains(&sentence), "{}", chain(&error));
        assert!(zoo.list_models().await.unwrap().is_empty());
    }
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().1.iter_mut().for_each(|weight| *weight *= 1e-9);
    checkpoint.write(&dir.path().join("a"));
    let error = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Int8).await.unwrap_err();
    assert!(chain(&error).contains("which would be 0e0 in int8g32"), "{}", chain(&error));
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
}
