//! The adapter of one block on the device: for each of the block's two projections what is added to it, packed so that the rows of a batch may each
//! have another adapter, or none. Made from a descriptor and its factors, read by `forward`. It does not know which rows have which.

use ashlar_kernels::format::{Dtype, TensorView, dequantise, quantise};
use ashlar_kernels::ops::{Ops, PlacedPart};
use ashlar_zoo::manifest::{Adapter, Block, Change};
use ashlar_zoo::roles::{RoleShape, roles};

use super::load::{LoadError, take};
use super::source::{TensorBytes, TensorSource};

/// An adapter whose factors are on device `B`.
pub struct LoadedAdapter<B: Ops> {
    bytes: usize,
    /// Onto q, k and v, or onto gate and up.
    first: Option<Added<B>>,
    /// Onto o, or onto down.
    second: Option<Added<B>>,
}

/// What an adapter adds to one projection, each part to matrices of its own; at least one is there.
pub(super) struct Added<B: Ops> {
    pub(super) low_rank: Option<LowRank<B>>,
    /// One-bit deltas, where their outputs lie, `[N, K]`: `y += x D^T`.
    pub(super) signs: Option<B::Linear>,
    /// Outputs of the projection.
    pub(super) outputs: usize,
}

/// `y += (x A^T) (s B)^T`.
pub(super) struct LowRank<B: Ops> {
    /// The A of the matrices that lie in a row of y, stacked: `[R, K]`, R being the sum of their ranks.
    pub(super) shrink: B::Linear,
    /// Each one's B times its scale, where its outputs lie: a diagonal, `[N, R]`.
    pub(super) expand: B::Linear,
    pub(super) rank: usize,
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
        let (first, second) = (loader.added(first)?, loader.added(std::slice::from_ref(second))?);
        Ok(Self { bytes: loader.bytes, first, second })
    }

    /// Bytes of its factors on the device.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn added(&self, projection: Projection) -> Option<&Added<B>> {
        match projection {
            Projection::First => self.first.as_ref(),
            Projection::Second => self.second.as_ref(),
        }
    }
}

impl<B: Ops> std::fmt::Debug for LoadedAdapter<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rank = |added: &Option<Added<B>>| added.as_ref().and_then(|added| Some(added.low_rank.as_ref()?.rank));
        let has_signs = |added: &Option<Added<B>>| added.as_ref().is_some_and(|added| added.signs.is_some());
        let both = [&self.first, &self.second];
        let mut debug = f.debug_struct("LoadedAdapter");
        debug.field("ranks", &both.map(rank)).field("signs", &both.map(has_signs)).field("bytes", &self.bytes).finish()
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
    fn added(&mut self, matrices: &[(&'static str, usize)]) -> Result<Option<Added<B>>, LoadError> {
        let (low_rank, signs) = (self.low_rank(matrices)?, self.signs(matrices)?);
        let outputs = matrices.iter().map(|(_, outputs)| outputs).sum();
        Ok((low_rank.is_some() || signs.is_some()).then_some(Added { low_rank, signs, outputs }))
    }

    fn signs(&mut self, matrices: &[(&'static str, usize)]) -> Result<Option<B::Linear>, LoadError> {
        let (mut deltas, mut first_output, mut first_role) = (Vec::new(), 0, None);
        for (role, outputs) in matrices {
            if let Some(Change::OneBit { signs }) = self.adapter.changes.get(*role) {
                deltas.push((first_output, take(self.source, &format!("{role}.signs"), signs)?));
                first_role = first_role.or(Some(*role));
            }
            first_output += outputs;
        }
        let Some(role) = first_role else { return Ok(None) };
        let mut parts: Vec<PlacedPart<'_>> = Vec::with_capacity(deltas.len());
        for (first_output, signs) in &deltas {
            parts.push(PlacedPart { weights: signs.view(), first_input: 0, first_output: *first_output });
        }
        let linear = self.ops.linear_placed(&parts).map_err(|source| LoadError::Pack { role, source })?;
        self.bytes += self.ops.linear_bytes(&linear);
        Ok(Some(linear))
    }

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
        let mut first_input = 0;
        let diagonal = expands.iter().map(|(first_output, b)| {
            let part = PlacedPart { weights: b.view(), first_input, first_output: *first_output };
            first_input += b.cols;
            part
        });
        let expand = self.ops.linear_placed(&diagonal.collect::<Vec<_>>()).map_err(pack)?;
        self.bytes += self.ops.linear_bytes(&shrink) + self.ops.linear_bytes(&expand);
        Ok(Some(LowRank { shrink, expand, rank }))
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
