//! `zoo add` of a PEFT adapter: its factors become adapters over the blocks of a base that is in the zoo, whole tensors
//! that it brings make blocks of their own. The order is a checkpoint's: parse, plan and check all, hash, and only then write.

mod base;
mod complete;
mod error;
mod files;
mod keys;
mod plan;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use error::PeftError;
pub use files::{ADAPTER_BYTES_MAX, AdapterFiles, AdaptersDir};

use super::IngestError;
use super::add::{AddOptions, Hashed, Stored, blocking, hash, name, store_chain, store_tensors};
use super::plan::TensorPlan;
use super::report::{AddReport, Progress, Shared};
use super::sight::Sight;
use crate::canonical;
use crate::digest::Digest;
use crate::family::peft::LoraConfig;
use crate::formats::TensorFiles;
use crate::manifest::{Adapter, AdapterRef, Block, Chain, Change, TensorRef};
use crate::model_id::ModelId;
use crate::relatives::{Samples, Sketch, Viewer};
use crate::store::{Compression, Object, Put, StoreError, Zoo};
use crate::tensor_file;
use base::Base;
use files::Private;
use plan::AdapterPlan;

/// What peft calls its files.
const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Whether a PEFT adapter lies at `path`.
pub fn is_adapter(path: &Path) -> bool {
    path.is_dir() && path.join(CONFIG).exists()
}

/// Adds the adapter at `path` under a name.
pub(super) async fn add(zoo: &Zoo, path: &Path, options: &AddOptions, progress: &dyn Progress) -> Result<AddReport, IngestError> {
    let owned = path.to_owned();
    let files = blocking(move || AdapterFiles::open(&owned)).await?;
    let viewer = zoo.viewer(options.model.tenant()).await?;
    let prepared = prepare(zoo, files, options, &viewer, progress).await?;
    let stored = prepared.store(zoo, options, progress).await?;
    let replaced = name(zoo, options, prepared.parent(), prepared.digest).await?;
    Ok(prepared.report(&options.model, replaced, stored))
}

/// An adapter of which all is known and checked, and nothing stored.
pub(super) struct Prepared {
    tensors: Arc<TensorFiles>,
    base: Base,
    /// Those that are stored.
    plans: Vec<Arc<TensorPlan>>,
    refs: Vec<TensorRef>,
    /// The chain's, in order.
    blocks: Vec<Block>,
    /// In order of their blocks.
    adapters: Vec<Adapter>,
    chain: Chain,
    /// The chain's.
    pub(super) digest: Digest,
    /// The chain's.
    sketch: Sketch,
    /// What the tenant may know of what is there.
    sight: Sight,
    notes: Vec<String>,
}

/// What storing it did.
pub(super) struct Done {
    tensors: Stored,
    blocks: Shared,
    adapters: Shared,
}

/// Copies the files, and makes of the copy all that will be stored. The base is one that `viewer` may see.
pub(super) async fn prepare(
    zoo: &Zoo,
    files: AdapterFiles,
    options: &AddOptions,
    viewer: &Viewer,
    progress: &dyn Progress,
) -> Result<Prepared, IngestError> {
    let copies = zoo.clone();
    let Private { config, tensors, source: folder, mut notes } = blocking(move || files.copied(&copies)).await?;
    let config = LoraConfig::parse(&config).map_err(IngestError::AdapterConfig)?;
    let base = base::find(zoo, (options.model.tenant(), viewer), config.base.as_deref(), options.parent.as_ref()).await?;
    let tensors = Arc::new(tensors);
    let (planned, base) = {
        let tensors = tensors.clone();
        blocking(move || Ok((plan::plan(&tensors, &config, &base)?, base))).await?
    };
    let plans: Vec<Arc<TensorPlan>> = planned.tensors.iter().cloned().map(Arc::new).collect();
    // All of it is hashed, and so found to be finite, also what is then left out.
    let Hashed { refs, samples, kept } = hash(&tensors, &plans, progress).await?;
    assert!(kept.is_empty(), "nothing is converted, so nothing is kept");
    let (block_digests, blocks) = replaced_blocks(&base, &planned, &refs).into_iter().unzip::<_, _, Vec<_>, Vec<_>>();
    let (list, adapters) = adapters(&planned, &refs);
    let chain = Chain { blocks: block_digests, adapters: list, source: options.source.clone().unwrap_or(folder), ..base.chain.clone() };
    let digest = Digest::of(&canonical::to_bytes(&chain));
    let sample = |tensor: &TensorRef| samples[refs.iter().position(|of_file| of_file == tensor).expect("it is the file's")];
    let sketch = sketch(zoo, &base, &chain, &blocks, &adapters, sample).await?;
    let sight = Sight::of(zoo, viewer, &sketch, options, digest).await?;
    let (plans, refs) = planned.used().into_iter().map(|index| (plans[index].clone(), refs[index].clone())).unzip();
    notes.extend(base.note.clone());
    notes.extend(planned.notes);
    notes.extend(sight.notes());
    Ok(Prepared { tensors, base, plans, refs, blocks, adapters, chain, digest, sketch, sight, notes })
}

