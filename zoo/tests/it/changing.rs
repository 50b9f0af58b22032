//! Files that somebody writes to while they are added: no digest ever names other bytes than its own, and nothing is named by half.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir};
use ashlar_kernels::format::dequantise;
use ashlar_zoo::ingest::{AddOptions, AddReport, IngestError, Progress, Recipe, Silent, Stage, add};
use ashlar_zoo::store::{MappedChange, Zoo};
use ashlar_zoo::verify::verify;

/// Does something to a file when a stage begins, once.
struct Meddler {
    stage: Stage,
    act: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Meddler {
    fn at(stage: Stage, act: impl FnOnce() + Send + 'static) -> Self {
        Self { stage, act: Mutex::new(Some(Box::new(act))) }
    }
}

impl Progress for Meddler {
    fn begin(&self, stage: Stage, _: u64) {
        if stage == self.stage
            && let Some(act) = self.act.lock().unwrap().take()
        {
            act();
        }
    }
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}

async fn add_with(zoo: &Zoo, path: &Path, model: &str, recipe: Recipe, progress: &Meddler) -> Result<AddReport, IngestError> {
    let options = AddOptions { recipe, ..AddOptions::new(model.parse().unwrap()) };
    let report = add(zoo, path, &options, progress).await;
    assert!(progress.act.lock().unwrap().is_none(), "the stage has begun");
    report
}

/// Other values in the same file, in place.
fn rewrite(path: &PathBuf, with: &[u8]) {
    use std::io::Write;
    let mut file = std::fs::File::options().write(true).open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), with.len() as u64);
    file.write_all(with).unwrap();
}

async fn zoo(dir: &tempfile::TempDir) -> Zoo {
    Zoo::create_dir(&dir.path().join("zoo")).await.unwrap()
}

#[tokio::test]
async fn a_checkpoint_that_changes_between_hash_and_store_is_refused_by_the_tensors_name() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(&dir).await;
    let path = dir.path().join("base");
    let honest = Checkpoint::llama(1);
    honest.write(&path);
    let mut other = honest.clone();
    other.retrain("self_attn.q_proj", 7);
    let (file, bytes) = (path.join("model.safetensors"), other.safetensors());
    let meddler = Meddler::at(Stage::Store, move || rewrite(&file, &bytes));
    let error = add_with(&zoo, &path, "demo/base", Recipe::Keep, &meddler).await.unwrap_err().to_string();
    let names = [0, 1].map(|layer| format!("tensor `model.layers.{layer}.self_attn.q_proj.weight` was changed in its file meanwhile"));
    assert!(names.iter().any(|name| error.starts_with(name)), "{error}");
    assert!(zoo.list_models().await.unwrap().is_empty(), "nothing is named");
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty(), "what was stored is what it is called");

    // What is converted is converted once, so it is of one content.
    honest.write(&path);
    let (file, bytes) = (path.join("model.safetensors"), other.safetensors());
    let report = add_with(&zoo, &path, "demo/base", Recipe::Int8, &Meddler::at(Stage::Store, move || rewrite(&file, &bytes))).await;
    let norms_alone = report.err().map(|error| error.to_string());
    assert_eq!(norms_alone, None, "only q_proj has changed, and that is converted");
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
}

#[tokio::test]
async fn an_adapter_whose_file_is_cut_or_rewritten_meanwhile_is_added_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let zoo = zoo(&dir).await;
    Checkpoint::llama(1).write(&dir.path().join("base"));
    add_dir(&zoo, &dir.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let of = |seed| {
        let mut peft = Peft::over("base");
        peft.lora("model.layers.0.self_attn.q_proj", (D, 64), 4, seed);
        peft
    };
    let bytes_of = |seed: u64| {
        let other = dir.path().join("other");
        of(seed).write(&other);
        std::fs::read(other.join("adapter_model.safetensors")).unwrap()
    };
    let mut seed = 10;
    for stage in [Stage::Hash, Stage::Store] {
        for is_cut in [true, false] {
            seed += 1;
            let path = dir.path().join(format!("adapter-{seed}"));
            of(seed).write(&path);
            let (file, bytes) = (path.join("adapter_model.safetensors"), bytes_of(seed + 100));
            let meddler = Meddler::at(stage, move || match is_cut {
                // Whoever reads a map of it ends by SIGBUS.
                true => std::fs::File::options().write(true).open(&file).unwrap().set_len(0).unwrap(),
                false => rewrite(&file, &bytes),
            });
            let report = add_with(&zoo, &path, &format!("demo/adapter-{seed}"), Recipe::Keep, &meddler).await.unwrap();
            let chain = zoo.read_chain(report.chain).await.unwrap();
            let mapped = zoo.map_adapter(chain.adapters[0].digest).await.unwrap();
            let MappedChange::LowRank { b, .. } = &mapped.changes["q.weight"] else { panic!("another change") };
            assert_eq!(dequantise(&b.view()), of(seed).values("model.layers.0.self_attn.q_proj.lora_B.weight"));
        }
    }
    assert!(verify(&zoo, &Silent).await.unwrap().damage.is_empty());
    let left: Vec<_> = std::fs::read_dir(dir.path().join("zoo")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with(".tmp")), "copies have no names: {left:?}");
}
