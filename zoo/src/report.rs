//! A zoo to look at: which block each model has at each place and who shares it, and what each model costs alone and in company. The facts
//! are a pure function of manifests and of the sizes of stored files. Start with [`Report`]; [`map`] draws it in a terminal, [`page`] as HTML.

mod costs;
mod kin;
pub mod map;
pub mod page;
pub mod similarity;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub use costs::{Cost, ModelCost, TenantCost, Totals};
pub use kin::{Kin, Row};

use crate::digest::Digest;
use crate::inspect::{Resolved, kind, tensor_bytes};
use crate::manifest::{Adapter, Block};
use crate::store::{Object, StoreError, Zoo, object};

/// All that is drawn. Models, blocks and adapters are named by their index here.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The zoo's directory or bucket.
    pub place: String,
    /// Sums over the zoo.
    pub totals: Totals,
    /// By tenant, in order of their names.
    pub tenants: Vec<TenantCost>,
    /// In order of their names.
    pub models: Vec<ModelCost>,
    /// Names that lead to something damaged or missing, and why.
    pub broken: Vec<Broken>,
    /// Distinct blocks, in order of their digests.
    pub blocks: Vec<BlockFacts>,
    /// Distinct adapters, in order of their digests.
    pub adapters: Vec<AdapterFacts>,
    /// Models that share something with each other, most models first.
    pub kin: Vec<Kin>,
}

/// A name that cannot be resolved.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Broken {
    /// `tenant/name`.
    pub model: String,
    /// Why.
    pub error: String,
}

/// A distinct block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BlockFacts {
    /// Its digest.
    pub digest: Digest,
    /// `embed`, `attention`, `feed_forward` or `head`.
    pub kind: &'static str,
    /// Dtypes of its matrices.
    pub dtypes: Vec<String>,
    /// Bytes of its tensors, before any encoding.
    pub bytes: u64,
    /// Of these, bytes of tensors that at least one other model has: all, where the block itself is shared.
    pub common_bytes: u64,
    /// Models that have it.
    pub model_count: usize,
}

/// A distinct adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterFacts {
    /// Its digest.
    pub digest: Digest,
    /// Matrices that it changes.
    pub roles: Vec<String>,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Models that have it.
    pub model_count: usize,
}

impl Zoo {
    /// Reads all manifests, and lists the tensors' files for their sizes. No weights are read.
    ///
    /// # Errors
    /// When the store cannot list. A model that is damaged is told of in [`Report::broken`].
    pub async fn report(&self) -> Result<Report, StoreError> {
        let (mut models, mut broken) = (Vec::new(), Vec::new());
        for (id, model) in self.resolve_all().await? {
            match model {
                Ok(model) => models.push(model),
                Err(e) => broken.push(Broken { model: id.to_string(), error: e.to_string() }),
            }
        }
        let files = self.list("tensors").await?.into_iter().filter_map(|meta| match object(&meta.location)? {
            Object::Tensor(digest) => Some((digest, meta.size)),
            _ => None,
        });
        Ok(Report::new(self.place().to_owned(), &models, broken, &files.collect()))
    }
}

impl Report {
    /// The facts of resolved models (ordered by name) and of the sizes of tensors' files in bytes.
    pub fn new(place: String, models: &[Resolved], broken: Vec<Broken>, files: &BTreeMap<Digest, u64>) -> Self {
        let owners = costs::owners(models);
        let blocks = block_facts(models, &owners);
        let adapters = adapter_facts(models);
        let index_of = |digests: Vec<Digest>| digests.into_iter().enumerate().map(|(index, digest)| (digest, index)).collect();
        let block_index: BTreeMap<Digest, usize> = index_of(blocks.iter().map(|block| block.digest).collect());
        let adapter_index: BTreeMap<Digest, usize> = index_of(adapters.iter().map(|adapter| adapter.digest).collect());
        let (costs, tenants, mut totals) = costs::costs(models, &owners, files);
        totals.broken_count = broken.len();
        totals.block_count = blocks.len();
        totals.adapter_count = adapters.len();
        let kin = kin::kin(models, &block_index, &adapter_index);
        Self { place, totals, tenants, models: costs, broken, blocks, adapters, kin }
    }
}

fn block_facts(models: &[Resolved], owners: &BTreeMap<Digest, usize>) -> Vec<BlockFacts> {
    let mut found: BTreeMap<Digest, (&Block, usize)> = BTreeMap::new();
    for model in models {
        let distinct: BTreeMap<&Digest, &Block> = std::iter::zip(&model.chain.blocks, &model.blocks).collect();
        for (digest, block) in distinct {
            found.entry(*digest).or_insert((block, 0)).1 += 1;
        }
    }
    let facts = found.into_iter().map(|(digest, (block, model_count))| {
        let dtypes: BTreeSet<String> = block.tensors.values().filter(|t| t.shape.len() == 2).map(|t| t.dtype.to_string()).collect();
        let common = block.tensors.values().filter(|tensor| owners.get(&tensor.digest).is_some_and(|count| *count > 1));
        BlockFacts {
            digest,
            kind: kind(&block.params),
            dtypes: dtypes.into_iter().collect(),
            bytes: block.tensors.values().map(tensor_bytes).sum(),
            common_bytes: common.map(tensor_bytes).sum(),
            model_count,
        }
    });
    facts.collect()
}

fn adapter_facts(models: &[Resolved]) -> Vec<AdapterFacts> {
    let mut found: BTreeMap<Digest, (&Adapter, usize)> = BTreeMap::new();
    for model in models {
        let digest = |index: usize| model.chain.adapters.iter().find(|adapter| adapter.block_index as usize == index).map(|a| a.digest);
        let distinct: BTreeMap<Digest, &Adapter> =
            model.adapters.iter().filter_map(|(index, adapter)| Some((digest(*index)?, adapter))).collect();
        for (digest, adapter) in distinct {
            found.entry(digest).or_insert((adapter, 0)).1 += 1;
        }
    }
    let facts = found.into_iter().map(|(digest, (adapter, model_count))| AdapterFacts {
        digest,
        roles: adapter.changes.keys().cloned().collect(),
        bytes: adapter.tensors().map(|(_, tensor)| tensor_bytes(tensor)).sum(),
        model_count,
    });
    facts.collect()
}
