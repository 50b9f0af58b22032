//! How a chain differs from its relative, block by block: identical, of low rank (a merged LoRA), a little, or altogether. Reads both sides'
//! tensors where their digests differ, a few at a time. Start with [`compare`].

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::low_rank::{LowRank, Proof, low_rank};
use crate::adapter::ADAPTED_ROLES;
use crate::apart::Apart;
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::manifest::{Block, TensorRef};
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};
use crate::tensor::MappedTensor;

/// From here on a difference is no smaller than that of independent matrices of one size (the square root of 2, less what chance takes).
pub const UNRELATED_MIN: f64 = 1.2;

/// Largest rank that `add` looks for.
pub const RANK_SOUGHT_MAX: usize = 64;

/// How a block or a tensor differs, from nothing to all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The same bytes.
    Identical,
    /// The base plus a product of two thin matrices, rounded.
    LowRank,
    /// Smaller than what it changes.
    Small,
    /// Of another shape, or as far as independent ones.
    Unrelated,
}

/// A tensor that differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDifference {
    /// How.
    pub kind: Kind,
    /// Rank of the difference, where it is low.
    pub rank: Option<usize>,
    /// Root mean square of the difference over that of the larger tensor; none where shapes differ.
    pub relative_rms: Option<f64>,
    /// Share of the elements that are equal.
    pub equal_share: f64,
    /// How well base and product give the tensor.
    pub proof: Option<Proof>,
}

/// A block against its relative's at the same place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BlockDifference {
    /// Place in the chain.
    pub index: usize,
    /// The farthest of its tensors.
    pub kind: Kind,
    /// Tensors that differ, by role.
    pub tensors: BTreeMap<String, TensorDifference>,
}

/// A block's difference with the factors of what is of low rank.
#[derive(Debug, Clone)]
pub struct Compared {
    /// The difference.
    pub difference: BlockDifference,
    /// By role.
    pub factors: BTreeMap<String, LowRank>,
}

/// Compares blocks with those of a relative, place by place, `at_once` at a time.
///
/// # Errors
/// When a tensor is missing or damaged, or the store fails.
pub async fn compare(zoo: &Zoo, base: &[Block], tuned: &[Block], rank_max: usize, at_once: usize) -> Result<Vec<Compared>, StoreError> {
    let compared = stream::iter(tuned.iter().enumerate()).map(|(index, tuned)| compare_block(zoo, index, base.get(index), tuned, rank_max));
    compared.buffered(at_once).try_collect().await
}

async fn compare_block(zoo: &Zoo, index: usize, base: Option<&Block>, tuned: &Block, rank_max: usize) -> Result<Compared, StoreError> {
    let (mut tensors, mut factors) = (BTreeMap::new(), BTreeMap::new());
    for (role, tensor) in &tuned.tensors {
        let of_base = base.and_then(|base| base.tensors.get(role));
        if of_base.is_some_and(|base| base.digest == tensor.digest) {
            continue;
        }
        let (difference, found) = match of_base.and_then(|base| comparable(role, base, tensor).map(|rows| (base, rows))) {
            None => (TensorDifference::unrelated(), None),
            Some((base, rows)) => {
                let (base, tensor) = (zoo.map_tensor(base).await?, zoo.map_tensor(tensor).await?);
                let seek = ADAPTED_ROLES.contains(&role.as_str());
                blocking(move || compare_tensor(&base, &tensor, rows, if seek { rank_max } else { 0 })).await
            }
        };
        tensors.insert(role.clone(), difference);
        factors.extend(found.map(|found| (role.clone(), found)));
    }
    let is_whole = base.is_some_and(|base| {
        base.params == tuned.params && base.width == tuned.width && base.tensors.keys().all(|role| tuned.tensors.contains_key(role))
    });
    let least = if is_whole { Kind::Identical } else { Kind::Unrelated };
    let kind = tensors.values().map(|tensor: &TensorDifference| tensor.kind).max().unwrap_or(least);
    // Other hyper-parameters over the same tensors are a small change: a longer context, say.
    let same_kind = base.is_some_and(|base| std::mem::discriminant(&base.params) == std::mem::discriminant(&tuned.params));
    let kind = if is_whole { kind } else { kind.max(if same_kind { Kind::Small } else { Kind::Unrelated }) };
    Ok(Compared { difference: BlockDifference { index, kind, tensors }, factors })
}

