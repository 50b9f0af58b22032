//! From the zoo back to a Hugging Face directory: adding what was exported gives the same chain, for every family.

use std::path::{Path, PathBuf};

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, HEAD_DIM, HEADS, INNER, add_dir, make_public, tiny};
use ashlar_zoo::export::{ExportError, export};
use ashlar_zoo::formats::{TensorFiles, shards};
use ashlar_zoo::ingest::{AddOptions, AddReport, Recipe, Silent, add};
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

async fn zoo() -> (tempfile::TempDir, Zoo) {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    make_public(&zoo, &["demo", "tiny"]).await;
    (dir, zoo)
}

async fn chain_of(zoo: &Zoo, report: &AddReport) -> Chain {
    zoo.read_chain(report.chain).await.unwrap()
}

/// Adds a directory as what came from another place.
async fn add_again(zoo: &Zoo, dir: &Path, source: &str) -> AddReport {
    let options = AddOptions { source: Some(source.to_owned()), ..AddOptions::new("again/x".parse().unwrap()) };
    add(zoo, dir, &options, &Silent).await.unwrap()
}

fn tiny_models() -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(tiny()).expect("the tiny models are in the repository").map(|entry| entry.unwrap().path());
    let mut models: Vec<_> =
        entries.filter(|path| path.is_dir()).map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), path)).collect();
    models.sort();
    models
}

/// The tensor's bytes, wherever a name begins.
fn same_as(files: &TensorFiles, name: &str, bytes: &[u8]) -> bool {
    let ends = |other: &&str| *other == name || other.ends_with(&format!(".{name}")) || name.ends_with(&format!(".{other}"));
    files.names().find(ends).and_then(|name| files.bytes(name)).is_some_and(|other| other.as_ref() == bytes)
}

#[tokio::test]
async fn every_family_comes_back_as_it_was() {
    let (dir, zoo) = zoo().await;
    let (mut families, mut count) = (std::collections::BTreeSet::new(), 0);
    for (name, path) in tiny_models().into_iter().filter(|(_, path)| !path.join("model.gguf").exists()) {
        let added = add_dir(&zoo, &path, &format!("tiny/{name}"), Recipe::Keep).await.unwrap();
        let before = chain_of(&zoo, &added).await;
        let out = dir.path().join(&name);
        let report = export(&zoo, &format!("tiny/{name}").parse().unwrap(), &out).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let (source, exported) = (shards::open(&path).unwrap(), shards::open(&out).unwrap());
        assert_eq!(exported.names().count(), report.tensors, "{name}");
        for tensor in exported.names() {
            assert!(same_as(&source, tensor, exported.bytes(tensor).unwrap().as_ref()), "{name}: {tensor}");
        }
        let again = add_again(&zoo, &out, &before.source).await;
        assert_eq!(chain_of(&zoo, &again).await, before, "{name}");
        assert_eq!((again.chain, again.bytes_new), (added.chain, 0), "{name}");
        families.insert(before.architecture);
        count += 1;
    }
    assert!(count >= 12, "only {count}");
    let all = ["gemma2", "gemma3", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3"];
    assert_eq!(families.into_iter().collect::<Vec<_>>(), all);
}

/// What transformers calls not sampling is a temperature of 0, and comes back as what it was.
#[tokio::test]
async fn a_greedy_model_stays_greedy() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    let written = json!({"do_sample": false, "temperature": 0.6, "top_p": 0.9}).to_string();
    checkpoint.files.insert("generation_config.json".to_owned(), written.into_bytes());
    checkpoint.write(&dir.path().join("a"));
    let before = chain_of(&zoo, &add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap()).await;
    assert_eq!((before.defaults.temperature, before.defaults.top_p), (Some(0.0), Some(0.9)));
    let out = dir.path().join("out");
    export(&zoo, &"demo/a".parse().unwrap(), &out).await.unwrap();
    let exported: Value = serde_json::from_slice(&std::fs::read(out.join("generation_config.json")).unwrap()).unwrap();
    assert_eq!(exported, json!({"bos_token_id": before.tokens.bos, "eos_token_id": before.tokens.eos, "top_p": 0.9, "do_sample": false}));
    let again = add_again(&zoo, &out, &before.source).await;
    assert_eq!(chain_of(&zoo, &again).await, before);
}

