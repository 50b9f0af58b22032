//! What an adapter may be, alone and over a block: the paragraph "Adapters" of docs/block-format.md as code. Every adapter
//! that is read is checked; whoever puts one over a block asks [`Adapter::check_against`] as well. It does no IO.

use ashlar_kernels::format::Dtype;

use crate::manifest::{Adapter, Block, Change, TensorRef};
use crate::roles::{DIMENSION_MAX, RoleShape, roles};
use crate::tensor_file;

/// Largest rank that is believed. PEFT's are 4 to 256 and vLLM serves at most 512; at twice that an adapter weighs as much as the
/// matrices of a 2048-wide model, so that a full fine-tune is the better form. It bounds what an executor keeps for each row.
pub const RANK_MAX: u64 = 1024;

/// Largest magnitude of a scale that is believed. PEFT's are alpha / rank, mostly 1 or 2; beyond this a model says nothing but infinities, which
/// would show at each request and not when the adapter is added.
pub const SCALE_MAX: f32 = 65_536.0;

/// Matrices that an adapter can change: the linear ones of attention and feed-forward blocks.
pub const ADAPTED_ROLES: [&str; 7] = ["q.weight", "k.weight", "v.weight", "o.weight", "gate.weight", "up.weight", "down.weight"];

/// What is wrong with an adapter.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum AdapterError {
    /// It changes nothing, so it should not be there.
    #[error("it changes nothing")]
    Empty,
    /// A role that no adapter can change.
    #[error("`{0}` is no matrix that an adapter can change")]
    Role(String),
    /// A scale that makes everything infinite.
    #[error("`{role}` has the scale {scale:e}, which is not within {SCALE_MAX}")]
    Scale {
        /// Role.
        role: String,
        /// The scale.
        scale: f32,
    },
    /// Factors that are no `[rank, K]` and `[N, rank]`.
    #[error("`{role}` has factors of shapes {a:?} and {b:?}, not [rank, K] and [N, rank]")]
    Factors {
        /// Role.
        role: String,
        /// Shape of a.
        a: Vec<u64>,
        /// Shape of b.
        b: Vec<u64>,
    },
    /// More rank than is believed.
    #[error("`{role}` has rank {rank}, more than {RANK_MAX}")]
    Rank {
        /// Role.
        role: String,
        /// Its rank.
        rank: u64,
    },
    /// Factors of a format that is for weights alone.
    #[error("`{role}` has a factor of type {dtype}, not f32, f16 or bf16")]
    Dtype {
        /// Role.
        role: String,
        /// The format.
        dtype: Dtype,
    },
    /// A one-bit delta that is no matrix of such a format.
    #[error("`{role}` has signs of type {dtype} and shape {shape:?}, not int1 and [N, K]")]
    Signs {
        /// Role.
        role: String,
        /// The format.
        dtype: Dtype,
        /// The shape.
        shape: Vec<u64>,
    },
    /// A matrix that the block does not have.
    #[error("`{0}` is no matrix of this block")]
    Absent(String),
    /// A matrix of another shape.
    #[error("`{role}` changes a matrix of shape {actual:?}, the block's is {expected:?}")]
    Shape {
        /// Role.
        role: String,
        /// `[N, K]` of the change.
        actual: [u64; 2],
        /// Shape in the block.
        expected: RoleShape,
    },
}

impl Change {
    /// The tensors of it, by the name that the descriptor gives them.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &TensorRef)> {
        let (first, second) = match self {
            Self::LowRank { a, b, .. } => (("a", a), Some(("b", b))),
            Self::OneBit { signs } => (("signs", signs), None),
        };
        std::iter::once(first).chain(second)
    }
}

impl Adapter {
    /// The tensors of all changes, each with its place (`q.weight.a`).
    pub fn tensors(&self) -> impl Iterator<Item = (String, &TensorRef)> {
        self.changes.iter().flat_map(|(role, change)| change.tensors().map(move |(factor, tensor)| (format!("{role}.{factor}"), tensor)))
    }

    /// Checks roles, scales, shapes and formats, as far as they can be without the block.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), AdapterError> {
        if self.changes.is_empty() {
            return Err(AdapterError::Empty);
        }
        self.changes.iter().try_for_each(|(role, change)| check_change(role, change))
    }

    /// Checks that the block has the matrices that this changes, in these shapes. Call [`Adapter::check`] first.
    ///
    /// # Errors
    /// The first matrix that is not there or is another.
    pub fn check_against(&self, block: &Block) -> Result<(), AdapterError> {
        let roles = roles(block.width, &block.params);
        for (role, change) in &self.changes {
            let shape = roles.iter().find(|known| known.name == role && block.tensors.contains_key(role)).map(|known| known.shape);
            let Some(expected) = shape else { return Err(AdapterError::Absent(role.clone())) };
            let actual = dimensions(role, change)?;
            if !expected.fits(&actual) {
                return Err(AdapterError::Shape { role: role.clone(), actual, expected });
            }
        }
        Ok(())
    }
}

/// Whether the scale of a low-rank change is one.
pub(crate) fn is_believed(scale: f32) -> bool {
    scale.abs() <= SCALE_MAX
}

fn check_change(role: &str, change: &Change) -> Result<(), AdapterError> {
    if !ADAPTED_ROLES.contains(&role) {
        return Err(AdapterError::Role(role.to_owned()));
    }
    if let Change::LowRank { scale, .. } = change
        && !is_believed(*scale)
    {
        return Err(AdapterError::Scale { role: role.to_owned(), scale: *scale });
    }
    dimensions(role, change)?;
    let Change::LowRank { a, b, .. } = change else { return Ok(()) };
    if a.shape[0] > RANK_MAX {
        return Err(AdapterError::Rank { role: role.to_owned(), rank: a.shape[0] });
    }
    match [a, b].into_iter().find(|tensor| !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16)) {
        Some(tensor) => Err(AdapterError::Dtype { role: role.to_owned(), dtype: tensor.dtype }),
        None => Ok(()),
    }
}

/// N and K. One-bit deltas are of their format after this.
fn dimensions(role: &str, change: &Change) -> Result<[u64; 2], AdapterError> {
    let fit = |dims: &[u64]| dims.iter().all(|dim| (1..=bound()).contains(dim));
    match change {
        Change::LowRank { a, b, .. } => match (a.shape.as_slice(), b.shape.as_slice()) {
            ([rank, cols], [rows, b_rank]) if rank == b_rank && fit(&[*rank, *cols, *rows]) => Ok([*rows, *cols]),
            _ => Err(AdapterError::Factors { role: role.to_owned(), a: a.shape.clone(), b: b.shape.clone() }),
        },
        Change::OneBit { signs: TensorRef { dtype, shape, .. } } => match (shape.as_slice(), tensor_file::payload_bytes(*dtype, shape)) {
            ([rows, cols], Some(_)) if matches!(dtype, Dtype::Int1 { .. }) && fit(shape) => Ok([*rows, *cols]),
            _ => Err(AdapterError::Signs { role: role.to_owned(), dtype: *dtype, shape: shape.clone() }),
        },
    }
}

/// Heads times their size is the largest dimension of a matrix.
fn bound() -> u64 {
    u64::from(DIMENSION_MAX) * u64::from(DIMENSION_MAX)
}

#[cfg(test)]
mod tests;
