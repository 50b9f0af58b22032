//! What models cost alone and in company, in memory and on disk. A pure function of manifests and sizes of files.
//!
//! Memory counts as executors hold weights: one copy of each distinct block and adapter, and a token table or output projection once however
//! many blocks name it; other tensors that two different blocks have in common are there twice. Bytes are those of the tensors as
//! they were added, before a device packs them. Disk counts each distinct tensor once, as large as its file.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::digest::Digest;
use crate::inspect::{Resolved, distinct_tensors, layer_count, tensor_bytes};

/// Bytes of which models own parts alone and others together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Cost {
    /// All that it needs: what it costs alone.
    pub alone_bytes: u64,
    /// Of these, what no other has: what goes when it goes.
    pub own_bytes: u64,
    /// Each part over the number of models that have it: the fair shares of all models sum to what is there.
    pub fair_bytes: u64,
}

/// A model and its costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelCost {
    /// `tenant/name`.
    pub model: String,
    /// Family.
    pub architecture: String,
    /// Where it came from, as the manifest says.
    pub source: String,
    /// Model it was tuned from.
    pub parent: Option<String>,
    /// Licence as the source states it.
    pub licence: Option<String>,
    /// Attention and feed-forward pairs.
    pub layer_count: usize,
    /// Positions it can take.
    pub context_tokens: u32,
    /// Blocks that have an adapter.
    pub adapter_count: usize,
    /// In memory.
    pub memory: Cost,
    /// On disk.
    pub disk: Cost,
}

/// A tenant's models.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TenantCost {
    /// Its name.
    pub tenant: String,
    /// Its models.
    pub model_count: usize,
    /// In memory: alone is the sum of its models alone, own what no other tenant has, fair the sum of its models' fair shares.
    pub memory: Cost,
    /// On disk, likewise.
    pub disk: Cost,
}

/// Sums over a zoo.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Totals {
    /// Models that are whole.
    pub model_count: usize,
    /// Names that are not.
    pub broken_count: usize,
    /// Tenants with models.
    pub tenant_count: usize,
    /// Distinct blocks.
    pub block_count: usize,
    /// Blocks of all models, counted in each.
    pub placed_count: usize,
    /// Distinct adapters.
    pub adapter_count: usize,
    /// Memory of all models if each had its own.
    pub alone_bytes: u64,
    /// Memory of all models together.
    pub resident_bytes: u64,
    /// Distinct tensors of all models, before any encoding.
    pub tensor_bytes: u64,
    /// Files of these tensors.
    pub stored_bytes: u64,
    /// Files of tensors that no model has now: earlier chains', bases of others, and what `gc` would free.
    pub other_stored_bytes: u64,
}

/// A part of the memory of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    /// A block, less the tables and projections that are parts of their own.
    Block(Digest),
    Adapter(Digest),
    /// A token table or output projection.
    Table(Digest),
}

/// How many models have each tensor.
pub(super) fn owners(models: &[Resolved]) -> BTreeMap<Digest, usize> {
    let mut owners = BTreeMap::new();
    for tensors in models.iter().map(distinct_tensors) {
        tensors.into_keys().for_each(|digest| *owners.entry(digest).or_default() += 1);
    }
    owners
}

/// Costs of each model, of each tenant, and sums; counts of blocks and broken names are the caller's.
pub(super) fn costs(
    models: &[Resolved],
    owners: &BTreeMap<Digest, usize>,
    files: &BTreeMap<Digest, u64>,
) -> (Vec<ModelCost>, Vec<TenantCost>, Totals) {
    let memory: Vec<BTreeMap<Part, u64>> = models.iter().map(parts).collect();
    let tensors: Vec<BTreeMap<Digest, u64>> = models.iter().map(distinct_tensors).collect();
    // A file that is missing is `verify`'s to tell of; it takes no room.
    let file_bytes = |digest: &Digest| files.get(digest).copied().unwrap_or(0);
    let disk: Vec<BTreeMap<Digest, u64>> =
        tensors.iter().map(|tensors| tensors.keys().map(|digest| (*digest, file_bytes(digest))).collect()).collect();
    let (memory_costs, disk_costs) = (fair(&memory), fair(&disk));
    let mut costs = Vec::new();
    let mut totals = Totals { model_count: models.len(), ..Totals::default() };
    for (index, model) in models.iter().enumerate() {
        totals.placed_count += model.blocks.len();
        totals.alone_bytes += memory_costs[index].alone_bytes;
        costs.push(ModelCost {
            model: model.id.to_string(),
            architecture: model.chain.architecture.clone(),
            source: model.chain.source.clone(),
            parent: model.name.parent.clone(),
            licence: model.chain.licence.clone(),
            layer_count: layer_count(&model.blocks),
            context_tokens: model.chain.context_tokens,
            adapter_count: model.adapters.len(),
            memory: memory_costs[index],
            disk: disk_costs[index],
        });
    }
    totals.resident_bytes = memory.iter().flatten().collect::<BTreeMap<_, _>>().into_values().sum();
    totals.tensor_bytes = tensors.iter().flatten().collect::<BTreeMap<_, _>>().into_values().sum();
    totals.stored_bytes = owners.keys().map(file_bytes).sum();
    totals.other_stored_bytes = files.values().sum::<u64>() - totals.stored_bytes;
    let tenants = tenants(models, &costs, &memory, &disk);
    totals.tenant_count = tenants.len();
    (costs, tenants, totals)
}

