//! Spans of the demo family come and go: what their blocks take together, counted beside what the device was given.

#[path = "../../../tests/it/support/adapters.rs"]
mod adapters;

use std::path::Path;

use ashlar_kernels::cpu::{Cpu, CpuOptions};
use ashlar_kernels::ops::KvFormat;
use ashlar_zoo::ingest::{AddOptions, Silent, add};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::profiles::{Point, Profile};

use super::*;
use crate::state::engine::Engine;
use crate::state::limits::Limits;

const PAGES: PageLayout = PageLayout { tokens: 16, format: KvFormat::F32 };

struct Host {
    _folder: tempfile::TempDir,
    hosting: Hosting<Cpu>,
    commands: std::sync::mpsc::Receiver<Command<Cpu>>,
    /// What the device holds.
    blocks: BTreeMap<u32, Box<LoadedBlock<Cpu>>>,
    adapters: BTreeMap<AdapterIndex, Box<LoadedAdapter<Cpu>>>,
    chains: Vec<Digest>,
}

impl Host {
    async fn new(models: &[&str], memory_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let zoo = Zoo::create_dir(folder.path()).await.unwrap();
        let mut chains = Vec::new();
        for name in models {
            let options = AddOptions::new(ModelId::new("demo", name).unwrap());
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo").join(name);
            chains.push(add(&zoo, &path, &options, &Silent).await.unwrap().chain);
        }
        let (sender, commands) = std::sync::mpsc::channel();
        let metrics = ExecutorMetrics::new(&prometheus::Registry::new()).unwrap();
        let ops = Arc::new(Cpu::new(CpuOptions { threads: 1, ..CpuOptions::default() }));
        let hosting = Hosting::new(ops, zoo, sender, mpsc::unbounded_channel().0, metrics, memory_bytes, PAGES);
        Self { _folder: folder, hosting, commands, blocks: BTreeMap::new(), adapters: BTreeMap::new(), chains }
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
                Command::LoadAdapter(index, adapter) => assert!(self.adapters.insert(index, adapter).is_none()),
                Command::EvictAdapter(index) => assert!(self.adapters.remove(&index).is_some()),
                _ => panic!("hosting loads and evicts"),
            }
        }
        let adapters: usize = self.adapters.values().map(|adapter| adapter.bytes()).sum();
        assert_eq!(self.hosting.weight_bytes(None), total_bytes(self.blocks.values().map(|block| block.weights())) + adapters as u64);
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
        Err(HostError::Memory { bytes, free_bytes, .. }) => assert!(bytes > free_bytes),
        other => panic!("{other:?}"),
    }
    assert_eq!((tight.used(), tight.blocks.len()), (0, 0));
}

const UPPER: adapters::Recipe = adapters::Recipe {
    attention: &["q.weight", "v.weight"],
    feed_forward: &["down.weight"],
    rank: 4,
    scale: 0.5,
    dtype: ashlar_kernels::format::Dtype::Bf16,
    from_layer: 6,
    salt: 1,
};

