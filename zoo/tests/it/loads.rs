//! How tensors come out of a store that is no local directory: by ranges, tried again, once for all who want one, through a cache.

use std::sync::Arc;
use std::time::Duration;

use crate::flaky::FlakyStore;
use crate::support::{Checkpoint, add_dir};
use ashlar_kernels::format::Dtype;
use ashlar_zoo::ingest::Recipe;
use ashlar_zoo::manifest::TensorRef;
use ashlar_zoo::store::{Cache, Compression, Retries, StoreError, Zoo};
use ashlar_zoo::tensor_file;
use futures::future::join_all;
use object_store::memory::InMemory;

/// Three parts, the last of them short.
const LARGE: u64 = (17 << 20) / 4;

async fn put(zoo: &Zoo, elements: u64) -> TensorRef {
    let payload: Vec<u8> = (0..elements).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let shape = vec![1, elements];
    let tensor = TensorRef { digest: tensor_file::digest(Dtype::F32, &shape, &payload), dtype: Dtype::F32, shape };
    zoo.put_tensor(&tensor, payload.into(), Compression::Off).await.unwrap();
    tensor
}

async fn over(store: &Arc<FlakyStore>) -> Zoo {
    let retries = Retries { attempts: 4, pause: Duration::from_millis(1) };
    Zoo::open(store.clone(), "the bucket").await.unwrap().with_retries(retries)
}

fn assert_reads(mapped: &ashlar_zoo::tensor::MappedTensor, elements: u64) {
    let last = (elements - 1) as f32;
    let bytes: &[u8] = mapped.as_ref();
    assert_eq!((bytes.len() as u64, &bytes[bytes.len() - 4..]), (4 * elements, &last.to_le_bytes()[..]));
}

#[tokio::test]
async fn a_part_that_fails_is_read_again_and_no_other() {
    let inner = Arc::new(InMemory::new());
    let tensor = put(&Zoo::create(inner.clone(), "memory").await.unwrap(), LARGE).await;
    let store = FlakyStore::new(inner, |number| number == 1 || number == 3);
    assert_reads(&over(&store).await.map_tensor(&tensor).await.unwrap(), LARGE);
    let mut reads: Vec<u64> = store.reads.lock().unwrap().iter().map(|range| range.clone().unwrap().start).collect();
    assert_eq!(reads.len(), 5);
    reads.sort_unstable();
    reads.dedup();
    assert_eq!(reads, [0, 8 << 20, 16 << 20]);
}

#[tokio::test]
async fn a_store_that_goes_on_failing_is_named_with_the_tensor_block_and_role() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("a"));
    let report = add_dir(&zoo, &dir.path().join("a"), "demo/a", Recipe::Keep).await.unwrap();
    let block = zoo.read_chain(report.chain).await.unwrap().blocks[2];
    let store = FlakyStore::new(inner, |_| true);
    let error = over(&store).await.map_block(block).await.unwrap_err();
    let text = format!("{error}");
    assert!(text.contains(&block.to_string()) && text.contains("weight`") && text.contains("the bucket"), "{text}");
    assert!(matches!(error.retry(), ashlar_zoo::store::Retry::Same));
    // Each tensor that was begun was tried four times.
    assert_eq!(store.read_count() % 4, 0);
    assert!(store.read_count() <= 16);
}

#[tokio::test]
async fn what_is_missing_is_not_asked_for_again() {
    let inner = Arc::new(InMemory::new());
    let tensor = put(&Zoo::create(inner.clone(), "memory").await.unwrap(), 100).await;
    let absent = TensorRef { digest: ashlar_zoo::digest::Digest([7; 32]), ..tensor };
    let store = FlakyStore::new(inner, |_| false);
    let error = over(&store).await.map_tensor(&absent).await.unwrap_err();
    assert!(matches!(error, StoreError::Missing { .. }), "{error}");
    assert_eq!(store.read_count(), 1);
}

#[tokio::test]
async fn many_who_want_one_tensor_read_it_once() {
    let inner = Arc::new(InMemory::new());
    let tensor = put(&Zoo::create(inner.clone(), "memory").await.unwrap(), 1000).await;
    let store = FlakyStore::new(inner, |number| number == 0);
    let zoo = over(&store).await;
    let mapped = join_all((0..32).map(|_| zoo.map_tensor(&tensor))).await;
    mapped.iter().for_each(|mapped| assert_reads(mapped.as_ref().unwrap(), 1000));
    assert_eq!(store.read_count(), 2, "one failed, one read");
    drop(mapped);
    zoo.map_tensor(&tensor).await.unwrap();
    assert_eq!(store.read_count(), 3, "nobody held it any more");
}

#[tokio::test]
async fn the_cache_is_read_in_place_of_the_store_and_mended_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let inner = Arc::new(InMemory::new());
    let tensor = put(&Zoo::create(inner.clone(), "memory").await.unwrap(), 1000).await;
    let store = FlakyStore::new(inner, |_| false);
    let file = dir.path().join(&tensor.digest.to_string()[..2]).join(tensor.digest.to_string());
    for reads in [1, 1] {
        let zoo = over(&store).await.with_cache(Cache::open(dir.path(), 1 << 20).unwrap());
        assert_reads(&zoo.map_tensor(&tensor).await.unwrap(), 1000);
        assert_eq!(store.read_count(), reads);
    }
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[99] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let zoo = over(&store).await.with_cache(Cache::open(dir.path(), 1 << 20).unwrap());
    assert_reads(&zoo.map_tensor(&tensor).await.unwrap(), 1000);
    assert_eq!(store.read_count(), 2);
    bytes[99] ^= 1;
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
    // A cache that cannot be written costs memory, and nothing else.
    let shelf = file.parent().unwrap();
    std::fs::remove_dir_all(shelf).unwrap();
    std::fs::write(shelf, "no directory").unwrap();
    assert_reads(&zoo.map_tensor(&tensor).await.unwrap(), 1000);
    assert_eq!(store.read_count(), 3);
}
