//! Quantises a chain with GPTQ, block by block: what a block's layers read is what the blocks before, already quantised, make of the calibration
//! text. So the result belongs to this chain alone; nothing of it is shared with models that share the source's blocks (docs/quantize.md).

use std::sync::{Arc, Mutex, PoisonError};

use ashlar_kernels::ops::{Ops, PackError};
use ashlar_zoo::blocking::blocking;
use ashlar_zoo::draft::{ChainDraft, DraftError};
use ashlar_zoo::ingest::{Progress, Stage};
use ashlar_zoo::manifest::BlockKind;
use ashlar_zoo::quantise::{Draft, Form, Levels};
use ashlar_zoo::store::MappedBlock;

use super::alone::AloneError;
use super::block::LoadedBlock;
use super::gptq::{self, Hessian};
use super::outputs::Outputs;
use super::passes::Passes;
use super::workspace::Observer;

/// Why a chain was not calibrated.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The draft refused, or its store failed.
    #[error(transparent)]
    Draft(#[from] DraftError),
    /// The chain could not be read, loaded or run.
    #[error(transparent)]
    Chain(#[from] AloneError),
    /// A form that is rounded without data only.
    #[error("{0} is rounded without data: leave the calibration text out")]
    Ungrouped(Form),
    /// Activations that are infinite or no numbers.
    #[error("the calibration text gives block {index} inputs of `{role}` that are not finite")]
    NotFinite {
        /// Its place in the chain.
        index: usize,
        /// The first matrix that reads them.
        role: &'static str,
    },
}

/// Matrices that read the same inputs, in the order in which a block's two layers are computed.
fn layers(params: &BlockKind) -> [&'static [&'static str]; 2] {
    match params {
        BlockKind::Attention { .. } => [&["q.weight", "k.weight", "v.weight"], &["o.weight"]],
        BlockKind::FeedForward { .. } => [&["gate.weight", "up.weight"], &["down.weight"]],
        BlockKind::Embed { .. } | BlockKind::Head { .. } | BlockKind::Stitch { .. } => [&[], &[]],
    }
}

/// Quantises all matrices of a draft on the inputs that `windows` of tokens give them; token table and head are rounded without them.
///
/// # Errors
/// When a block cannot be read, loaded or stored, activations are not finite, or linear weights are to have a form without a grid.
///
/// # Panics
/// When there is no window, or one is empty or has a token beyond the vocabulary.
pub async fn calibrate<B: Ops>(
    ops: &Arc<B>,
    draft: &mut Draft,
    windows: Vec<Vec<u32>>,
    progress: &dyn Progress,
) -> Result<(), CalibrateError> {
    let window_tokens = windows.iter().map(Vec::len).max().expect("a window");
    let block_count = draft.blocks().len();
    let observed = (0..block_count).filter(|index| !layers(&draft.blocks()[*index].params)[0].is_empty());
    if let Some((_, form)) = observed.flat_map(|index| draft.targets(index)).find(|(_, form)| Levels::of(form.dtype()).is_none()) {
        return Err(CalibrateError::Ungrouped(form));
    }
    progress.begin(Stage::Quantise, (0..block_count).map(|index| draft.target_bytes(index)).sum());
    let mut passes = Passes::new(Arc::clone(ops), windows, window_tokens).map_err(AloneError::from)?;
    for index in 0..block_count {
        let layers = layers(&draft.blocks()[index].params);
        if layers[0].is_empty() {
            draft.round(index).await?;
        }
        // The second layer reads what the first one makes, quantised.
        for (layer, roles) in layers.into_iter().enumerate() {
            let mut targets = draft.targets(index);
            targets.retain(|(role, _)| roles.contains(&role.as_str()));
            if targets.is_empty() {
                continue;
            }
            let (mapped, block) = load(&**ops, draft.chain(), index).await?;
            let hessian = inputs(ops, &mut passes, &block, layer).map_err(AloneError::from)?;
            let factor = hessian.and_then(|hessian| hessian.factor()).ok_or(CalibrateError::NotFinite { index, role: roles[0] })?;
            let factor = Arc::new(factor);
            for (role, form) in targets {
                let (tensor, factor) = (mapped.tensors[&role].clone(), Arc::clone(&factor));
                let payload = blocking(move || gptq::quantise(&tensor.view(), form.dtype(), &factor)).await;
                draft.set(index, &role, form, payload).await?;
            }
        }
        if index + 1 < block_count {
            let (_, block) = load(&**ops, draft.chain(), index).await?;
            passes.run(&block, None).map_err(AloneError::from)?;
        }
        progress.advance(draft.target_bytes(index));
    }
    progress.end();
    Ok(())
}

/// Loads a block with what was made of it so far.
pub(super) async fn load<B: Ops>(ops: &B, draft: &ChainDraft, index: usize) -> Result<(MappedBlock, LoadedBlock<B>), AloneError> {
    let mapped = draft.map_block(index).await?;
    let block = LoadedBlock::load(ops, &mapped.block, &mapped, &Outputs::default());
    Ok((mapped, block.map_err(|source| AloneError::Load { index, source })?))
}

/// Sums of products of what one of a block's two layers reads, over all windows; `None` where it reads nothing. The windows stay where they are.
pub(super) fn inputs<B: Ops>(
    ops: &Arc<B>,
    passes: &mut Passes<B>,
    block: &LoadedBlock<B>,
    layer: usize,
) -> Result<Option<Hessian>, PackError> {
    let observed = Arc::new(Mutex::new(Observed::default()));
    passes.run(block, Some(observer(Arc::clone(ops), layer, Arc::clone(&observed))))?;
    let Observed { hessian, failed } = std::mem::take(&mut *observed.lock().unwrap_or_else(PoisonError::into_inner));
    failed.map_or(Ok(hessian), Err)
}

/// What an observer made of the inputs.
#[derive(Default)]
struct Observed {
    hessian: Option<Hessian>,
    failed: Option<PackError>,
}

/// Adds up the inputs of one of a block's two layers.
fn observer<B: Ops>(ops: Arc<B>, layer: usize, observed: Arc<Mutex<Observed>>) -> Observer {
    let mut seen = 0;
    Box::new(move |rows, cols| {
        if seen % 2 == layer {
            let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
            let hessian = observed.hessian.get_or_insert_with(|| Hessian::new(cols));
            if let Err(error) = hessian.add(&*ops, rows) {
                observed.failed = Some(error);
            }
        }
        seen += 1;
    })
}
