//! Killed at any change, `add` and `gc` leave a zoo that verifies and in which every name resolves.

#[path = "support/faulty.rs"]
mod faulty;
mod support;

use std::sync::Arc;
use std::time::Duration;

use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::store::Zoo;
use ashlar_zoo::verify::verify;
use faulty::FaultyStore;
use object_store::memory::InMemory;
use support::{Checkpoint, add_dir};

async fn over(inner: &Arc<InMemory>, changes: i64, torn: bool) -> Zoo {
    // Opening only reads, so the count is of the changes under test.
    Zoo::open(Arc::new(FaultyStore::new(inner.clone(), changes, torn)), "memory").await.unwrap()
}

/// Everything is sound, and every name resolves with its weights.
async fn assert_sound(inner: &Arc<InMemory>, when: &str) {
    let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
    let report = verify(&zoo, &Silent).await.unwrap();
    assert!(report.damage.is_empty(), "{when}: {:?}", report.damage);
    for (id, _) in zoo.list_models().await.unwrap() {
        let model = zoo.resolve(&id).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        for block in &model.chain.blocks {
            zoo.map_block(*block).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    }
}

#[tokio::test]
async fn an_add_that_dies_at_any_change_leaves_a_sound_zoo_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1", 2).write(&dir.path().join("b"));
    let mut finished = false;
    for changes in 0..200 {
        for torn in [false, true] {
            let inner = Arc::new(InMemory::new());
            let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
            add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
            let result = add_dir(&over(&inner, changes, torn).await, &dir.path().join("b"), "demo/a", Recipe::Keep).await;
            assert_sound(&inner, &format!("add, {changes} changes, torn {torn}")).await;
            finished |= result.is_ok();
            if result.is_err() {
                let again = add_dir(&zoo, &dir.path().join("b"), "demo/a", Recipe::Keep).await.unwrap();
                assert_eq!(zoo.read_model(&"demo/a".parse().unwrap()).await.unwrap().chain, again.chain);
            }
        }
        if finished {
            // 9 tensors, 2 blocks, chain and name.
            assert_eq!(changes, 13);
            return;
        }
    }
    panic!("the add never finished");
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
                assert_eq!(changes, 12);
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
        for block in zoo.read_chain(chain).await.unwrap().blocks {
            zoo.read_block(block).await.unwrap();
        }
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
    assert_eq!(young.young_count, 2 + 8 + 30 + 2, "and says what it left");
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
    zoo.remove_model(&"demo/a".parse().unwrap()).await.unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(40 * 60);
    for entry in walk(&root) {
        std::fs::File::options().append(true).open(entry).unwrap().set_modified(old).unwrap();
    }
    // Older than half the hour of grace: renewed, and then younger than half an hour.
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/b", Recipe::Keep).await.unwrap();
    assert_eq!((report.bytes_new, report.blocks.present), (0, 6));
    zoo.remove_model(&"demo/b".parse().unwrap()).await.unwrap();
    let report = gc::collect(&zoo, Duration::from_secs(30 * 60), false).await.unwrap();
    assert_eq!((report.tensor_count, report.block_count), (0, 0), "{report:?}");
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

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
