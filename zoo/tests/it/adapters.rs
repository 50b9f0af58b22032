//! PEFT adapters: what becomes of their factors over a base, what they share with it, and who finds them afterwards.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, VOCAB, add_dir, make_public, tiny};
use ashlar_kernels::format::dequantise;
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{AddOptions, AddReport, IngestError, Recipe, Shared, Silent, add};
use ashlar_zoo::manifest::Chain;
use ashlar_zoo::store::{MappedChange, Zoo};
use ashlar_zoo::verify::verify;
use serde_json::json;

const Q: usize = HEADS * HEAD_DIM;
const KV: usize = KV_HEADS * HEAD_DIM;

/// Module, inputs and outputs of the small model's linear layers, by role.
const MODULES: [(&str, &str, usize, usize); 7] = [
    ("q.weight", "self_attn.q_proj", D, Q),
    ("k.weight", "self_attn.k_proj", D, KV),
    ("v.weight", "self_attn.v_proj", D, KV),
    ("o.weight", "self_attn.o_proj", Q, D),
    ("gate.weight", "mlp.gate_proj", D, INNER),
    ("up.weight", "mlp.up_proj", D, INNER),
    ("down.weight", "mlp.down_proj", INNER, D),
];

struct Fixture {
    dir: tempfile::TempDir,
    zoo: Zoo,
    base: Chain,
}

/// A zoo with the small model as `demo/base`.
async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("base"));
    let report = add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let base = zoo.read_chain(report.chain).await.unwrap();
    Fixture { dir, zoo, base }
}

impl Fixture {
    async fn add(&self, peft: &Peft, name: &str) -> Result<AddReport, IngestError> {
        let path = self.dir.path().join(name);
        peft.write(&path);
        add_dir(&self.zoo, &path, &format!("demo/{name}"), Recipe::Keep).await
    }

    async fn chain(&self, report: &AddReport) -> Chain {
        self.zoo.read_chain(report.chain).await.unwrap()
    }
}

/// All factors on q and v of every layer.
fn on_q_and_v(seed: u64) -> Peft {
    let mut peft = Peft::over("org/base");
    for layer in 0..LAYERS {
        for (_, module, inputs, outputs) in [MODULES[0], MODULES[2]] {
            peft.lora(&format!("model.layers.{layer}.{module}"), (inputs, outputs), 4, seed);
        }
    }
    peft
}

/// Scale, a and b of each change.
async fn changes(zoo: &Zoo, chain: &Chain, block: u32) -> BTreeMap<String, (f32, Vec<f32>, Vec<f32>)> {
    let digest = chain.adapters.iter().find(|adapter| adapter.block_index == block).unwrap().digest;
    let mapped = zoo.map_adapter(digest).await.unwrap();
    let values = |change: &MappedChange| match change {
        MappedChange::LowRank { scale, a, b } => (*scale, dequantise(&a.view()), dequantise(&b.view())),
        MappedChange::OneBit { .. } => panic!("no such change is added"),
    };
    mapped.changes.iter().map(|(role, change)| (role.clone(), values(change))).collect()
}

fn blocks_with_adapters(chain: &Chain) -> Vec<u32> {
    chain.adapters.iter().map(|adapter| adapter.block_index).collect()
}