/// What a model holds in memory.
fn parts(model: &Resolved) -> BTreeMap<Part, u64> {
    let mut parts = BTreeMap::new();
    for (digest, block) in std::iter::zip(&model.chain.blocks, &model.blocks) {
        let is_table = |role: &str| matches!(role, "token.weight" | "output.weight");
        for tensor in block.tensors.iter().filter(|(role, _)| is_table(role)).map(|(_, tensor)| tensor) {
            parts.insert(Part::Table(tensor.digest), tensor_bytes(tensor));
        }
        let rest = block.tensors.iter().filter(|(role, _)| !is_table(role)).map(|(_, tensor)| tensor_bytes(tensor)).sum();
        parts.insert(Part::Block(*digest), rest);
    }
    for adapter in &model.chain.adapters {
        let bytes = model.adapters[&(adapter.block_index as usize)].tensors().map(|(_, tensor)| tensor_bytes(tensor)).sum();
        parts.insert(Part::Adapter(adapter.digest), bytes);
    }
    parts
}

/// Costs of owners of parts.
fn fair<K: Ord + Copy>(owners: &[BTreeMap<K, u64>]) -> Vec<Cost> {
    let counts = counts(owners);
    let cost = |parts: &BTreeMap<K, u64>| Cost {
        alone_bytes: parts.values().sum(),
        own_bytes: parts.iter().filter(|(part, _)| counts[part] == 1).map(|(_, bytes)| bytes).sum(),
        fair_bytes: parts.iter().map(|(part, bytes)| *bytes as f64 / counts[part] as f64).sum::<f64>().round() as u64,
    };
    owners.iter().map(cost).collect()
}

fn counts<K: Ord + Copy>(owners: &[BTreeMap<K, u64>]) -> BTreeMap<K, usize> {
    let mut counts = BTreeMap::new();
    owners.iter().flat_map(BTreeMap::keys).for_each(|part| *counts.entry(*part).or_default() += 1);
    counts
}

fn tenants(models: &[Resolved], costs: &[ModelCost], memory: &[BTreeMap<Part, u64>], disk: &[BTreeMap<Digest, u64>]) -> Vec<TenantCost> {
    let mut of: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    models.iter().enumerate().for_each(|(index, model)| of.entry(model.id.tenant()).or_default().push(index));
    let sets: Vec<&Vec<usize>> = of.values().collect();
    let (memory_own, disk_own) = (own(&sets, memory), own(&sets, disk));
    let sum = |set: &[usize], bytes: &dyn Fn(&ModelCost) -> u64| set.iter().map(|index| bytes(&costs[*index])).sum();
    let tenants = of.iter().enumerate().map(|(at, (tenant, set))| TenantCost {
        tenant: (*tenant).to_owned(),
        model_count: set.len(),
        memory: Cost {
            alone_bytes: sum(set, &|cost| cost.memory.alone_bytes),
            own_bytes: memory_own[at],
            fair_bytes: sum(set, &|cost| cost.memory.fair_bytes),
        },
        disk: Cost {
            alone_bytes: sum(set, &|cost| cost.disk.alone_bytes),
            own_bytes: disk_own[at],
            fair_bytes: sum(set, &|cost| cost.disk.fair_bytes),
        },
    });
    tenants.collect()
}

/// For each set of models, bytes of what no model outside it has.
fn own<K: Ord + Copy>(sets: &[&Vec<usize>], parts: &[BTreeMap<K, u64>]) -> Vec<u64> {
    let together: Vec<BTreeMap<K, u64>> =
        sets.iter().map(|set| set.iter().flat_map(|index| parts[*index].iter().map(|(part, bytes)| (*part, *bytes))).collect()).collect();
    fair(&together).into_iter().map(|cost| cost.own_bytes).collect()
}
