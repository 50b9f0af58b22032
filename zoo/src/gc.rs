//! Takes what no name leads to. Marks from names and their history, and from young objects that an `add` may just be
//! writing, and on to the tensors that marked ones are stored over; sweeps records, sketches and chains, then blocks and adapters, then tensors (a delta before
//! its mark and its base) and assets, so that a killed run leaves nothing that points to what is gone. Refuses to sweep when it cannot read all that it must follow.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use object_store::ObjectMeta;
use serde::Serialize;
use tokio::time::Instant;

use crate::digest::Digest;
use crate::encoding::DEPTH_MAX;
use crate::store::{Object, StoreError, Zoo, object};

/// Marks serve at least for so long a sweep, or a short grace period and a large zoo would leave no time for one.
const SWEEP_MIN: Duration = Duration::from_secs(20);

/// What [`collect`] did, or with `dry_run` would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Chains taken.
    pub chain_count: u64,
    /// Blocks taken.
    pub block_count: u64,
    /// Adapters taken.
    pub adapter_count: u64,
    /// Tensors taken.
    pub tensor_count: u64,
    /// Marks of deltas taken.
    pub base_count: u64,
    /// Assets taken.
    pub asset_count: u64,
    /// Records of equivalence taken: of chains that no name leads to.
    pub equivalence_count: u64,
    /// Sketches taken.
    pub sketch_count: u64,
    /// Records of what was measured of chains that are gone, taken.
    pub measure_count: u64,
    /// Records of what blocks that are gone cost, taken.
    pub profile_count: u64,
    /// Remains of killed writes taken.
    pub staged_count: u64,
    /// Bytes freed.
    pub bytes: u64,
    /// Unreferenced objects left because they are younger than the grace period.
    pub young_count: u64,
    /// Their bytes.
    pub young_bytes: u64,
}

/// Where objects lie, in the order in which they are swept.
const FOLDERS: [&str; 11] =
    ["equivalences", "measures", "profiles", "sketches", "chains", "blocks", "adapters", "tensors", "bases", "assets", "scratch"];
const EQUIVALENCES: usize = 0;
const CHAINS: usize = 4;
const BLOCKS: usize = 5;
const ADAPTERS: usize = 6;
const TENSORS: usize = 7;
const BASES: usize = 8;

/// Objects that are kept, and those of them that a name leads to.
struct Marked {
    kept: Marks,
    named: Marks,
}

/// Objects by kind.
#[derive(Default)]
struct Marks {
    chains: BTreeSet<Digest>,
    blocks: BTreeSet<Digest>,
    adapters: BTreeSet<Digest>,
    leaves: BTreeSet<Object>,
}

/// Sweeps unreferenced objects that are older than `grace`. With no grace at all nothing else may be adding.
///
/// # Errors
/// When a name, chain, block or adapter that is in use cannot be read, another `gc` sweeps, or the store fails; nothing more is taken then.
pub async fn collect(zoo: &Zoo, grace: Duration, dry_run: bool) -> Result<GcReport, StoreError> {
    let mut report = GcReport::default();
    while !collect_once(zoo, grace, dry_run, &mut report).await? {}
    let (count, bytes) = zoo.sweep_staged(grace, dry_run).await?;
    report.staged_count += count;
    report.bytes += bytes;
    Ok(report)
}

