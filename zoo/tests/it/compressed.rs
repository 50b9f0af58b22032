//! Tensors that are stored encoded: alone, or as deltas of a relative's. They read back the same, `gc` and `verify` know what lies under
//! what, and a crash or a damaged base loses nothing that is not said.

use std::sync::Arc;
use std::time::Duration;

use crate::faulty::FaultyStore;
use crate::support::{Checkpoint, add_dir};
use ashlar_kernels::format::Dtype;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::encoding::DEPTH_MAX;
use ashlar_zoo::ingest::{AddOptions, AddReport, Recipe, Silent, add};
use ashlar_zoo::manifest::TensorRef;
use ashlar_zoo::repair::repair;
use ashlar_zoo::store::{Compression, Form, Retries, Stored, Zoo};
use ashlar_zoo::verify::verify;
use ashlar_zoo::{gc, tensor_file};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

const SHAPE: [u64; 2] = [96, 1024];

/// Weights of bell shape, and the same after `steps` small updates.
fn weights(seed: u64, steps: u64) -> Vec<u8> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let count = SHAPE[0] * SHAPE[1];
    let mut values: Vec<f32> = (0..count).map(|_| 0.1 * (0..4).map(|_| uniform()).sum::<f32>()).collect();
    for _ in 0..steps {
        values.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value + 2e-4 * uniform()).to_f32());
    }
    values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect()
}

async fn put(zoo: &Zoo, payload: &[u8], compression: Compression<'_>) -> (TensorRef, Stored) {
    let digest = tensor_file::digest(Dtype::Bf16, &SHAPE, payload);
    let tensor = TensorRef { digest, dtype: Dtype::Bf16, shape: SHAPE.to_vec() };
    let stored = zoo.put_tensor(&tensor, payload.to_vec().into(), compression).await.unwrap();
    (tensor, stored)
}

fn key(digest: Digest) -> Path {
    let digest = digest.to_string();
    Path::from(format!("tensors/{}/{digest}", &digest[..2]))
}

/// The header's byte that says how a tensor is stored.
async fn encoding(inner: &InMemory, digest: Digest) -> u8 {
    inner.get(&key(digest)).await.unwrap().bytes().await.unwrap()[8]
}

#[tokio::test]
async fn a_tensor_is_stored_alone_or_over_another_one_and_reads_back() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    let (base, tuned) = (weights(1, 0), weights(1, 3));
    let (base_ref, alone) = put(&zoo, &base, Compression::Alone).await;
    let (tuned_ref, over) = put(&zoo, &tuned, Compression::Over(&base_ref)).await;
    let (raw_ref, raw) = put(&zoo, &weights(2, 0), Compression::Off).await;
    let raw_bytes = base.len() as u64 + 64;
    assert_eq!(raw.bytes, raw_bytes);
    assert!(alone.bytes < raw_bytes * 85 / 100 && over.bytes < raw_bytes / 2, "{} and {} of {raw_bytes}", alone.bytes, over.bytes);
    let mut encodings = Vec::new();
    for tensor in [&base_ref, &tuned_ref, &raw_ref] {
        encodings.push(encoding(&inner, tensor.digest).await);
    }
    assert_eq!(encodings, [1, 2, 0]);
    let again = Zoo::open(inner, "memory").await.unwrap();
    assert!(again.map_tensor(&tuned_ref).await.unwrap().as_ref() == tuned);
    assert!(again.map_tensor(&base_ref).await.unwrap().as_ref() == base);
}

#[tokio::test]
async fn nothing_is_stored_over_what_is_of_another_shape_or_unlike() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    let (base_ref, _) = put(&zoo, &weights(1, 0), Compression::Alone).await;
    let other_shape = TensorRef { shape: vec![SHAPE[1], SHAPE[0]], ..base_ref.clone() };
    let missing = TensorRef { digest: Digest([3; 32]), ..base_ref.clone() };
    for (seed, near) in [(4, &base_ref), (5, &other_shape), (6, &missing)] {
        let (tensor, _) = put(&zoo, &weights(seed, 0), Compression::Over(near)).await;
        assert_eq!(encoding(&inner, tensor.digest).await, 1, "{seed}");
    }
}

#[tokio::test]
async fn deltas_over_deltas_are_few_and_all_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(dir.path()).await.unwrap();
    let mut refs: Vec<TensorRef> = Vec::new();
    for steps in 0..12 {
        let compression = refs.last().map_or(Compression::Alone, Compression::Over);
        let (tensor, _) = put(&zoo, &weights(1, steps), compression).await;
        refs.push(tensor);
    }
    let count = |folder: &str| std::fs::read_dir(dir.path().join(folder)).unwrap().count() as u64;
    // Each fifth one begins again.
    let alone = 12_u64.div_ceil(u64::from(DEPTH_MAX) + 1);
    assert_eq!(count("bases"), 12 - alone);
    // The deepest of all can be renewed: to one who must not know of it, it is stored again, and lies as it did.
    let deepest = usize::from(DEPTH_MAX);
    let lies_over = zoo.stored_as(refs[deepest].digest).await.unwrap();
    assert_eq!(lies_over.form, Form::Over(refs[deepest - 1].digest));
    put(&zoo.blind(), &weights(1, u64::from(DEPTH_MAX)), Compression::Over(&refs[deepest - 1])).await;
    assert_eq!(zoo.stored_as(refs[deepest].digest).await.unwrap(), lies_over);
    let zoo = Zoo::open_dir(dir.path()).await.unwrap();
    for (steps, tensor) in refs.iter().enumerate() {
        assert!(zoo.map_tensor(tensor).await.unwrap().as_ref() == weights(1, steps as u64), "{steps}");
    }
}

