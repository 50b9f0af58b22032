//! Relatives are found, told apart, and shown only to those who may see them.

mod support;

use std::path::Path;
use std::sync::Arc;

use ashlar_zoo::ingest::{AddReport, Recipe, Shared, Silent};
use ashlar_zoo::relatives::relative_for;
use ashlar_zoo::store::Zoo;
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use support::peft::Peft;
use support::{Checkpoint, D, add_dir};

async fn zoo() -> (tempfile::TempDir, Zoo) {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    (dir, zoo)
}

async fn add(zoo: &Zoo, dir: &Path, name: &str) -> AddReport {
    add_dir(zoo, dir, name, Recipe::Keep).await.unwrap()
}

async fn make_public(zoo: &Zoo, tenant: &str) {
    zoo.update_domains(|domains| _ = domains.public.insert(tenant.to_owned())).await.unwrap();
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
    make_public(&zoo, "hub").await;
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
    let options = |model: &str| ashlar_zoo::ingest::AddOptions {
        model: model.parse().unwrap(),
        recipe: Recipe::Keep,
        parent: Some("hub/base".parse().unwrap()),
        source: None,
    };
    let named = ashlar_zoo::ingest::add(&zoo, &dir.path().join("lora"), &options("acme/lora"), &Silent).await.unwrap_err().to_string();
    assert!(named.contains("hub/base is not acme's to build on: `ashlar zoo public hub`"), "{named}");
    make_public(&zoo, "hub").await;
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
