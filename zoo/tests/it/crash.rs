//! Killed at any change, `add` and `gc` leave a zoo that verifies and in which every name resolves.

use std::sync::Arc;
use std::time::Duration;

use crate::faulty::FaultyStore;
use crate::sound::assert_sound;
use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir};
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::store::{Retries, Zoo};
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

async fn over(inner: &Arc<InMemory>, changes: i64, torn: bool) -> Zoo {
    // Opening only reads, so the count is of the changes under test.
    let zoo = Zoo::open(Arc::new(FaultyStore::new(inner.clone(), changes, torn)), "memory").await.unwrap();
    zoo.with_retries(Retries { attempts: 1, ..Retries::default() })
}

#[tokio::test]
async fn an_add_that_dies_at_any_change_leaves_a_sound_zoo_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1", 2).write(&dir.path().join("b"));
    // 9 tensors, 2 blocks, chain, sketch and name; to a tenant who does not see what is there 21 tensors, 6 blocks, 2 assets, chain, sketch and name.
    for (name, expected) in [("demo/a", 14), ("rival/a", 32)] {
        let mut finished = None;
        for (changes, torn) in (0..200).flat_map(|changes| [(changes, false), (changes, true)]) {
            let inner = Arc::new(InMemory::new());
            let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
            add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
            let result = add_dir(&over(&inner, changes, torn).await, &dir.path().join("b"), name, Recipe::Keep).await;
            assert_sound(&inner, &format!("add {name}, {changes} changes, torn {torn}")).await;
            if result.is_ok() {
                finished = Some(changes);
                break;
            }
            let again = add_dir(&zoo, &dir.path().join("b"), name, Recipe::Keep).await.unwrap();
            assert_eq!(zoo.read_model(&name.parse().unwrap()).await.unwrap().chain, again.chain);
        }
        assert_eq!(finished, Some(expected), "{name}");
    }
}

/// An adapter on q of both layers, and a head of its own.
fn peft() -> Peft {
    let mut peft = Peft::over("a");
    for layer in 0..2 {
        peft.lora(&format!("model.layers.{layer}.self_attn.q_proj"), (D, D), 4, 1);
    }
    peft.tensor("model.norm.weight", vec![D], 1).config["modules_to_save"] = serde_json::json!(["norm"]);
    peft
}

#[tokio::test]
async fn an_add_or_gc_of_an_adapter_that_dies_at_any_change_leaves_a_sound_zoo() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    peft().write(&dir.path().join("lora"));
    // 5 tensors, a block, 2 adapters, chain, sketch and name; gc takes all but the name, and says when it begins and when it has done.
    for (is_add, expected) in [(true, 11), (false, 12)] {
        let mut finished = None;
        for (changes, torn) in (0..200).flat_map(|changes| [(changes, false), (changes, true)]) {
            let inner = Arc::new(InMemory::new());
            let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
            add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
            let ended = if is_add {
                add_dir(&over(&inner, changes, torn).await, &dir.path().join("lora"), "demo/lora", Recipe::Keep).await.is_ok()
            } else {
                add_dir(&zoo, &dir.path().join("lora"), "demo/lora", Recipe::Keep).await.unwrap();
                zoo.remove_model(&"demo/lora".parse().unwrap()).await.unwrap();
                gc::collect(&over(&inner, changes, torn).await, Duration::ZERO, false).await.is_ok()
            };
            assert_sound(&inner, &format!("add {is_add}, {changes} changes, torn {torn}")).await;
            if !is_add {
                assert_closed(&inner).await;
            }
            if ended {
                finished = Some(changes);
                break;
            }
            // With no grace nobody is waited for who may still sweep.
            let zoo = zoo.with_grace(Duration::ZERO);
            let again = add_dir(&zoo, &dir.path().join("lora"), "demo/lora", Recipe::Keep).await.unwrap();
            assert_eq!(zoo.read_model(&"demo/lora".parse().unwrap()).await.unwrap().chain, again.chain);
        }
        assert_eq!(finished, Some(expected), "add {is_add}");
    }
}

