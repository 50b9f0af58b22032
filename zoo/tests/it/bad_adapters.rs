//! Adapters that lie, lack something or cannot be served: one error that names the tensor or key, and nothing written.

use std::path::{Path, PathBuf};

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, VOCAB, add_dir, tiny};
use ashlar_zoo::ingest::Recipe;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

/// The error and what caused it, as people see it.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Every file of the zoo with its bytes' length.
fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push((entry.path(), entry.metadata().unwrap().len()));
        }
    }
    found.sort();
    found
}

type Break = Box<dyn Fn(&mut Peft)>;

const Q: &str = "model.layers.0.self_attn.q_proj";
const Q_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const Q_B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

fn config(key: &'static str, value: Value) -> Break {
    Box::new(move |peft| peft.config[key] = value.clone())
}

/// A change; what it returns does not matter.
fn edit<T>(change: impl Fn(&mut Peft) -> T + 'static) -> Break {
    Box::new(move |peft| {
        change(peft);
    })
}

fn lora(module: &'static str, inputs: usize, outputs: usize, rank: usize) -> Break {
    edit(move |peft| peft.lora(module, (inputs, outputs), rank, 3).tensors.len())
}

fn whole(name: &'static str, shape: Vec<usize>, saved: &'static [&'static str]) -> Break {
    Box::new(move |peft| {
        peft.tensor(name, shape.clone(), 3);
        peft.config["modules_to_save"] = json!(saved);
    })
}

#[tokio::test]
async fn each_is_refused_by_name_before_anything_is_written() {
    let cases: Vec<(&str, Break, &str)> = vec![
        ("another method", config("peft_type", json!("IA3")), "`peft_type` = IA3 is not supported: only LORA is"),
        ("DoRA", config("use_dora", json!(true)), "`use_dora` = true is not supported"),
        ("a method of the future", config("use_new", json!(true)), "`use_new` = true is not supported"),
        ("rank of no number", config("r", json!("four")), "the adapter cannot be served: `r` is \"four\""),
        ("a rank that lies", config("r", json!(8)), leaked(format!("tensor `{Q_A}` has rank 4, adapter_config.json says 8"))),
        ("a pattern that lies", config("rank_pattern", json!({"q_proj": 2})), "has rank 4, adapter_config.json says 2"),
        (
            "one factor's rank",
            edit(|p| p.tensors.get_mut(Q_B).unwrap().0 = vec![32, 8]),
            "lora_B.weight` has shape [32, 8], over demo/base it is [64, 4]",
        ),
        (
            "huge rank",
            edit(|p| {
                p.config["r"] = json!(1025);
                p.tensors.clear();
                p.lora(Q, (D, 64), 1025, 1);
            }),
            "has rank 1025, more than 1024",
        ),
        ("infinite alpha", config("lora_alpha", json!(1e300)), "would be scaled by inf, more than 65536: its lora_alpha is too large"),
        ("huge alpha", config("lora_alpha", json!(-1e39)), ", more than 65536: its lora_alpha is too large"),
        ("NaN", edit(|p| p.tensors.get_mut(Q_A).unwrap().1[5] = f32::NAN), "lora_A.weight` holds NaN (element 5)"),
        ("infinity", edit(|p| p.tensors.get_mut(Q_B).unwrap().1[7] = f32::INFINITY), "lora_B.weight` holds an infinity (element 7)"),
        (
            "NaN beside a zero",
            edit(|p| {
                p.tensors.get_mut(Q_B).unwrap().1.fill(0.0);
                p.tensors.get_mut(Q_A).unwrap().1[0] = f32::NAN;
            }),
            "holds NaN (element 0)",
        ),
        ("A without B", edit(|p| p.tensors.remove(Q_B)), leaked(format!("tensor `{Q_A}` has no lora_B beside it"))),
        ("B without A", edit(|p| p.tensors.remove(Q_A)), leaked(format!("tensor `{Q_B}` has no lora_A beside it"))),
        (
            "both namings",
            edit(|p| {
                let a = p.tensors[Q_A].clone();
                p.tensors.insert(Q_A.replace(".weight", ".default.weight"), a);
            }),
            "change the same matrix",
        ),
        ("two prefixes", lora("model.language_model.layers.0.self_attn.q_proj", D, 64, 4), "change the same matrix"),
        (
            "a layer too many",
            lora("model.layers.2.self_attn.q_proj", D, 64, 4),
            "`model.layers.2.self_attn.q_proj`, which demo/base does not have",
        ),
        (
            "factors that peft does not read",
            config("exclude_modules", json!(["q_proj"])),
            "exclude_modules in adapter_config.json names `model.layers.0.self_attn.q_proj`, of which adapter_model.safetensors has factors",
        ),
        ("no such module", lora("model.layers.0.self_attn.c_attn", D, 192, 4), "which demo/base does not have"),
        (
            "another base",
            lora("model.layers.0.self_attn.k_proj", D, 64, 4),
            "k_proj.lora_B.weight` has shape [64, 4], over demo/base it is [32, 4]",
        ),
        ("a vector", edit(|p| p.tensors.get_mut(Q_A).unwrap().0 = vec![256]), "has shape [256], a LoRA factor is a matrix"),
        (
            "nothing in it",
            edit(|p| *p.tensors.get_mut(Q_A).unwrap() = (vec![0, 64], vec![])),
            "has shape [0, 64], a LoRA factor is a matrix",
        ),
        ("the head", lora("lm_head", D, VOCAB, 4), "lm_head.lora_A.weight` is of a LoRA of the output projection"),
        (
            "the embedding",
            edit(|p| p.tensor("model.embed_tokens.lora_embedding_A", vec![4, VOCAB], 1).tensors.len()),
            "is of a LoRA of the embedding",
        ),
        ("a norm", lora("model.norm", D, D, 4), "is of a LoRA of the norm"),
        ("a DoRA in disguise", edit(|p| p.tensor(&format!("{Q}.lora_magnitude_vector"), vec![64], 1).tensors.len()), "belongs to DoRA"),
        ("a bias on B", edit(|p| p.tensor(&format!("{Q}.lora_B.bias"), vec![64], 1).tensors.len()), "is a bias on lora_B"),
        (
            "an unknown name",
            edit(|p| p.tensor(&format!("{Q}.lora_C.weight"), vec![4, 4], 1).tensors.len()),
            "lora_C.weight` is no LoRA factor",
        ),
        ("no prefix", edit(|p| p.tensors.insert("x".to_owned(), (vec![1], vec![0.0]))), "tensor `x` is no LoRA factor"),
        (
            "not targeted",
            config("target_modules", json!(["k_proj"])),
            "is of a module that target_modules and layers_to_transform in adapter_config.json do not name",
        ),
        ("unlisted", edit(|p| p.tensor("lm_head.weight", vec![VOCAB, D], 1).tensors.len()), "which neither modules_to_save nor bias"),
        ("unlisted bias", edit(|p| p.tensor(&format!("{Q}.bias"), vec![64], 1).tensors.len()), "which neither modules_to_save nor bias"),
        (
            "a larger vocabulary",
            whole("lm_head.weight", vec![VOCAB + 2, D], &["lm_head"]),
            "lm_head.weight` has shape [272, 64], over demo/base it is [270, 64]",
        ),
        ("a classifier", whole("score.weight", vec![2, D], &["score"]), "`score.weight`, which demo/base does not have"),
        (
            "a bias that the base lacks",
            edit(|p| {
                p.tensor(&format!("{Q}.bias"), vec![64], 1).config["bias"] = json!("lora_only");
            }),
            "which demo/base does not have",
        ),
        ("a save that failed", edit(|p| p.tensors.clear()), "has neither LoRA factors nor tensors saved whole"),
        (
            "a target without tensors",
            config("target_modules", json!(["q_proj", "o_proj"])),
            "target_modules in adapter_config.json names `o_proj`, of which adapter_model.safetensors has no tensors",
        ),
        (
            "a head without tensors",
            config("modules_to_save", json!(["lm_head"])),
            "modules_to_save in adapter_config.json names `lm_head`, of which adapter_model.safetensors has no tensors",
        ),
        (
            "a layer without factors",
            config("target_modules", json!(["q_proj"])),
            "names `model.layers.1.self_attn.q_proj`, of which adapter_model.safetensors has no factors",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let before = files(&dir.path().join("zoo"));
    for (index, (what, change, message)) in cases.into_iter().enumerate() {
        let mut peft = Peft::over("base");
        peft.lora(Q, (D, 64), 4, 1);
        change(&mut peft);
        let path = dir.path().join(format!("{index}"));
        peft.write(&path);
        let error = chain(&add_dir(&zoo, &path, "demo/a", Recipe::Keep).await.expect_err(what));
        assert!(error.contains(message), "{what}: {error}");
        assert_eq!(files(&dir.path().join("zoo")), before, "{what}");
    }
}

/// Messages live as long as the table.
fn leaked(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

#[tokio::test]
async fn files_that_are_missing_or_lie_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let mut peft = Peft::over("base");
    peft.lora(Q, (D, 64), 4, 1);
    let weights = "adapter_model.safetensors";
    let good = crate::support::safetensors(&peft.tensors);
    let mut integers = good.clone();
    let at = good.windows(3).position(|bytes| bytes == b"F32").unwrap();
    integers[at..at + 3].copy_from_slice(b"I32");
    for (what, name, bytes, message) in [
        ("pickled", weights, None, "it has no adapter_model.safetensors (pickled weights are never read)"),
        ("cut", weights, Some(good[..good.len() / 2].to_vec()), "lies outside the file"),
        ("a pickle", weights, Some(b"\x80\x02}q\x00.........".to_vec()), "is not valid safetensors"),
        ("integers", weights, Some(integers), "has type I32, which is not supported; in an adapter"),
        ("no JSON", "adapter_config.json", Some(b"{".to_vec()), "adapter_config.json is not a JSON object"),
        ("NaN", "adapter_config.json", Some(br#"{"peft_type":"LORA","lora_alpha":NaN}"#.to_vec()), "is not a JSON object"),
    ] {
        let path = dir.path().join(what);
        peft.write(&path);
        std::fs::remove_file(path.join(name)).unwrap();
        std::fs::write(path.join("adapter_model.bin"), b"pickle").unwrap();
        if let Some(bytes) = bytes {
            std::fs::write(path.join(name), bytes).unwrap();
        }
        let error = chain(&add_dir(&zoo, &path, "demo/a", Recipe::Keep).await.expect_err(what));
        assert!(error.contains(message), "{what}: {error}");
    }
}

/// Where peft itself leaves modules out, what is not there is a note at most.
#[tokio::test]
async fn what_the_configuration_explains_is_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let first = "`model.layers.1.self_attn.q_proj` has no factors, though its like in other layers has";
    for (what, change, notes) in [
        ("one layer", json!({"target_modules": ["q_proj"], "layers_to_transform": [0]}), &[][..]),
        ("a whole path", json!({"target_modules": [Q]}), &[]),
        ("excluded", json!({"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]}), &[first]),
        ("a pattern", json!({"target_modules": ".*q_proj"}), &[first]),
        ("all", json!({"target_modules": "all-linear"}), &[first]),
        (
            "not the base's",
            json!({"target_modules": ["q_proj", "c_attn"], "layers_to_transform": 0}),
            &["target_modules names `c_attn`, of which the adapter has no tensors"],
        ),
        ("biases that the base lacks", json!({"bias": "all", "target_modules": [Q]}), &[]),
    ] {
        let mut peft = Peft::over("demo/base");
        peft.lora(Q, (D, 64), 4, 1).config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let path = dir.path().join(what);
        peft.write(&path);
        let report = add_dir(&zoo, &path, "demo/a", Recipe::Keep).await.unwrap_or_else(|e| panic!("{what}: {}", chain(&e)));
        assert_eq!(report.notes, notes, "{what}");
    }
}

#[tokio::test]
async fn biases_that_were_trained_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    add_dir(&zoo, &tiny().join("llama-bias"), "demo/llama-bias", Recipe::Keep).await.unwrap();
    for bias in ["none", "all", "lora_only"] {
        let mut peft = Peft::over("demo/llama-bias");
        peft.lora(Q, (64, 64), 4, 1).config["bias"] = json!(bias);
        peft.write(&dir.path().join(bias));
        let result = add_dir(&zoo, &dir.path().join(bias), "demo/a", Recipe::Keep).await;
        match bias {
            "none" => assert!(result.is_ok()),
            _ => assert!(chain(&result.unwrap_err()).contains("says that biases such as `layers.0."), "{bias}"),
        }
    }
}

/// llama.cpp's converter adds Gemma's 1 to its norms, so a whole norm of transformers does not fit over them.
#[tokio::test]
async fn a_norm_over_a_gguf_gemma_is_refused_and_over_its_directory_taken() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    for (base, path, width, taken) in
        [("gguf-gemma3", tiny().join("gguf-gemma3/model.gguf"), None, false), ("gemma3", tiny().join("gemma3"), Some(96), true)]
    {
        let report = add_dir(&zoo, &path, &format!("demo/{base}"), Recipe::Keep).await.unwrap();
        let width = width.unwrap_or(zoo.read_chain(report.chain).await.unwrap().width as usize);
        let mut peft = Peft::over(base);
        peft.tensor("model.norm.weight", vec![width], 1).config["modules_to_save"] = json!(["norm"]);
        peft.write(&dir.path().join(base));
        let result = add_dir(&zoo, &dir.path().join(base), "demo/a", Recipe::Keep).await;
        match taken {
            true => assert_eq!(result.unwrap().blocks.present, 9),
            false => assert!(chain(&result.unwrap_err()).contains("is a norm, and demo/gguf-gemma3 comes from a GGUF file")),
        }
    }
}