#[tokio::test]
async fn an_adapter_is_resident_once_beside_the_blocks_of_its_base() {
    let mut host = Host::new(&["base"], 1 << 30).await;
    let base = host.load(0, 0, 0).await.unwrap();
    let (base_bytes, block_count) = (host.used(), host.blocks.len());
    let zoo = host.hosting.zoo.clone();
    let first = adapters::adapted(&zoo, host.chains[0], UPPER).await;
    // The same adapters from one layer up on, in another chain.
    let second = adapters::adapted(&zoo, host.chains[0], adapters::Recipe { from_layer: 7, ..UPPER }).await;
    host.chains.extend([first, second]);

    // Two layers have two each.
    let one = host.load(1, 0, 0).await.unwrap();
    let one_bytes = host.used() - base_bytes;
    assert_eq!((host.blocks.len(), host.adapters.len()), (block_count, 4));
    assert!(one_bytes > 0);
    let two = host.load(2, 0, 0).await.unwrap();
    assert_eq!((host.used() - base_bytes, host.adapters.len()), (one_bytes, 4), "nothing is loaded twice");
    host.evict(&one);
    assert_eq!(host.adapters.len(), 2);
    host.evict(&base);
    assert_eq!((host.blocks.len(), host.adapters.len()), (block_count, 2), "the blocks are the other model's too");
    host.evict(&two);
    assert_eq!((host.used(), host.blocks.len(), host.adapters.len()), (0, 0, 0));

    // A span brings the adapters of its own blocks.
    let lower = host.load(1, 0, 13).await.unwrap();
    assert_eq!(host.adapters.len(), 0);
    let upper = host.load(1, 13, 0).await.unwrap();
    assert_eq!(host.adapters.len(), 4);
    let hosted = host.hosting.load_span(&upper).await.unwrap();
    assert_eq!(hosted.adapters.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(hosted.adapter_bytes.iter().sum::<u64>(), one_bytes);
    host.evict(&lower);
    host.evict(&upper);
    assert_eq!(host.used(), 0);
}

#[tokio::test]
async fn an_adapter_needs_memory_of_its_own() {
    let mut host = Host::new(&["base"], 1 << 30).await;
    let chain = adapters::adapted(&host.hosting.zoo, host.chains[0], UPPER).await;
    host.chains.push(chain);
    host.load(1, 0, 0).await.unwrap();
    let mut tight = Host::new(&["base"], host.used() - 1).await;
    tight.chains.push(adapters::adapted(&tight.hosting.zoo, tight.chains[0], UPPER).await);
    match tight.load(1, 0, 0).await {
        Err(HostError::Memory { kind: "adapter", bytes, free_bytes, .. }) => assert_eq!(bytes, free_bytes + 1),
        other => panic!("{other:?}"),
    }
    assert_eq!((tight.used(), tight.blocks.len(), tight.adapters.len()), (0, 0, 0));
}

#[tokio::test]
async fn an_adapter_that_does_not_fit_its_block_is_refused_by_chain_block_and_role() {
    let mut host = Host::new(&["base"], 1 << 30).await;
    let zoo = host.hosting.zoo.clone();
    let sound = adapters::adapted(&zoo, host.chains[0], UPPER).await;
    let mut chain = zoo.read_chain(sound).await.unwrap();
    // That of a feed-forward block on an attention block.
    chain.adapters[0].digest = chain.adapters[1].digest;
    let index = chain.adapters[0].block_index;
    let (digest, _) = zoo.put_chain(&chain).await.unwrap();
    host.chains.push(digest);
    let error = host.load(1, 0, 0).await.unwrap_err();
    let mut said = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        said = format!("{said}: {cause}");
        source = cause.source();
    }
    for named in [digest.to_string(), format!("block {index}"), "`down.weight`".to_owned()] {
        assert!(said.contains(&named), "{said}: {named}");
    }
    assert_eq!((host.used(), host.adapters.len()), (0, 0));
}

/// What a block is said to cost on a device: so many microseconds, whatever the rows.
fn profile(block: Digest, device: &DeviceKey, micros: f64) -> Profile {
    Profile {
        block,
        device: device.clone(),
        points: vec![Point { rows: 1, micros, runs: 7 }, Point { rows: 256, micros, runs: 7 }],
        context_tokens: 256,
        sequences_max: 32,
        kv_format: KvFormat::F32,
        version: "0.1.0".to_owned(),
        created_ms: 1,
    }
}

#[tokio::test]
async fn profiles_of_this_device_come_with_the_blocks_and_a_damaged_one_is_left_out() {
    let [here, elsewhere] = ["here", "elsewhere"].map(|processor| DeviceKey::new(processor, "cpu"));
    let mut host = Host::new(&["base"], 1 << 30).await;
    let zoo = host.hosting.zoo.clone();
    let blocks = zoo.read_chain(host.chains[0]).await.unwrap().blocks;
    for (at, block) in blocks.iter().enumerate() {
        zoo.put_profile(&profile(*block, &here, 10.0 + at as f64)).await.unwrap();
    }
    let predicted = |hosted: HostedSpan| {
        let mut engine = Engine::new(Limits::default());
        engine.handle_host(hosted.host);
        engine.costs[0].predict(64)
    };
    let mut costs = async |device: Option<&DeviceKey>| {
        host.hosting.profiled_on = device.cloned();
        let key = host.load(0, 0, 0).await.unwrap();
        let hosted = host.hosting.load_span(&key).await.unwrap();
        host.evict(&key);
        hosted
    };
    let hosted = costs(Some(&here)).await;
    assert_eq!(hosted.host.costs.iter().flatten().count(), blocks.len());
    let sum: f64 = (0..blocks.len()).map(|at| 10.0 + at as f64).sum();
    assert!(predicted(hosted).is_some_and(|micros| (micros - sum).abs() < 1e-6), "before anything has run");
    for none in [None, Some(&elsewhere)] {
        let hosted = costs(none).await;
        assert_eq!((hosted.host.costs.iter().flatten().count(), predicted(hosted)), (0, None));
    }
    let file = zoo.place().to_owned() + &format!("/profiles/{}/{here}.json", blocks[3]);
    std::fs::write(file, "no profile").unwrap();
    let hosted = costs(Some(&here)).await;
    assert!(hosted.host.costs[3].is_none() && hosted.host.costs.iter().flatten().count() == blocks.len() - 1);
    assert_eq!(predicted(hosted), None, "it is learned");
}
