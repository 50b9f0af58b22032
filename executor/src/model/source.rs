//! Where the bytes of a block's tensors come from while it is loaded. Bytes are verified before they get here (the zoo
//! does it when it maps them); a source only hands them out.

use std::sync::Arc;

use ashlar_kernels::format::{Dtype, TensorView};
use ashlar_zoo::digest::Digest;
use ashlar_zoo::manifest::TensorRef;
use ashlar_zoo::store::{MappedAdapter, MappedBlock, MappedChange};
use ashlar_zoo::tensor::MappedTensor;

/// Bytes of one tensor, kept alive by `keep`.
#[derive(Clone)]
pub struct TensorBytes {
    /// Element format.
    pub dtype: Dtype,
    /// Rows (N); 1 for a vector.
    pub rows: usize,
    /// Columns (K).
    pub cols: usize,
    /// Its bytes are the payload, no more and no less.
    pub keep: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

impl TensorBytes {
    /// The view that the op set takes.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes: (*self.keep).as_ref() }
    }
}

impl From<&MappedTensor> for TensorBytes {
    fn from(mapped: &MappedTensor) -> Self {
        Self { dtype: mapped.dtype(), rows: mapped.rows(), cols: mapped.cols(), keep: Arc::new(mapped.clone()) }
    }
}

/// Why a tensor's bytes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source does not hold it.
    #[error("tensor {0} is not at hand")]
    Missing(Digest),
    /// The source failed.
    #[error("read tensor {digest}")]
    Read {
        /// The tensor.
        digest: Digest,
        /// What went wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Hands out tensors by reference. It does not block: the zoo's maps are awaited before, by `Zoo::map_block`.
pub trait TensorSource {
    /// The bytes of `tensor`.
    ///
    /// # Errors
    /// When the source does not hold it or cannot read it.
    fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError>;
}

impl TensorSource for MappedBlock {
    fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError> {
        let role = self.block.tensors.iter().find(|(_, held)| *held == tensor).map(|(role, _)| role);
        let mapped = role.and_then(|role| self.tensors.get(role)).ok_or(SourceError::Missing(tensor.digest))?;
        Ok(mapped.into())
    }
}

impl TensorSource for MappedAdapter {
    fn tensor(&self, tensor: &TensorRef) -> Result<TensorBytes, SourceError> {
        for (role, change) in &self.adapter.changes {
            let mapped = self.changes.get(role).into_iter().flat_map(MappedChange::tensors);
            if let Some((_, mapped)) = change.tensors().zip(mapped).find(|((_, held), _)| *held == tensor) {
                return Ok(mapped.into());
            }
        }
        Err(SourceError::Missing(tensor.digest))
    }
}
