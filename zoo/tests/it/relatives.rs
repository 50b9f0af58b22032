//! Relatives are found, told apart, and shown only to those who may see them.

use std::path::Path;
use std::sync::Arc;

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir, make_public};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{AddOptions, AddReport, Recipe, Shared, Silent};
use ashlar_zoo::relatives::{AdaptError, propose, relative_for};
use ashlar_zoo::store::Zoo;
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};

async fn zoo() -> (tempfile::TempDir, Zoo) {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    (dir, zoo)
}

async fn add(zoo: &Zoo, dir: &Path, name: &str) -> AddReport {
    add_dir(zoo, dir, name, Recipe::Keep).await.unwrap()
}

#[tokio::test]
async fn what_another_tenant_has_is_charged_and_written_like_what_nobody_has() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    let first = add(&zoo, &dir.path().join("a"), "acme/a").await;
    let written = |objects: &[object_store::ObjectMeta]| -> Vec<_> {
        let kinds = ["tensors/", "blocks/", "assets/", "chains/", "sketches/"];
        let mine = objects.iter().filter(|meta| kinds.iter().any(|kind| meta.location.as_ref().starts_with(kind)));
        mine.map(|meta| (meta.location.clone(), meta.e_tag.clone())).collect()
    };
    let before = written(&all(&inner).await);
    let other = add(&zoo, &dir.path().join("a"), "rival/a").await;
    assert_eq!(AddReport { model: first.model.clone(), ..other.clone() }, first, "the report is that of the first one, word for word");
    let after = written(&all(&inner).await);
    assert_eq!(before.len(), after.len(), "and yet it is stored once");
    for ((location, old), (_, new)) in before.iter().zip(&after) {
        assert_ne!(old, new, "{location} was not written again");
    }
    // To its own tenant it is there.
    let again = add(&zoo, &dir.path().join("a"), "rival/b").await;
    assert_eq!((again.bytes_new, again.blocks, again.tensors), (0, Shared { total: 6, present: 6 }, Shared { total: 21, present: 21 }));
    let after_again = written(&all(&inner).await);
    assert_eq!(after, after_again, "and nothing is written");
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
}

async fn all(inner: &Arc<InMemory>) -> Vec<object_store::ObjectMeta> {
    use futures::TryStreamExt;
    let mut all: Vec<_> = inner.list(None).try_collect().await.unwrap();
    all.sort_by(|a, b| a.location.cmp(&b.location));
    all
}

#[tokio::test]
async fn public_tenants_are_seen_by_all_until_they_are_not() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&dir.path().join("b"));
    let base = add(&zoo, &dir.path().join("a"), "hub/base").await;
    let sketch = zoo.read_sketch(base.chain).await.unwrap().expect("written by add");
    let nearest = |tenant: &'static str| {
        let (zoo, sketch) = (zoo.clone(), sketch.clone());
        async move { relative_for(&zoo, &zoo.viewer(tenant).await.unwrap(), &sketch).await.unwrap().map(|found| found.id.to_string()) }
    };
    assert_eq!(nearest("hub").await.as_deref(), Some("hub/base"));
    assert_eq!(nearest("acme").await, None);
    make_public(&zoo, &["hub"]).await;
    assert_eq!(nearest("acme").await.as_deref(), Some("hub/base"));
    let seen = add(&zoo, &dir.path().join("b"), "acme/b").await;
    assert_eq!((seen.blocks, seen.tensors), (Shared { total: 6, present: 5 }, Shared { total: 21, present: 20 }));
    zoo.update_domains(|domains| _ = domains.public.remove("hub")).await.unwrap();
    assert_eq!(nearest("rival").await, None);
    let unseen = add(&zoo, &dir.path().join("b"), "rival/b").await;
    assert_eq!((unseen.blocks.present, unseen.tensors.present, unseen.bytes_new), (0, 0, unseen.bytes_total));
}

