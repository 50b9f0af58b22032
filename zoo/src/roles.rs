//! Which tensors a block of given hyper-parameters holds, by role and shape: the table of docs/block-format.md as code.
//! Ingest plans with it and every block that is read is checked against it.

use ashlar_kernels::format::Dtype;

use crate::manifest::{Block, BlockKind, Chain, Norm, Rope, RopeScaling};
use crate::tensor_file;

/// Largest width, head count, head size or inner width that is believed: it bounds what a lying manifest can ask for.
pub const DIMENSION_MAX: u32 = 1 << 20;
/// Most blocks of one chain.
pub const CHAIN_BLOCKS_MAX: usize = 4096;

/// The shape that a role must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleShape {
    /// `[K]`.
    Vector(u64),
    /// `[N, K]`.
    Matrix(u64, u64),
    /// `[any, K]`: tables whose rows are the vocabulary or positions.
    Rows(u64),
}

impl RoleShape {
    /// Whether `shape` is it.
    pub fn fits(self, shape: &[u64]) -> bool {
        match (self, shape) {
            (Self::Vector(k), [cols]) => *cols == k,
            (Self::Matrix(n, k), [rows, cols]) => *rows == n && *cols == k,
            (Self::Rows(k), [rows, cols]) => *rows > 0 && *cols == k,
            _ => false,
        }
    }
}

/// A role of a block kind.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    /// Name, as in the block's `tensors`.
    pub name: &'static str,
    /// Shape that a tensor in this role has.
    pub shape: RoleShape,
    /// Whether the block is incomplete without it.
    pub required: bool,
}

