//! The whole of `zoo add`, in the order that makes it safe to kill: plan, hash, then write payloads, blocks and assets,
//! the chain, and last the name.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::convert::Infallible;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ashlar_kernels::format::TensorView;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::adapter;
use super::checkpoint::Checkpoint;
use super::convert::Recipe;
use super::plan::{self, Plan, TensorPlan};
use super::report::{AddReport, Progress, Shared, Stage};
use super::sight::Sight;
use super::text::{self, Text};
use super::{IngestError, gather};
use crate::canonical;
use crate::digest::Digest;
use crate::formats::TensorFiles;
use crate::manifest::{Assets, Block, Chain, ModelName, Past, TensorRef};
use crate::model_id::ModelId;
use crate::relatives::{Samples, Sketch};
use crate::store::{Compression, Put, StoreError, Stored as StoredTensor, Zoo};
use crate::tensor_file;

/// Times that a name is tried again after someone else changed it.
const NAME_ATTEMPTS: usize = 8;

/// Bytes of converted tensors that are kept from their hashing to their storing; others are converted twice.
const KEPT_BYTES_MAX: u64 = 1 << 30;

/// What `zoo add` was asked.
#[derive(Debug, Clone)]
pub struct AddOptions {
    /// The name to set.
    pub model: ModelId,
    /// Conversion.
    pub recipe: Recipe,
    /// The model that it was tuned from, if the user says so; of an adapter its base, which is sought where this says nothing.
    pub parent: Option<ModelId>,
    /// Where it came from, in place of the path's last component (a hub name).
    pub source: Option<String>,
    /// Whether tensors are stored encoded where that saves enough.
    pub compress: bool,
}

impl AddOptions {
    /// The model as it is, under this name.
    pub fn new(model: ModelId) -> Self {
        Self { model, recipe: Recipe::Keep, parent: None, source: None, compress: true }
    }
}

/// Adds the checkpoint or PEFT adapter at `path` under a name.
///
/// # Errors
/// What is wrong with it (nothing is written then), or how the store failed (no name changes then).
pub async fn add(zoo: &Zoo, path: &Path, options: &AddOptions, progress: &dyn Progress) -> Result<AddReport, IngestError> {
    if adapter::is_adapter(path) {
        return adapter::add(zoo, path, options, progress).await;
    }
    let (owned, recipe) = (path.to_owned(), options.recipe);
    let opened = crate::blocking::blocking(move || {
        let checkpoint = Checkpoint::open(&owned)?;
        let plan = plan::plan(&checkpoint, recipe)?;
        let text = text::read(&checkpoint, plan.vocab)?;
        Ok::<_, IngestError>((checkpoint, plan, text))
    });
    let (checkpoint, mut plan, mut text) = opened.await?;
    text.notes.extend_from_slice(&checkpoint.quantised.notes);
    let files = &checkpoint.tensors;
    let tensor_plans: Vec<Arc<TensorPlan>> = std::mem::take(&mut plan.tensors).into_iter().map(Arc::new).collect();

    let Hashed { refs, samples, kept } = hash(files, &tensor_plans, progress).await?;
    let blocks = blocks(checkpoint.decoder.width, &plan, &refs);
    let chain = chain(&checkpoint, &plan, blocks.iter().map(|(digest, _)| *digest).collect(), &text, options);
    let sketch = sketch(&plan, &blocks, &chain.assets, &samples);
    let viewer = zoo.viewer(options.model.tenant()).await?;
    let sight = Sight::of(zoo, &viewer, &sketch, options, canonical::digest(&chain)).await?;

    let near = if options.compress { sight.near(options, &plan).await? } else { BTreeMap::new() };
    let compression = |index: usize| match near.get(&index) {
        _ if !options.compress => Compression::Off,
        Some(tensor) => Compression::Over(tensor),
        None => Compression::Alone,
    };
    let store = async |kept| {
        let stored = store_tensors(&sight, files, &tensor_plans, &refs, kept, compression, progress).await?;
        let block_count = store_blocks(&sight, &blocks).await?;
        store_assets(&sight, &text).await?;
        Ok::<_, IngestError>((stored, block_count, store_chain(&sight, &chain, &sketch).await?))
    };
    let mut kept = kept;
    let (stored, block_count, chain) = zoo.storing(|| store(std::mem::take(&mut kept))).await?;
    let replaced = name(zoo, options, options.parent.as_ref().map(ToString::to_string), chain).await?;
    let mut notes = text.notes;
    notes.extend(sight.notes());
    let nearest = sight.kinship(&blocks, &mut notes).await;
    Ok(AddReport {
        model: options.model.clone(),
        chain,
        replaced,
        architecture: checkpoint.decoder.architecture.to_owned(),
        base: None,
        blocks: block_count,
        adapters: Shared::default(),
        tensors: stored.count,
        bytes_total: stored.bytes_total,
        bytes_new: stored.bytes_new,
        bytes_stored: stored.bytes_stored,
        nearest,
        notes,
    })
}

