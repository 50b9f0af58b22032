//! Takes what no name leads to. Marks from names and their history, and from young objects that an `add` may just be
//! writing; sweeps chains, then blocks, then tensors and assets, so that a killed run leaves nothing that points to what
//! is gone. Refuses to sweep when it cannot read all that it must follow.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use object_store::ObjectMeta;
use serde::Serialize;

use crate::digest::Digest;
use crate::store::{Object, StoreError, Zoo, object};

/// What [`collect`] did, or with `dry_run` would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Chains taken.
    pub chain_count: u64,
    /// Blocks taken.
    pub block_count: u64,
    /// Tensors taken.
    pub tensor_count: u64,
    /// Assets taken.
    pub asset_count: u64,
    /// Remains of killed writes taken (local directories only).
    pub staged_count: u64,
    /// Bytes freed.
    pub bytes: u64,
    /// Unreferenced objects left because they are younger than the grace period.
    pub young_count: u64,
    /// Their bytes.
    pub young_bytes: u64,
}

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
    leaves: BTreeSet<Object>,
}

/// Sweeps unreferenced objects that are older than `grace`. With no grace at all nothing else may be adding.
///
/// # Errors
/// When a name, chain or block that is in use cannot be read, or the store fails; nothing more is taken then.
pub async fn collect(zoo: &Zoo, grace: Duration, dry_run: bool) -> Result<GcReport, StoreError> {
    // Listed before marking: what is written from here on is not in the lists, so it cannot be taken.
    let mut lists = Vec::new();
    for folder in ["chains", "blocks", "tensors", "assets"] {
        let metas = zoo.list(folder).await?;
        lists.push(metas.into_iter().filter_map(|meta| Some((object(&meta.location)?, meta))).collect::<Vec<_>>());
    }
    let Marked { kept, named } = mark(zoo, &lists, grace).await?;
    let mut report = GcReport::default();
    for (object, meta) in lists.iter().flatten() {
        if kept.keeps(object) {
            if !named.keeps(object) {
                report.young_count += 1;
                report.young_bytes += meta.size;
            }
            continue;
        }
        if is_young(meta, grace) || !(dry_run || zoo.delete_if_old(object, grace).await?) {
            report.young_count += 1;
            report.young_bytes += meta.size;
            continue;
        }
        *match object {
            Object::Chain(_) => &mut report.chain_count,
            Object::Block(_) => &mut report.block_count,
            Object::Asset(_) => &mut report.asset_count,
            _ => &mut report.tensor_count,
        } += 1;
        report.bytes += meta.size;
    }
    let (count, bytes) = zoo.sweep_staged(grace, dry_run).await?;
    report.staged_count = count;
    report.bytes += bytes;
    Ok(report)
}

impl Marks {
    fn keeps(&self, object: &Object) -> bool {
        match object {
            Object::Chain(digest) => self.chains.contains(digest),
            Object::Block(digest) => self.blocks.contains(digest),
            other => self.leaves.contains(other),
        }
    }
}

async fn mark(zoo: &Zoo, lists: &[Vec<(Object, ObjectMeta)>], grace: Duration) -> Result<Marked, StoreError> {
    let (mut marks, mut named) = (Marks::default(), Marks::default());
    for (_, name) in zoo.list_models().await? {
        let name = name?;
        marks.chains.insert(name.chain);
        marks.chains.extend(name.history.iter().map(|past| past.chain));
    }
    let young = |list: &[(Object, ObjectMeta)]| {
        list.iter().filter(|(_, meta)| is_young(meta, grace)).map(|(object, _)| object.clone()).collect::<Vec<_>>()
    };
    // A young chain or block is kept, so what it points to must be kept with it, be it old: an `add` took long.
    let young_chains =
        young(&lists[0]).into_iter().filter_map(|object| if let Object::Chain(digest) = object { Some(digest) } else { None });
    let young_blocks =
        young(&lists[1]).into_iter().filter_map(|object| if let Object::Block(digest) = object { Some(digest) } else { None });
    let mut unnamed_chains = BTreeSet::new();
    for digest in young_chains {
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
            named.leaves.extend(assets.clone());
        }
        marks.blocks.extend(chain.blocks);
        marks.leaves.extend(assets);
    }
    let of_chains = marks.blocks.clone();
    marks.blocks.extend(young_blocks);
    for digest in &marks.blocks {
        let block = match zoo.read_block(*digest).await {
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) if !of_chains.contains(digest) => continue,
            block => block?,
        };
        let tensors = block.tensors.values().map(|tensor| Object::Tensor(tensor.digest));
        if named.blocks.contains(digest) {
            named.leaves.extend(tensors.clone());
        }
        marks.leaves.extend(tensors);
    }
    Ok(Marked { kept: marks, named })
}

pub(crate) fn is_young(meta: &ObjectMeta, grace: Duration) -> bool {
    // A time in the future (a clock that was set back) counts as young, unless there is no grace at all.
    SystemTime::now().duration_since(meta.last_modified.into()).unwrap_or_default() < grace
}