#[tokio::test]
async fn a_hidden_base_is_refused_by_name_and_not_found_by_search() {
    let (dir, zoo) = zoo().await;
    Checkpoint::llama(1).write(&dir.path().join("base"));
    Peft::over("base").lora("model.layers.1.self_attn.q_proj", (D, D), 4, 1).write(&dir.path().join("lora"));
    add(&zoo, &dir.path().join("base"), "hub/base").await;
    let sought = add_dir(&zoo, &dir.path().join("lora"), "acme/lora", Recipe::Keep).await.unwrap_err().to_string();
    assert!(sought.contains("no model here has that name or source") && !sought.contains("hub"), "{sought}");
    let options = |model: &str| AddOptions { parent: Some("hub/base".parse().unwrap()), ..AddOptions::new(model.parse().unwrap()) };
    let named = ashlar_zoo::ingest::add(&zoo, &dir.path().join("lora"), &options("acme/lora"), &Silent).await.unwrap_err().to_string();
    assert!(named.contains("hub/base is not acme's to build on: `ashlar zoo public hub`"), "{named}");
    make_public(&zoo, &["hub"]).await;
    let report = ashlar_zoo::ingest::add(&zoo, &dir.path().join("lora"), &options("acme/lora"), &Silent).await.unwrap();
    assert_eq!((report.blocks.present, report.tensors.present), (6, 21));
    // The same adapter of another tenant: the base is there, the factors are not.
    let other = ashlar_zoo::ingest::add(&zoo, &dir.path().join("lora"), &options("rival/lora"), &Silent).await.unwrap();
    assert_eq!((other.tensors, other.adapters, other.bytes_new), (report.tensors, report.adapters, report.bytes_new));
}

#[tokio::test]
async fn a_missing_or_damaged_sketch_is_made_again_when_it_is_wanted() {
    let (dir, zoo) = zoo().await;
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let report = add(&zoo, &dir.path().join("a"), "demo/a").await;
    let path = dir.path().join("zoo/sketches").join(report.chain.to_string());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let verified = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((verified.damage.len(), verified.unreferenced_count), (0, 0), "a missing one is no damage");
    assert_eq!(add(&zoo, &dir.path().join("a"), "demo/b").await.bytes_new, 0);
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "byte for byte what add had made of the checkpoint");
    std::fs::write(&path, &bytes[1..]).unwrap();
    let verified = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((verified.damage.len(), verified.damage[0].object.clone()), (1, format!("sketch of chain {}", report.chain)));
    assert_eq!(add(&zoo, &dir.path().join("a"), "demo/c").await.bytes_new, 0);
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
}