#[tokio::test]
async fn factors_become_adapters_over_the_bases_own_blocks() {
    let fixture = fixture().await;
    let mut peft = Peft::over("org/base");
    for (_, module, inputs, outputs) in MODULES {
        peft.lora(&format!("model.layers.0.{module}"), (inputs, outputs), 4, 1);
    }
    peft.lora("model.layers.1.self_attn.q_proj", (D, Q), 3, 1);
    peft.config["rank_pattern"] = json!({"layers.1.self_attn.q_proj": 3});
    peft.config["alpha_pattern"] = json!({"self_attn.q_proj": 5});
    let report = fixture.add(&peft, "tuned").await.unwrap();
    let adapter_bytes: usize = peft.tensors.values().map(|(_, values)| values.len() * 4).sum();
    assert_eq!(report.base, Some("demo/base".parse().unwrap()));
    assert_eq!((report.blocks, report.adapters), (Shared { total: 6, present: 6 }, Shared { total: 3, present: 0 }));
    assert_eq!((report.tensors, report.bytes_new), (Shared { total: 21 + 16, present: 21 }, adapter_bytes as u64));
    assert_eq!(report.to_string(), "6 of 6 blocks, 0 of 3 adapters, 21 of 37 tensors already here; 16 kB new of 402 kB");

    let chain = fixture.chain(&report).await;
    assert_eq!(blocks_with_adapters(&chain), [1, 2, 3]);
    let base = fixture.base.clone();
    assert_eq!(Chain { adapters: Vec::new(), source: base.source.clone(), ..chain.clone() }, base, "all else is the base's");
    assert_eq!(chain.source, "tuned");
    let name = fixture.zoo.read_model(&"demo/tuned".parse().unwrap()).await.unwrap();
    assert_eq!(name.parent.as_deref(), Some("demo/base"));

    let stored = [changes(&fixture.zoo, &chain, 1).await, changes(&fixture.zoo, &chain, 2).await].concat_maps();
    for (role, module, ..) in MODULES {
        let (scale, a, b) = &stored[role];
        assert_eq!(*scale, if role == "q.weight" { 5.0 / 4.0 } else { 2.0 }, "{role}");
        assert_eq!(a, peft.values(&format!("model.layers.0.{module}.lora_A.weight")), "{role}");
        assert_eq!(b, peft.values(&format!("model.layers.0.{module}.lora_B.weight")), "{role}");
    }
    assert_eq!(changes(&fixture.zoo, &chain, 3).await["q.weight"].0, (5.0f64 / 3.0) as f32);

    // The same again, and under another name: nothing new.
    let again = fixture.add(&peft, "tuned").await.unwrap();
    assert_eq!((again.chain, again.bytes_new, again.adapters.present, again.replaced), (report.chain, 0, 3, None));
    let path = fixture.dir.path().join("tuned");
    make_public(&fixture.zoo, &["demo"]).await;
    let other = add_dir(&fixture.zoo, &path, "other/tuned", Recipe::Int8).await.unwrap();
    assert_eq!((other.chain, other.bytes_new), (report.chain, 0), "a recipe does not touch adapters");
}

trait ConcatMaps<T> {
    fn concat_maps(self) -> BTreeMap<String, T>;
}

impl<T, const N: usize> ConcatMaps<T> for [BTreeMap<String, T>; N] {
    fn concat_maps(self) -> BTreeMap<String, T> {
        self.into_iter().flatten().collect()
    }
}

#[tokio::test]
async fn an_adapter_of_equal_factors_on_two_blocks_is_one() {
    let fixture = fixture().await;
    let mut peft = Peft::over("base");
    peft.lora("model.layers.0.self_attn.q_proj", (D, Q), 4, 1);
    for factor in ["lora_A", "lora_B"] {
        let name = |layer: usize| format!("base_model.model.model.layers.{layer}.self_attn.q_proj.{factor}.weight");
        let first = peft.tensors[&name(0)].clone();
        peft.tensors.insert(name(1), first);
    }
    let report = fixture.add(&peft, "twice").await.unwrap();
    assert_eq!((report.adapters, report.tensors), (Shared { total: 1, present: 0 }, Shared { total: 23, present: 21 }));
    assert_eq!(blocks_with_adapters(&fixture.chain(&report).await), [1, 3]);
}

#[tokio::test]
async fn a_change_that_is_zero_is_left_out() {
    let fixture = fixture().await;
    let mut peft = on_q_and_v(1);
    for (name, values) in peft.tensors.iter_mut().map(|(name, (_, values))| (name, values)) {
        if name.contains("layers.0") && name.contains("lora_B") || name.contains("layers.1.self_attn.v_proj.lora_A") {
            values.fill(-0.0);
        }
    }
    let report = fixture.add(&peft, "fresh").await.unwrap();
    let chain = fixture.chain(&report).await;
    assert_eq!(blocks_with_adapters(&chain), [3]);
    assert_eq!(changes(&fixture.zoo, &chain, 3).await.keys().collect::<Vec<_>>(), ["q.weight"]);
    assert_eq!(report.tensors.total, 23);
    assert_eq!(report.notes[1..], ["3 changes are zero and were left out"]);
    peft.config["lora_alpha"] = json!(0);
    let report = fixture.add(&peft, "still").await.unwrap();
    assert_eq!((report.adapters.total, report.bytes_new), (0, 0));
}