/// What [`hash`] found of each tensor, in the order of the plans.
pub(super) struct Hashed {
    pub(super) refs: Vec<TensorRef>,
    pub(super) samples: Vec<Samples>,
    pub(super) kept: Kept,
}

/// Payloads by index, where they were converted and kept.
pub(super) type Kept = BTreeMap<usize, Bytes>;

/// Identity of every tensor as it will be stored. Finds values that are not finite before anything is written.
pub(super) async fn hash(files: &Arc<TensorFiles>, plans: &[Arc<TensorPlan>], progress: &dyn Progress) -> Result<Hashed, IngestError> {
    progress.begin(Stage::Hash, plans.iter().map(|plan| target_bytes(plan)).sum());
    let hashed = stream::iter(plans.iter().cloned()).map(|plan| {
        let files = files.clone();
        async move {
            let bytes = target_bytes(&plan);
            let hashed = blocking(move || {
                let payload = gather::payload(&files, &plan)?;
                let digest = tensor_file::digest(plan.target, &plan.shape, &payload);
                let (rows, cols) = tensor_file::rows_cols(&plan.shape).expect("checked by the plan");
                let samples = Samples::of(&TensorView { dtype: plan.target, rows, cols, bytes: &payload });
                let tensor = TensorRef { digest, dtype: plan.target, shape: plan.shape.clone() };
                Ok((tensor, samples, (plan.source != plan.target || plan.matrix.is_some()).then_some(payload)))
            })
            .await?;
            progress.advance(bytes);
            Ok::<_, IngestError>(hashed)
        }
    });
    // A few at a time: memory is bounded by so many tensors and what is kept, whatever the model.
    let mut hashed = pin!(hashed.buffered(concurrency()));
    let (mut refs, mut samples) = (Vec::with_capacity(plans.len()), Vec::with_capacity(plans.len()));
    let (mut kept, mut kept_bytes) = (Kept::new(), 0);
    while let Some((tensor, sampled, converted)) = hashed.try_next().await? {
        if let Some(payload) = converted
            && kept_bytes + payload.len() as u64 <= KEPT_BYTES_MAX
        {
            kept_bytes += payload.len() as u64;
            kept.insert(refs.len(), payload);
        }
        refs.push(tensor);
        samples.push(sampled);
    }
    progress.end();
    Ok(Hashed { refs, samples, kept })
}

/// What [`store_tensors`] did.
pub(super) struct Stored {
    pub(super) count: Shared,
    pub(super) bytes_total: u64,
    pub(super) bytes_new: u64,
    pub(super) bytes_stored: u64,
}

/// Stores what is not there, as far as `sight` goes, each as `compression` says for its index.
pub(super) async fn store_tensors<'a>(
    sight: &Sight,
    files: &Arc<TensorFiles>,
    plans: &[Arc<TensorPlan>],
    refs: &[TensorRef],
    mut kept: Kept,
    compression: impl Fn(usize) -> Compression<'a>,
    progress: &dyn Progress,
) -> Result<Stored, IngestError> {
    let distinct: BTreeMap<Digest, usize> = refs.iter().enumerate().rev().map(|(index, tensor)| (tensor.digest, index)).collect();
    let bytes_total = distinct.values().map(|index| target_bytes(&plans[*index])).sum();
    progress.begin(Stage::Store, bytes_total);
    let stored = stream::iter(distinct.values().copied()).map(|index| {
        let (plan, tensor, kept, compression) = (&plans[index], &refs[index], kept.remove(&index), compression(index));
        let zoo = sight.zoo(tensor.digest);
        async move {
            let bytes = target_bytes(plan);
            let stored = match zoo.keep_tensor(tensor).await? {
                true => StoredTensor { put: Put::Present, bytes: 0 },
                false => {
                    let (files, plan) = (files.clone(), plan.clone());
                    let payload = match kept {
                        Some(payload) => payload,
                        None => {
                            let digest = tensor.digest;
                            blocking(move || gather::own_payload(&files, &plan, digest)).await?
                        }
                    };
                    zoo.put_tensor(tensor, payload, compression).await?
                }
            };
            progress.advance(bytes);
            Ok::<_, IngestError>((stored, bytes))
        }
    });
    let puts: Vec<(StoredTensor, u64)> = stored.buffered(concurrency()).try_collect().await?;
    progress.end();
    let new = puts.iter().filter(|(stored, _)| stored.put == Put::New);
    let bytes_new = new.clone().map(|(_, bytes)| bytes).sum();
    let bytes_stored = new.clone().map(|(stored, _)| stored.bytes).sum();
    let total = puts.len() as u64;
    Ok(Stored { count: Shared { total, present: total - new.count() as u64 }, bytes_total, bytes_new, bytes_stored })
}