/// Rows that two tensors have in common, where they can be compared: of equal shapes all. A table of tokens may have more rows than another.
fn comparable(role: &str, base: &TensorRef, tuned: &TensorRef) -> Option<usize> {
    let is_float = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
    let rows = |shape: &[u64]| if shape.len() == 2 { usize::try_from(shape[0]).ok() } else { Some(1) };
    if base.shape == tuned.shape {
        return rows(&tuned.shape);
    }
    let is_table = matches!(role, "token.weight" | "position.weight" | "output.weight");
    let fits = base.shape.len() == 2 && tuned.shape.len() == 2 && base.shape[1] == tuned.shape[1];
    (is_table && fits && is_float(base.dtype) && is_float(tuned.dtype))
        .then(|| rows(&base.shape).zip(rows(&tuned.shape)).map(|(a, b)| a.min(b)))?
}

impl TensorDifference {
    fn unrelated() -> Self {
        Self { kind: Kind::Unrelated, rank: None, relative_rms: None, equal_share: 0.0, proof: None }
    }
}

fn compare_tensor(base: &MappedTensor, tuned: &MappedTensor, rows: usize, rank_max: usize) -> (TensorDifference, Option<LowRank>) {
    let (base_view, tuned_view) = (base.view(), tuned.view());
    let apart = Apart::of(&base_view, &tuned_view, rows);
    let grown = base_view.rows != tuned_view.rows;
    let ratio = relative_rms(&apart);
    let found = if ratio < UNRELATED_MIN && rank_max > 0 && !grown { low_rank(&base_view, &tuned_view, rank_max) } else { None };
    base.release_pages();
    tuned.release_pages();
    let kind = match &found {
        Some(_) => Kind::LowRank,
        None if ratio < UNRELATED_MIN => Kind::Small,
        None => Kind::Unrelated,
    };
    let (rank, proof) = (found.as_ref().map(|found| found.rank), found.as_ref().map(|found| found.proof));
    (TensorDifference { kind, rank, relative_rms: Some(ratio), equal_share: apart.equal_share(), proof }, found)
}

/// Root mean square of the difference over that of the larger tensor; 0 where both are 0.
fn relative_rms(apart: &Apart) -> f64 {
    let larger = apart.a.max(apart.b);
    if larger > 0.0 { (apart.difference / larger).sqrt() } else { 0.0 }
}

/// What [`compare`] found, counted: of `zoo add`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kinship {
    /// The nearest model that the tenant may see, `tenant/name`.
    pub model: String,
    /// Its chain.
    pub chain: Digest,
    /// Models that it is the nearest of: those that the tenant may see.
    pub visible_count: usize,
    /// How far it is (`Sketch::distance`).
    pub distance: f32,
    /// Blocks of the same bytes.
    pub identical_count: usize,
    /// Blocks that differ by merged LoRA alone.
    pub low_rank_count: usize,
    /// Least and greatest rank of those.
    pub ranks: Option<(usize, usize)>,
    /// Blocks that differ a little.
    pub small_count: usize,
    /// Blocks that have nothing in common.
    pub unrelated_count: usize,
    /// Those that differ.
    pub blocks: Vec<BlockDifference>,
}

impl Kinship {
    /// Counts blocks.
    pub fn new((model, chain): (&ModelId, Digest), distance: f32, visible_count: usize, compared: &[Compared]) -> Self {
        let differences = || compared.iter().map(|compared| &compared.difference);
        let count = |kind: Kind| differences().filter(|block| block.kind == kind).count();
        let ranks: Vec<usize> = differences().flat_map(|block| block.tensors.values()).filter_map(|tensor| tensor.rank).collect();
        Self {
            model: model.to_string(),
            chain,
            visible_count,
            distance,
            identical_count: count(Kind::Identical),
            low_rank_count: count(Kind::LowRank),
            ranks: ranks.iter().min().copied().zip(ranks.iter().max().copied()),
            small_count: count(Kind::Small),
            unrelated_count: count(Kind::Unrelated),
            blocks: differences().filter(|block| block.kind != Kind::Identical).cloned().collect(),
        }
    }
}

impl std::fmt::Display for Kinship {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rank = match self.ranks {
            Some((least, most)) if least == most => format!(" (rank {most})"),
            Some((least, most)) => format!(" (rank {least} to {most})"),
            None => String::new(),
        };
        let Self { model, visible_count, identical_count, low_rank_count, small_count, unrelated_count, .. } = self;
        write!(
            f,
            "{model} (of {visible_count} that are visible): {identical_count} blocks identical, {low_rank_count} low-rank{rank}, {small_count} small, {unrelated_count} unrelated"
        )
    }
}