#[tokio::test]
async fn fused_modules_are_split_by_rows_and_share_their_a() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    // Base, its modules with inputs and outputs, and the roles (with block) that each makes, in order of their rows.
    let phi3: [(&str, usize, usize, &[(u32, &str)]); 3] = [
        ("model.layers.1.self_attn.qkv_proj", 64, 128, &[(3, "q.weight"), (3, "k.weight"), (3, "v.weight")]),
        ("model.layers.1.self_attn.o_proj", 64, 64, &[(3, "o.weight")]),
        ("model.layers.1.mlp.gate_up_proj", 64, 192, &[(4, "gate.weight"), (4, "up.weight")]),
    ];
    let gpt2: [(&str, usize, usize, &[(u32, &str)]); 4] = [
        ("transformer.h.0.attn.c_attn", 64, 192, &[(1, "q.weight"), (1, "k.weight"), (1, "v.weight")]),
        ("transformer.h.0.attn.c_proj", 64, 64, &[(1, "o.weight")]),
        ("transformer.h.0.mlp.c_fc", 64, 256, &[(2, "up.weight")]),
        ("transformer.h.0.mlp.c_proj", 256, 64, &[(2, "down.weight")]),
    ];
    for (seed, (base, modules)) in (1..).zip([("phi3", &phi3[..]), ("gguf-phi3", &phi3[..]), ("gpt2", &gpt2[..]), ("gguf-gpt2", &gpt2[..])])
    {
        let gguf = tiny().join(base).join("model.gguf");
        let source = if gguf.exists() { gguf } else { tiny().join(base) };
        add_dir(&zoo, &source, &format!("demo/{base}"), Recipe::Keep).await.unwrap();
        let mut peft = Peft::over(base);
        peft.config["fan_in_fan_out"] = json!(base.ends_with("gpt2"));
        for (module, inputs, outputs, _) in modules {
            peft.lora(module, (*inputs, *outputs), 4, seed);
        }
        let path = dir.path().join(base);
        peft.write(&path);
        let report = add_dir(&zoo, &path, &format!("demo/{base}-lora"), Recipe::Keep).await.unwrap_or_else(|e| panic!("{base}: {e}"));
        let chain = zoo.read_chain(report.chain).await.unwrap();
        for (module, _, _, parts) in modules {
            let mut rows = Vec::new();
            for (block, role) in *parts {
                let (scale, a, b) = changes(&zoo, &chain, *block).await.remove(*role).unwrap();
                assert_eq!((scale, a.as_slice()), (2.0, peft.values(&format!("{module}.lora_A.weight"))), "{base} {module}");
                rows.extend(b);
            }
            assert_eq!(rows, peft.values(&format!("{module}.lora_B.weight")), "{base} {module}");
        }
        // One A for all parts of a module.
        let parts: usize = modules.iter().map(|(.., parts)| parts.len()).sum();
        assert_eq!(report.tensors.total - report.tensors.present, (parts + modules.len()) as u64, "{base}");
    }
}