#[tokio::test]
async fn what_an_adapter_uses_of_its_base_is_renewed_so_that_gc_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    peft().write(&dir.path().join("lora"));
    let root = dir.path().join("zoo");
    let zoo = Zoo::create_dir(&root).await.unwrap();
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(40 * 60);
    for entry in walk(&root) {
        std::fs::File::options().append(true).open(entry).unwrap().set_modified(old).unwrap();
    }
    add_dir(&zoo, &dir.path().join("lora"), "demo/lora", Recipe::Keep).await.unwrap();
    for name in ["demo/a", "demo/lora"] {
        zoo.remove_model(&name.parse().unwrap()).await.unwrap();
    }
    let report = gc::collect(&zoo, Duration::from_secs(30 * 60), false).await.unwrap();
    // The base's own chain, its head, and the norm that only that has, are of no use to the adapter.
    assert_eq!((report.chain_count, report.block_count, report.tensor_count, report.asset_count), (1, 1, 1, 0), "{report:?}");

    // A store that is no directory has objects renewed by writing them again: here each, for none is younger than no grace at all.
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    let zoo = zoo.with_grace(Duration::ZERO);
    add_dir(&zoo, &dir.path().join("lora"), "demo/lora", Recipe::Keep).await.unwrap();
    assert_sound(&inner, "renewed").await;
}

#[tokio::test]
async fn a_gc_that_dies_at_any_change_leaves_a_sound_zoo_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1", 2).write(&dir.path().join("b"));
    for changes in 0..200 {
        for torn in [false, true] {
            let inner = Arc::new(InMemory::new());
            let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
            add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
            add_dir(&zoo, &dir.path().join("b"), "demo/b", Recipe::Keep).await.unwrap();
            zoo.remove_model(&"demo/b".parse().unwrap()).await.unwrap();
            let result = gc::collect(&over(&inner, changes, torn).await, Duration::ZERO, false).await;
            assert_sound(&inner, &format!("gc, {changes} changes, torn {torn}")).await;
            assert_closed(&inner).await;
            let rest = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
            let report = verify(&zoo, &Silent).await.unwrap();
            assert_eq!((report.unreferenced_count, report.model_count), (0, 1));
            if let Ok(report) = result {
                assert_eq!((report.chain_count, report.block_count, report.tensor_count), (1, 2, 9));
                assert_eq!(rest, gc::GcReport::default());
                assert_eq!(changes, 15);
                return;
            }
        }
    }
    panic!("the gc never finished");
}

/// Nothing that is left points to what is gone, named or not.
async fn assert_closed(inner: &Arc<InMemory>) {
    use futures::TryStreamExt;
    use object_store::ObjectStore;
    let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
    let keys: Vec<String> = inner.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap();
    let digests =
        |folder: &str| keys.iter().filter_map(|key| key.strip_prefix(folder)?.strip_suffix(".json")?.parse().ok()).collect::<Vec<_>>();
    for chain in digests("chains/") {
        let chain = zoo.read_chain(chain).await.unwrap();
        for block in chain.blocks {
            zoo.read_block(block).await.unwrap();
        }
        for adapter in chain.adapters {
            zoo.read_adapter(adapter.digest).await.unwrap();
        }
    }
    for adapter in digests("adapters/") {
        zoo.map_adapter(adapter).await.unwrap();
    }
    for block in digests("blocks/") {
        zoo.map_block(block).await.unwrap();
    }
}

