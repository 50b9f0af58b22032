//! One look at all that a viewer may see: the nearest relative of a chain, and what of the chain is there already. It reads the visible
//! names and one sketch for each of their chains; it touches nothing of others, so neither its answer nor its time tells of them.

use std::collections::HashSet;
use std::pin::pin;

use futures::{StreamExt, TryStreamExt, stream};

use super::nearest::{Known, Rank, Search};
use super::sketch::Sketch;
use super::viewer::Viewer;
use crate::digest::Digest;
use crate::manifest::{Block, Chain, ModelName};
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};

/// Sketches that one survey makes where they are missing (models that an older build added).
const SKETCHES_MADE_MAX: usize = 8;

/// Objects that are read at a time.
const READS_AT_ONCE: usize = 32;

/// What a survey found.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// The nearest relative, if any is near enough: its name, chain, and how near it is.
    pub nearest: Option<(ModelId, Digest, Rank)>,
    /// What of the chain visible models have.
    pub known: Known,
    /// Visible models.
    pub visible_count: usize,
    /// Of these, those that have no sketch and got none: they are as if they were not there.
    pub unsketched_count: usize,
}

/// Which models may be the nearest relative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Candidates {
    /// All that can be seen.
    All,
    /// Those without adapters and of another chain: what adapters can lie over.
    Plain,
}

/// A relative with its manifests.
#[derive(Debug, Clone)]
pub struct Relative {
    /// Its name.
    pub id: ModelId,
    /// Its chain's digest.
    pub digest: Digest,
    /// Its chain.
    pub chain: Chain,
    /// The chain's blocks, in order.
    pub blocks: Vec<Block>,
}

/// Looks at all visible models. `own` is the name that is being set and the chain that it will have: where it has that already, it is not
/// its own relative.
/// `candidates` says which of them may be the nearest; all count for what is there already.
///
/// # Errors
/// When the store fails. A model that cannot be read is passed over; `verify` tells of it.
pub async fn survey(
    zoo: &Zoo,
    viewer: &Viewer,
    of: &Sketch,
    own: Option<(&ModelId, Digest)>,
    candidates: Candidates,
) -> Result<Survey, StoreError> {
    let mut names = zoo.list_visible(viewer).await?;
    // Of models that are equally near, what was there first is what the others were made of.
    names.sort_by_key(|(_, name)| name.created_ms);
    let names: Vec<_> = names.into_iter().map(|(id, name)| (id, name.chain)).collect();
    let visible_count = names.len();
    let (mut chains, mut seen) = (Vec::new(), HashSet::new());
    let others = names.iter().filter(|(id, chain)| own.is_none_or(|(name, own_chain)| *id != *name || *chain != own_chain));
    // The own name is last, so that its chain counts as there, under another's name where it has one.
    for (id, chain) in others.chain(names.iter()) {
        if seen.insert(*chain) {
            chains.push((*chain, id.clone()));
        }
    }
    let mut search = Search::new(of);
    if let Some((_, chain)) = own.filter(|(_, chain)| seen.contains(chain)) {
        search.know_object(chain);
    }
    let mut missing = Vec::new();
    let reads = stream::iter(chains).map(|(chain, id)| async move { Ok::<_, StoreError>((zoo.read_sketch(chain).await?, chain, id)) });
    let mut reads = pin!(reads.buffered(READS_AT_ONCE));
    let mut look = |id: ModelId, chain: Digest, sketch: &Sketch| {
        let is_own = own.is_some_and(|(name, own_chain)| id == *name && chain == own_chain);
        // Nothing differs from a base that it equals.
        let no_base = sketch.is_adapted() || own.is_some_and(|(_, own_chain)| chain == own_chain);
        match is_own || candidates == Candidates::Plain && no_base {
            true => search.know(sketch),
            false => search.see((id, chain), sketch),
        }
    };
    while let Some((sketch, chain, id)) = reads.try_next().await? {
        match sketch {
            Some(sketch) => look(id, chain, &sketch),
            None => missing.push((id, chain)),
        }
    }
    let mut unsketched_count = missing.len();
    for (id, chain) in missing.into_iter().take(SKETCHES_MADE_MAX) {
        match zoo.make_sketch(chain).await {
            Ok(sketch) => look(id, chain, &sketch),
            Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => continue,
            Err(other) => return Err(other),
        }
        unsketched_count -= 1;
    }
    let (nearest, known) = search.finish();
    Ok(Survey { nearest: nearest.map(|(rank, (id, chain))| (id, chain, rank)), known, visible_count, unsketched_count })
}

/// The nearest relative of a chain among what `viewer` may see, with its manifests: for a matrix of block `i` and role `r`,
/// `relative.blocks[i].tensors.get(r)` is what it was tuned from (where the shapes agree: tables of tokens may have more rows).
///
/// # Errors
/// When the store fails, or a manifest of the relative is missing or damaged.
pub async fn relative_for(zoo: &Zoo, viewer: &Viewer, sketch: &Sketch) -> Result<Option<Relative>, StoreError> {
    match survey(zoo, viewer, sketch, None, Candidates::All).await?.nearest {
        Some((id, digest, _)) => Relative::read(zoo, id, digest).await.map(Some),
        None => Ok(None),
    }
}

impl Relative {
    /// Reads the manifests of what a survey found.
    ///
    /// # Errors
    /// When one of them is missing or damaged, or the store fails.
    pub async fn read(zoo: &Zoo, id: ModelId, digest: Digest) -> Result<Self, StoreError> {
        let chain = zoo.read_chain(digest).await?;
        let blocks = stream::iter(chain.blocks.clone()).map(|digest| zoo.read_block(digest)).buffered(READS_AT_ONCE);
        let blocks = blocks.try_collect().await?;
        Ok(Self { id, digest, chain, blocks })
    }
}

impl Zoo {
    /// Names that `viewer` may see and what they point to now, in order. What cannot be read is left out.
    pub(crate) async fn list_visible(&self, viewer: &Viewer) -> Result<Vec<(ModelId, ModelName)>, StoreError> {
        let ids = match viewer {
            Viewer::Administrator => self.model_ids(None).await?,
            Viewer::Tenant(tenants) => {
                let mut ids = Vec::new();
                for tenant in tenants {
                    ids.extend(self.model_ids(Some(tenant)).await?);
                }
                ids
            }
        };
        let names = stream::iter(ids).map(|id| async move { (self.read_model(&id).await, id) });
        let names: Vec<_> = names.buffered(READS_AT_ONCE).collect().await;
        let mut visible = Vec::with_capacity(names.len());
        for (name, id) in names {
            match name {
                Ok(name) => visible.push((id, name)),
                Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(visible)
    }
}