/// Marks and sweeps. Returns whether it came to its end: marks serve for a quarter of the grace period. An `add` relies on what is younger than half of
/// it, at most an eighth before it sets the name, and may set it right after the names were read here: that is seven eighths at most, and not old.
async fn collect_once(zoo: &Zoo, grace: Duration, dry_run: bool, report: &mut GcReport) -> Result<bool, StoreError> {
    let began = Instant::now();
    (report.young_count, report.young_bytes) = (0, 0);
    // Listed before marking: what is written from here on is not in the lists, so it cannot be taken.
    let mut lists = Vec::new();
    for folder in FOLDERS {
        let metas = zoo.list(folder).await?;
        lists.push(metas.into_iter().filter_map(|meta| Some((object(&meta.location)?, meta))).collect::<Vec<_>>());
    }
    let Marked { mut kept, mut named } = mark(zoo, &lists, grace).await?;
    let bases = Bases::of(&lists[BASES]);
    let young = lists[TENSORS].iter().filter(|(_, meta)| is_young(meta, grace)).map(|(object, _)| object.clone());
    kept.leaves.extend(young.clone());
    bases.close(&mut kept.leaves);
    bases.close(&mut named.leaves);
    bases.sort_deltas_first(&mut lists[TENSORS]);
    let mut sweep = if dry_run { None } else { Some(zoo.begin_sweep(grace).await?) };
    let (mut is_whole, sweep_began) = (true, Instant::now());
    for (object, meta) in lists.iter().flatten() {
        if kept.keeps(object) {
            if !named.keeps(object) {
                report.young_count += 1;
                report.young_bytes += meta.size;
            }
            continue;
        }
        let is_taken = match &mut sweep {
            _ if is_young(meta, grace) => false,
            None => true,
            Some(_) if !grace.is_zero() && began.elapsed() > grace / 4 && sweep_began.elapsed() > SWEEP_MIN => {
                is_whole = false;
                break;
            }
            Some(sweep) => {
                sweep.go_on().await?;
                zoo.delete_if_old(object, grace).await?
            }
        };
        if !is_taken {
            report.young_count += 1;
            report.young_bytes += meta.size;
            continue;
        }
        *match object {
            Object::Chain(_) => &mut report.chain_count,
            Object::Block(_) => &mut report.block_count,
            Object::Adapter(_) => &mut report.adapter_count,
            Object::Asset(_) => &mut report.asset_count,
            Object::Base { .. } => &mut report.base_count,
            Object::Equivalence(_) => &mut report.equivalence_count,
            Object::Sketch(_) => &mut report.sketch_count,
            Object::Measure { .. } => &mut report.measure_count,
            Object::Profile { .. } => &mut report.profile_count,
            Object::Scratch(_) => &mut report.staged_count,
            _ => &mut report.tensor_count,
        } += 1;
        report.bytes += meta.size;
    }
    if let Some(sweep) = sweep {
        sweep.end().await?;
    }
    Ok(is_whole)
}

impl Marks {
    fn keeps(&self, object: &Object) -> bool {
        match object {
            Object::Chain(digest) | Object::Sketch(digest) | Object::Measure { chain: digest, .. } => self.chains.contains(digest),
            Object::Block(digest) | Object::Profile { block: digest, .. } => self.blocks.contains(digest),
            Object::Adapter(digest) => self.adapters.contains(digest),
            // A mark stays with its delta.
            Object::Base { tensor, .. } => self.leaves.contains(&Object::Tensor(*tensor)),
            other => self.leaves.contains(other),
        }
    }
}

/// What deltas are stored over, by their marks. A tensor has more than one mark where two `add`s stored it over different ones.
struct Bases(BTreeMap<Digest, Vec<Digest>>);

impl Bases {
    fn of(marks: &[(Object, ObjectMeta)]) -> Self {
        let mut bases: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
        for (object, _) in marks {
            if let Object::Base { tensor, base } = object {
                bases.entry(*tensor).or_default().push(*base);
            }
        }
        Self(bases)
    }

    /// Adds to tensors all that they are stored over.
    fn close(&self, leaves: &mut BTreeSet<Object>) {
        let mut open: Vec<Digest> = leaves.iter().filter_map(as_tensor).collect();
        while let Some(tensor) = open.pop() {
            open.extend(self.0.get(&tensor).into_iter().flatten().filter(|base| leaves.insert(Object::Tensor(**base))));
        }
    }

    /// Puts tensors behind all that are stored over them.
    fn sort_deltas_first(&self, tensors: &mut [(Object, ObjectMeta)]) {
        let mut depths: BTreeMap<Digest, u8> = BTreeMap::new();
        let mut ahead: Vec<(Digest, u8)> = self.0.keys().map(|tensor| (*tensor, 0)).collect();
        while let Some((tensor, depth)) = ahead.pop() {
            let known = depths.entry(tensor).or_default();
            // Marks that run in a circle are none of ours; the bound ends them.
            if depth >= *known && depth <= 2 * DEPTH_MAX {
                *known = depth;
                ahead.extend(self.0.get(&tensor).into_iter().flatten().map(|base| (*base, depth + 1)));
            }
        }
        tensors.sort_by_key(|(object, _)| as_tensor(object).and_then(|tensor| depths.get(&tensor)).copied().unwrap_or(0));
    }
}

