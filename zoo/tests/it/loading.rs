//! Adapters that are loaded and unloaded: which names they may take, which they give back, and what is left afterwards.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir};
use ashlar_zoo::gc;
use ashlar_zoo::ingest::{AdapterFiles, AddReport, IngestError, LoadOptions, Recipe, Shared, Silent, UnloadError, load, unload};
use ashlar_zoo::manifest::ModelName;
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{StoreError, Zoo};
use ashlar_zoo::verify::verify;
use serde_json::json;

const Q: &str = "model.layers.0.self_attn.q_proj";

struct Fixture {
    dir: tempfile::TempDir,
    zoo: Zoo,
}

/// A zoo with the small model as `demo/base`.
async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    Fixture { dir, zoo }
}

fn of_seed(seed: u64) -> Peft {
    let mut peft = Peft::over("base");
    peft.lora(Q, (D, 64), 4, seed);
    peft
}

fn id(name: &str) -> ModelId {
    format!("demo/{name}").parse().unwrap()
}

impl Fixture {
    fn written(&self, peft: &Peft, folder: &str) -> PathBuf {
        let path = self.dir.path().join(folder);
        peft.write(&path);
        path
    }

    async fn load(&self, peft: &Peft, name: &str) -> Result<AddReport, IngestError> {
        self.load_path(&self.written(peft, name), name, false).await
    }

    async fn load_path(&self, path: &Path, name: &str, replaces: bool) -> Result<AddReport, IngestError> {
        let options = LoadOptions { model: id(name), base: None, replaces };
        load(&self.zoo, AdapterFiles::open(path)?, &options, &Silent).await
    }

    async fn name(&self, name: &str) -> Option<ModelName> {
        match self.zoo.read_model(&id(name)).await {
            Ok(name) => Some(name),
            Err(StoreError::Missing { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        fn walk(dir: &Path, found: &mut BTreeSet<PathBuf>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, found),
                    false => assert!(found.insert(path), "each is met once"),
                }
            }
        }
        let mut found = BTreeSet::new();
        walk(&self.dir.path().join("zoo"), &mut found);
        found
    }
}