/// Adapters as peft itself saves them; executor/tests/goldens.rs has their numbers.
#[tokio::test]
async fn every_tiny_adapter_is_taken_with_each_of_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    make_public(&zoo, &["base"]).await;
    let mut seen = BTreeMap::new();
    for entry in std::fs::read_dir(tiny().join("../adapters")).unwrap() {
        let path = entry.unwrap().path();
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path.join("golden.json")).unwrap()).unwrap();
        let (name, base) = (path.file_name().unwrap().to_str().unwrap().to_owned(), golden["base"].as_str().unwrap());
        add_dir(&zoo, &tiny().join(base), &format!("base/{base}"), Recipe::Keep).await.unwrap();
        let report = add_dir(&zoo, &path, &format!("tiny/{name}"), Recipe::Keep).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let chain = zoo.read_chain(report.chain).await.unwrap();
        // Whatever became of them, the file's bytes are those of what is new: A once for all parts of a fused module.
        let file = std::fs::read(path.join("adapter_model.safetensors")).unwrap();
        let header = u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(report.bytes_new, file.len() as u64 - 8 - header, "{name}");
        let mut scales = BTreeMap::new();
        for block in blocks_with_adapters(&chain) {
            for (role, (scale, ..)) in changes(&zoo, &chain, block).await {
                scales.insert((block, role), scale);
            }
        }
        seen.insert(name, (scales, report.blocks.total - report.blocks.present));
    }
    let scale = |name: &str, block: u32, role: &str| seen[name].0[&(block, role.to_owned())];
    assert_eq!(
        seen.iter().map(|(name, (scales, blocks))| (name.as_str(), scales.len(), *blocks)).collect::<Vec<_>>(),
        [
            ("gpt2-fused", 2 * 4, 0),
            ("llama-bias-whole", 3, 7),
            ("llama-patterns", 2 * 7, 0),
            ("llama-qv", 2 * 2, 0),
            ("phi3-fused", 2 * 6, 0),
            ("qwen2-layer", 7, 0),
        ]
    );
    assert_eq!(scale("llama-qv", 1, "q.weight"), 2.0);
    // Rank 3 and alpha 6; rank 5 in layer 1 alone; an alpha of its own in layer 0 alone; ranks by a regular expression.
    assert_eq!(scale("llama-patterns", 1, "q.weight"), (6.0 / 3f64.sqrt()) as f32);
    assert_eq!(scale("llama-patterns", 2, "down.weight"), (6.0 / 8f64.sqrt()) as f32);
    assert_eq!(scale("llama-patterns", 4, "down.weight"), (6.0 / 5f64.sqrt()) as f32);
    assert_eq!(scale("llama-patterns", 1, "o.weight"), (2.0 / 8f64.sqrt()) as f32);
    assert_eq!(scale("llama-patterns", 3, "o.weight"), (6.0 / 8f64.sqrt()) as f32);
    assert_eq!(scale("llama-patterns", 3, "k.weight"), 3.0);
    assert_eq!(scale("llama-patterns", 4, "up.weight"), (3.5 / 8f64.sqrt()) as f32);
}

#[tokio::test]
async fn whole_tensors_make_blocks_of_their_own() {
    let fixture = fixture().await;
    let mut peft = on_q_and_v(1);
    peft.tensor("lm_head.weight", vec![VOCAB, D], 5).tensor("model.layers.1.post_attention_layernorm.weight", vec![D], 5);
    peft.config["modules_to_save"] = json!(["lm_head", "post_attention_layernorm"]);
    let report = fixture.add(&peft, "heads").await.unwrap();
    assert_eq!((report.blocks, report.adapters.total), (Shared { total: 6, present: 4 }, 2));
    let chain = fixture.chain(&report).await;
    let same: Vec<bool> = chain.blocks.iter().zip(&fixture.base.blocks).map(|(a, b)| a == b).collect();
    assert_eq!(same, [true, true, true, true, false, false]);
    let head = fixture.zoo.map_block(chain.blocks[5]).await.unwrap();
    assert_eq!(dequantise(&head.tensors["output.weight"].view()), peft.values("lm_head.weight"));
    let base = fixture.zoo.read_block(fixture.base.blocks[5]).await.unwrap();
    assert_eq!(head.block.tensors["norm.weight"], base.tensors["norm.weight"]);

    // Biases, of a base that has them.
    add_dir(&fixture.zoo, &tiny().join("llama-bias"), "demo/llama-bias", Recipe::Keep).await.unwrap();
    let mut peft = Peft::over("llama-bias");
    let name = "model.layers.0.self_attn.q_proj.base_layer.bias";
    peft.tensor(name, vec![64], 5).config["bias"] = json!("all");
    let report = fixture.add(&peft, "biased").await.unwrap();
    let chain = fixture.chain(&report).await;
    let block = fixture.zoo.map_block(chain.blocks[1]).await.unwrap();
    assert_eq!(dequantise(&block.tensors["q.bias"].view()), peft.values(name));
}