#[tokio::test]
async fn what_came_as_gguf_goes_as_a_directory_where_its_numbers_can() {
    let (dir, zoo) = zoo().await;
    let mut told = Vec::new();
    for (name, path) in tiny_models().into_iter().filter(|(_, path)| path.join("model.gguf").exists()) {
        let added = add_dir(&zoo, &path.join("model.gguf"), &format!("tiny/{name}"), Recipe::F32).await.unwrap();
        let before = chain_of(&zoo, &added).await;
        let out = dir.path().join(&name);
        match export(&zoo, &format!("tiny/{name}").parse().unwrap(), &out).await {
            Ok(_) => {
                let again = add_again(&zoo, &out, &before.source).await;
                let after = chain_of(&zoo, &again).await;
                assert_eq!(
                    (after.blocks, after.tokens, after.context_tokens),
                    (before.blocks, before.tokens, before.context_tokens),
                    "{name}"
                );
                told.push(format!("{name} ok"));
            }
            Err(error) => told.push(format!("{name} {error}")),
        }
    }
    let gemma = "config.json of a gemma3 model cannot say what block 1 is here";
    let expected = [
        format!("gguf-gemma3 {gemma}"),
        "gguf-gpt2 ok".to_owned(),
        "gguf-llama ok".to_owned(),
        "gguf-llama-k ok".to_owned(),
        "gguf-phi3 ok".to_owned(),
        "gguf-qwen2 ok".to_owned(),
        "gguf-qwen3 ok".to_owned(),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn of_quantised_checkpoints_only_what_became_floats_goes_back() {
    let (dir, zoo) = zoo().await;
    let quantised = |name: &str| tiny().parent().unwrap().join("quantised").join(name);
    for (name, dtype) in
        [("gptq-llama", "int4zg32"), ("gptq-gpt2", "int4g32"), ("ct-mistral-int8", "int8g512"), ("fp8-qwen3-blocks", "fp8g32")]
    {
        add_dir(&zoo, &quantised(name), "demo/a", Recipe::Keep).await.unwrap();
        let out = dir.path().join(name);
        let error = export(&zoo, &"demo/a".parse().unwrap(), &out).await.unwrap_err().to_string();
        assert!(error.contains(&format!("is stored as {dtype}, which is no element type of a Hugging Face checkpoint")), "{name}: {error}");
        assert!(!out.exists(), "{name}");
    }
    let added = add_dir(&zoo, &quantised("gptq-qwen2-order"), "demo/b", Recipe::Keep).await.unwrap();
    let before = chain_of(&zoo, &added).await;
    let out = dir.path().join("out");
    export(&zoo, &"demo/b".parse().unwrap(), &out).await.unwrap();
    let again = add_again(&zoo, &out, &before.source).await;
    assert_eq!((chain_of(&zoo, &again).await, again.bytes_new), (before, 0));
}

#[tokio::test]
async fn what_has_no_such_form_is_told_and_nothing_is_written() {
    let (dir, zoo) = zoo().await;
    Checkpoint::llama(1).write(&dir.path().join("a"));
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Int8).await.unwrap();
    let out = dir.path().join("out");
    let error = export(&zoo, &"demo/a".parse().unwrap(), &out).await.unwrap_err();
    assert!(error.to_string().starts_with("tensor `lm_head.weight` is stored as int8g32, which is no element type"), "{error}");
    assert!(!out.exists());
    export(&zoo, &"demo/none".parse().unwrap(), &out).await.unwrap_err();

    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    std::fs::create_dir(&out).unwrap();
    export(&zoo, &"demo/a".parse().unwrap(), &out).await.expect("an empty directory is as good as none");
    for there in [out.clone(), out.join("config.json")] {
        let error = export(&zoo, &"demo/a".parse().unwrap(), &there).await.unwrap_err();
        assert!(matches!(error, ExportError::Exists(_)), "{error}");
    }
    for unnamed in [Path::new("."), Path::new("/"), &dir.path().join("none/..")] {
        let error = export(&zoo, &"demo/a".parse().unwrap(), unnamed).await.unwrap_err();
        assert!(matches!(error, ExportError::Exists(_) | ExportError::Unnamed(_) | ExportError::Io { .. }), "{error}");
    }
    export(&zoo, &"demo/a".parse().unwrap(), &dir.path().join("new/deep/")).await.expect("folders above it are made");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_str().unwrap().ends_with(".partial")), "{names:?}");
}

