//! `zoo add` of a PEFT adapter: its factors become adapters over the blocks of a base that is in the zoo, whole tensors
//! that it brings make blocks of their own. The order is a checkpoint's: parse, plan and check all, hash, and only then write.

mod base;
mod complete;
mod error;
mod keys;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use error::PeftError;

use super::IngestError;
use super::add::{AddOptions, Stored, blocking, hash, name, store_tensors};
use super::checkpoint::{read_config, source_name};
use super::plan::TensorPlan;
use super::report::{AddReport, Progress, Shared};
use crate::digest::Digest;
use crate::family::peft::LoraConfig;
use crate::formats::{TensorFiles, shards};
use crate::manifest::{Adapter, AdapterRef, Block, Chain, Change, TensorRef};
use crate::store::{Compression, Object, Put, StoreError, Zoo};
use crate::tensor_file;
use base::Base;
use plan::AdapterPlan;

/// What peft calls its files.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Whether a PEFT adapter lies at `path`.
pub fn is_adapter(path: &Path) -> bool {
    path.is_dir() && path.join(CONFIG).exists()
}

/// An adapter directory, parsed.
struct Opened {
    config: LoraConfig,
    tensors: TensorFiles,
    source: String,
    notes: Vec<String>,
}

/// Adds the adapter at `path` under a name.
pub(super) async fn add(zoo: &Zoo, path: &Path, options: &AddOptions, progress: &dyn Progress) -> Result<AddReport, IngestError> {
    let owned = path.to_owned();
    let Opened { config, tensors, source, mut notes } = blocking(move || open(&owned)).await?;
    let base = base::find(zoo, config.base.as_deref(), options.parent.as_ref()).await?;
    let tensors = Arc::new(tensors);
    let (planned, base) = {
        let tensors = tensors.clone();
        blocking(move || Ok((plan::plan(&tensors, &config, &base)?, base))).await?
    };
    let plans: Vec<Arc<TensorPlan>> = planned.tensors.iter().cloned().map(Arc::new).collect();
    // All of it is hashed, and so found to be finite, also what is then left out.
    let (refs, kept) = hash(&tensors, &plans, progress).await?;
    let used: Vec<usize> = planned.used().into_iter().collect();
    let (used_plans, used_refs): (Vec<_>, Vec<_>) = used.iter().map(|index| (plans[*index].clone(), refs[*index].clone())).unzip();
    assert!(kept.is_empty(), "nothing is converted, so nothing is kept");

    let compression = if options.compress { Compression::Alone } else { Compression::Off };
    let stored = store_tensors(zoo, &tensors, &used_plans, &used_refs, kept, |_| compression, progress).await?;
    let blocks = replaced_blocks(&base, &planned, &refs);
    let (block_digests, block_count) = store_blocks(zoo, &base, &blocks).await?;
    let (adapters, adapter_count, change_refs) = store_adapters(zoo, &planned, &refs).await?;
    renew(zoo, &base, &blocks).await?;
    let chain = Chain { blocks: block_digests, adapters, source: options.source.clone().unwrap_or(source), ..base.chain.clone() };
    let (chain, _) = zoo.put_chain(&chain).await?;
    let replaced = name(zoo, options, Some(base.id.to_string()), chain).await?;
    notes.extend(base.note.clone());
    notes.extend(planned.notes);
    Ok(report(options, &base, chain, replaced, (&blocks, block_count), (&change_refs, adapter_count), &stored, notes))
}

fn open(path: &Path) -> Result<Opened, IngestError> {
    let config = read_config(path, CONFIG)?.ok_or_else(|| missing(path, "it has no adapter_config.json"))?;
    let config = LoraConfig::parse(&config).map_err(IngestError::AdapterConfig)?;
    if !path.join(WEIGHTS).exists() {
        return Err(missing(path, "it has no adapter_model.safetensors (pickled weights are never read)"));
    }
    let mut tensors = TensorFiles::default();
    shards::add(&mut tensors, &path.join(WEIGHTS))?;
    let own = ["tokenizer.json", "chat_template.jinja"].into_iter().filter(|name| path.join(name).exists());
    let notes = own.map(|name| format!("the adapter's own {name} is not used: an adapter speaks with its base's"));
    Ok(Opened { config, tensors, source: source_name(path)?, notes: notes.collect() })
}

fn missing(path: &Path, reason: &'static str) -> IngestError {
    IngestError::NoCheckpoint { path: PathBuf::from(path), reason }
}

