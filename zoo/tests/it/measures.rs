//! Records of what an approximate model changes: kept with their chain, shown, verified, repaired and taken.

use std::time::Duration;

use crate::support::Checkpoint;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::export::export;
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::measures::{Divergence, Measure};
use ashlar_zoo::repair::repair;
use ashlar_zoo::store::{StoreError, Zoo};
use ashlar_zoo::verify::verify;

fn measure(method: &str, created_ms: u64) -> Measure {
    Measure {
        method: method.to_owned(),
        against: Digest::of(b"source"),
        text: Digest::of(b"text"),
        rows: 63,
        kl: Divergence { mean: 0.01, p99: 0.2, max: 0.5 },
        same_top_share: 0.97,
        perplexity: 20.4,
        perplexity_of_source: 20.0,
        created_ms,
    }
}

async fn zoo_with_a_model(folder: &std::path::Path) -> (Zoo, Digest) {
    let zoo = Zoo::create_dir(&folder.join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&folder.join("model"));
    let report = crate::support::add_dir(&zoo, &folder.join("model"), "acme/one", Recipe::Keep).await.unwrap();
    (zoo, report.chain)
}

#[tokio::test]
async fn an_approximate_model_that_is_exported_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, chain) = zoo_with_a_model(folder.path()).await;
    let name = "acme/one".parse().unwrap();
    export(&zoo, &name, &folder.path().join("exact")).await.unwrap();
    let card = |out: &str| std::fs::read_to_string(folder.path().join(out).join("README.md")).unwrap_or_default();
    assert!(!card("exact").contains("approximation"));
    zoo.put_measure(chain, &measure("ffn 0.75", 1)).await.unwrap();
    export(&zoo, &name, &folder.path().join("cut")).await.unwrap();
    let expected = format!(
        "- ffn 0.75, of chain {}: its next-token distributions differ by a mean KL of 1.00e-2 over 63 tokens\n",
        Digest::of(b"source").short()
    );
    assert_eq!(card("cut"), card("exact") + "\n## This is an approximation\n\nMade from the model of this card:\n\n" + &expected);
}

#[tokio::test]
async fn records_are_shown_newest_first_and_go_with_their_chain() {
    let folder = tempfile::tempdir().unwrap();
    let (zoo, chain) = zoo_with_a_model(folder.path()).await;
    let (old, new) = (measure("svd:16", 1), measure("bitdelta", 2));
    zoo.put_measure(chain, &new).await.unwrap();
    let first = zoo.put_measure(chain, &old).await.unwrap();
    assert_eq!(zoo.put_measure(chain, &old).await.unwrap(), first, "twice is once");
    let shown = zoo.show(&"acme/one".parse().unwrap()).await.unwrap();
    assert_eq!(shown.measures, [new, old.clone()]);
    let report = verify(&zoo, &Silent).await.unwrap();
    assert_eq!((report.damage.len(), report.unreferenced_count), (0, 0));
    assert_eq!(gc::collect(&zoo, Duration::ZERO, false).await.unwrap(), gc::GcReport::default());

    zoo.remove_model(&"acme/one".parse().unwrap()).await.unwrap();
    assert_eq!(verify(&zoo, &Silent).await.unwrap().damage.len(), 0);
    let report = gc::collect(&zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!((report.measure_count, report.chain_count), (2, 1));
    assert!(zoo.read_measures(chain).await.unwrap().is_empty());
    assert!(matches!(zoo.read_measure(chain, first).await, Err(StoreError::Missing { .. })));
}

#[tokio::test]
async fn a_damaged_record_is_named_with_its_models_left_out_and_mended() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (zoo, chain) = zoo_with_a_model(folder.path()).await;
    let record = zoo.put_measure(chain, &measure("svd:16", 1)).await.unwrap();
    let (spare, same) = zoo_with_a_model(other.path()).await;
    assert_eq!((same, spare.put_measure(chain, &measure("svd:16", 1)).await.unwrap()), (chain, record));

    let file = folder.path().join(format!("zoo/measures/{chain}/{record}.json"));
    let text = std::fs::read_to_string(&file).unwrap();
    // A number that cannot be, under a name that is its own digest; then other bytes than the name says.
    let nonsense = text.replace("\"same_top_share\":0.97", "\"same_top_share\":1.97");
    let name = Digest::of(nonsense.as_bytes());
    std::fs::write(file.with_file_name(format!("{name}.json")), nonsense).unwrap();
    std::fs::write(&file, text.replace("0.97", "0.99")).unwrap();
    assert!(zoo.read_measures(chain).await.unwrap().is_empty());
    let report = verify(&zoo, &Silent).await.unwrap();
    let mut reasons: Vec<&str> = report.damage.iter().map(|damage| damage.reason.as_str()).collect();
    reasons.sort_unstable();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].starts_with("its bytes have the digest"), "{reasons:?}");
    assert_eq!(reasons[1], "its share of equal likeliest tokens is 1.97");
    for damage in &report.damage {
        assert!(damage.object.ends_with(&format!("of chain {chain}")), "{}", damage.object);
        assert_eq!(damage.models, ["acme/one"]);
    }
    let mended = repair(&zoo, &spare, &report).await.unwrap();
    assert_eq!((mended.repaired.len(), mended.left.len()), (1, 1), "{mended:?}");
    assert_eq!(zoo.read_measures(chain).await.unwrap(), [measure("svd:16", 1)]);
}
