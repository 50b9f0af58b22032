//! Records of measured equivalence in a zoo: what can be held against each other, what `gc` and `verify` make of records, and revoking them.

use std::time::Duration;

use crate::support::Checkpoint;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::equivalence::{Equivalence, Figures, METHOD, PairsError, Step, exchanged, pairs};
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::measures::Divergence;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{StoreError, Zoo};
use ashlar_zoo::verify::verify;

/// `acme/one`, and `acme/two` with another first feed-forward block.
async fn two_models(folder: &std::path::Path) -> (Zoo, ModelId, ModelId) {
    let zoo = Zoo::create_dir(&folder.join("zoo")).await.unwrap();
    let mut checkpoint = Checkpoint::llama(1);
    checkpoint.write(&folder.join("one"));
    crate::support::add_dir(&zoo, &folder.join("one"), "acme/one", Recipe::Keep).await.unwrap();
    checkpoint.retrain("layers.0.mlp", 2).write(&folder.join("two"));
    crate::support::add_dir(&zoo, &folder.join("two"), "acme/two", Recipe::Keep).await.unwrap();
    (zoo, "acme/one".parse().unwrap(), "acme/two".parse().unwrap())
}

/// Stores the chain of `one` with `two`'s block, and a record of it.
async fn record(zoo: &Zoo, one: &ModelId, two: &ModelId) -> (Digest, Equivalence) {
    let (own, others) = (zoo.resolve(one).await.unwrap(), zoo.resolve(two).await.unwrap());
    let pairs = pairs(zoo, (one, &own.chain), (two, &others.chain)).await.unwrap();
    assert_eq!(pairs.iter().map(|pair| pair.block_index).collect::<Vec<_>>(), [2], "the feed-forward block of the first layer");
    let (chain, _) = zoo.put_chain(&exchanged(&own.chain, [(2, pairs[0].other)])).await.unwrap();
    let figures = Figures { rows: 63, kl: Divergence { mean: 0.01, p99: 0.2, max: 0.3 }, same_top_share: 0.9 };
    let step = Step { block_index: 2, own: pairs[0].own, other: pairs[0].other, cosine: 0.98, alone: figures, together: figures, chain };
    let record = Equivalence {
        format: 1,
        method: METHOD.to_owned(),
        model: one.to_string(),
        chain: own.name.chain,
        other: two.to_string(),
        other_chain: others.name.chain,
        text: Digest::of(b"text"),
        created_ms: 5,
        steps: vec![step],
    };
    (zoo.put_equivalence(&record).await.unwrap().0, record)
}

#[tokio::test]
async fn a_record_keeps_what_it_exchanges_until_it_is_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, one, two) = two_models(folder.path()).await;
    let (digest, written) = record(&zoo, &one, &two).await;
    assert_eq!(zoo.list_equivalences().await.unwrap(), [digest]);
    assert_eq!(zoo.read_equivalence(digest).await.unwrap(), written);

    // The other model's name may go: the block that stands in stays, for the record's sake.
    zoo.remove_model(&two).await.unwrap();
    gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    let chain = zoo.read_chain(written.steps[0].chain).await.unwrap();
    for block in &chain.blocks {
        zoo.map_block(*block).await.unwrap();
    }
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.unreferenced_count), (0, 0), "{:?}", report.damage);

    zoo.remove_equivalence(digest).await.unwrap();
    assert!(matches!(zoo.remove_equivalence(digest).await, Err(StoreError::Missing { .. })));
    let taken = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((taken.equivalence_count, taken.chain_count, taken.block_count), (0, 1, 1));
    assert!(zoo.read_chain(written.steps[0].chain).await.is_err());
    zoo.show(&one).await.unwrap();
}

#[tokio::test]
async fn a_record_goes_with_its_chain() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, one, two) = two_models(folder.path()).await;
    let (digest, _) = record(&zoo, &one, &two).await;
    zoo.remove_model(&one).await.unwrap();
    let taken = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((taken.equivalence_count, taken.chain_count), (1, 2), "the model's chain and the exchanged one");
    assert!(matches!(zoo.read_equivalence(digest).await, Err(StoreError::Missing { .. })));
    assert_eq!(verify(&zoo, &Silent).await.unwrap().damage.len(), 0);
}

#[tokio::test]
async fn what_a_record_needs_is_missed_by_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, one, two) = two_models(folder.path()).await;
    let (digest, written) = record(&zoo, &one, &two).await;
    let root = folder.path().join("zoo");
    std::fs::remove_file(root.join(format!("chains/{}.json", written.steps[0].chain))).unwrap();
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!(report.damage.len(), 1, "{:?}", report.damage);
    assert_eq!(report.damage[0].object, format!("chain {}", written.steps[0].chain));
    assert_eq!(report.damage[0].models, ["acme/one"]);

    let file = root.join(format!("equivalences/{digest}.json"));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"rows\":63", "\"rows\":64")).unwrap();
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!(report.damage.len(), 1, "{:?}", report.damage);
    assert_eq!(report.damage[0].object, format!("equivalence {digest}"));
    assert!(report.damage[0].reason.starts_with("its bytes have the digest"), "{}", report.damage[0].reason);
}

#[tokio::test]
async fn models_that_do_not_correspond_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, one, _) = two_models(folder.path()).await;
    let own = zoo.resolve(&one).await.unwrap().chain;
    assert!(matches!(pairs(&zoo, (&one, &own), (&one, &own)).await, Err(PairsError::None(..))));
    let mut other = own.clone();
    other.assets.tokenizer = Some(Digest::of(b"another"));
    assert!(matches!(pairs(&zoo, (&one, &own), (&one, &other)).await, Err(PairsError::Tokenizer(..))));
    let mut longer = own.clone();
    longer.blocks.extend_from_slice(&own.blocks[1..3]);
    let refused = pairs(&zoo, (&one, &own), (&one, &longer)).await.unwrap_err();
    assert_eq!(refused.to_string(), "acme/one has 6 blocks, acme/one has 8");
}
