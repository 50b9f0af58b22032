//! A fine-tune as its base and a compressed difference, so that it shares its base: each linear matrix becomes the base's plus what is left of the
//! difference in few bits ([`Method`]). It is an approximation; who stores one measures it first (`measures`). [`compress`] writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use ashlar_kernels::format::{Dtype, TensorView, dequantise, quantise};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use nalgebra::DMatrix;
use serde::Serialize;

use super::adapted::{AdaptError, Adapted, NewTensor, Related};
use super::low_rank::Seeded;
use super::truncated::{Factors, truncated};
use super::viewer::Viewer;
use crate::adapter::{ADAPTED_ROLES, RANK_MAX};
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::manifest::{Adapter, Block, BlockKind, Change, TensorRef};
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};
use crate::tensor::MappedTensor;
use crate::tensor_file;

/// Weights of a row that share a scale: the most that the numeric contract allows, 1.03 bits a weight. A scale for each row alone would save 0.02 of
/// them and has the greater error, as one for each group is the best for its own.
pub const ONE_BIT_GROUP: u16 = 512;

/// Blocks that are compressed at a time: each holds a few copies of a matrix in f32.
const BLOCKS_AT_ONCE: usize = 2;

/// How a difference is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Its largest singular values with their vectors, as factors in bf16: the nearest of all matrices of that rank.
    Svd {
        /// How many, at most as many as the matrix has.
        rank: usize,
    },
    /// A sign for each weight, and the mean size of 512 of them as their scale (BitDelta, arXiv 2402.10193, section 3.1, with more scales).
    BitDelta,
}

/// The text names no method.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither svd:R, R being a rank of 1 to {RANK_MAX}, nor bitdelta")]
pub struct UnknownMethod(String);

impl FromStr for Method {
    type Err = UnknownMethod;