impl Prepared {
    /// What its name says that it is over.
    pub(super) fn parent(&self) -> Option<String> {
        Some(self.base.id.to_string())
    }

    /// Stores all but the name.
    pub(super) async fn store(&self, zoo: &Zoo, options: &AddOptions, progress: &dyn Progress) -> Result<Done, IngestError> {
        zoo.storing(|| self.store_once(zoo, options, progress)).await
    }

    async fn store_once(&self, zoo: &Zoo, options: &AddOptions, progress: &dyn Progress) -> Result<Done, IngestError> {
        let compression = if options.compress { Compression::Alone } else { Compression::Off };
        let (plans, refs) = (&self.plans, &self.refs);
        let tensors = store_tensors(&self.sight, &self.tensors, plans, refs, BTreeMap::new(), |_| compression, progress).await?;
        let blocks = self.store_blocks().await?;
        let adapters = self.store_adapters().await?;
        renew(zoo, &self.base, &self.blocks).await?;
        let digest = store_chain(&self.sight, &self.chain, &self.sketch).await?;
        assert_eq!(digest, self.digest, "a chain has one digest");
        Ok(Done { tensors, blocks, adapters })
    }

    /// Stores the blocks that are not the base's own.
    async fn store_blocks(&self) -> Result<Shared, StoreError> {
        let mut new = BTreeSet::new();
        for (index, digest) in self.chain.blocks.iter().enumerate() {
            let is_own = *digest != self.base.chain.blocks[index];
            if is_own && self.sight.zoo(*digest).put_block(&self.blocks[index]).await?.1 == Put::New {
                new.insert(*digest);
            }
        }
        let total = self.chain.blocks.iter().collect::<BTreeSet<_>>().len() as u64;
        Ok(Shared { total, present: total - new.len() as u64 })
    }

    async fn store_adapters(&self) -> Result<Shared, StoreError> {
        let mut puts = BTreeMap::new();
        for (of_chain, adapter) in self.chain.adapters.iter().zip(&self.adapters) {
            if let Entry::Vacant(place) = puts.entry(of_chain.digest) {
                place.insert(self.sight.zoo(of_chain.digest).put_adapter(adapter).await?.1);
            }
        }
        let present = puts.values().filter(|put| **put == Put::Present).count() as u64;
        Ok(Shared { total: puts.len() as u64, present })
    }

    /// What was done, for people.
    pub(super) fn report(self, model: &ModelId, replaced: Option<Digest>, done: Done) -> AddReport {
        let factors = self.adapters.iter().flat_map(|adapter| adapter.tensors().map(|(_, tensor)| tensor));
        let tensors = self.blocks.iter().flat_map(|block| block.tensors.values()).chain(factors);
        let bytes = |tensor: &TensorRef| tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(0, |bytes| bytes as u64);
        let distinct: BTreeMap<Digest, u64> = tensors.map(|tensor| (tensor.digest, bytes(tensor))).collect();
        let (total, new) = (distinct.len() as u64, done.tensors.count.total - done.tensors.count.present);
        AddReport {
            model: model.clone(),
            chain: self.digest,
            replaced,
            architecture: self.base.chain.architecture.clone(),
            base: Some(self.base.id),
            blocks: done.blocks,
            adapters: done.adapters,
            tensors: Shared { total, present: total - new },
            bytes_total: distinct.values().sum(),
            bytes_new: done.tensors.bytes_new,
            bytes_stored: done.tensors.bytes_stored,
            nearest: None,
            notes: self.notes,
        }
    }
}

