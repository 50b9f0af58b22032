//! The models that the zoo names, with what placement and assembly need of their chains. Names are read again every few seconds
//! and on demand; chains and blocks never change, so each is read once. While the zoo is away the last catalog stands.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::ChainDigest;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::{Adapter, Block, Chain, Change, ModelName};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{StoreError, Zoo};
use ashlar_zoo::tensor_file;
use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;

use super::backend::ModelView;
use crate::state::assembly::ChainPath;
use crate::state::placement::{SizedAdapter, SizedBlock, SizedChain};

/// Longest line of descent that is followed to a model's root.
const GENERATIONS_MAX: usize = 32;

/// A chain as the router needs it.
#[derive(Debug)]
pub struct ChainEntry {
    /// Its manifest.
    pub chain: Arc<Chain>,
    /// For assembly.
    pub path: ChainPath,
    /// For placement.
    pub sized: SizedChain,
}

/// All models at one moment.
#[derive(Debug, Clone, Default)]
pub struct CatalogView {
    /// Whether the zoo was read at least once.
    pub loaded: bool,
    /// By `tenant/name`.
    pub models: BTreeMap<String, Arc<ModelView>>,
    /// Chains that some name points to.
    pub chains: BTreeMap<ChainDigest, Arc<ChainEntry>>,
}

/// Keeps the view.
#[derive(Debug)]
pub struct Catalog {
    reader: Arc<Reader>,
    view: watch::Receiver<Arc<CatalogView>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Reader {
    zoo: Zoo,
    view: watch::Sender<Arc<CatalogView>>,
    /// One refresh at a time; sizes of blocks and adapters that were read.
    block_bytes: Mutex<BTreeMap<Digest, u64>>,
}

impl Catalog {
    /// Reads the zoo now, then again every `interval`. A zoo that cannot be read now is tried again.
    pub async fn start(zoo: Zoo, interval: Duration) -> Arc<Self> {
        let (sender, view) = watch::channel(Arc::new(CatalogView::default()));
        let reader = Arc::new(Reader { zoo, view: sender, block_bytes: Mutex::default() });
        let mut told = tell(reader.refresh().await, false);
        let refreshed = reader.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(interval).await;
                told = tell(refreshed.refresh().await, told);
            }
        });
        Arc::new(Self { reader, view, _task: AbortOnDropHandle::new(task) })
    }

    /// The view now.
    pub fn view(&self) -> Arc<CatalogView> {
        self.view.borrow().clone()
    }

    /// Follows the view.
    pub fn subscribe(&self) -> watch::Receiver<Arc<CatalogView>> {
        self.view.clone()
    }

    /// Reads the zoo now.
    ///
    /// # Errors
    /// When the zoo cannot be listed.
    pub async fn refresh(&self) -> Result<(), StoreError> {
        self.reader.refresh().await
    }

    /// The zoo behind it.
    pub fn zoo(&self) -> &Zoo {
        &self.reader.zoo
    }
}

/// Says once that the zoo is away, and once that it is back.
fn tell(refreshed: Result<(), StoreError>, told: bool) -> bool {
    match refreshed {
        Ok(()) => {
            if told {
                tracing::info!("the zoo is readable again");
            }
            false
        }
        Err(error) => {
            if !told {
                tracing::warn!(error = &error as &dyn std::error::Error, "failed to read the zoo; keeping the models that were known");
            }
            true
        }
    }
}

impl Reader {
    async fn refresh(&self) -> Result<(), StoreError> {
        let mut block_bytes = self.block_bytes.lock().await;
        let names = self.zoo.list_models().await?;
        let old = self.view.borrow().clone();
        let mut new = CatalogView { loaded: true, ..CatalogView::default() };
        let parents: BTreeMap<String, Option<String>> =
            names.iter().map(|(id, name)| (id.to_string(), name.as_ref().ok().and_then(|name| name.parent.clone()))).collect();
        for (id, name) in names {
            let known = old.models.get(&id.to_string());
            let read = match name {
                Ok(name) => self.entry(&old, &new, name.chain, &mut block_bytes).await.map(|entry| (name, entry)),
                Err(error) => Err(error),
            };
            match read {
                Ok((name, entry)) => {
                    let view = model_view(&id, &name, &entry, &parents);
                    new.chains.insert(ChainDigest(name.chain.0), entry);
                    new.models.insert(view.id.clone(), view);
                }
                Err(error) => {
                    let Some(view) = known else {
                        tracing::warn!(model = %id, error = &error as &dyn std::error::Error, "leaving out a model that cannot be read");
                        continue;
                    };
                    let digest = ChainDigest(view.chain_digest.0);
                    new.chains.extend(old.chains.get(&digest).map(|entry| (digest, entry.clone())));
                    new.models.insert(view.id.clone(), view.clone());
                }
            }
        }
        self.view.send_if_modified(|view| {
            let changed = !view.loaded || !same(view, &new);
            if changed {
                *view = Arc::new(new);
            }
            changed
        });
        Ok(())
    }