#[tokio::test]
async fn gc_leaves_what_is_young_and_what_history_names() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1", 2).write(&dir.path().join("b"));
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    add_dir(&zoo, &dir.path().join("b"), "demo/a", Recipe::Keep).await.unwrap();
    assert_eq!(gc::collect(&zoo, Duration::ZERO, false).await.unwrap(), gc::GcReport::default());
    zoo.remove_model(&"demo/a".parse().unwrap()).await.unwrap();
    let young = gc::collect(&zoo, Duration::from_secs(3600), false).await.unwrap();
    assert_eq!((young.bytes, young.tensor_count), (0, 0));
    assert_eq!(young.young_count, 2 + 2 + 8 + 30 + 2, "and says what it left");
    let planned = gc::collect(&zoo, Duration::ZERO, true).await.unwrap();
    assert_eq!(young.young_bytes, planned.bytes);
    assert_eq!((planned.chain_count, planned.block_count, planned.tensor_count, planned.asset_count), (2, 8, 30, 2));
    assert_eq!(gc::collect(&zoo, Duration::ZERO, false).await.unwrap(), planned);
    assert_eq!(verify(&zoo, &Silent).await.unwrap().object_count, 0);
}

#[tokio::test]
async fn what_an_add_found_present_is_renewed_so_that_gc_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let root = dir.path().join("zoo");
    let zoo = Zoo::create_dir(&root).await.unwrap();
    add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(40 * 60);
    for entry in walk(&root) {
        std::fs::File::options().append(true).open(entry).unwrap().set_modified(old).unwrap();
    }
    // Older than half the hour of grace: renewed, and then younger than half an hour.
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/b", Recipe::Keep).await.unwrap();
    assert_eq!((report.bytes_new, report.blocks.present), (0, 6));
    for name in ["demo/a", "demo/b"] {
        zoo.remove_model(&name.parse().unwrap()).await.unwrap();
    }
    let report = gc::collect(&zoo, Duration::from_secs(30 * 60), false).await.unwrap();
    let taken = (report.tensor_count, report.block_count, report.chain_count, report.sketch_count);
    assert_eq!(taken, (0, 0, 0, 0), "{report:?}");
}

#[tokio::test]
async fn the_remains_of_killed_writes_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(dir.path()).await.unwrap();
    for name in ["tensors/ab/abc#1", "blocks/x.json#2"] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"half").unwrap();
    }
    assert_eq!(gc::collect(&zoo, Duration::from_secs(60), false).await.unwrap().staged_count, 0);
    let report = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((report.staged_count, report.bytes), (2, 8));
    assert!(!dir.path().join("tensors/ab/abc#1").exists());
}

/// What nobody names any more is added again as if it were not there: a `gc` that found all of it old must not take a part of it then.
#[tokio::test]
async fn what_is_added_again_is_young_with_the_marks_of_its_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let (root, demo) = (dir.path().join("zoo"), std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo"));
    let zoo = Zoo::create_dir(&root).await.unwrap();
    add_dir(&zoo, &demo.join("base"), "demo/base", Recipe::Keep).await.unwrap();
    add_dir(&zoo, &demo.join("shakespeare-top"), "demo/verse", Recipe::Keep).await.unwrap();
    zoo.remove_model(&"demo/verse".parse().unwrap()).await.unwrap();
    let before: Vec<_> = walk(&root.join("bases"));
    assert!(!before.is_empty(), "some of it is stored over the base");
    let old = std::time::SystemTime::now() - Duration::from_secs(3 * 3600);
    for entry in walk(&root) {
        std::fs::File::options().append(true).open(entry).unwrap().set_modified(old).unwrap();
    }
    add_dir(&zoo, &demo.join("shakespeare-top"), "demo/again", Recipe::Keep).await.unwrap();
    let model = zoo.resolve(&"demo/again".parse().unwrap()).await.unwrap();
    let tensors = model.blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| tensor.digest.to_string());
    let files = tensors.map(|digest| root.join("tensors").join(&digest[..2]).join(digest));
    let blocks = model.chain.blocks.iter().map(|digest| root.join("blocks").join(format!("{digest}.json")));
    for file in files.chain(blocks).chain(before) {
        let modified = file.metadata().unwrap_or_else(|error| panic!("{}: {error}", file.display())).modified().unwrap();
        assert!(modified > old + Duration::from_secs(3600), "{} is as old as it was", file.display());
    }
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
