//! The models that the zoo names, with what placement and assembly need of their chains. Names are read again every few seconds
//! and on demand; chains and blocks never change, so each is read once. While the zoo is away the last catalog stands.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::ChainDigest;
use ashlar_zoo::digest::Digest;
use ashlar_zoo::equivalence::Equivalence;
use ashlar_zoo::joint::{self, Joint};
use ashlar_zoo::manifest::{Adapter, Block, Chain, Change, ModelName};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::relatives::Viewer;
use ashlar_zoo::store::{Domains, KnownNames, Object, StoreError, Zoo};
use ashlar_zoo::tensor_file;
use tokio::sync::{Mutex, watch};
use tokio_util::task::AbortOnDropHandle;

use super::backend::ModelView;
use super::cluster::{Cluster, ClusterState};
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
    /// Whether the zoo was read at least once, and the deployments before it.
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
    clusters: watch::Receiver<Arc<ClusterState>>,
    view: watch::Sender<Arc<CatalogView>>,
    /// One refresh at a time.
    read: Mutex<Read>,
}

/// What was read before.
#[derive(Debug, Default)]
struct Read {
    blocks: BTreeMap<Digest, KnownBlock>,
    /// Sizes of adapters.
    adapter_bytes: BTreeMap<Digest, u64>,
    names: KnownNames,
    /// Records of equivalence: they never change.
    records: BTreeMap<Digest, Equivalence>,
}

/// What was read of a block.
#[derive(Debug, Clone, Copy)]
struct KnownBlock {
    bytes: u64,
    joint: Joint,
}