    async fn entry(
        &self,
        old: &CatalogView,
        new: &CatalogView,
        digest: Digest,
        block_bytes: &mut BTreeMap<Digest, u64>,
    ) -> Result<Arc<ChainEntry>, StoreError> {
        let key = ChainDigest(digest.0);
        if let Some(entry) = new.chains.get(&key).or_else(|| old.chains.get(&key)) {
            return Ok(entry.clone());
        }
        let chain = self.zoo.read_chain(digest).await?;
        let mut blocks = Vec::with_capacity(chain.blocks.len());
        for block in &chain.blocks {
            let bytes = match block_bytes.get(block) {
                Some(bytes) => *bytes,
                None => weight_bytes(&self.zoo.read_block(*block).await?),
            };
            block_bytes.insert(*block, bytes);
            blocks.push(SizedBlock { digest: *block, bytes, adapter: None });
        }
        for adapter in &chain.adapters {
            let bytes = match block_bytes.get(&adapter.digest) {
                Some(bytes) => *bytes,
                None => adapter_bytes(&self.zoo.read_adapter(adapter.digest).await?),
            };
            block_bytes.insert(adapter.digest, bytes);
            let block = &mut blocks[adapter.block_index as usize];
            block.adapter = Some(SizedAdapter { digest: Digest::of(&[adapter.digest.0, block.digest.0].concat()), bytes });
        }
        let sized = SizedChain { borders: borders(blocks.len()), blocks };
        Ok(Arc::new(ChainEntry { path: ChainPath::new(digest, &chain), chain: Arc::new(chain), sized }))
    }
}

fn same(old: &CatalogView, new: &CatalogView) -> bool {
    let pairs = || old.models.values().zip(new.models.values());
    let equal = |(a, b): (&Arc<ModelView>, &Arc<ModelView>)| {
        (&a.id, a.chain_digest, a.created_s, &a.parent, &a.root) == (&b.id, b.chain_digest, b.created_s, &b.parent, &b.root)
    };
    old.models.len() == new.models.len() && pairs().all(equal)
}

/// `parents`: of each name that is there. Ancestors that are gone are not named.
fn model_view(id: &ModelId, name: &ModelName, entry: &ChainEntry, parents: &BTreeMap<String, Option<String>>) -> Arc<ModelView> {
    let known = |ancestor: Option<String>| ancestor.filter(|ancestor| parents.contains_key(ancestor));
    let parent = known(name.parent.clone());
    let ancestors = std::iter::successors(parent.clone(), |ancestor| known(parents.get(ancestor).cloned().flatten()));
    Arc::new(ModelView {
        id: id.to_string(),
        root: ancestors.take(GENERATIONS_MAX).last(),
        parent,
        created_s: name.created_ms / 1000,
        chain: entry.chain.clone(),
        chain_digest: name.chain,
    })
}

/// Bytes of a block's tensors as stored; executors hold them in about the same.
fn weight_bytes(block: &Block) -> u64 {
    let bytes =
        block.tensors.values().map(|tensor| tensor_file::payload_bytes(tensor.dtype, &tensor.shape).map_or(u64::MAX, |bytes| bytes as u64));
    bytes.fold(0, u64::saturating_add)
}

/// Bytes that an adapter's factors take at most: packed, shrinks have sixteen outputs or a multiple, and expands may be f32.
fn adapter_bytes(adapter: &Adapter) -> u64 {
    let stored = |dtype, shape: [u64; 2]| tensor_file::payload_bytes(dtype, &shape).map_or(u64::MAX, |bytes| bytes as u64);
    let bytes = |change: &Change| match change {
        Change::LowRank { a, b, .. } => {
            let shrink = stored(a.dtype, [a.shape[0].next_multiple_of(16), a.shape[1]]);
            b.shape.iter().fold(4, |bytes: u64, dimension| bytes.saturating_mul(*dimension)).saturating_add(shrink)
        }
        // Packed, sixteen outputs are a panel, and eight inputs a byte of each.
        Change::OneBit { signs } => stored(signs.dtype, [signs.shape[0].next_multiple_of(16), signs.shape[1].next_multiple_of(8)]),
    };
    adapter.changes.values().map(bytes).fold(0, u64::saturating_add)
}

/// Borders of layers in `embed, (attention, feed_forward)*, head`: behind each feed-forward but the last, which stays with the head.
fn borders(block_count: usize) -> Vec<u32> {
    let end = u32::try_from(block_count).expect("chains are short").saturating_sub(2);
    (3..end).step_by(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_lie_between_layers() {
        assert_eq!(borders(2), Vec::<u32>::new());
        assert_eq!(borders(4), Vec::<u32>::new());
        assert_eq!(borders(6), [3]);
        assert_eq!(borders(10), [3, 5, 7]);
    }
}
