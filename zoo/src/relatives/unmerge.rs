//! A merged LoRA as base and adapter again, so that it shares its base. [`propose`] writes nothing: what it finds can be loaded and
//! measured. [`Adapted::store`] then stores it under a name.

use std::collections::BTreeMap;

use ashlar_kernels::format::Dtype;
use bytes::Bytes;

use super::adapted::{AdaptError, Adapted, NewTensor, Related};
use super::difference::{BlockDifference, Compared, compare};
use super::low_rank::{LowRank, Proof};
use super::viewer::Viewer;
use crate::manifest::{Adapter, Change, TensorRef};
use crate::model_id::ModelId;
use crate::store::Zoo;
use crate::tensor_file;

/// Blocks that are compared at a time: each holds a few copies of a matrix in f32.
const BLOCKS_AT_ONCE: usize = 2;

/// A merged model as base and adapters.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// With the base's tensors where the model has these or those and a low-rank difference, and the model's own elsewhere.
    pub adapted: Adapted,
    /// How the model's blocks differ from the base's.
    pub differences: Vec<BlockDifference>,
    /// Elements of all unmerged matrices, after rounding.
    pub proof: Proof,
    /// Matrices that were unmerged.
    pub matrix_count: usize,
}

/// Finds what of `model` is a base's and a difference of rank at most `rank_max`. The base is sought among what `viewer` may see unless it is given.
///
/// # Errors
/// Why there is nothing to propose, or how the store failed.
pub async fn propose(
    zoo: &Zoo,
    viewer: (&str, &Viewer),
    model: &ModelId,
    base: Option<&ModelId>,
    rank_max: usize,
) -> Result<Proposal, AdaptError> {
    let related = Related::read(zoo, viewer, model, base).await?;
    let (base, tuned) = (&related.base, &related.tuned);
    let compared = compare(zoo, &base.blocks, &tuned.blocks, rank_max, BLOCKS_AT_ONCE).await?;
    if compared.iter().all(|block| block.factors.is_empty()) {
        return Err(AdaptError::NotMerged { model: model.clone(), base: base.id.clone(), rank_max });
    }
    Ok(Proposal::new(&related, compared))
}

impl Proposal {
    fn new(related: &Related, compared: Vec<Compared>) -> Self {
        let (base, mut blocks) = (&related.base, related.tuned.blocks.clone());
        let (mut adapters, mut factors): (_, BTreeMap<_, NewTensor>) = (BTreeMap::new(), BTreeMap::new());
        let (mut differences, mut proof, mut matrix_count) = (Vec::new(), Proof::default(), 0);
        for (index, Compared { difference, factors: found }) in compared.into_iter().enumerate() {
            let mut changes = BTreeMap::new();
            for (role, found) in found {
                blocks[index].tensors.insert(role.clone(), base.blocks[index].tensors[&role].clone());
                proof = proof.plus(found.proof);
                matrix_count += 1;
                let [a, b] = tensors(&found, &base.blocks[index].tensors[&role].shape);
                changes.insert(role, Change::LowRank { scale: 1.0, a: a.0.clone(), b: b.0.clone() });
                factors.extend([a, b].map(|(tensor, payload)| (tensor.digest, (tensor, payload))));
            }
            if !changes.is_empty() {
                adapters.insert(index, Adapter { changes });
            }
            differences.push(difference);
        }
        Self { adapted: Adapted::new(related, blocks, adapters, factors), differences, proof, matrix_count }
    }

    /// Ranks of the unmerged matrices, by block index and role.
    pub fn ranks(&self) -> BTreeMap<(usize, &str), usize> {
        let of = |block: &'_ BlockDifference| block.index;
        let tensors =
            self.differences.iter().flat_map(|block| block.tensors.iter().map(move |(role, tensor)| ((of(block), role.as_str()), tensor)));
        tensors.filter_map(|(place, tensor)| Some((place, tensor.rank?))).collect()
    }
}

/// Both factors as f32 tensors: f32 keeps the proof, and they are small.
fn tensors(found: &LowRank, shape: &[u64]) -> [NewTensor; 2] {
    let tensor = |shape: Vec<u64>, values: &[f32]| {
        let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let digest = tensor_file::digest(Dtype::F32, &shape, &payload);
        (TensorRef { digest, dtype: Dtype::F32, shape }, Bytes::from(payload))
    };
    let rank = found.rank as u64;
    [tensor(vec![rank, shape[1]], &found.a), tensor(vec![shape[0], rank], &found.b)]
}