#[tokio::test]
async fn copies_cost_nothing_and_cycles_leave_nothing() {
    let fixture = fixture().await;
    let before = fixture.files();
    let first = fixture.load(&of_seed(1), "one").await.unwrap();
    assert_eq!(first.adapters, Shared { total: 1, present: 0 });
    let second = fixture.load(&of_seed(1), "again").await.unwrap();
    assert_eq!((second.adapters, second.bytes_new), (Shared { total: 1, present: 1 }, 0), "the same factors are stored once");
    let name = fixture.name("one").await.unwrap();
    assert_eq!((name.chain, name.parent.as_deref(), name.loaded), (first.chain, Some("demo/base"), true));
    for _ in 0..3 {
        assert_eq!(unload(&fixture.zoo, &id("one")).await.unwrap(), first.chain);
        assert!(fixture.name("one").await.is_none());
        assert!(matches!(unload(&fixture.zoo, &id("one")).await.unwrap_err(), UnloadError::Missing(_)));
        fixture.load_path(&fixture.dir.path().join("one"), "one", false).await.unwrap();
        assert_eq!(fixture.name("one").await.unwrap().history, []);
    }
    for name in ["one", "again"] {
        unload(&fixture.zoo, &id(name)).await.unwrap();
    }
    gc::collect(&fixture.zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!(fixture.files(), before);
}

#[tokio::test]
async fn a_name_that_is_there_is_kept_unless_it_means_the_same() {
    let fixture = fixture().await;
    let first = fixture.load(&of_seed(1), "one").await.unwrap();
    let same = fixture.load(&of_seed(1), "one").await.unwrap();
    assert_eq!((same.chain, same.replaced), (first.chain, None), "asked again");
    let (before, name) = (fixture.files(), fixture.name("one").await);
    let error = fixture.load(&of_seed(2), "one").await.unwrap_err();
    assert_eq!(error.to_string(), "a model demo/one is there already");
    assert_eq!((fixture.files(), fixture.name("one").await), (before, name), "nothing was written");

    let path = fixture.dir.path().join("one");
    let in_place = fixture.load_path(&path, "one", true).await.unwrap();
    assert_eq!(in_place.replaced, Some(first.chain));
    let name = fixture.name("one").await.unwrap();
    assert_eq!((name.chain, name.history.len(), name.loaded), (in_place.chain, 0, true), "nothing grows");
    assert!(matches!(fixture.load_path(&path, "base", true).await.unwrap_err(), IngestError::Exists(_)), "it was added");
    assert!(matches!(fixture.load_path(&path, "base", false).await.unwrap_err(), IngestError::Exists(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_loads_at_one_time_one_wins_and_the_other_is_told() {
    let fixture = fixture().await;
    let paths = [1, 2].map(|seed| fixture.written(&of_seed(seed), &format!("seed-{seed}")));
    for round in 0..8 {
        let name = format!("one-{round}");
        let (a, b) = tokio::join!(fixture.load_path(&paths[0], &name, false), fixture.load_path(&paths[1], &name, false));
        let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
        assert_eq!(fixture.name(&name).await.unwrap().chain, won.unwrap().chain);
        assert!(matches!(lost.unwrap_err(), IngestError::Exists(_)));
        let model = id(&name);
        let (a, b) = tokio::join!(unload(&fixture.zoo, &model), unload(&fixture.zoo, &model));
        let lost = if a.is_ok() { b } else { a };
        assert!(matches!(lost.unwrap_err(), UnloadError::Missing(_)));
    }
}

#[tokio::test]
async fn what_was_added_is_not_unloaded_and_what_was_loaded_again_is_not_dropped() {
    let fixture = fixture().await;
    let path = fixture.written(&of_seed(1), "one");
    add_dir(&fixture.zoo, &path, "demo/one", Recipe::Keep).await.unwrap();
    fixture.load_path(&path, "one", false).await.unwrap();
    for name in ["one", "base"] {
        let error = unload(&fixture.zoo, &id(name)).await.unwrap_err();
        assert_eq!(error.to_string(), format!("demo/{name} was added to the zoo, not loaded: `ashlar zoo rm demo/{name}` drops its name"));
        assert!(fixture.name(name).await.is_some());
    }

    // What is added over a loaded name is the zoo's from then on, be it the same chain.
    fixture.load(&of_seed(2), "two").await.unwrap();
    add_dir(&fixture.zoo, &fixture.dir.path().join("two"), "demo/two", Recipe::Keep).await.unwrap();
    assert!(!fixture.name("two").await.unwrap().loaded);

    fixture.load(&of_seed(3), "three").await.unwrap();
    let seen = fixture.name("three").await.unwrap();
    fixture.written(&of_seed(4), "three");
    fixture.load_path(&fixture.dir.path().join("three"), "three", true).await.unwrap();
    let again = fixture.name("three").await;
    let stale = fixture.zoo.remove_model_if(&id("three"), &seen).await.unwrap_err();
    assert!(matches!(stale, StoreError::Conflict { .. }));
    assert_eq!(fixture.name("three").await, again);
}

#[tokio::test]
async fn adapters_that_change_nothing_and_such_that_bring_whole_tensors_come_and_go_as_others_do() {
    let fixture = fixture().await;
    let base = fixture.zoo.read_chain(fixture.name("base").await.unwrap().chain).await.unwrap();
    let mut zero = of_seed(1);
    let b = format!("base_model.model.{Q}.lora_B.weight");
    zero.tensors.get_mut(&b).unwrap().1.fill(0.0);
    let report = fixture.load(&zero, "zero").await.unwrap();
    assert!(report.notes.contains(&"1 changes are zero and were left out".to_owned()), "{:?}", report.notes);
    let chain = fixture.zoo.read_chain(report.chain).await.unwrap();
    assert_eq!((chain.blocks, chain.adapters.len()), (base.blocks.clone(), 0), "the base by another name");

    let mut whole = Peft::over("base");
    whole.tensor("model.norm.weight", vec![D], 5).config["modules_to_save"] = json!(["norm"]);
    let report = fixture.load(&whole, "whole").await.unwrap();
    let chain = fixture.zoo.read_chain(report.chain).await.unwrap();
    let same: Vec<bool> = chain.blocks.iter().zip(&base.blocks).map(|(a, b)| a == b).collect();
    assert_eq!((same, chain.adapters.len()), (vec![true, true, true, true, true, false], 0));

    // Neither is sought as the base of another, though they have no adapters of their own.
    let mut over = of_seed(2);
    over.config["base_model_name_or_path"] = json!("zero");
    assert!(matches!(fixture.load(&over, "over").await.unwrap_err(), IngestError::BaseUnclear { .. }));

    assert!(verify(&fixture.zoo, &Silent).await.unwrap().damage.is_empty());
    for name in ["zero", "whole"] {
        unload(&fixture.zoo, &id(name)).await.unwrap();
    }
    gc::collect(&fixture.zoo, Duration::ZERO, false).await.unwrap();
    assert_eq!(fixture.zoo.resolve(&id("base")).await.unwrap().chain.blocks, base.blocks, "the base's blocks are still there");
}
