//! The whole of `zoo add`, in the order that makes it safe to kill: plan, hash, then write payloads, blocks and assets,
//! the chain, and last the name.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::adapter;
use super::checkpoint::Checkpoint;
use super::convert::Recipe;
use super::plan::{self, Plan, TensorPlan};
use super::report::{AddReport, Progress, Shared, Stage};
use super::text::{self, Text};
use super::{IngestError, gather};
use crate::digest::Digest;
use crate::formats::TensorFiles;
use crate::manifest::{Assets, Block, Chain, ModelName, Past, TensorRef};
use crate::model_id::ModelId;
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
    let (checkpoint, mut plan, text) = opened.await?;
    let files = &checkpoint.tensors;
    let tensor_plans: Vec<Arc<TensorPlan>> = std::mem::take(&mut plan.tensors).into_iter().map(Arc::new).collect();

    let (refs, kept) = hash(files, &tensor_plans, progress).await?;
    let near = if options.compress { near(zoo, options, &plan).await? } else { BTreeMap::new() };
    let compression = |index: usize| match near.get(&index) {
        _ if !options.compress => Compression::Off,
        Some(tensor) => Compression::Over(tensor),
        None => Compression::Alone,
    };
    let stored = store_tensors(zoo, files, &tensor_plans, &refs, kept, compression, progress).await?;
    let (blocks, block_count) = store_blocks(zoo, checkpoint.decoder.width, &plan, &refs).await?;
    let chain = chain(&checkpoint, &plan, blocks, &text, store_assets(zoo, &text).await?, options);
    let (chain, _) = zoo.put_chain(&chain).await?;
    let replaced = name(zoo, options, options.parent.as_ref().map(ToString::to_string), chain).await?;
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
        notes: text.notes,
    })
}

/// Payloads by index, where they were converted and kept.
pub(super) type Kept = BTreeMap<usize, Bytes>;

/// Identity of every tensor as it will be stored. Finds values that are not finite before anything is written.
pub(super) async fn hash(
    files: &Arc<TensorFiles>,
    plans: &[Arc<TensorPlan>],
    progress: &dyn Progress,
) -> Result<(Vec<TensorRef>, Kept), IngestError> {
    progress.begin(Stage::Hash, plans.iter().map(|plan| target_bytes(plan)).sum());
    let hashed = stream::iter(plans.iter().cloned()).map(|plan| {
        let files = files.clone();
        async move {
            let bytes = target_bytes(&plan);
            let hashed = blocking(move || {
                let payload = gather::payload(&files, &plan)?;
                let digest = tensor_file::digest(plan.target, &plan.shape, &payload);
                let tensor = TensorRef { digest, dtype: plan.target, shape: plan.shape.clone() };
                Ok((tensor, (plan.source != plan.target).then_some(payload)))
            })
            .await?;
            progress.advance(bytes);
            Ok::<_, IngestError>(hashed)
        }
    });
    // A few at a time: memory is bounded by so many tensors and what is kept, whatever the model.
    let mut hashed = pin!(hashed.buffered(concurrency()));
    let (mut refs, mut kept, mut kept_bytes) = (Vec::with_capacity(plans.len()), Kept::new(), 0);
    while let Some((tensor, converted)) = hashed.try_next().await? {
        if let Some(payload) = converted
            && kept_bytes + payload.len() as u64 <= KEPT_BYTES_MAX
        {
            kept_bytes += payload.len() as u64;
            kept.insert(refs.len(), payload);
        }
        refs.push(tensor);
    }
    progress.end();
    Ok((refs, kept))
}

/// What [`store_tensors`] did.
pub(super) struct Stored {
    pub(super) count: Shared,
    pub(super) bytes_total: u64,
    pub(super) bytes_new: u64,
    pub(super) bytes_stored: u64,
}

/// The tensors that the plan's may be close to: those in the same places of the model that it was tuned from, or else of the one that has its
/// name now. By index into the plan's tensors.
async fn near(zoo: &Zoo, options: &AddOptions, plan: &Plan) -> Result<BTreeMap<usize, TensorRef>, IngestError> {
    let relative = options.parent.as_ref().unwrap_or(&options.model);
    let relative = match zoo.resolve(relative).await {
        Ok(relative) => relative,
        Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => return Ok(BTreeMap::new()),
        Err(e) => return Err(e.into()),
    };
    let mut near = BTreeMap::new();
    for (block, other) in plan.blocks.iter().zip(&relative.blocks) {
        for (role, index) in &block.tensors {
            if let Some(tensor) = other.tensors.get(*role) {
                near.insert(*index, tensor.clone());
            }
        }
    }
    Ok(near)
}

/// Stores what is not there, each as `compression` says for its index.
pub(super) async fn store_tensors<'a>(
    zoo: &Zoo,
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

async fn store_blocks(zoo: &Zoo, width: u32, plan: &Plan, refs: &[TensorRef]) -> Result<(Vec<Digest>, Shared), StoreError> {
    let mut digests = Vec::with_capacity(plan.blocks.len());
    let mut puts = BTreeMap::new();
    for block in &plan.blocks {
        let tensors = block.tensors.iter().map(|(role, index)| ((*role).to_owned(), refs[*index].clone())).collect();
        let (digest, put) = zoo.put_block(&Block { width, params: block.params.clone(), tensors }).await?;
        // A block that the model has twice is new once.
        puts.entry(digest).or_insert(put);
        digests.push(digest);
    }
    let present = puts.values().filter(|put| **put == Put::Present).count() as u64;
    Ok((digests, Shared { total: puts.len() as u64, present }))
}

async fn store_assets(zoo: &Zoo, text: &Text) -> Result<Assets, StoreError> {
    let mut digests = [None; 3];
    for (digest, bytes) in digests.iter_mut().zip([&text.tokenizer, &text.chat_template, &text.card]) {
        if let Some(bytes) = bytes {
            *digest = Some(zoo.put_asset(bytes.clone()).await?.0);
        }
    }
    let [tokenizer, chat_template, card] = digests;
    Ok(Assets { tokenizer, chat_template, card })
}

fn chain(checkpoint: &Checkpoint, plan: &Plan, blocks: Vec<Digest>, text: &Text, assets: Assets, options: &AddOptions) -> Chain {
    Chain {
        format: 1,
        architecture: checkpoint.decoder.architecture.to_owned(),
        width: checkpoint.decoder.width,
        vocab: plan.vocab,
        context_tokens: plan.context_tokens,
        blocks,
        adapters: Vec::new(),
        assets,
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