/// What is wrong with a block or chain that was read (or is about to be written).
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ManifestError {
    /// A hyper-parameter out of range.
    #[error("`{0}` is out of range")]
    Range(&'static str),
    /// A role that must be there and is not.
    #[error("tensor `{0}` is missing")]
    Missing(&'static str),
    /// A role that the kind does not have.
    #[error("tensor `{0}` does not belong to this kind of block")]
    Unexpected(String),
    /// A shape that the hyper-parameters do not imply.
    #[error("tensor `{role}` has shape {actual:?}, expected {expected:?}")]
    Shape {
        /// Role.
        role: String,
        /// Shape in the manifest.
        actual: Vec<u64>,
        /// Shape that follows from the hyper-parameters.
        expected: RoleShape,
    },
    /// A dtype that cannot have this shape (columns that do not fit its blocks).
    #[error("tensor `{role}` cannot be {dtype} with shape {shape:?}")]
    Dtype {
        /// Role.
        role: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Too few blocks for embed, a layer and head, or more than are believed.
    #[error("a chain of {0} blocks is not embed, (attention, feed_forward) pairs, head, of at most {CHAIN_BLOCKS_MAX} blocks")]
    ChainLength(usize),
    /// Blocks that are not embed, attention and feed-forward by turns with stitches between layers, and head.
    #[error("block {index} is of kind {kind}, which cannot {place}")]
    Order {
        /// Its place in the chain.
        index: usize,
        /// Its kind.
        kind: &'static str,
        /// Where it would stand.
        place: String,
    },
    /// A block that takes rows of another width than those that the one before it gives.
    #[error("block {index} ({kind}) takes rows of width {width}, and block {} gives rows of width {given}", .index - 1)]
    Width {
        /// Its place in the chain.
        index: usize,
        /// Its kind.
        kind: &'static str,
        /// What it takes.
        width: u32,
        /// What it is given.
        given: u32,
    },
    /// Adapters that are not ascending by block, or two on one block.
    #[error("adapters are not ascending by block, one for each: block {0} comes too late")]
    AdapterOrder(u32),
    /// Format version of a chain.
    #[error("format {0} is not known to this build")]
    Format(u32),
}

/// All roles of a block with these hyper-parameters, in the order of docs/block-format.md.
pub fn roles(width: u32, params: &BlockKind) -> Vec<Role> {
    let width = u64::from(width);
    let mut list = RoleList(Vec::new());
    match params {
        BlockKind::Embed { .. } => {
            list.must("token.weight", RoleShape::Rows(width));
            list.may("position.weight", RoleShape::Rows(width));
        }
        BlockKind::Attention { norm, heads, kv_heads, head_dim, qk_norm, post_norm, .. } => {
            let (q, kv, head) =
                (u64::from(*heads) * u64::from(*head_dim), u64::from(*kv_heads) * u64::from(*head_dim), u64::from(*head_dim));
            list.norm(norm, width);
            list.must("q.weight", RoleShape::Matrix(q, width));
            list.must("k.weight", RoleShape::Matrix(kv, width));
            list.must("v.weight", RoleShape::Matrix(kv, width));
            list.must("o.weight", RoleShape::Matrix(width, q));
            list.may("q.bias", RoleShape::Vector(q));
            list.may("k.bias", RoleShape::Vector(kv));
            list.may("v.bias", RoleShape::Vector(kv));
            list.may("o.bias", RoleShape::Vector(width));
            if qk_norm.is_some() {
                list.must("q_norm.weight", RoleShape::Vector(head));
                list.must("k_norm.weight", RoleShape::Vector(head));
            }
            list.post_norm(post_norm.as_ref(), width);
        }
        BlockKind::FeedForward { norm, inner, gated, post_norm, .. } => {
            let inner = u64::from(*inner);
            list.norm(norm, width);
            if *gated {
                list.must("gate.weight", RoleShape::Matrix(inner, width));
                list.may("gate.bias", RoleShape::Vector(inner));
            }
            list.must("up.weight", RoleShape::Matrix(inner, width));
            list.must("down.weight", RoleShape::Matrix(width, inner));
            list.may("up.bias", RoleShape::Vector(inner));
            list.may("down.bias", RoleShape::Vector(width));
            list.post_norm(post_norm.as_ref(), width);
        }
        BlockKind::Head { norm, .. } => {
            list.norm(norm, width);
            list.must("output.weight", RoleShape::Rows(width));
        }
        BlockKind::Stitch { to } => {
            let to = u64::from(*to);
            list.must("map.weight", RoleShape::Matrix(to, width));
            list.may("map.bias", RoleShape::Vector(to));
            list.may("map.position", RoleShape::Vector(to));
        }
    }
    list.0
}

impl Block {
    /// Checks hyper-parameters, roles and shapes against each other.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self) -> Result<(), ManifestError> {
        check_params(self.width, &self.params)?;
        let roles = roles(self.width, &self.params);
        for role in &roles {
            let Some(tensor) = self.tensors.get(role.name) else {
                if role.required {
                    return Err(ManifestError::Missing(role.name));
                }
                continue;
            };
            if !role.shape.fits(&tensor.shape) {
                return Err(ManifestError::Shape { role: role.name.to_owned(), actual: tensor.shape.clone(), expected: role.shape });
            }
            if tensor_file::payload_bytes(tensor.dtype, &tensor.shape).is_none() {
                return Err(ManifestError::Dtype { role: role.name.to_owned(), dtype: tensor.dtype, shape: tensor.shape.clone() });
            }
        }
        match self.tensors.keys().find(|name| !roles.iter().any(|role| role.name == name.as_str())) {
            Some(name) => Err(ManifestError::Unexpected(name.clone())),
            None => Ok(()),
        }
    }
}

impl Chain {
    /// Checks format and structure (not the blocks themselves, which are objects of their own: `joint::check`).
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.format != 1 {
            return Err(ManifestError::Format(self.format));
        }
        range("width", self.width)?;
        if self.vocab == 0 {
            return Err(ManifestError::Range("vocab"));
        }
        if self.context_tokens == 0 {
            return Err(ManifestError::Range("context_tokens"));
        }
        let count = self.blocks.len();
        if !(4..=CHAIN_BLOCKS_MAX).contains(&count) {
            return Err(ManifestError::ChainLength(count));
        }
        let defaults = [self.defaults.temperature, self.defaults.top_p, self.defaults.repetition_penalty];
        if defaults.into_iter().flatten().any(|value| !value.is_finite()) {
            return Err(ManifestError::Range("defaults"));
        }
        if self.adapters.iter().any(|adapter| adapter.block_index as usize >= count) {
            return Err(ManifestError::Range("adapters.block_index"));
        }
        match self.adapters.windows(2).find(|pair| pair[0].block_index >= pair[1].block_index) {
            Some(pair) => Err(ManifestError::AdapterOrder(pair[1].block_index)),
            None => Ok(()),
        }
    }
}

fn check_params(width: u32, params: &BlockKind) -> Result<(), ManifestError> {
    range("width", width)?;
    match params {
        BlockKind::Embed { scale } => positive("scale", f64::from(*scale)),
        BlockKind::Attention { norm, heads, kv_heads, head_dim, scale, rope, window, softcap, qk_norm, post_norm } => {
            range("heads", *heads)?;
            range("kv_heads", *kv_heads)?;
            range("head_dim", *head_dim)?;
            if !heads.is_multiple_of(*kv_heads) {
                return Err(ManifestError::Range("kv_heads"));
            }
            if window.is_some_and(|window| window == 0) {
                return Err(ManifestError::Range("window"));
            }
            positive("scale", f64::from(*scale))?;
            softcap.map_or(Ok(()), |cap| positive("softcap", f64::from(cap)))?;
            [Some(norm), qk_norm.as_ref(), post_norm.as_ref()].into_iter().flatten().try_for_each(check_norm)?;
            rope.as_ref().map_or(Ok(()), |rope| check_rope(rope, *head_dim))
        }
        BlockKind::FeedForward { norm, inner, post_norm, .. } => {
            range("inner", *inner)?;
            [Some(norm), post_norm.as_ref()].into_iter().flatten().try_for_each(check_norm)
        }
        BlockKind::Head { norm, softcap, scale } => {
            check_norm(norm)?;
            positive("scale", f64::from(*scale))?;
            softcap.map_or(Ok(()), |cap| positive("softcap", f64::from(cap)))
        }
        BlockKind::Stitch { to } => range("to", *to),
    }
}

fn check_rope(rope: &Rope, head_dim: u32) -> Result<(), ManifestError> {
    // Bounds that keep angles finite in f32 at any position.
    within("rope.theta", rope.theta, 1.0..=1e15)?;
    if rope.dim == 0 || rope.dim > head_dim || !rope.dim.is_multiple_of(2) {
        return Err(ManifestError::Range("rope.dim"));
    }
    match &rope.scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => within("rope.factor", *factor, 1e-3..=1e6),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            within("rope.factor", *factor, 1e-3..=1e6)?;
            positive("rope.low_freq_factor", *low_freq_factor)?;
            positive("rope.high_freq_factor", *high_freq_factor - *low_freq_factor)?;
            if *original_context == 0 { Err(ManifestError::Range("rope.original_context")) } else { Ok(()) }
        }
        RopeScaling::Factors { factors, attention_factor } => {
            within("rope.attention_factor", *attention_factor, 1e-3..=1e3)?;
            if factors.len() != rope.dim as usize / 2 {
                return Err(ManifestError::Range("rope.factors"));
            }
            factors.iter().try_for_each(|factor| within("rope.factors", *factor, 1e-3..=1e6))
        }
    }
}

