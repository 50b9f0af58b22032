//! What the golden tests share: a temporary zoo with one checkpoint in it, and reading of golden files.

use std::path::{Path, PathBuf};

use ashlar_executor::model::alone::{Alone, AloneLimits};
use ashlar_kernels::ops::Ops;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::ingest::{AddOptions, Recipe, Silent, add};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::Zoo;

/// A zoo in a temporary folder, and the chain of the one model in it.
pub(crate) struct Home {
    _folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    zoo: Zoo,
    chain: Digest,
}

impl Home {
    /// Adds the checkpoint at `path` to a new zoo.
    pub(crate) fn of(path: &Path, recipe: Recipe) -> Self {
        Self::of_last(&[path], recipe)
    }

    /// Adds checkpoints and adapters over them to a new zoo, in this order; the model is the last of them.
    pub(crate) fn of_last(paths: &[&Path], recipe: Recipe) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (zoo, chain) = runtime.block_on(async {
            let zoo = Zoo::create_dir(folder.path()).await.unwrap();
            let mut chain = None;
            for (index, path) in paths.iter().enumerate() {
                let model = ModelId::new("golden", &format!("model-{index}")).unwrap();
                let options = AddOptions { recipe, ..AddOptions::new(model) };
                let report = add(&zoo, path, &options, &Silent).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                chain = Some(report.chain);
            }
            (zoo, chain.expect("a path"))
        });
        Self { _folder: folder, runtime, zoo, chain }
    }

    /// Loads the model onto a device.
    pub(crate) fn load<B: Ops>(&self, ops: B, limits: AloneLimits) -> Alone<B> {
        self.runtime.block_on(Alone::load(std::sync::Arc::new(ops), &self.zoo, self.chain, limits)).unwrap()
    }
}

/// A file or folder under `executor/tests/data`.
pub(crate) fn data(name: &str) -> PathBuf {
    crate_folder().join("data").join(name)
}

/// Parses a JSON file.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The lowest index of the largest logit.
pub(crate) fn argmax(row: &[f32]) -> u32 {
    (0..row.len()).reduce(|best, index| if row[index] > row[best] { index } else { best }).unwrap() as u32
}

/// This crate's folder: where cargo says now, or where it was built, as a test binary may have been carried to a machine with a card.
pub(crate) fn crate_folder() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}

/// The CUDA device: on the card whose number ASHLAR_CARD is, else on the emulated one where this machine can run that.
pub(crate) fn cuda() -> Option<ashlar_cuda::Cuda> {
    use ashlar_cuda_emulated::{Emulated, Order};
    if let Ok(ordinal) = std::env::var("ASHLAR_CARD") {
        let card = ashlar_cuda::Card::open(ordinal.parse().unwrap(), &ashlar_cuda::Cache::of_user().unwrap()).unwrap();
        return Some(ashlar_cuda::Cuda::new(std::sync::Arc::new(card)).unwrap());
    }
    let order = [Order::Ascending, Order::Descending, Order::Shuffled(7)][std::process::id() as usize % 3];
    Some(ashlar_cuda::Cuda::new(std::sync::Arc::new(Emulated::new(order, 1 << 32)?)).unwrap())
}

/// The CPU backend with two threads.
pub(crate) fn cpu() -> ashlar_kernels::cpu::Cpu {
    ashlar_kernels::cpu::Cpu::new(ashlar_kernels::cpu::CpuOptions { threads: 2, ..Default::default() })
}
