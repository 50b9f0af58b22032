//! A surrogate in the zoo: blocks that were not cut stay the source's, cut ones are whole and of a sound shape, and what is killed leaves no name.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::faulty::FaultyStore;
use crate::support::peft::Peft;
use crate::support::{Checkpoint, HEAD_DIM, add_dir, make_public};
use ashlar_kernels::format::dequantise;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::draft::{ChainDraft, DraftError};
use ashlar_zoo::export::export;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::manifest::BlockKind;
use ashlar_zoo::store::{Retries, Zoo};
use ashlar_zoo::surrogate::{CutError, cut, multiply_adds};
use ashlar_zoo::verify::verify;
use object_store::memory::InMemory;

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Draft(#[from] DraftError),
    #[error(transparent)]
    Cut(#[from] CutError),
}

/// Leaves of block 3 the second key-value head, of block 4 the even columns.
async fn halve(zoo: &Zoo, model: &str, name: &str) -> Result<Digest, Failed> {
    let name = name.parse().unwrap();
    let source = zoo.resolve(&model.parse().unwrap()).await.map_err(DraftError::from)?;
    let mut draft = ChainDraft::new(zoo, source, Some(&name)).await?;
    cut(&mut draft, 3, &[1], None).await?;
    cut(&mut draft, 4, &(0..96).step_by(2).collect::<Vec<_>>(), None).await?;
    Ok(draft.store(&name, 1, None).await?)
}

async fn zoo_of(checkpoint: &Checkpoint, recipe: Recipe, zoo: &Zoo) {
    let dir = tempfile::tempdir().unwrap();
    checkpoint.write(&dir.path().join("a"));
    add_dir(zoo, &dir.path().join("a"), "demo/a", recipe).await.unwrap();
}

#[tokio::test]
async fn what_is_cut_is_cut_alike_in_all_tensors_and_the_rest_is_the_sources() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in [Recipe::Keep, Recipe::Int8] {
        let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
        zoo_of(&Checkpoint::llama(1), recipe, &zoo).await;
        let chain = halve(&zoo, "demo/a", "demo/half").await.unwrap();
        let (source, made) =
            (zoo.resolve(&"demo/a".parse().unwrap()).await.unwrap(), zoo.resolve(&"demo/half".parse().unwrap()).await.unwrap());
        assert_eq!((made.name.chain, made.name.parent.as_deref()), (chain, Some("demo/a")));
        let differ: Vec<usize> = (0..6).filter(|index| source.chain.blocks[*index] != made.chain.blocks[*index]).collect();
        assert_eq!(differ, [3, 4]);
        assert!(matches!(made.blocks[3].params, BlockKind::Attention { heads: 2, kv_heads: 1, .. }), "{:?}", made.blocks[3].params);
        assert!(matches!(made.blocks[4].params, BlockKind::FeedForward { inner: 48, .. }), "{:?}", made.blocks[4].params);
        // Half of q, k, v and o (64 x 64, 32 x 64 twice, 64 x 64) and of gate, up and down (96 x 64 each).
        assert_eq!(multiply_adds(&source.blocks) - multiply_adds(&made.blocks), (2 * 64 * 64 + 2 * 32 * 64) / 2 + 3 * 96 * 64 / 2);

        let [whole, cut] = [&source, &made].map(|model| model.chain.blocks.clone());
        let rows = |values: Vec<f32>, cols: usize, kept: &[usize]| -> Vec<f32> {
            kept.iter().flat_map(|r| values[r * cols..][..cols].to_vec()).collect()
        };
        for (index, role, kept) in [
            (3, "q.weight", (2 * HEAD_DIM..4 * HEAD_DIM).collect::<Vec<_>>()),
            (3, "k.weight", (HEAD_DIM..2 * HEAD_DIM).collect()),
            (3, "v.weight", (HEAD_DIM..2 * HEAD_DIM).collect()),
            (4, "gate.weight", (0..96).step_by(2).collect()),
            (4, "up.weight", (0..96).step_by(2).collect()),
        ] {
            let [whole, cut] = [whole[index], cut[index]];
            let (whole, cut) = (zoo.map_block(whole).await.unwrap(), zoo.map_block(cut).await.unwrap());
            assert_eq!(cut.tensors[role].dtype(), whole.tensors[role].dtype());
            assert_eq!(
                dequantise(&cut.tensors[role].view()),
                rows(dequantise(&whole.tensors[role].view()), 64, &kept),
                "{recipe:?} {role}"
            );
        }
        for (index, role, cols, kept) in
            [(3, "o.weight", 64, (32..64).collect::<Vec<_>>()), (4, "down.weight", 96, (0..96).step_by(2).collect())]
        {
            let (whole, cut) = (zoo.map_block(whole[index]).await.unwrap(), zoo.map_block(cut[index]).await.unwrap());
            let (values, cut) = (dequantise(&whole.tensors[role].view()), dequantise(&cut.tensors[role].view()));
            let expected: Vec<f32> = values.chunks(cols).flat_map(|row| kept.iter().map(|k| row[*k])).collect();
            assert_eq!(expected.len(), cut.len());
            let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
            let error = (squares(&mut expected.iter().zip(&cut).map(|(a, b)| a - b)) / squares(&mut expected.iter().copied())).sqrt();
            // Rounded to eight bits once more, in other groups.
            let most = if recipe == Recipe::Keep { 0.0 } else { 0.01 };
            assert!(error <= most, "{recipe:?} {role}: {error}");
        }
        let report = verify(&zoo, &Silent).await.unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
        if recipe == Recipe::Keep {
            let refused = export(&zoo, &"demo/half".parse().unwrap(), &dir.path().join("out")).await.unwrap_err();
            assert!(refused.to_string().starts_with("config.json of a llama model cannot say what "), "{refused}");
        }
    }
}