fn check_norm(norm: &Norm) -> Result<(), ManifestError> {
    let (Norm::Rms { eps, .. } | Norm::Layer { eps }) = norm;
    if eps.is_finite() && *eps >= 0.0 { Ok(()) } else { Err(ManifestError::Range("norm.eps")) }
}

fn range(name: &'static str, value: u32) -> Result<(), ManifestError> {
    if (1..=DIMENSION_MAX).contains(&value) { Ok(()) } else { Err(ManifestError::Range(name)) }
}

fn within(name: &'static str, value: f64, bounds: std::ops::RangeInclusive<f64>) -> Result<(), ManifestError> {
    if bounds.contains(&value) { Ok(()) } else { Err(ManifestError::Range(name)) }
}

fn positive(name: &'static str, value: f64) -> Result<(), ManifestError> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(ManifestError::Range(name)) }
}

struct RoleList(Vec<Role>);

impl RoleList {
    fn must(&mut self, name: &'static str, shape: RoleShape) {
        self.0.push(Role { name, shape, required: true });
    }

    fn may(&mut self, name: &'static str, shape: RoleShape) {
        self.0.push(Role { name, shape, required: false });
    }

    fn norm(&mut self, norm: &Norm, width: u64) {
        self.must("norm.weight", RoleShape::Vector(width));
        if matches!(norm, Norm::Layer { .. }) {
            self.may("norm.bias", RoleShape::Vector(width));
        }
    }

    fn post_norm(&mut self, norm: Option<&Norm>, width: u64) {
        if norm.is_some() {
            self.must("post_norm.weight", RoleShape::Vector(width));
        }
    }
}