impl Catalog {
    /// Reads the zoo now, then again every `interval`, and when deployments allow other chains than before. A zoo that cannot be read now is tried again.
    pub async fn start(zoo: Zoo, interval: Duration, cluster: &Cluster) -> Arc<Self> {
        let (sender, view) = watch::channel(Arc::new(CatalogView::default()));
        let reader = Arc::new(Reader { zoo, clusters: cluster.subscribe(), view: sender, read: Mutex::default() });
        // Before the first look, or what is allowed between the two would wait for the next one.
        let mut clusters = cluster.subscribe();
        let mut allowed = Allowed::of(&clusters.borrow());
        let mut told = tell(reader.refresh().await, false);
        let refreshed = reader.clone();
        let task = tokio::spawn(async move {
            loop {
                let changed = tokio::time::timeout(interval, clusters.wait_for(|state| Allowed::of(state) != allowed)).await;
                match changed.map(|followed| followed.map(|state| Allowed::of(&state))) {
                    Ok(Ok(now)) => allowed = now,
                    // Nobody follows the cluster any more.
                    Ok(Err(_)) => tokio::time::sleep(interval).await,
                    Err(_) => {}
                }
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

/// What deployments allow to be served in place of models' own chains.
#[derive(Debug, Clone, PartialEq)]
struct Allowed {
    /// Whether the registry was read: until then nothing is planned, so that no chain is loaded that another one is to stand for.
    is_known: bool,
    /// Bounds of exchanges, by `tenant/name`.
    kl_max: BTreeMap<String, f64>,
}

impl Allowed {
    fn of(state: &ClusterState) -> Self {
        let bounds = state.deployments.iter().filter_map(|(model, deployment)| Some((model.clone(), deployment.kl_max()?)));
        Self { is_known: state.loaded, kl_max: bounds.collect() }
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
        let mut read = self.read.lock().await;
        let Read { blocks, adapter_bytes, names, records } = &mut *read;
        let allowed = Allowed::of(&self.clusters.borrow());
        let names = self.zoo.list_changed(names).await?;
        let served = self.served(&names, &allowed, records).await?;
        let old = self.view.borrow().clone();
        let mut new = CatalogView { loaded: allowed.is_known, ..CatalogView::default() };
        let parents: BTreeMap<String, Option<String>> =
            names.iter().map(|(id, name)| (id.to_string(), name.as_ref().ok().and_then(|name| name.parent.clone()))).collect();
        for (id, name) in names {
            let known = old.models.get(&id.to_string());
            let read = match name {
                Ok(name) => {
                    let chain = served.get(&id).copied().unwrap_or(name.chain);
                    self.entry((&old, &new), chain, blocks, adapter_bytes).await.map(|entry| (name, chain, entry))
                }
                Err(error) => Err(error),
            };
            match read {
                Ok((name, chain, entry)) => {
                    let view = model_view(&id, &name, (chain, &entry), &parents);
                    new.chains.insert(ChainDigest(chain.0), entry);
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
            let changed = view.loaded != new.loaded || !same(view, &new);
            if changed {
                *view = Arc::new(new);
            }
            changed
        });
        Ok(())
    }

    /// The chains by which models are served where that is not the one that their name points to: of the records that are within the deployment's
    /// bound, the exchange of most blocks. A record whose other model is not the tenant's own or a public one's counts for nothing.
    async fn served(
        &self,
        names: &[(ModelId, Result<ModelName, StoreError>)],
        allowed: &Allowed,
        records: &mut BTreeMap<Digest, Equivalence>,
    ) -> Result<BTreeMap<ModelId, Digest>, StoreError> {
        if allowed.kl_max.is_empty() {
            return Ok(BTreeMap::new());
        }
        let listed = self.zoo.list_equivalences().await?;
        records.retain(|digest, _| listed.contains(digest));
        for digest in listed {
            if let Entry::Vacant(place) = records.entry(digest) {
                match self.zoo.read_equivalence(digest).await {
                    Ok(record) => drop(place.insert(record)),
                    Err(error) => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(record = %digest, error, "leaving out a record of equivalence that cannot be read");
                    }
                }
            }
        }
        let domains = if records.is_empty() { Domains::default() } else { self.zoo.read_domains().await? };
        let may_see = |id: &ModelId, record: &Equivalence| {
            let viewer = Viewer::new(id.tenant(), domains.clone());
            record.other.parse().is_ok_and(|other| viewer.sees(&other))
        };
        let mut served = BTreeMap::new();
        for (id, name) in names {
            let (Ok(name), Some(kl_max)) = (name, allowed.kl_max.get(&id.to_string())) else { continue };
            let of_chain = records.values().filter(|record| record.chain == name.chain && may_see(id, record));
            let within = of_chain.filter_map(|record| record.within(*kl_max));
            if let Some((_, step)) = within.max_by(|(a, x), (b, y)| a.cmp(b).then(y.together.kl.mean.total_cmp(&x.together.kl.mean))) {
                served.insert(id.clone(), step.chain);
            }
        }
        Ok(served)
    }

    async fn entry(
        &self,
        (old, new): (&CatalogView, &CatalogView),
        digest: Digest,
        known: &mut BTreeMap<Digest, KnownBlock>,
        known_adapters: &mut BTreeMap<Digest, u64>,
    ) -> Result<Arc<ChainEntry>, StoreError> {
        let key = ChainDigest(digest.0);
        if let Some(entry) = new.chains.get(&key).or_else(|| old.chains.get(&key)) {
            return Ok(entry.clone());
        }
        let chain = self.zoo.read_chain(digest).await?;
        let (mut blocks, mut joints) = (Vec::with_capacity(chain.blocks.len()), Vec::with_capacity(chain.blocks.len()));
        for digest in &chain.blocks {
            let KnownBlock { bytes, joint } = match known.get(digest) {
                Some(block) => *block,
                None => {
                    let block = self.zoo.read_block(*digest).await?;
                    KnownBlock { bytes: weight_bytes(&block), joint: Joint::of(&block) }
                }
            };
            known.insert(*digest, KnownBlock { bytes, joint });
            blocks.push(SizedBlock { digest: *digest, bytes, adapter: None });
            joints.push(joint);
        }
        joint::check(0, joints.len(), joints.iter().copied())
            .map_err(|e| StoreError::Damaged { object: Object::Chain(digest), reason: e.to_string() })?;
        for adapter in &chain.adapters {
            let bytes = match known_adapters.get(&adapter.digest) {
                Some(bytes) => *bytes,
                None => adapter_bytes(&self.zoo.read_adapter(adapter.digest).await?),
            };
            known_adapters.insert(adapter.digest, bytes);
            let block = &mut blocks[adapter.block_index as usize];
            block.adapter = Some(SizedAdapter { digest: Digest::of(&[adapter.digest.0, block.digest.0].concat()), bytes });
        }
        let sized = SizedChain { borders: borders(&joints), blocks };
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
fn model_view(
    id: &ModelId,
    name: &ModelName,
    (chain, entry): (Digest, &ChainEntry),
    parents: &BTreeMap<String, Option<String>>,
) -> Arc<ModelView> {
    let known = |ancestor: Option<String>| ancestor.filter(|ancestor| parents.contains_key(ancestor));
    let parent = known(name.parent.clone());
    let ancestors = std::iter::successors(parent.clone(), |ancestor| known(parents.get(ancestor).cloned().flatten()));
    Arc::new(ModelView {
        id: id.to_string(),
        root: ancestors.take(GENERATIONS_MAX).last(),
        parent,
        created_s: name.created_ms / 1000,
        chain: entry.chain.clone(),
        chain_digest: chain,
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

/// Borders of layers in `embed, (attention, feed_forward)*, head`: in front of each attention block but the first, which stays with the embedding,
/// and on either side of a stitch.
fn borders(joints: &[Joint]) -> Vec<u32> {
    (0u32..).zip(joints).skip(2).filter(|(_, joint)| joint.begins_layer()).map(|(place, _)| place).collect()
}

#[cfg(test)]
mod tests;