#[tokio::test]
async fn the_base_is_the_one_that_is_asked_for_or_given() {
    let fixture = fixture().await;
    let peft = on_q_and_v(1);
    let message = |error: IngestError| error.to_string();
    let wanted = |base: serde_json::Value| {
        let mut peft = peft.clone();
        peft.config["base_model_name_or_path"] = base;
        peft
    };
    let none = fixture.add(&wanted(json!("org/unknown")), "none").await.unwrap_err();
    assert_eq!(
        message(none),
        "the adapter asks for the base `org/unknown`, and no model here has that name or source: give it with --base TENANT/MODEL"
    );
    let unsaid = fixture.add(&wanted(json!(null)), "none").await.unwrap_err();
    assert!(message(unsaid).contains("does not say what base"));
    let options = |parent: &str| AddOptions {
        parent: Some(parent.parse().unwrap()),
        source: Some("org/given@0123".to_owned()),
        ..AddOptions::new("demo/given".parse().unwrap())
    };
    let path = fixture.dir.path().join("given");
    wanted(json!(null)).write(&path);
    let given = add(&fixture.zoo, &path, &options("demo/base"), &Silent).await.unwrap();
    assert_eq!(fixture.chain(&given).await.source, "org/given@0123");
    let error = add(&fixture.zoo, &path, &options("demo/unknown"), &Silent).await.unwrap_err();
    assert_eq!(message(error), "model demo/unknown is not in the zoo");
    assert!(given.notes.is_empty(), "nothing was asked for");
    // Another than the one that is asked for is the user's choice.
    for (asked, notes) in [
        ("org/other", &["the adapter asks for org/other, and demo/base has neither that name nor that source"][..]),
        ("org/base", &[]),
        ("demo/base", &[]),
    ] {
        wanted(json!(asked)).write(&path);
        assert_eq!(add(&fixture.zoo, &path, &options("demo/base"), &Silent).await.unwrap().notes, notes, "{asked}");
    }
    // The last component alone is a guess.
    let guessed = fixture.add(&peft, "base-lora").await.unwrap();
    assert_eq!(guessed.notes, ["the adapter asks for org/base; taking demo/base: --base names another"]);
    // Two of that name; the model with adapters, of that source, is no base.
    let error = add(&fixture.zoo, &path, &options("demo/base-lora"), &Silent).await.unwrap_err();
    assert!(message(error).contains("demo/base-lora has adapters of its own"), "and names demo/base");
    add_dir(&fixture.zoo, &fixture.dir.path().join("base"), "other/base", Recipe::Keep).await.unwrap();
    assert_eq!(fixture.add(&peft, "base-lora").await.unwrap().notes.len(), 1, "another tenant's is not seen");
    make_public(&fixture.zoo, &["other", "more0", "more1", "more2"]).await;
    let error = fixture.add(&peft, "none").await.unwrap_err();
    assert!(message(error).contains("`org/base`, and 2 models here have that name or source (demo/base, other/base): give it"));
    let full = fixture.add(&wanted(json!("other/base")), "full").await.unwrap();
    assert_eq!((full.base, full.notes), (Some("other/base".parse().unwrap()), Vec::new()), "a whole name decides");
    for index in 0..3 {
        add_dir(&fixture.zoo, &fixture.dir.path().join("base"), &format!("more{index}/base"), Recipe::Keep).await.unwrap();
    }
    let error = fixture.add(&peft, "none").await.unwrap_err();
    assert!(
        message(error).contains("and 5 models here have that name or source (demo/base, more0/base, more1/base, more2/base, ...): give")
    );
}