#[tokio::test]
async fn weights_that_a_half_float_cannot_hold_are_refused_by_name() {
    let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
    zoo_of(&Checkpoint::llama(1), Recipe::Keep, &zoo).await;
    let source = zoo.resolve(&"demo/a".parse().unwrap()).await.unwrap();
    let mut draft = ChainDraft::new(&zoo, source, None).await.unwrap();
    let refused = cut(&mut draft, 4, &[0, 5], Some(vec![f32::INFINITY; 2 * 64])).await.unwrap_err();
    assert_eq!(refused.to_string(), "`down.weight` of block 4 would not be finite as f32");
    assert_eq!(draft.blocks(), draft.source().blocks);
}

#[tokio::test]
async fn a_store_that_fails_at_any_change_leaves_a_sound_zoo_without_the_name() {
    for (changes, torn) in (0..60).flat_map(|changes| [(changes, false), (changes, true)]) {
        let inner = Arc::new(InMemory::new());
        let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
        zoo_of(&Checkpoint::llama(1), Recipe::Keep, &zoo).await;
        let failing = Zoo::open(Arc::new(FaultyStore::new(inner, changes, torn)), "memory").await.unwrap();
        let failing = failing.with_retries(Retries { attempts: 1, ..Retries::default() });
        let result = halve(&failing, "demo/a", "demo/half").await;
        let report = verify(&zoo, &Silent).await.unwrap();
        assert!(report.damage.is_empty(), "{changes}: {:?}", report.damage);
        let named = zoo.resolve(&"demo/half".parse().unwrap()).await;
        match result {
            Ok(chain) => {
                assert_eq!(named.unwrap().name.chain, chain);
                assert!(changes > 10, "seven tensors, two blocks, chain, sketch and name are changes: {changes}");
                return;
            }
            // The last change of all may happen and not be told.
            Err(error) => assert!(named.is_err() || torn, "{changes}: {error}"),
        }
    }
    panic!("it never succeeds");
}

#[tokio::test]
async fn a_draft_without_a_name_writes_nothing_and_counts_what_it_would_take() {
    let inner = Arc::new(InMemory::new());
    let zoo = Zoo::create(inner.clone(), "memory").await.unwrap();
    zoo_of(&Checkpoint::llama(1), Recipe::Keep, &zoo).await;
    let source = zoo.resolve(&"demo/a".parse().unwrap()).await.unwrap();
    // A store that dies at the first change.
    let still = Zoo::open(Arc::new(FaultyStore::new(inner, 0, false)), "memory").await.unwrap();
    let mut draft = ChainDraft::new(&still, source, None).await.unwrap();
    cut(&mut draft, 4, &(0..32).collect::<Vec<_>>(), None).await.unwrap();
    let matrices = 4 * 64 * 32 * 3;
    assert_eq!((draft.own_bytes(), draft.source_bytes() - draft.bytes()), (matrices, 2 * matrices));
    let sizes: BTreeMap<String, u64> =
        draft.map_block(4).await.unwrap().block.tensors.into_iter().map(|(role, t)| (role, t.shape[0])).collect();
    assert_eq!((sizes["gate.weight"], sizes["down.weight"], sizes["norm.weight"]), (32, 64, 64));
}

#[tokio::test]
async fn taken_names_hidden_models_and_adapters_are_refused_before_anything_is_written() {
    let zoo = Zoo::create(Arc::new(InMemory::new()), "memory").await.unwrap();
    zoo_of(&Checkpoint::llama(1), Recipe::Keep, &zoo).await;
    let refused = halve(&zoo, "demo/a", "demo/a").await.unwrap_err();
    assert_eq!(refused.to_string(), "demo/a exists: give another name with --name");
    let refused = halve(&zoo, "demo/a", "rival/a").await.unwrap_err();
    assert!(refused.to_string().starts_with("demo/a is not rival's to see: `ashlar zoo public demo`"), "{refused}");
    make_public(&zoo, &["demo"]).await;
    halve(&zoo, "demo/a", "rival/a").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    Peft::over("demo/a").lora("model.layers.1.self_attn.q_proj", (64, 64), 4, 1).write(dir.path());
    add_dir(&zoo, dir.path(), "demo/lora", Recipe::Keep).await.unwrap();
    let refused = halve(&zoo, "demo/lora", "demo/half").await.unwrap_err();
    assert!(refused.to_string().starts_with("demo/lora has adapters, which were trained over its base as it is"), "{refused}");
}