/// A small llama, and one that was tuned from it.
fn family(dir: &std::path::Path) {
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.join("base"));
    checkpoint.nudge(2e-4, 7).write(&dir.join("tuned"));
}

async fn add_over(zoo: &Zoo, dir: &std::path::Path, model: &str, parent: &str) -> Result<AddReport, ashlar_zoo::ingest::IngestError> {
    let options = AddOptions { recipe: Recipe::Bf16, parent: Some(parent.parse().unwrap()), ..AddOptions::new(model.parse().unwrap()) };
    add(zoo, dir, &options, &Silent).await
}

async fn names_resolve(zoo: &Zoo, when: &str) {
    let report = verify(zoo, &Silent).await.unwrap();
    assert!(report.damage.is_empty(), "{when}: {:?}", report.damage);
    for (id, _) in zoo.list_models().await.unwrap() {
        for block in &zoo.resolve(&id).await.unwrap().chain.blocks {
            zoo.map_block(*block).await.unwrap_or_else(|e| panic!("{when}: {e}"));
        }
    }
}

#[tokio::test]
async fn a_base_stays_while_a_delta_needs_it_and_goes_with_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path());
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Bf16).await.unwrap();
    let report = add_over(&zoo, &dir.path().join("tuned"), "demo/tuned", "demo/base").await.unwrap();
    assert!(report.bytes_stored < report.bytes_new / 2, "{report}");
    zoo.remove_model(&"demo/base".parse().unwrap()).await.unwrap();
    let collected = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert!(collected.chain_count == 1 && collected.tensor_count < 8, "{collected:?}");
    names_resolve(&Zoo::open(inner.clone(), "memory").await.unwrap(), "without the base's name").await;
    zoo.remove_model(&"demo/tuned".parse().unwrap()).await.unwrap();
    let collected = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert!(collected.base_count > 0, "{collected:?}");
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((report.object_count, report.damage.len()), (0, 0));
}

#[tokio::test]
async fn an_add_over_a_base_or_a_gc_that_dies_at_any_change_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path());
    for is_add in [true, false] {
        let mut ended = false;
        for (changes, torn) in (0..200).flat_map(|changes| [(changes, false), (changes, true)]) {
            let inner = Arc::new(InMemory::new());
            let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
            add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Bf16).await.unwrap();
            let faulty = Zoo::open(Arc::new(FaultyStore::new(inner.clone(), changes, torn)), "memory").await.unwrap();
            let faulty = faulty.with_retries(Retries { attempts: 1, ..Retries::default() });
            ended = if is_add {
                add_over(&faulty, &dir.path().join("tuned"), "demo/tuned", "demo/base").await.is_ok()
            } else {
                add_over(&zoo, &dir.path().join("tuned"), "demo/tuned", "demo/base").await.unwrap();
                zoo.remove_model(&"demo/base".parse().unwrap()).await.unwrap();
                zoo.remove_model(&"demo/tuned".parse().unwrap()).await.unwrap();
                gc::collect(&faulty, Duration::ZERO, false).await.is_ok()
            };
            // Without a grace period a killed gc's round is known to be over, so the adds below do not wait for it.
            let fresh = Zoo::open(inner.clone(), "memory").await.unwrap().with_grace(Duration::ZERO);
            names_resolve(&fresh, &format!("add {is_add}, {changes} changes, torn {torn}")).await;
            // What a killed gc left reads back as well, for an add may rely on it.
            add_dir(&fresh, &dir.path().join("base"), "demo/base", Recipe::Bf16).await.unwrap();
            add_over(&fresh, &dir.path().join("tuned"), "demo/tuned", "demo/base").await.unwrap();
            names_resolve(&fresh, &format!("added again after {changes} changes, torn {torn}")).await;
            if ended {
                break;
            }
        }
        assert!(ended, "it never finished");
    }
}