/// The base's blocks, with the tensors in them that the adapter brings whole.
fn replaced_blocks(base: &Base, planned: &AdapterPlan, refs: &[TensorRef]) -> Vec<Block> {
    let mut blocks = base.blocks.clone();
    for ((block, role), index) in &planned.replaced {
        blocks[*block].tensors.insert((*role).to_owned(), refs[*index].clone());
    }
    blocks
}

/// Stores the blocks that are not the base's own. Returns the digests of all.
async fn store_blocks(zoo: &Zoo, base: &Base, blocks: &[Block]) -> Result<(Vec<Digest>, Shared), StoreError> {
    let mut digests = base.chain.blocks.clone();
    let mut new = BTreeSet::new();
    for (index, block) in blocks.iter().enumerate().filter(|(index, block)| base.blocks[*index] != **block) {
        let (digest, put) = zoo.put_block(block).await?;
        digests[index] = digest;
        if put == Put::New {
            new.insert(digest);
        }
    }
    let total = digests.iter().collect::<BTreeSet<_>>().len() as u64;
    Ok((digests, Shared { total, present: total - new.len() as u64 }))
}

async fn store_adapters(
    zoo: &Zoo,
    planned: &AdapterPlan,
    refs: &[TensorRef],
) -> Result<(Vec<AdapterRef>, Shared, Vec<TensorRef>), StoreError> {
    let (mut list, mut tensors) = (Vec::with_capacity(planned.changes.len()), Vec::new());
    let mut puts = BTreeMap::new();
    for (block, changes) in &planned.changes {
        let change =
            |change: &plan::ChangePlan| Change::LowRank { scale: change.scale, a: refs[change.a].clone(), b: refs[change.b].clone() };
        let adapter = Adapter { changes: changes.iter().map(|(role, planned)| ((*role).to_owned(), change(planned))).collect() };
        tensors.extend(adapter.tensors().map(|(_, tensor)| tensor.clone()));
        let (digest, put) = zoo.put_adapter(&adapter).await?;
        puts.entry(digest).or_insert(put);
        list.push(AdapterRef { block_index: u32::try_from(*block).expect("chains have at most 4096 blocks"), digest });
    }
    let present = puts.values().filter(|put| **put == Put::Present).count() as u64;
    Ok((list, Shared { total: puts.len() as u64, present }, tensors))
}

/// What is the base's is in use from now on: its own name may go while this is written.
async fn renew(zoo: &Zoo, base: &Base, blocks: &[Block]) -> Result<(), StoreError> {
    let assets = &base.chain.assets;
    let tensors = blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| Object::Tensor(tensor.digest));
    let kept = base.blocks.iter().zip(blocks).zip(&base.chain.blocks).filter(|((old, new), _)| old == new);
    let blocks = kept.map(|(_, digest)| Object::Block(*digest));
    let assets = [assets.tokenizer, assets.chat_template, assets.card].into_iter().flatten().map(Object::Asset);
    for object in tensors.chain(blocks).chain(assets).collect::<BTreeSet<_>>() {
        match object {
            Object::Tensor(digest) => zoo.renew_tensor(digest).await?,
            object => zoo.renew(&object).await?,
        }
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the pieces of one report")]
fn report(
    options: &AddOptions,
    base: &Base,
    chain: Digest,
    replaced: Option<Digest>,
    (blocks, block_count): (&[Block], Shared),
    (change_refs, adapter_count): (&[TensorRef], Shared),
    stored: &Stored,
    notes: Vec<String>,
) -> AddReport {
    let tensors = blocks.iter().flat_map(|block| block.tensors.values()).chain(change_refs);
    let bytes = |tensor: &TensorRef| tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(0, |bytes| bytes as u64);
    let distinct: BTreeMap<Digest, u64> = tensors.map(|tensor| (tensor.digest, bytes(tensor))).collect();
    let (total, new) = (distinct.len() as u64, stored.count.total - stored.count.present);
    AddReport {
        model: options.model.clone(),
        chain,
        replaced,
        architecture: base.chain.architecture.clone(),
        base: Some(base.id.clone()),
        blocks: block_count,
        adapters: adapter_count,
        tensors: Shared { total, present: total - new },
        bytes_total: distinct.values().sum(),
        bytes_new: stored.bytes_new,
        bytes_stored: stored.bytes_stored,
        notes,
    }
}
