//! Spans of the demo family come and go: what their blocks take together, counted beside what the device was given.

use std::path::Path;

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::KvFormat;
use ashlar_zoo::ingest::{AddOptions, Recipe, Silent, add};
use ashlar_zoo::model_id::ModelId;

use super::*;

const PAGES: PageLayout = PageLayout { tokens: 16, format: KvFormat::F32 };

struct Host {
    _folder: tempfile::TempDir,
    hosting: Hosting<Cpu>,
    commands: std::sync::mpsc::Receiver<Command<Cpu>>,
    /// What the device holds.
    blocks: BTreeMap<u32, Box<LoadedBlock<Cpu>>>,
    chains: Vec<Digest>,
}

impl Host {
    async fn new(models: &[&str], memory_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(folder.path()).await.unwrap();
        let mut chains = Vec::new();
        for name in models {
            let options = AddOptions { model: ModelId::new("demo", name).unwrap(), recipe: Recipe::Keep, parent: None, source: None };
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo").join(name);
            chains.push(add(&zoo, &path, &options, &Silent).await.unwrap().chain);
        }
        let (sender, commands) = std::sync::mpsc::channel();
        let metrics = ExecutorMetrics::new(&prometheus::Registry::new()).unwrap();
        let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
        let hosting = Hosting::new(ops, zoo, sender, mpsc::unbounded_channel().0, metrics, memory_bytes, PAGES);
        Self { _folder: folder, hosting, commands, blocks: BTreeMap::new(), chains }
    }

    /// Blocks `[from, to)` of a chain; all if `to` is 0.
    async fn load(&mut self, chain: usize, from: u32, to: u32) -> Result<SpanKey, HostError> {
        let chain = self.chains[chain];
        let count = self.hosting.zoo.read_chain(chain).await.unwrap().blocks.len() as u32;
        let key = SpanKey { chain, from, to: if to == 0 { count } else { to } };
        let loaded = self.hosting.load_span(&key).await;
        if loaded.is_err() {
            self.hosting.forget_unused(&key);
        }
        self.obey_commands();
        loaded.map(|_| key)
    }

    fn evict(&mut self, key: &SpanKey) {
        self.hosting.forget_unused(key);
        self.obey_commands();
    }

    /// As the device does; and both count alike.
    fn obey_commands(&mut self) {
        for command in self.commands.try_iter() {
            match command {
                Command::Load(index, block) => assert!(self.blocks.insert(index.0, block).is_none()),
                Command::Evict(index) => assert!(self.blocks.remove(&index.0).is_some()),
                _ => panic!("hosting loads and evicts"),
            }
        }
        assert_eq!(self.hosting.weight_bytes(None), total_bytes(self.blocks.values().map(|block| block.weights())));
    }

    fn used(&self) -> u64 {
        self.hosting.weight_bytes(None)
    }

    fn embed(&self) -> WeightBytes {
        self.blocks.values().find(|block| block.is_embed()).unwrap().weights()
    }
}

#[tokio::test]
async fn a_tied_head_that_is_evicted_counts_while_an_embedding_reads_it() {
    let mut host = Host::new(&["base", "shakespeare-top"], 1 << 30).await;
    // The embedding alone is mapped.
    let part = host.load(1, 0, 1).await.unwrap();
    let mapped_bytes = host.used();
    assert_eq!(host.embed(), WeightBytes { own: mapped_bytes, output: None });
    host.evict(&part);
    assert_eq!((host.used(), host.blocks.len()), (0, 0));

    // With its head it is not.
    let whole = host.load(0, 0, 0).await.unwrap();
    let whole_bytes = host.used();
    let output = host.embed().output.expect("the head was loaded before");
    assert_eq!(host.embed().own, 0);
    // The other model's embedding is the same block, and its head is evicted with the first model.
    let part = host.load(1, 0, 1).await.unwrap();
    assert_eq!(host.used(), whole_bytes);
    host.evict(&whole);
    assert_eq!(host.blocks.len(), 1);
    assert_eq!(host.used(), output.1, "the panels are the embedding's now");
    // A head that comes back packs nothing anew.
    let whole = host.load(0, 0, 0).await.unwrap();
    assert_eq!((host.used(), host.embed().output), (whole_bytes, Some(output)));
    host.evict(&part);
    host.evict(&whole);
    assert_eq!((host.used(), host.blocks.len()), (0, 0));
    assert!(host.load(1, 0, 1).await.is_ok());
    assert_eq!(host.used(), mapped_bytes);
}

#[tokio::test]
async fn an_embedding_that_came_first_stays_mapped_and_both_count() {
    let mut host = Host::new(&["base"], 1 << 30).await;
    host.load(0, 0, 1).await.unwrap();
    let mapped_bytes = host.used();
    host.load(0, 1, 0).await.unwrap();
    let both = host.used();
    let mut other = Host::new(&["base"], 1 << 30).await;
    other.load(0, 0, 0).await.unwrap();
    assert_eq!(both, other.used() + mapped_bytes);
}

#[tokio::test]
async fn a_tied_model_fits_memory_for_one_copy_of_its_table() {
    let mut host = Host::new(&["base"], 1 << 30).await;
    host.load(0, 0, 0).await.unwrap();
    let bytes = host.used();
    assert!(Host::new(&["base"], bytes).await.load(0, 0, 0).await.is_ok());
    let mut tight = Host::new(&["base"], bytes - 1).await;
    match tight.load(0, 0, 0).await {
        Err(HostError::Memory { block_bytes, free_bytes, .. }) => assert!(block_bytes > free_bytes),
        other => panic!("{other:?}"),
    }
    assert_eq!((tight.used(), tight.blocks.len()), (0, 0));
}