/// The block descriptors of a planned model, and their digests.
fn blocks(width: u32, plan: &Plan, refs: &[TensorRef]) -> Vec<(Digest, Block)> {
    let described = plan.blocks.iter().map(|block| {
        let tensors = block.tensors.iter().map(|(role, index)| ((*role).to_owned(), refs[*index].clone())).collect();
        let block = Block { width, params: block.params.clone(), tensors };
        (canonical::digest(&block), block)
    });
    described.collect()
}

fn sketch(plan: &Plan, blocks: &[(Digest, Block)], assets: &Assets, samples: &[Samples]) -> Sketch {
    let blocks: Vec<(Digest, &Block)> = blocks.iter().map(|(digest, block)| (*digest, block)).collect();
    let sample = |index: usize, role: &str| Ok::<_, Infallible>(samples[plan.blocks[index].tensor(role)]);
    Sketch::new(&blocks, &[], assets, sample).unwrap_or_else(|never| match never {})
}

async fn store_blocks(sight: &Sight, blocks: &[(Digest, Block)]) -> Result<Shared, StoreError> {
    let mut puts = BTreeMap::new();
    for (digest, block) in blocks {
        // A block that the model has twice is stored, and new, once.
        if let Entry::Vacant(place) = puts.entry(*digest) {
            place.insert(sight.zoo(*digest).put_block(block).await?.1);
        }
    }
    let present = puts.values().filter(|put| **put == Put::Present).count() as u64;
    Ok(Shared { total: puts.len() as u64, present })
}

async fn store_assets(sight: &Sight, text: &Text) -> Result<(), StoreError> {
    for bytes in [&text.tokenizer, &text.chat_template, &text.card].into_iter().flatten() {
        sight.zoo(Digest::of(bytes)).put_asset(bytes.clone()).await?;
    }
    Ok(())
}

fn assets(text: &Text) -> Assets {
    let [tokenizer, chat_template, card] =
        [&text.tokenizer, &text.chat_template, &text.card].map(|bytes| bytes.as_ref().map(|bytes| Digest::of(bytes)));
    Assets { tokenizer, chat_template, card }
}

/// Stores a chain and its sketch.
pub(super) async fn store_chain(sight: &Sight, chain: &Chain, sketch: &Sketch) -> Result<Digest, StoreError> {
    let zoo = sight.zoo(canonical::digest(chain));
    let (digest, _) = zoo.put_chain(chain).await?;
    zoo.put_sketch(digest, sketch).await?;
    Ok(digest)
}

fn chain(checkpoint: &Checkpoint, plan: &Plan, blocks: Vec<Digest>, text: &Text, options: &AddOptions) -> Chain {
    Chain {
        format: 1,
        architecture: checkpoint.decoder.architecture.to_owned(),
        width: checkpoint.decoder.width,
        vocab: plan.vocab,
        context_tokens: plan.context_tokens,
        blocks,
        adapters: Vec::new(),
        assets: assets(text),
        tokens: text.tokens.clone(),
        defaults: text.defaults.clone(),
        licence: text.licence.clone(),
        source: options.source.clone().unwrap_or_else(|| checkpoint.source.clone()),
    }
}

/// Points the name to the chain, keeping what it pointed to as history. Returns the chain that it replaced.
pub(super) async fn name(zoo: &Zoo, options: &AddOptions, parent: Option<String>, chain: Digest) -> Result<Option<Digest>, IngestError> {
    for _ in 0..NAME_ATTEMPTS {
        let current = match zoo.read_model(&options.model).await {
            Ok(current) => Some(current),
            Err(StoreError::Missing { .. }) => None,
            Err(e) => return Err(e.into()),
        };
        let new = match &current {
            Some(current) if current.chain == chain && !current.loaded && (parent.is_none() || parent == current.parent) => {
                return Ok(None);
            }
            Some(current) => renamed(current, chain, parent.clone()),
            None => ModelName { chain, created_ms: now_ms(), parent: parent.clone(), history: Vec::new(), loaded: false },
        };
        match zoo.set_model(&options.model, current.as_ref(), &new).await {
            Ok(()) => return Ok(current.map(|current| current.chain).filter(|old| *old != chain)),
            Err(StoreError::Conflict { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(IngestError::Contended(options.model.clone()))
}

fn renamed(current: &ModelName, chain: Digest, parent: Option<String>) -> ModelName {
    let mut history = current.history.clone();
    if current.chain != chain {
        history.insert(0, Past { chain: current.chain, created_ms: current.created_ms });
    }
    ModelName { chain, created_ms: now_ms(), parent: parent.or_else(|| current.parent.clone()), history, loaded: false }
}

/// Unix time.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn target_bytes(plan: &TensorPlan) -> u64 {
    tensor_file::payload_bytes(plan.target, &plan.shape).expect("checked by the plan") as u64
}

fn concurrency() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 8)
}

pub(super) async fn blocking<T: Send + 'static>(task: impl FnOnce() -> Result<T, IngestError> + Send + 'static) -> Result<T, IngestError> {
    crate::blocking::blocking(task).await
}