#[tokio::test]
async fn a_damaged_base_is_told_with_all_that_lies_over_it_and_mended_from_another_zoo() {
    let dir = tempfile::tempdir().unwrap();
    family(dir.path());
    let (inner, other) = (Arc::new(InMemory::new()), Arc::new(InMemory::new()));
    let (zoo, other) = (Zoo::create(inner.clone(), "memory").await.unwrap(), Zoo::create(other, "the other").await.unwrap());
    for zoo in [&zoo, &other] {
        add_dir(zoo, &dir.path().join("base"), "demo/base", Recipe::Bf16).await.unwrap();
        add_over(zoo, &dir.path().join("tuned"), "demo/tuned", "demo/base").await.unwrap();
    }
    let base = zoo.resolve(&"demo/base".parse().unwrap()).await.unwrap();
    let tuned = zoo.resolve(&"demo/tuned".parse().unwrap()).await.unwrap();
    let (q, over) = (&base.blocks[1].tensors["q.weight"], &tuned.blocks[1].tensors["q.weight"]);
    assert_eq!(encoding(&inner, over.digest).await, 2);
    let mut bytes = inner.get(&key(q.digest)).await.unwrap().bytes().await.unwrap().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    inner.put(&key(q.digest), bytes.into()).await.unwrap();
    inner.delete(&Path::from(format!("bases/{}/{}", over.digest, q.digest))).await.unwrap();
    inner.delete(&Path::from(format!("chains/{}.json", tuned.name.chain))).await.unwrap();

    let zoo = Zoo::open(inner, "memory").await.unwrap();
    let error = zoo.map_tensor(over).await.unwrap_err().to_string();
    assert!(error.contains(&over.digest.to_string()) && error.contains(&q.digest.to_string()), "{error}");
    let report = verify(&zoo, &Silent).await.unwrap();
    let told: Vec<&str> = report.damage.iter().map(|damage| damage.object.as_str()).collect();
    assert!(told.iter().any(|object| object.contains(&q.digest.to_string())), "{told:?}");
    assert!(told.iter().any(|object| object.contains(&tuned.name.chain.to_string())), "{told:?}");

    // The first repair brings the chain back, through which the rest is found to be needed.
    for _ in 0..2 {
        let report = verify(&zoo, &Silent).await.unwrap();
        let repaired = repair(&zoo, &other, &report).await.unwrap();
        assert!(repaired.left.is_empty(), "{:?}", repaired.left);
    }
    names_resolve(&zoo, "repaired").await;
    let empty = Zoo::create(Arc::new(InMemory::new()), "an empty zoo").await.unwrap();
    assert_eq!(repair(&zoo, &empty, &report).await.unwrap().left.len(), report.damage.len());
}

#[tokio::test]
async fn deltas_that_name_each_other_are_refused() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    let (a, _) = put(&zoo, &weights(1, 0), Compression::Alone).await;
    let (b, _) = put(&zoo, &weights(1, 1), Compression::Over(&a)).await;
    // The file of b in the place of a: it says that it lies over a.
    let bytes = inner.get(&key(b.digest)).await.unwrap().bytes().await.unwrap();
    inner.put(&key(a.digest), bytes.into()).await.unwrap();
    let zoo = Zoo::open(inner, "memory").await.unwrap();
    let (first, second) = tokio::join!(zoo.map_tensor(&a), zoo.map_tensor(&b));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert!(error.to_string().contains("is damaged"), "{error}");
    }
}

#[tokio::test]
async fn what_is_there_never_comes_to_lie_over_what_lies_over_it() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    let (base, tuned) = (weights(1, 0), weights(1, 3));
    let (base_ref, _) = put(&zoo, &base, Compression::Alone).await;
    let (tuned_ref, over) = put(&zoo, &tuned, Compression::Over(&base_ref)).await;
    let reads_back = async |when: &str| {
        let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
        assert!(zoo.map_tensor(&tuned_ref).await.unwrap().as_ref() == tuned, "{when}");
        assert!(zoo.map_tensor(&base_ref).await.unwrap().as_ref() == base, "{when}");
        assert_eq!((encoding(&inner, base_ref.digest).await, encoding(&inner, tuned_ref.digest).await), (1, 2), "{when}");
        assert_eq!(inner.list_with_delimiter(Some(&Path::from("scratch"))).await.unwrap().objects.len(), 0, "{when}");
    };
    // Too old in a store where only a put renews: written again.
    put(&zoo.clone().with_grace(Duration::ZERO), &base, Compression::Over(&tuned_ref)).await;
    reads_back("renewed").await;
    // To someone who must not know that it is there it is as small as it would be.
    let (_, seen) = put(&zoo.blind(), &base, Compression::Over(&tuned_ref)).await;
    assert_eq!(seen.put, ashlar_zoo::store::Put::New);
    assert!(seen.bytes.abs_diff(over.bytes) < over.bytes / 20, "{} and {}", seen.bytes, over.bytes);
    reads_back("added again by another").await;
    let (_, seen) = put(&zoo.blind(), &tuned, Compression::Over(&base_ref)).await;
    assert_eq!(seen, over, "the first one was told the same");
    reads_back("the delta added again by another").await;
    // What is there and cannot be read is written, not kept.
    inner.put(&key(base_ref.digest), "rubbish".into()).await.unwrap();
    put(&zoo.blind(), &base, Compression::Over(&tuned_ref)).await;
    let zoo = Zoo::open(inner.clone(), "memory").await.unwrap();
    assert!(zoo.map_tensor(&tuned_ref).await.unwrap().as_ref() == tuned && zoo.map_tensor(&base_ref).await.unwrap().as_ref() == base);
}