#[tokio::test]
async fn an_adapter_comes_back_as_one_over_its_base() {
    let (dir, zoo) = zoo().await;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    add_dir(&zoo, &demo.join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let options = AddOptions { parent: Some("demo/base".parse().unwrap()), ..AddOptions::new("demo/names".parse().unwrap()) };
    let added = add(&zoo, &demo.join("names-lora"), &options, &Silent).await.unwrap();
    let before = chain_of(&zoo, &added).await;
    let out = dir.path().join("out");
    export(&zoo, &"demo/names".parse().unwrap(), &out).await.unwrap();
    let again = add_again(&zoo, &out, &before.source).await;
    assert_eq!((again.chain, again.bytes_new), (added.chain, 0));

    zoo.remove_model(&"demo/base".parse().unwrap()).await.unwrap();
    let error = export(&zoo, &"demo/names".parse().unwrap(), &dir.path().join("none")).await.unwrap_err();
    assert_eq!(error.to_string(), "it is an adapter, and cannot be parted from its base: model demo/base is not in the zoo");
}

/// Factors of one layer alone, of other ranks, and of a fused module of which a part is zero: PEFT's own names and numbers come back.
#[tokio::test]
async fn uneven_adapters_come_back() {
    let (dir, zoo) = zoo().await;
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    add_dir(&zoo, &tiny().join("gpt2"), "demo/gpt2", Recipe::Keep).await.unwrap();
    let width = chain_of(&zoo, &add_dir(&zoo, &tiny().join("gpt2"), "demo/gpt2", Recipe::Keep).await.unwrap()).await.width as usize;

    let mut first = Peft::over("demo/base");
    first.lora("model.layers.0.self_attn.q_proj", (D, HEADS * HEAD_DIM), 4, 1);
    first.lora("model.layers.0.mlp.down_proj", (INNER, D), 8, 2);
    first.config["rank_pattern"] = json!({"down_proj": 8});
    let mut partly = Peft::over("demo/gpt2");
    partly.lora("transformer.h.0.attn.c_attn", (width, 3 * width), 4, 3);
    // The rows of k.
    let (_, rows) = partly.tensors.get_mut("base_model.model.transformer.h.0.attn.c_attn.lora_B.weight").unwrap();
    rows[4 * width..8 * width].fill(0.0);
    for (name, peft) in [("first", first), ("partly", partly)] {
        let (folder, out) = (dir.path().join(name), dir.path().join(format!("{name}-out")));
        peft.write(&folder);
        let added = add_dir(&zoo, &folder, &format!("demo/{name}"), Recipe::Keep).await.unwrap_or_else(|e| panic!("{name}: {e:?}"));
        export(&zoo, &format!("demo/{name}").parse().unwrap(), &out).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let again = add_again(&zoo, &out, &chain_of(&zoo, &added).await.source).await;
        assert_eq!((again.chain, again.bytes_new), (added.chain, 0), "{name}");
    }
}
