//! A flipped bit, a missing file: found by verify, refused on load, with the block and the models named.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::support::{Checkpoint, add_dir};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::store::{Retry, StoreError, Zoo};
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

struct Fixture {
    dir: tempfile::TempDir,
    zoo: Zoo,
    block: Digest,
    tensor: PathBuf,
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1.mlp", 2).write(&dir.path().join("b"));
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    add_dir(&zoo, &dir.path().join("b"), "demo/b", Recipe::Keep).await.unwrap();
    let block = zoo.read_chain(report.chain).await.unwrap().blocks[2];
    let digest = zoo.read_block(block).await.unwrap().tensors["up.weight"].digest.to_string();
    let tensor = dir.path().join("zoo/tensors").join(&digest[..2]).join(&digest);
    Fixture { dir, zoo, block, tensor }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_flipped_bit_of_a_tensor_is_found_and_refused_with_the_block_named() {
    let fixture = fixture().await;
    flip(&fixture.tensor, 1000);
    let error = fixture.zoo.map_block(fixture.block).await.unwrap_err();
    assert_eq!(error.retry(), Retry::Elsewhere);
    let text = error.to_string();
    assert!(text.contains(&fixture.block.to_string()) && text.contains("`up.weight`"), "{text}");
    let report = verify(&fixture.zoo, &Silent).await.unwrap();
    assert_eq!(report.damage.len(), 1);
    assert_eq!(report.damage[0].models, ["demo/a", "demo/b"]);
    assert_eq!(report.damage[0].blocks, [format!("{} (`up.weight`)", fixture.block)]);
}

#[tokio::test]
async fn each_kind_of_damage_is_named() {
    for (what, index, expected) in [("block", 0, "block"), ("chain", 1, "chain"), ("asset", 2, "asset"), ("name", 3, "model demo/a")] {
        let fixture = fixture().await;
        let root = fixture.dir.path().join("zoo");
        let first = |folder: &str| std::fs::read_dir(root.join(folder)).unwrap().next().unwrap().unwrap().path();
        let path = [root.join(format!("blocks/{}.json", fixture.block)), first("chains"), first("assets"), root.join("models/demo/a.json")]
            [index]
            .clone();
        flip(&path, 3);
        let report = verify(&fixture.zoo, &Silent).await.unwrap();
        assert!(
            report.damage.iter().any(|damage| damage.object.starts_with(expected) && !damage.models.is_empty()),
            "{what}: {:?}",
            report.damage
        );
    }
}

#[tokio::test]
async fn what_is_gone_is_missed() {
    let fixture = fixture().await;
    std::fs::remove_file(&fixture.tensor).unwrap();
    let error = fixture.zoo.map_block(fixture.block).await.unwrap_err();
    assert!(matches!(error, StoreError::Missing { .. }), "{error}");
    let report = verify(&fixture.zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.damage[0].reason.as_str()), (1, "it is missing"));
    // Adding again heals it.
    add_dir(&fixture.zoo, &fixture.dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    assert!(verify(&fixture.zoo, &Silent).await.unwrap().damage.is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn a_tensor_that_is_no_plain_file_is_damage_and_verify_goes_on() {
    let make_link: fn(&Path) = |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap();
    for (what, make) in [("folder", (|path| std::fs::create_dir(path).unwrap()) as fn(&Path)), ("link", make_link)] {
        let fixture = fixture().await;
        std::fs::remove_file(&fixture.tensor).unwrap();
        make(&fixture.tensor);
        // Another one, which is read after it or before it.
        let asset = std::fs::read_dir(fixture.dir.path().join("zoo/assets")).unwrap().next().unwrap().unwrap().path();
        flip(&asset, 3);
        let report = verify(&fixture.zoo, &Silent).await.unwrap();
        let of_tensor = report.damage.iter().find(|damage| damage.object.starts_with("tensor"));
        assert_eq!((report.damage.len(), of_tensor.unwrap().models.len()), (2, 2), "{what}: {:?}", report.damage);
        assert!(fixture.zoo.map_block(fixture.block).await.is_err(), "{what}");
    }
}

#[tokio::test]
async fn a_truncated_tensor_is_refused_and_healed_by_adding_again() {
    let fixture = fixture().await;
    let bytes = std::fs::read(&fixture.tensor).unwrap();
    for len in [0, 10, 64, bytes.len() - 1] {
        std::fs::write(&fixture.tensor, &bytes[..len]).unwrap();
        assert!(fixture.zoo.map_block(fixture.block).await.is_err(), "{len}");
    }
    add_dir(&fixture.zoo, &fixture.dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    assert!(fixture.zoo.map_block(fixture.block).await.is_ok());
}

#[tokio::test]
async fn adding_again_mends_flipped_bits() {
    let fixture = fixture().await;
    let root = fixture.dir.path().join("zoo");
    flip(&fixture.tensor, 1000);
    for folder in ["assets", "chains", "blocks"] {
        let object = std::fs::read_dir(root.join(folder)).unwrap().next().unwrap().unwrap().path();
        flip(&object, 3);
    }
    assert_eq!(verify(&fixture.zoo, &Silent).await.unwrap().damage.len(), 4);
    for name in ["a", "b"] {
        add_dir(&fixture.zoo, &fixture.dir.path().join(name), &format!("demo/{name}"), Recipe::Keep).await.unwrap();
    }
    assert!(verify(&fixture.zoo, &Silent).await.unwrap().damage.is_empty());
}

#[tokio::test]
async fn without_local_files_tensors_are_aligned_copies() {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Int4).await.unwrap();
    let chain = zoo.read_chain(report.chain).await.unwrap();
    for block in chain.blocks {
        for tensor in zoo.map_block(block).await.unwrap().tensors.values() {
            assert_eq!(tensor.as_ref().as_ptr() as usize % 64, 0);
            tensor.view().check().unwrap();
        }
    }
}

#[tokio::test]
async fn a_directory_without_a_zoo_and_a_newer_one_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Zoo::open_dir(dir.path()).await, Err(StoreError::NoZoo { .. })));
    std::fs::write(dir.path().join("format.json"), r#"{"format":2}"#).unwrap();
    assert!(matches!(Zoo::open_dir(dir.path()).await, Err(StoreError::Format { .. })));
    assert!(matches!(Zoo::create_dir(dir.path()).await, Err(StoreError::Format { .. })));
}

#[tokio::test]
async fn of_two_who_change_a_name_one_is_told() {
    for local in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        Checkpoint::llama(1).write(&dir.path().join("a"));
        let zoo = match local {
            true => Zoo::create_dir(&dir.path().join("zoo")).await.unwrap(),
            false => Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap(),
        };
        let id = "demo/a".parse().unwrap();
        add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
        let seen = zoo.read_model(&id).await.unwrap();
        let mut mine = seen.clone();
        mine.parent = Some("demo/base".to_owned());
        assert!(matches!(zoo.set_model(&id, None, &mine).await, Err(StoreError::Conflict { .. })));
        zoo.set_model(&id, Some(&seen), &mine).await.unwrap();
        assert!(matches!(zoo.set_model(&id, Some(&seen), &mine).await, Err(StoreError::Conflict { .. })));
        assert_eq!(zoo.read_model(&id).await.unwrap(), mine);
    }
}

#[tokio::test]
async fn list_show_and_diff_tell_what_is_shared() {
    let fixture = fixture().await;
    let listed = fixture.zoo.list_resolved().await.unwrap();
    assert_eq!(listed.iter().map(|model| model.model.as_str()).collect::<Vec<_>>(), ["demo/a", "demo/b"]);
    assert_eq!(listed[0].own_bytes, 3 * 96 * 64 * 4);
    let diff = fixture.zoo.diff(&"demo/a".parse().unwrap(), &"demo/b".parse().unwrap()).await.unwrap();
    assert_eq!((diff.common_prefix, diff.shared_blocks, diff.differences.len(), diff.same_text), (4, 5, 1, true));
    assert_eq!(diff.differences[0].roles, ["down.weight", "gate.weight", "up.weight"]);
    let shown = fixture.zoo.show(&"demo/a".parse().unwrap()).await.unwrap();
    assert_eq!(shown.blocks[2].shared_with, ["demo/b"]);
    assert!(shown.blocks[4].shared_with.is_empty());
}