#[tokio::test]
async fn reports_verify_and_gc_know_adapters() {
    let fixture = fixture().await;
    let zoo = &fixture.zoo;
    fixture.add(&on_q_and_v(1), "tuned").await.unwrap();
    let bytes = (LAYERS * 4 * (D + Q + D + KV) * 4) as u64;
    let listed = zoo.list_resolved().await.unwrap();
    let line = |index: usize| (listed[index].model.as_str(), listed[index].adapter_count, listed[index].own_bytes);
    assert_eq!((line(0), line(1)), (("demo/base", 0, 0), ("demo/tuned", 2, bytes)));
    assert_eq!(listed[1].bytes, listed[0].bytes + bytes);
    let shown = zoo.show(&"demo/tuned".parse().unwrap()).await.unwrap();
    assert_eq!((shown.bytes, shown.adapter_bytes), (listed[1].bytes, bytes));
    assert_eq!(shown.blocks[1].shared_with, ["demo/base"]);
    let adapter = shown.blocks[1].adapter.as_ref().unwrap();
    assert_eq!((adapter.ranks["q.weight"], adapter.shared_with.len(), adapter.bytes), (4, 0, bytes / 2));
    assert!(shown.blocks[2].adapter.is_none());
    let base = zoo.show(&"demo/base".parse().unwrap()).await.unwrap();
    assert_eq!((base.blocks[0].lineage == shown.blocks[0].lineage, base.blocks[1].lineage == shown.blocks[1].lineage), (true, false));
    let diff = zoo.diff(&"demo/base".parse().unwrap(), &"demo/tuned".parse().unwrap()).await.unwrap();
    assert_eq!((diff.common_prefix, diff.shared_blocks, diff.differences.len()), (1, 6, 2));
    assert_eq!(
        (diff.differences[0].roles.len(), &diff.differences[0].adapted_roles[..]),
        (0, &["q.weight".to_owned(), "v.weight".to_owned()][..])
    );

    let report = verify(zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.unreferenced_count), (0, 0));
    damage(&fixture).await;

    // The base's name may go: what the adapter is over stays.
    zoo.remove_model(&"demo/base".parse().unwrap()).await.unwrap();
    let swept = gc::collect(zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((swept.chain_count, swept.block_count, swept.adapter_count, swept.tensor_count), (1, 0, 0, 0));
    zoo.remove_model(&"demo/tuned".parse().unwrap()).await.unwrap();
    let young = gc::collect(zoo, Duration::from_secs(3600), false).await.unwrap();
    assert_eq!((young.adapter_count, young.young_count), (0, 1 + 1 + 6 + 2 + 21 + 8 + 2), "and a sketch");
    let swept = gc::collect(zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((swept.chain_count, swept.block_count, swept.adapter_count, swept.tensor_count), (1, 6, 2, 21 + 8));
    assert_eq!(verify(zoo, &Silent).await.unwrap().object_count, 0);
}

/// Damages a factor and then an adapter, and sees both named; adding again heals them.
async fn damage(fixture: &Fixture) {
    let root = fixture.dir.path().join("zoo");
    let chain = fixture.zoo.resolve(&"demo/tuned".parse().unwrap()).await.unwrap().chain;
    let digest = chain.adapters[1].digest;
    let adapter = fixture.zoo.read_adapter(digest).await.unwrap();
    let (role, tensor) = adapter.tensors().last().unwrap();
    let name = tensor.digest.to_string();
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let last = bytes.len() - 3;
        bytes[last] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    flip(&root.join("tensors").join(&name[..2]).join(&name));
    let report = verify(&fixture.zoo, &Silent).await.unwrap();
    assert_eq!(report.damage.len(), 1);
    assert_eq!(report.damage[0].adapters, [format!("{digest} (`{role}`)")]);
    assert_eq!(report.damage[0].models, ["demo/tuned"]);
    let error = fixture.zoo.map_adapter(digest).await.unwrap_err().to_string();
    assert!(error.contains(&format!("(`{role}` of adapter {digest})")), "{error}");
    flip(&root.join(format!("adapters/{digest}.json")));
    let report = verify(&fixture.zoo, &Silent).await.unwrap();
    let damaged: Vec<&str> = report.damage.iter().map(|damage| damage.object.as_str()).collect();
    assert!(damaged.contains(&format!("adapter {digest}").as_str()), "{damaged:?}");
    fixture.add(&on_q_and_v(1), "tuned").await.unwrap();
    assert!(verify(&fixture.zoo, &Silent).await.unwrap().damage.is_empty());
}