    fn from_str(text: &str) -> Result<Self, UnknownMethod> {
        let rank = |rank: &str| rank.parse().ok().filter(|rank| (1..=RANK_MAX).contains(rank));
        match text.strip_prefix("svd:").map(rank) {
            Some(Some(rank)) => Ok(Self::Svd { rank: usize::try_from(rank).expect("at most 1024") }),
            None if text == "bitdelta" => Ok(Self::BitDelta),
            _ => Err(UnknownMethod(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Svd { rank } => write!(f, "svd:{rank}"),
            Self::BitDelta => f.write_str("bitdelta"),
        }
    }
}

/// Blocks that stay the model's own, exactly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// The table of tokens.
    pub embed: bool,
    /// The last norm and the output projection.
    pub head: bool,
}

impl Kept {
    fn keeps(self, block: &Block) -> bool {
        match block.params {
            BlockKind::Embed { .. } => self.embed,
            BlockKind::Head { .. } => self.head,
            BlockKind::Attention { .. } | BlockKind::FeedForward { .. } => false,
            // It is of two other models than its base's.
            BlockKind::Stitch { .. } => true,
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept: Vec<&str> =
            [(self.embed, "embed"), (self.head, "head")].into_iter().filter_map(|(is, name)| is.then_some(name)).collect();
        f.write_str(&kept.join(","))
    }
}

/// A matrix whose difference was compressed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompressedMatrix {
    /// Place of its block in the chain.
    pub index: usize,
    /// Its role.
    pub role: String,
    /// Root mean square of the difference over that of the base's matrix.
    pub relative_rms: f64,
    /// Root mean square of what the compressed difference is off, over that of the difference: 0 is exact, 1 as good as nothing.
    pub lost: f64,
}

/// A fine-tune as base and compressed differences.
#[derive(Debug, Clone)]
pub struct Compressed {
    /// With the base's tensors wherever shapes agree.
    pub adapted: Adapted,
    /// How.
    pub method: Method,
    /// Which blocks were to stay the model's own.
    pub kept: Kept,
    /// Matrices that have a compressed difference.
    pub matrices: Vec<CompressedMatrix>,
    /// Tensors that differ and are the base's now, as no adapter changes such: block index and role.
    pub given_up: Vec<(usize, String)>,
    /// Tensors that stay the model's own.
    pub own: Vec<(usize, String)>,
}

/// Makes base and compressed differences of `model`. The base is sought among what `viewer` may see unless it is given. Norms, biases, embedding and
/// head become the base's, unless they are `kept` or the base has none of their shape.
///
/// # Errors
/// Why that cannot be, or how the store failed.
pub async fn compress(
    zoo: &Zoo,
    viewer: (&str, &Viewer),
    model: &ModelId,
    base: Option<&ModelId>,
    (method, kept): (Method, Kept),
) -> Result<Compressed, AdaptError> {
    let related = Related::read(zoo, viewer, model, base).await?;
    let pairs = related.base.blocks.iter().zip(&related.tuned.blocks).enumerate();
    let blocks = stream::iter(pairs).map(|(index, (base, tuned))| compress_block(zoo, index, base, tuned, (method, kept)));
    let parts: Vec<Part> = blocks.buffered(BLOCKS_AT_ONCE).try_collect().await?;
    let (mut blocks, mut adapters, mut new) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let (mut matrices, mut given_up, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for (index, part) in parts.into_iter().enumerate() {
        blocks.push(part.block);
        if !part.changes.is_empty() {
            adapters.insert(index, Adapter { changes: part.changes });
        }
        new.extend(part.new);
        matrices.extend(part.matrices);
        given_up.extend(part.given_up.into_iter().map(|role| (index, role)));
        own.extend(part.own.into_iter().map(|role| (index, role)));
    }
    if adapters.is_empty() {
        return Err(AdaptError::Same { model: model.clone(), base: related.base.id });
    }
    Ok(Compressed { adapted: Adapted::new(&related, blocks, adapters, new), method, kept, matrices, given_up, own })
}

/// What becomes of one block.
struct Part {
    block: Block,
    changes: BTreeMap<String, Change>,
    new: BTreeMap<Digest, NewTensor>,
    matrices: Vec<CompressedMatrix>,
    given_up: BTreeSet<String>,
    own: BTreeSet<String>,
}

async fn compress_block(zoo: &Zoo, index: usize, base: &Block, tuned: &Block, (method, kept): (Method, Kept)) -> Result<Part, StoreError> {
    let mut part = Part {
        block: tuned.clone(),
        changes: BTreeMap::new(),
        new: BTreeMap::new(),
        matrices: Vec::new(),
        given_up: BTreeSet::new(),
        own: BTreeSet::new(),
    };
    for (role, tensor) in &tuned.tensors {
        let of_base = base.tensors.get(role).filter(|of_base| of_base.shape == tensor.shape && !kept.keeps(tuned));
        let Some(of_base) = of_base else {
            if base.tensors.get(role).is_none_or(|of_base| of_base.digest != tensor.digest) {
                part.own.insert(role.clone());
            }
            continue;
        };
        if of_base.digest == tensor.digest {
            continue;
        }
        part.block.tensors.insert(role.clone(), of_base.clone());
        if !ADAPTED_ROLES.contains(&role.as_str()) {
            part.given_up.insert(role.clone());
            continue;
        }
        let (base, tuned) = (zoo.map_tensor(of_base).await?, zoo.map_tensor(tensor).await?);
        let shape = tensor.shape.clone();
        // Of other formats they may have the same values all the same.
        let Some(found) = blocking(move || compress_matrix(&base, &tuned, &shape, method)).await else { continue };
        part.matrices.push(CompressedMatrix { index, role: role.clone(), relative_rms: found.relative_rms, lost: found.lost });
        part.new.extend(found.tensors.into_iter().map(|tensor| (tensor.0.digest, tensor)));
        part.changes.insert(role.clone(), found.change);
    }
    Ok(part)
}

struct CompressedChange {
    change: Change,
    tensors: Vec<NewTensor>,
    relative_rms: f64,
    lost: f64,
}

fn compress_matrix(base: &MappedTensor, tuned: &MappedTensor, shape: &[u64], method: Method) -> Option<CompressedChange> {
    let (rows, cols) = (tuned.rows(), tuned.cols());
    let of_base = dequantise(&base.view());
    let difference: Vec<f32> = dequantise(&tuned.view()).iter().zip(&of_base).map(|(tuned, base)| tuned - base).collect();
    base.release_pages();
    tuned.release_pages();
    let whole = squares(&difference);
    if whole == 0.0 {
        return None;
    }
    let (change, tensors, made) = match method {
        Method::Svd { rank } => svd(rows, cols, &difference, shape, rank),
        Method::BitDelta => one_bit(rows, cols, &difference, shape),
    };
    let off: f64 = difference.iter().zip(&made).map(|(d, made)| f64::from(d - made).powi(2)).sum();
    let relative_rms = (whole / squares(&of_base).max(f64::MIN_POSITIVE)).sqrt();
    Some(CompressedChange { change, tensors, relative_rms, lost: (off / whole).sqrt() })
}

/// The change, its tensors, and the difference that they are.
type Made = (Change, Vec<NewTensor>, Vec<f32>);

fn svd(rows: usize, cols: usize, difference: &[f32], shape: &[u64], rank: usize) -> Made {
    let Factors { rank, a, b } = truncated(&DMatrix::from_row_slice(rows, cols, difference), rank);
    let (a, b) = (tensor(Dtype::Bf16, vec![rank as u64, shape[1]], &a), tensor(Dtype::Bf16, vec![shape[0], rank as u64], &b));
    let matrix = |(tensor, payload): &NewTensor, rows, cols| DMatrix::from_row_slice(rows, cols, &values(tensor, payload, rows, cols));
    let product = matrix(&b, rows, rank) * matrix(&a, rank, cols);
    // Row by row is column by column of the transpose.
    let made = product.transpose().as_slice().to_vec();
    (Change::LowRank { scale: 1.0, a: a.0.clone(), b: b.0.clone() }, vec![a, b], made)
}

fn one_bit(rows: usize, cols: usize, difference: &[f32], shape: &[u64]) -> Made {
    // Weights that did not change have no sign, and are many where a short training ends in few bits. All of one sign would add up, so they get
    // signs by chance; their size stays nothing in the mean.
    let mut rng = Seeded(0x0B17 ^ ((rows as u64) << 32) ^ cols as u64);
    let mut signed = |d: &f32| match *d == 0.0 {
        true if rng.next() >> 63 == 0 => f32::MIN_POSITIVE,
        true => -f32::MIN_POSITIVE,
        false => *d,
    };
    let difference: Vec<f32> = difference.iter().map(&mut signed).collect();
    let signs = tensor(Dtype::Int1 { group: ONE_BIT_GROUP }, shape.to_vec(), &difference);
    let made = values(&signs.0, &signs.1, rows, cols);
    (Change::OneBit { signs: signs.0.clone() }, vec![signs], made)
}

fn tensor(dtype: Dtype, shape: Vec<u64>, values: &[f32]) -> NewTensor {
    let [rows, cols] = [0, 1].map(|at| usize::try_from(shape[at]).expect("a matrix in memory"));
    let payload = quantise(dtype, rows, cols, values).expect("a format that is written");
    (TensorRef { digest: tensor_file::digest(dtype, &shape, &payload), dtype, shape }, Bytes::from(payload))
}

fn values(tensor: &TensorRef, payload: &[u8], rows: usize, cols: usize) -> Vec<f32> {
    dequantise(&TensorView { dtype: tensor.dtype, rows, cols, bytes: payload })
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum()
}

#[cfg(test)]
mod tests;
