//! The adapter of one block on the device: for each of the block's two projections what is added to it, packed so that the rows of a batch may each
//! have another adapter, or none. Made from a descriptor and its factors, read by `forward`. It does not know which rows have which.

use ashlar_kernels::format::{Dtype, TensorView, dequantise, quantise};
use ashlar_kernels::ops::{DiagonalPart, Ops};
use ashlar_zoo::manifest::{Adapter, Block, Change};
use ashlar_zoo::roles::{RoleShape, roles};

use super::load::{LoadError, take};
use super::source::{TensorBytes, TensorSource};

/// An adapter whose factors are on device `B`.
pub struct LoadedAdapter<B: Ops> {
    bytes: usize,
    /// Onto q, k and v, or onto gate and up.
    first: Option<LowRank<B>>,
    /// Onto o, or onto down.
    second: Option<LowRank<B>>,
}

/// What an adapter adds to one projection: `y += (x A^T) (s B)^T`.
pub(super) struct LowRank<B: Ops> {
    /// The A of the matrices that lie in a row of y, stacked: `[R, K]`, R being the sum of their ranks.
    pub(super) shrink: B::Linear,
    /// Each one's B times its scale, where its outputs lie: a diagonal, `[N, R]`.
    pub(super) expand: B::Linear,
    pub(super) rank: usize,
    pub(super) outputs: usize,
}

/// The projections of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Projection {
    /// Of the normed rows: q, k and v, or gate and up.
    First,
    /// Back to the width of the model: o, or down.
    Second,
}

impl<B: Ops> LoadedAdapter<B> {
    /// Loads an adapter of `block`: checks that it fits, takes its factors from `source` and packs them. Blocking, and short.
    ///
    /// # Errors
    /// The first thing that does not fit, by its role; nothing stays on the device then.
    pub fn load(ops: &B, block: &Block, adapter: &Adapter, source: &dyn TensorSource) -> Result<Self, LoadError> {
        adapter.check()?;
        adapter.check_against(block)?;
        let matrices: Vec<(&'static str, usize)> = roles(block.width, &block.params)
            .into_iter()
            .filter_map(|role| match role.shape {
                RoleShape::Matrix(outputs, _) => Some((role.name, outputs as usize)),
                RoleShape::Vector(_) | RoleShape::Rows(_) => None,
            })
            .collect();
        let (second, first) = matrices.split_last().expect("the check found a block that has matrices");
        let mut loader = Loader { ops, adapter, source, bytes: 0 };
        let (first, second) = (loader.low_rank(first)?, loader.low_rank(std::slice::from_ref(second))?);
        Ok(Self { bytes: loader.bytes, first, second })
    }

    /// Bytes of its factors on the device.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn low_rank(&self, projection: Projection) -> Option<&LowRank<B>> {
        match projection {
            Projection::First => self.first.as_ref(),
            Projection::Second => self.second.as_ref(),
        }
    }
}

impl<B: Ops> std::fmt::Debug for LoadedAdapter<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rank = |low: &Option<LowRank<B>>| low.as_ref().map(|low| low.rank);
        f.debug_struct("LoadedAdapter").field("ranks", &[rank(&self.first), rank(&self.second)]).field("bytes", &self.bytes).finish()
    }
}

struct Loader<'a, B: Ops> {
    ops: &'a B,
    adapter: &'a Adapter,
    source: &'a dyn TensorSource,
    bytes: usize,
}

impl<B: Ops> Loader<'_, B> {
    /// What is added to a row in which these matrices lie one after another; None if nothing is.
    fn low_rank(&mut self, matrices: &[(&'static str, usize)]) -> Result<Option<LowRank<B>>, LoadError> {
        let (mut shrinks, mut expands) = (Vec::new(), Vec::new());
        let (mut first_output, mut rank, mut first_role) = (0, 0, None);
        for (role, outputs) in matrices {
            if let Some(Change::LowRank { scale, a, b }) = self.adapter.changes.get(*role) {
                let (a, b) = (take(self.source, &format!("{role}.a"), a)?, take(self.source, &format!("{role}.b"), b)?);
                rank += a.rows;
                expands.push((first_output, Scaled::new(&b, *scale)));
                shrinks.push(a);
                first_role = first_role.or(Some(*role));
            }
            first_output += outputs;
        }
        let Some(role) = first_role else { return Ok(None) };
        let pack = |source| LoadError::Pack { role, source };
        // Of one dtype they share panels.
        let (dtype, cols) = (shrinks[0].dtype, shrinks[0].cols);
        let stacked =
            shrinks.iter().all(|a| a.dtype == dtype).then(|| shrinks.iter().flat_map(|a| a.view().bytes).copied().collect::<Vec<u8>>());
        let views: Vec<TensorView<'_>> = match &stacked {
            Some(bytes) => vec![TensorView { dtype, rows: rank, cols, bytes }],
            None => shrinks.iter().map(TensorBytes::view).collect(),
        };
        let shrink = self.ops.linear(&views).map_err(pack)?;
        let diagonal: Vec<DiagonalPart<'_>> =
            expands.iter().map(|(first_output, b)| DiagonalPart { weights: b.view(), first_output: *first_output }).collect();
        let expand = self.ops.linear_diagonal(&diagonal).map_err(pack)?;
        self.bytes += self.ops.linear_bytes(&shrink) + self.ops.linear_bytes(&expand);
        Ok(Some(LowRank { shrink, expand, rank, outputs: first_output }))
    }
}

/// An expand times its scale.
struct Scaled {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Scaled {
    /// In the dtype of `b` where that loses nothing, as with a scale that is a power of two; else in f32.
    fn new(b: &TensorBytes, scale: f32) -> Self {
        let (rows, cols) = (b.rows, b.cols);
        let values: Vec<f32> = dequantise(&b.view()).into_iter().map(|value| value * scale).collect();
        let as_stored = quantise(b.dtype, rows, cols, &values).filter(|bytes| {
            let back = dequantise(&TensorView { dtype: b.dtype, rows, cols, bytes });
            back.iter().zip(&values).all(|(back, value)| back.to_bits() == value.to_bits())
        });
        match as_stored {
            Some(bytes) => Self { dtype: b.dtype, rows, cols, bytes },
            None => Self { dtype: Dtype::F32, rows, cols, bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect() },
        }
    }

    fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes: &self.bytes }
    }
}

#[cfg(test)]
mod tests;
