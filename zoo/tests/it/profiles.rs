//! Records of what blocks cost: one for each block and kind of device, replaced whole, and verified, repaired and taken with their block.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{self, Checkpoint};
use ashlar_kernels::ops::KvFormat;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::profiles::{DeviceKey, Point, Profile};
use ashlar_zoo::repair::repair;
use ashlar_zoo::store::{Retry, StoreError, Zoo};
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

fn device(name: &str) -> DeviceKey {
    DeviceKey::new(name, "cpu, avx2, 2 threads")
}

fn profile(block: Digest, processor: &str, micros: f64) -> Profile {
    Profile {
        block,
        device: device(processor),
        points: vec![Point { rows: 1, micros, runs: 7 }, Point { rows: 8, micros: 2.0 * micros, runs: 7 }],
        context_tokens: 256,
        sequences_max: 32,
        kv_format: KvFormat::F32,
        version: "0.1.0".to_owned(),
        created_ms: 1,
    }
}

async fn zoo_with_a_model(folder: &Path) -> (Zoo, Vec<Digest>) {
    let zoo = Zoo::create_dir(&folder.join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&folder.join("model"));
    let report = support::add_dir(&zoo, &folder.join("model"), "acme/one", Recipe::Keep).await.unwrap();
    let blocks = zoo.read_chain(report.chain).await.unwrap().blocks;
    (zoo, blocks)
}

#[tokio::test]
async fn a_record_is_one_for_each_block_and_device_and_goes_with_its_block() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, blocks) = zoo_with_a_model(folder.path()).await;
    let missing = zoo.read_profile(blocks[0], &device("one")).await.unwrap_err();
    assert!(matches!(missing, StoreError::Missing { .. }) && missing.to_string().contains("profile of block"), "{missing}");
    for (block, processor, micros) in [(0, "one", 10.0), (0, "two", 20.0), (1, "one", 30.0), (0, "one", 11.5)] {
        zoo.put_profile(&profile(blocks[block], processor, micros)).await.unwrap();
    }
    // Measured again, the last one holds; the others are as they were.
    for (block, processor, micros) in [(0, "one", 11.5), (0, "two", 20.0), (1, "one", 30.0)] {
        let found = zoo.read_profile(blocks[block], &device(processor)).await.unwrap();
        assert_eq!(found, profile(blocks[block], processor, micros));
    }
    assert_eq!(std::fs::read_dir(folder.path().join(format!("zoo/profiles/{}", blocks[0]))).unwrap().count(), 2, "no file is left over");
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.unreferenced_count), (0, 0));
    assert_eq!(gc::collect(&zoo, Duration::ZERO, false).await.unwrap(), gc::GcReport::default());

    zoo.remove_model(&"acme/one".parse().unwrap()).await.unwrap();
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!(report.damage.len(), 0);
    let kept = gc::collect(&zoo, Duration::from_secs(3600), false).await.unwrap();
    assert_eq!((kept.profile_count, kept.block_count), (0, 0), "they are young");
    let report = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((report.profile_count, report.block_count), (3, 6));
    assert!(matches!(zoo.read_profile(blocks[0], &device("one")).await, Err(StoreError::Missing { .. })));
}

#[tokio::test]
async fn a_record_of_a_block_that_others_keep_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, blocks) = zoo_with_a_model(folder.path()).await;
    Checkpoint::llama(1).retrain("layers.1.mlp.up_proj", 2).write(&folder.path().join("other"));
    support::add_dir(&zoo, &folder.path().join("other"), "acme/two", Recipe::Keep).await.unwrap();
    for block in &blocks {
        zoo.put_profile(&profile(*block, "one", 10.0)).await.unwrap();
    }
    zoo.remove_model(&"acme/one".parse().unwrap()).await.unwrap();
    let report = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((report.profile_count, report.block_count), (1, 1), "the one block that the other has not");
    assert!(zoo.read_profile(blocks[0], &device("one")).await.is_ok());
}

#[tokio::test]
async fn a_damaged_record_is_named_with_its_models_and_mended() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (zoo, blocks) = zoo_with_a_model(folder.path()).await;
    let (spare, same) = zoo_with_a_model(other.path()).await;
    assert_eq!(same, blocks);
    let whole = profile(blocks[1], "one", 10.0);
    zoo.put_profile(&whole).await.unwrap();
    zoo.put_profile(&profile(blocks[2], "one", 20.0)).await.unwrap();
    spare.put_profile(&whole).await.unwrap();

    let path = |block: usize, device: &DeviceKey| folder.path().join(format!("zoo/profiles/{}/{device}.json", blocks[block]));
    let file = path(1, &whole.device);
    let text = std::fs::read_to_string(&file).unwrap();
    // A digit, a cut, a record that is another one's, and what is too long to be one.
    for (damage, reason) in [
        (text.replace("\"micros\":10.0", "\"micros\":11.0"), "its checksum is that of another text"),
        (text[..text.len() / 2].to_owned(), "this build cannot read it: "),
        (String::new(), "this build cannot read it: "),
        (std::fs::read_to_string(path(2, &whole.device)).unwrap(), "it is that of block "),
        (" ".repeat(20_000), "it has 20000 bytes, more than 16384"),
    ] {
        std::fs::write(&file, damage).unwrap();
        let error = zoo.read_profile(blocks[1], &whole.device).await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }) && error.retry() == Retry::Elsewhere, "{error:?}");
        assert!(
            error.to_string().starts_with(&format!("profile of block {} on {} is damaged: {reason}", blocks[1], whole.device)),
            "{error}"
        );
        assert!(zoo.read_profile(blocks[2], &whole.device).await.is_ok(), "another block's is sound");
        let report = verify(&zoo, &Silent).await.unwrap();
        assert_eq!((report.damage.len(), &report.damage[0].models[..]), (1, &["acme/one".to_owned()][..]), "{:?}", report.damage);
        assert_eq!(report.damage[0].blocks, [blocks[1].to_string()]);
    }
    let report = verify(&zoo, &Silent).await.unwrap();
    let mended = repair(&zoo, &spare, &report).await.unwrap();
    assert_eq!((mended.repaired.len(), mended.left.len()), (1, 0), "{mended:?}");
    assert_eq!(zoo.read_profile(blocks[1], &whole.device).await.unwrap(), whole);
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
    // What lies there and is no record is none of ours.
    std::fs::write(file.with_file_name("Notes.txt"), "x").unwrap();
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
}

#[tokio::test]
async fn any_store_replaces_a_record() {
    let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
    let block = Digest::of(b"block");
    for micros in [10.0, 12.0] {
        zoo.put_profile(&profile(block, "one", micros)).await.unwrap();
        assert_eq!(zoo.read_profile(block, &device("one")).await.unwrap(), profile(block, "one", micros));
    }
}