#[tokio::test]
async fn an_adapters_sketch_is_what_its_chain_gives() {
    let (dir, zoo) = zoo().await;
    Checkpoint::llama(1).write(&dir.path().join("base"));
    let mut peft = Peft::over("base");
    peft.lora("model.layers.1.self_attn.q_proj", (D, D), 4, 1).write(&dir.path().join("lora"));
    add(&zoo, &dir.path().join("base"), "demo/base").await;
    let report = add(&zoo, &dir.path().join("lora"), "demo/lora").await;
    let path = dir.path().join("zoo/sketches").join(report.chain.to_string());
    let bytes = std::fs::read(&path).unwrap();
    zoo.make_sketch(report.chain).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[tokio::test]
async fn damaged_domains_are_told_of_and_nobody_is_public_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    assert!(zoo.read_domains().await.unwrap().public.is_empty());
    for text in [r#"{"public":["../x"]}"#, r#"{"public":"all"}"#, "{", r#"{"public":[],"private":[]}"#] {
        inner.put(&"domains.json".into(), text.into()).await.unwrap();
        assert!(zoo.viewer("acme").await.unwrap_err().to_string().starts_with("domains.json is damaged: "), "{text}");
        assert_eq!(verify(&zoo, &Silent).await.unwrap().damage[0].object, "domains.json");
        Checkpoint::llama(1).write(&dir.path().join("a"));
        assert!(add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.is_err());
        assert!(zoo.list_models().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn of_many_who_declare_tenants_public_at_once_none_is_lost() {
    for local in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let zoo = match local {
            true => Zoo::create_dir(&dir.path().join("zoo")).await.unwrap(),
            false => Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap(),
        };
        let tenants: Vec<String> = (0..6).map(|number| format!("t{number}")).collect();
        let changes = tenants.iter().map(|tenant| zoo.update_domains(|domains| _ = domains.public.insert(tenant.clone())));
        futures::future::try_join_all(changes).await.unwrap();
        assert_eq!(zoo.read_domains().await.unwrap().public.into_iter().collect::<Vec<_>>(), tenants);
    }
}

/// The demo family and its ways of training, as `demo/train.py` has them.
#[tokio::test]
async fn the_demo_familys_ways_of_training_are_recognised() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let (_dir, zoo) = zoo().await;
    assert_eq!(add(&zoo, &demo.join("base"), "demo/base").await.nearest, None);
    let mut seen = Vec::new();
    for name in ["math-lora", "shakespeare-top", "banking-bias", "phonemes-attention", "japanese-full"] {
        let report = add(&zoo, &demo.join(name), &format!("hidden-{name}/x")).await;
        assert_eq!(report.nearest, None, "{name}: the base is another tenant's");
        make_public(&zoo, &["demo"]).await;
        let found = add(&zoo, &demo.join(name), &format!("{name}/x")).await.nearest.unwrap_or_else(|| panic!("{name} has no relative"));
        zoo.update_domains(|domains| domains.public.clear()).await.unwrap();
        assert_eq!((found.model.as_str(), found.visible_count), ("demo/base", 1), "{name}");
        seen.push((name, found.identical_count, found.low_rank_count, found.ranks, found.small_count, found.unrelated_count));
        if name == "math-lora" {
            assert_eq!(
                found.to_string(),
                "demo/base (of 1 that are visible): 14 blocks identical, 4 low-rank (rank 8), 0 small, 0 unrelated"
            );
            let places = found.blocks.iter().map(|block| (block.index, block.tensors.keys().map(String::as_str).collect::<Vec<_>>()));
            assert_eq!(places.collect::<Vec<_>>(), [9, 11, 13, 15].map(|index| (index, vec!["q.weight", "v.weight"])));
            let exact = found.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| tensor.proof.unwrap().exact_share());
            assert!(exact.into_iter().all(|share| share > 0.99), "{found:?}");
        }
    }
    let expected = [
        ("math-lora", 14, 4, Some((8, 8)), 0, 0),
        ("shakespeare-top", 14, 0, None, 4, 0),
        ("banking-bias", 2, 0, None, 16, 0),
        ("phonemes-attention", 10, 0, None, 8, 0),
        ("japanese-full", 0, 0, None, 18, 0),
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_longer_table_of_tokens_and_another_model_are_told_apart() {
    let (dir, zoo) = zoo().await;
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    add(&zoo, &dir.path().join("a"), "demo/a").await;
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (shape, values) = checkpoint.tensors.get_mut(name).unwrap();
        shape[0] += 2;
        values.extend(vec![0.5; 2 * D]);
    }
    checkpoint.config["vocab_size"] = (crate::support::VOCAB + 2).into();
    checkpoint.write(&dir.path().join("grown"));
    let grown = add(&zoo, &dir.path().join("grown"), "demo/grown").await.nearest.unwrap();
    assert_eq!((grown.identical_count, grown.small_count, grown.unrelated_count), (4, 2, 0), "{grown}");
    assert_eq!(grown.blocks[0].tensors["token.weight"].equal_share, 1.0, "in the rows that both have");
    Checkpoint::llama(2).write(&dir.path().join("other"));
    assert_eq!(add(&zoo, &dir.path().join("other"), "demo/other").await.nearest, None);
}

#[tokio::test]
async fn a_merged_lora_is_unmerged_stored_and_read_back() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo");
    let (dir, zoo) = zoo().await;
    add(&zoo, &demo.join("base"), "demo/base").await;
    let merged = add(&zoo, &demo.join("math-lora"), "demo/math").await;
    let viewer = zoo.viewer("demo").await.unwrap();
    let (model, name) = ("demo/math".parse().unwrap(), "demo/unmerged".parse().unwrap());
    let objects = verify(&zoo, &Silent).await.unwrap().object_count;
    let proposal = propose(&zoo, ("demo", &viewer), &model, None, 64).await.unwrap();
    assert_eq!(verify(&zoo, &Silent).await.unwrap().object_count, objects, "a proposal writes nothing");
    let ranks = proposal.ranks();
    assert_eq!(ranks.keys().copied().collect::<Vec<_>>(), [9, 11, 13, 15].map(|block| [(block, "q.weight"), (block, "v.weight")]).concat());
    assert!(ranks.values().all(|rank| *rank == 8), "{ranks:?}");
    assert!(proposal.proof.exact_share() > 0.99 && proposal.proof.changed_count > 80_000, "{:?}", proposal.proof);
    // q [128, 128] and v [64, 128] in bf16, four times; their factors in f32.
    assert_eq!((proposal.adapted.bytes_before, proposal.adapted.bytes_after), (4 * (128 + 64) * 128 * 2, 4 * 8 * (256 + 192) * 4));
    let chain = proposal.adapted.store(&zoo, &name, 1, None).await.unwrap();
    let stored = zoo.resolve(&name).await.unwrap();
    let base = zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap();
    assert_eq!((stored.name.chain, stored.name.parent.as_deref(), stored.adapters.len()), (chain, Some("demo/base"), 4));
    assert_eq!(stored.chain.blocks, base.chain.blocks, "every block is the base's own");
    for adapter in &stored.chain.adapters {
        zoo.map_adapter(adapter.digest).await.unwrap();
    }
    let sketch = zoo.read_sketch(chain).await.unwrap().unwrap();
    assert_eq!(zoo.make_sketch(chain).await.unwrap(), sketch);
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());

    let error = |result: Result<_, AdaptError>| result.map(|_: Digest| ()).unwrap_err().to_string();
    assert_eq!(error(proposal.adapted.store(&zoo, &name, 1, None).await), "demo/unmerged exists: give another name with --name");
    let refused = async |tenant: &str, model: &str, base: Option<&str>, rank_max: usize| {
        let viewer = zoo.viewer(tenant).await.unwrap();
        let base = base.map(|base| base.parse().unwrap());
        propose(&zoo, (tenant, &viewer), &model.parse().unwrap(), base.as_ref(), rank_max).await.unwrap_err().to_string()
    };
    assert_eq!(refused("demo", "demo/unmerged", None, 64).await, "demo/unmerged has adapters: it is base and adapter already");
    assert_eq!(
        refused("demo", "demo/math", Some("demo/base"), 7).await,
        "no matrix of demo/math is one of demo/base and a difference of rank 7 or less"
    );
    assert!(refused("rival", "demo/math", None, 64).await.starts_with("demo/math is not rival's to see: "));
    Checkpoint::llama(1).write(&dir.path().join("other"));
    add(&zoo, &dir.path().join("other"), "demo/other").await;
    assert!(refused("demo", "demo/other", None, 64).await.contains("none of the 4 models that demo may see is a relative of demo/other"));
    assert_eq!(refused("demo", "demo/math", Some("demo/other"), 64).await, "demo/math and demo/other have 18 and 6 blocks");
    // A copy of the model itself is no base of it, and what was there first is taken of those that are equally near.
    add(&zoo, &demo.join("math-lora"), "demo/copy").await;
    add(&zoo, &demo.join("banking-bias"), "demo/a").await;
    let again = propose(&zoo, ("demo", &viewer), &model, None, 64).await.unwrap();
    assert_eq!(again.adapted.base.to_string(), "demo/base");
    let japanese = add(&zoo, &demo.join("japanese-full"), "demo/japanese").await.nearest.unwrap();
    assert_eq!(japanese.model, "demo/base");
    for added in ["demo/copy", "demo/a", "demo/japanese"] {
        zoo.remove_model(&added.parse().unwrap()).await.unwrap();
    }
    // What lies over the base's blocks is as near as the base, and no base itself.
    zoo.remove_model(&"demo/base".parse().unwrap()).await.unwrap();
    assert!(refused("demo", "demo/math", None, 64).await.contains(" is a relative of demo/math without adapters: give its base"));
    assert_eq!(zoo.read_model(&model).await.unwrap().chain, merged.chain);
}