fn as_tensor(object: &Object) -> Option<Digest> {
    match object {
        Object::Tensor(digest) => Some(*digest),
        _ => None,
    }
}

async fn mark(zoo: &Zoo, lists: &[Vec<(Object, ObjectMeta)>], grace: Duration) -> Result<Marked, StoreError> {
    let (mut marks, mut named) = (Marks::default(), Marks::default());
    for (_, name) in zoo.list_models().await? {
        let name = name?;
        marks.chains.insert(name.chain);
        marks.chains.extend(name.history.iter().map(|past| past.chain));
    }
    // A record is worth something while its chain is a model's; then so are the chains that it exchanges blocks in.
    let mut exchanged = Vec::new();
    for (object, _) in &lists[EQUIVALENCES] {
        let Object::Equivalence(digest) = object else { continue };
        let record = match zoo.read_equivalence(*digest).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => continue,
            record => record?,
        };
        if marks.chains.contains(&record.chain) {
            exchanged.extend(record.steps.iter().map(|step| step.chain));
            marks.leaves.insert(object.clone());
            named.leaves.insert(object.clone());
        }
    }
    marks.chains.extend(exchanged);
    // A young chain, block or adapter is kept, so what it points to must be kept with it, be it old: an `add` took long.
    let young = |list: &[(Object, ObjectMeta)]| {
        let young = list.iter().filter(|(_, meta)| is_young(meta, grace));
        young
            .filter_map(|(object, _)| match object {
                Object::Chain(digest) | Object::Block(digest) | Object::Adapter(digest) => Some(*digest),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let mut unnamed_chains = BTreeSet::new();
    for digest in young(&lists[CHAINS]) {
        if marks.chains.insert(digest) {
            unnamed_chains.insert(digest);
        }
    }
    for digest in &marks.chains {
        let chain = match zoo.read_chain(*digest).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) if unnamed_chains.contains(digest) => continue,
            chain => chain?,
        };
        let assets = [chain.assets.tokenizer, chain.assets.chat_template, chain.assets.card].into_iter().flatten().map(Object::Asset);
        if !unnamed_chains.contains(digest) {
            named.chains.insert(*digest);
            named.blocks.extend(&chain.blocks);
            named.adapters.extend(chain.adapters.iter().map(|adapter| adapter.digest));
            named.leaves.extend(assets.clone());
        }
        marks.blocks.extend(chain.blocks);
        marks.adapters.extend(chain.adapters.iter().map(|adapter| adapter.digest));
        marks.leaves.extend(assets);
    }
    let (blocks_of_chains, adapters_of_chains) = (marks.blocks.clone(), marks.adapters.clone());
    marks.blocks.extend(young(&lists[BLOCKS]));
    marks.adapters.extend(young(&lists[ADAPTERS]));
    let mut held = Vec::new();
    for digest in &marks.blocks {
        match zoo.read_block(*digest).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) if !blocks_of_chains.contains(digest) => {}
            block => held.extend(block?.tensors.into_values().map(|tensor| (named.blocks.contains(digest), tensor.digest))),
        }
    }
    for digest in &marks.adapters {
        match zoo.read_adapter(*digest).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) if !adapters_of_chains.contains(digest) => {}
            adapter => held.extend(adapter?.tensors().map(|(_, tensor)| (named.adapters.contains(digest), tensor.digest))),
        }
    }
    for (is_named, tensor) in held {
        if is_named {
            named.leaves.insert(Object::Tensor(tensor));
        }
        marks.leaves.insert(Object::Tensor(tensor));
    }
    Ok(Marked { kept: marks, named })
}

pub(crate) fn is_young(meta: &ObjectMeta, grace: Duration) -> bool {
    // A time in the future (a clock that was set back) counts as young, unless there is no grace at all.
    SystemTime::now().duration_since(meta.last_modified.into()).unwrap_or_default() < grace
}
