//! A quantised model: what models share stays shared, what is killed leaves a sound zoo and no name, and nothing is quantised under a name
//! that is taken or for who may not see it.

use std::sync::Arc;

use crate::faulty::FaultyStore;
use crate::support::{Checkpoint, add_dir, make_public};
use ashlar_kernels::format::{Dtype, TensorView, dequantise};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::draft::DraftError;
use ashlar_zoo::ingest::{Recipe as Ingest, Silent};
use ashlar_zoo::quantise::{Draft, Form, Recipe};
use ashlar_zoo::store::{Retries, Zoo};
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

fn recipe(linear: &str) -> Recipe {
    Recipe { linear: linear.parse().unwrap(), table: Form::TABLE }
}

async fn quantise(zoo: &Zoo, model: &str, linear: &str, name: &str) -> Result<Digest, DraftError> {
    let name = name.parse().unwrap();
    let source = zoo.resolve(&model.parse().unwrap()).await?;
    let mut draft = Draft::new(zoo, source, recipe(linear), Some(&name)).await?;
    for index in 0..draft.blocks().len() {
        draft.round(index).await?;
    }
    draft.store(&name, 1, None).await
}

/// Two models that differ in one matrix.
async fn siblings(zoo: &Zoo) {
    let dir = tempfile::tempdir().unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&dir.path().join("a"));
    checkpoint.retrain("layers.1.mlp.up_proj", 2).write(&dir.path().join("b"));
    for name in ["a", "b"] {
        add_dir(zoo, &dir.path().join(name), &format!("demo/{name}"), Ingest::Keep).await.unwrap();
    }
}

#[tokio::test]
async fn blocks_that_models_share_are_shared_when_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(dir.path()).await.unwrap();
    siblings(&zoo).await;
    for (linear, dtype) in
        [("int4-g32", "int4g32"), ("int4m-g32", "int4mg32"), ("int8-g64", "int8g64"), ("fp8", "fp8g512"), ("fp8-g32", "fp8g32")]
    {
        let (a, b) = (format!("demo/a-{linear}"), format!("demo/b-{linear}"));
        quantise(&zoo, "demo/a", linear, &a).await.unwrap();
        quantise(&zoo, "demo/b", linear, &b).await.unwrap();
        let (a, b) = (zoo.show(&a.parse().unwrap()).await.unwrap(), zoo.show(&b.parse().unwrap()).await.unwrap());
        let differ: Vec<usize> = (0..a.chain.blocks.len()).filter(|index| a.chain.blocks[*index] != b.chain.blocks[*index]).collect();
        assert_eq!(differ, [4], "{linear}");
        assert_eq!((a.name.parent.as_deref(), a.chain.assets), (Some("demo/a"), b.chain.assets), "{linear}");
        assert_eq!((&a.blocks[0].dtypes, &a.blocks[1].dtypes), (&vec!["int8g32".to_owned()], &vec![dtype.to_owned()]));
    }
    let report = verify(&zoo, &Silent).await.unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
}

#[tokio::test]
async fn a_draft_without_a_name_writes_nothing_and_has_what_a_stored_one_has() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    siblings(&zoo).await;
    let source = zoo.resolve(&"demo/a".parse().unwrap()).await.unwrap();
    // A store that dies at the first change.
    let still = Zoo::open(Arc::new(FaultyStore::new(inner, 0, false)), "memory").await.unwrap();
    let mut draft = Draft::new(&still, source.clone(), recipe("int4-g32"), None).await.unwrap();
    for index in 0..draft.blocks().len() {
        draft.round(index).await.unwrap();
    }
    let stored = quantise(&zoo, "demo/a", "int4-g32", "demo/q").await.unwrap();
    for (index, digest) in zoo.read_chain(stored).await.unwrap().blocks.into_iter().enumerate() {
        let (held, stored) = (draft.map_block(index).await.unwrap(), zoo.map_block(digest).await.unwrap());
        assert_eq!(held.block, stored.block);
        for (role, tensor) in &held.tensors {
            assert_eq!(tensor.as_ref(), stored.tensors[role].as_ref(), "{index} {role}");
        }
        // And it is the source, less what the rounding took.
        let of_source = zoo.map_block(source.chain.blocks[index]).await.unwrap();
        for (role, tensor) in &of_source.tensors {
            let (w, q) = (dequantise(&tensor.view()), dequantise(&held.tensors[role].view()));
            let rms = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            let error = rms(&mut w.iter().zip(&q).map(|(w, q)| w - q)) / rms(&mut w.iter().copied());
            let expected = match held.tensors[role].view() {
                TensorView { dtype: Dtype::F32, .. } => 0.0..=0.0,
                TensorView { dtype: Dtype::Int8 { .. }, .. } => 1e-4..=0.01,
                _ => 0.01..=0.12,
            };
            assert!(expected.contains(&error), "{index} {role}: {error}");
        }
    }
    assert!(draft.bytes() < 100_000, "{}", draft.bytes());
}

#[tokio::test]
async fn a_store_that_fails_at_any_change_leaves_a_sound_zoo_without_the_name() {
    for (changes, torn) in (0..100).flat_map(|changes| [(changes, false), (changes, true)]) {
        let inner = Arc::new(InMemory::new());
        let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
        siblings(&zoo).await;
        let failing = Zoo::open(Arc::new(FaultyStore::new(inner, changes, torn)), "memory").await.unwrap();
        let failing = failing.with_retries(Retries { attempts: 1, ..Retries::default() });
        let result = quantise(&failing, "demo/a", "int4-g32", "demo/q").await;
        let report = verify(&zoo, &Silent).await.unwrap();
        assert!(report.damage.is_empty(), "{changes}: {:?}", report.damage);
        let named = zoo.resolve(&"demo/q".parse().unwrap()).await;
        match result {
            Ok(chain) => {
                assert_eq!(named.unwrap().name.chain, chain);
                assert!(changes > 20, "tensors, blocks, chain, sketch and name are changes: {changes}");
                return;
            }
            // The last change of all may happen and not be told.
            Err(error) => assert!(named.is_err() || torn, "{changes}: {error}"),
        }
        quantise(&zoo, "demo/a", "int4-g32", "demo/again").await.unwrap();
    }
    panic!("it never succeeds");
}

#[tokio::test]
async fn taken_names_and_hidden_models_are_refused_before_anything_is_written() {
    let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
    siblings(&zoo).await;
    let refused = quantise(&zoo, "demo/a", "int4-g32", "demo/b").await.unwrap_err();
    assert_eq!(refused.to_string(), "demo/b exists: give another name with --name");
    let refused = quantise(&zoo, "demo/a", "int4-g32", "rival/a").await.unwrap_err();
    assert!(refused.to_string().starts_with("demo/a is not rival's to see: `ashlar zoo public demo`"), "{refused}");
    make_public(&zoo, &["demo"]).await;
    quantise(&zoo, "demo/a", "int4-g32", "rival/a").await.unwrap();
}
