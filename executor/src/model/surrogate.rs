//! Makes cheaper forms of a chain's blocks, block by block: what matters least goes, and what stays is refitted to make up for it. With a
//! calibration text the inputs of a block are what the blocks before, already cut, make of the text, so the result belongs to this chain alone;
//! without one it is a function of each block (docs/surrogate.md).

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_kernels::format::{CodeRow, TensorView, dequantise_row};
use ashlar_kernels::ops::Ops;
use ashlar_zoo::blocking::blocking;
use ashlar_zoo::draft::ChainDraft;
use ashlar_zoo::ingest::{Progress, Stage};
use ashlar_zoo::manifest::BlockKind;
use ashlar_zoo::store::MappedBlock;
use ashlar_zoo::surrogate::{self, CutError, Units};
use ashlar_zoo::tensor_file::payload_bytes;

use super::alone::AloneError;
use super::calibrate::{inputs, load};
use super::passes::Passes;
use super::prune::{Moments, choose, importance, refit};

/// Why no surrogate was made.
#[derive(Debug, thiserror::Error)]
pub enum SurrogateError {
    /// A block could not be cut or stored.
    #[error(transparent)]
    Cut(#[from] CutError),
    /// The chain could not be read, loaded or run.
    #[error(transparent)]
    Chain(#[from] AloneError),
    /// Activations that are infinite or no numbers.
    #[error("the calibration text gives block {index} inputs of `{role}` that are not finite")]
    NotFinite {
        /// Its place in the chain.
        index: usize,
        /// The second layer's matrix.
        role: &'static str,
    },
}

/// What importance is measured on.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Windows of tokens.
    pub windows: Vec<Vec<u32>>,
    /// Whether what stays is fitted to make up for what goes.
    pub refits: bool,
}

/// A block that was cut.
#[derive(Debug, Clone, PartialEq)]
pub struct CutBlock {
    /// Its place in the chain.
    pub index: usize,
    /// Units that stay: inner columns, or key-value heads.
    pub kept: Vec<usize>,
    /// Units that there were.
    pub unit_count: usize,
    /// Importance of those that went, as a share of all.
    pub lost_share: f64,
}

/// Cuts blocks of a draft, by their index, to so many units each.
///
/// # Errors
/// When a block cannot be read, loaded or stored, or is not finite.
///
/// # Panics
/// When a block has not so many units; when there is a calibration without a window, or with one that is empty or has a token beyond the vocabulary.
pub async fn make<B: Ops>(
    ops: &Arc<B>,
    draft: &mut ChainDraft,
    counts: &BTreeMap<usize, usize>,
    calibration: Option<Calibration>,
    progress: &dyn Progress,
) -> Result<Vec<CutBlock>, SurrogateError> {
    let last = counts.keys().next_back().copied().unwrap_or(0);
    let bytes: Vec<u64> = (0..=last).map(|index| block_bytes(draft, index)).collect();
    progress.begin(Stage::Cut, bytes.iter().sum());
    let refits = calibration.as_ref().is_some_and(|calibration| calibration.refits);
    let mut passes = match calibration {
        Some(Calibration { windows, .. }) => {
            let window_tokens = windows.iter().map(Vec::len).max().expect("a window");
            Some(Passes::new(Arc::clone(ops), windows, window_tokens).map_err(AloneError::from)?)
        }
        None => None,
    };
    let mut made = Vec::new();
    for (index, bytes) in bytes.into_iter().enumerate() {
        if let Some(count) = counts.get(&index) {
            let units = Units::of(&draft.blocks()[index].params).expect("a plan cuts blocks of two layers");
            let (mapped, moments) = match &mut passes {
                Some(passes) => {
                    let (mapped, block) = load(&**ops, draft, index).await?;
                    let sums = inputs(ops, passes, &block, 1).map_err(AloneError::from)?;
                    (mapped, sums.map(Moments::Measured))
                }
                None => {
                    let mapped = draft.map_block(index).await.map_err(AloneError::from)?;
                    let guessed = guess(&mapped);
                    (mapped, Some(Moments::Guessed(guessed)))
                }
            };
            let count = *count;
            let chosen = blocking(move || choose_units(&mapped, units, moments?, count, refits)).await;
            let (kept, lost_share, refitted) = chosen.ok_or(SurrogateError::NotFinite { index, role: units.second })?;
            surrogate::cut(draft, index, &kept, refitted).await?;
            made.push(CutBlock { index, kept, unit_count: units.count, lost_share });
        }
        if let Some(passes) = passes.as_mut().filter(|_| index < last) {
            let (_, block) = load(&**ops, draft, index).await?;
            passes.run(&block, None).map_err(AloneError::from)?;
        }
        progress.advance(bytes);
    }
    progress.end();
    Ok(made)
}

fn block_bytes(draft: &ChainDraft, index: usize) -> u64 {
    let tensors = draft.blocks()[index].tensors.values();
    tensors.filter_map(|tensor| payload_bytes(tensor.dtype, &tensor.shape)).map(|bytes| bytes as u64).sum()
}

/// Units that stay, what share of importance goes with the others, and the second layer's matrix for them; `None` where something is not finite.
fn choose_units(
    mapped: &MappedBlock,
    units: Units,
    moments: Moments,
    count: usize,
    refits: bool,
) -> Option<(Vec<usize>, f64, Option<Vec<f32>>)> {
    let second = &mapped.tensors[units.second];
    let (kept, lost_share) = choose(&importance(&second.view(), units.columns, &moments), count)?;
    let refitted = match moments {
        Moments::Measured(sums) if refits => Some(refit(&second.view(), &sums, &units.inputs(&kept))?),
        _ => None,
    };
    Some((kept, lost_share, refitted))
}

/// The energy of the second layer's inputs as far as weights tell: of an inner column the product of the squared norms of its rows of up and gate, of
/// a head's element that of its row of v.
fn guess(mapped: &MappedBlock) -> Vec<f64> {
    let norms = |role: &str| mapped.tensors.get(role).map(|tensor| row_norms(&tensor.view()));
    match mapped.block.params {
        BlockKind::Attention { heads, kv_heads, head_dim, .. } => {
            let (values, head) = (norms("v.weight").expect("of an attention block"), head_dim as usize);
            (0..(heads * head_dim) as usize).map(|at| values[at / head / (heads / kv_heads) as usize * head + at % head]).collect()
        }
        _ => {
            let up = norms("up.weight").expect("of a feed-forward block");
            match norms("gate.weight") {
                Some(gate) => up.iter().zip(gate).map(|(up, gate)| up * gate).collect(),
                None => up,
            }
        }
    }
}

/// The squared norm of each row.
fn row_norms(view: &TensorView<'_>) -> Vec<f64> {
    let (mut scratch, mut row) = (CodeRow::default(), vec![0.0f32; view.cols]);
    let mut norm = |index: usize| {
        dequantise_row(view, index, &mut scratch, &mut row);
        row.iter().map(|weight| f64::from(*weight).powi(2)).sum()
    };
    (0..view.rows).map(&mut norm).collect()
}