fn missing(path: &Path, reason: &'static str) -> IngestError {
    IngestError::NoCheckpoint { path: PathBuf::from(path), reason }
}

/// The base's blocks, with the tensors in them that the adapter brings whole, and their digests.
fn replaced_blocks(base: &Base, planned: &AdapterPlan, refs: &[TensorRef]) -> Vec<(Digest, Block)> {
    let mut blocks: Vec<(Digest, Block)> = base.chain.blocks.iter().copied().zip(base.blocks.iter().cloned()).collect();
    for ((block, role), index) in &planned.replaced {
        blocks[*block].1.tensors.insert((*role).to_owned(), refs[*index].clone());
    }
    for (index, (digest, block)) in blocks.iter_mut().enumerate().filter(|(index, (_, block))| base.blocks[*index] != *block) {
        *digest = canonical::digest(block);
        debug_assert_ne!(*digest, base.chain.blocks[index]);
    }
    blocks
}

/// The planned adapters, in order of their blocks, and how the chain refers to them.
fn adapters(planned: &AdapterPlan, refs: &[TensorRef]) -> (Vec<AdapterRef>, Vec<Adapter>) {
    let change = |change: &plan::ChangePlan| Change::LowRank { scale: change.scale, a: refs[change.a].clone(), b: refs[change.b].clone() };
    let one = |(block, changes): (&usize, &BTreeMap<&'static str, plan::ChangePlan>)| {
        let adapter = Adapter { changes: changes.iter().map(|(role, planned)| ((*role).to_owned(), change(planned))).collect() };
        let block_index = u32::try_from(*block).expect("chains have at most 4096 blocks");
        (AdapterRef { block_index, digest: Digest::of(&canonical::to_bytes(&adapter)) }, adapter)
    };
    planned.changes.iter().map(one).unzip()
}

/// The chain's sketch: the base's samples, but of matrices that the adapter brings whole.
async fn sketch(
    zoo: &Zoo,
    base: &Base,
    chain: &Chain,
    blocks: &[Block],
    adapters: &[Adapter],
    own: impl Fn(&TensorRef) -> Samples,
) -> Result<Sketch, StoreError> {
    let of_base = match zoo.read_sketch(base.digest).await? {
        Some(sketch) => sketch,
        None => zoo.make_sketch(base.digest).await?,
    };
    let blocks: Vec<(Digest, &Block)> = chain.blocks.iter().copied().zip(blocks).collect();
    let adapters: Vec<(Digest, &Adapter)> = chain.adapters.iter().map(|adapter| adapter.digest).zip(adapters).collect();
    let mut at = 0;
    Sketch::new(&blocks, &adapters, &base.chain.assets, |index, role| {
        let (tensor, place) = (&blocks[index].1.tensors[role], at);
        at += 1;
        if *tensor != base.blocks[index].tensors[role] {
            return Ok(own(tensor));
        }
        let damaged = || StoreError::Damaged { object: Object::Sketch(base.digest), reason: "it is of another chain".to_owned() };
        of_base.samples(place).ok_or_else(damaged)
    })
}

/// What is the base's is in use from now on: its own name may go while this is written.
async fn renew(zoo: &Zoo, base: &Base, blocks: &[Block]) -> Result<(), StoreError> {
    let assets = &base.chain.assets;
    let tensors = blocks.iter().flat_map(|block| block.tensors.values()).map(|tensor| Object::Tensor(tensor.digest));
    let kept = base.blocks.iter().zip(blocks).zip(&base.chain.blocks).filter(|((old, new), _)| old == new);
    let blocks = kept.map(|(_, digest)| Object::Block(*digest));
    let assets = [assets.tokenizer, assets.chat_template, assets.card].into_iter().flatten().map(Object::Asset);
    for object in tensors.chain(blocks).chain(assets).collect::<BTreeSet<_>>() {
        zoo.renew(&object).await?;
    }
    Ok(())
}
