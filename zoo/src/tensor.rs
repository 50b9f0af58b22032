//! A tensor's payload in memory: a verified map of its file, or an aligned copy where there is no local file.

use std::sync::Arc;

use ashlar_kernels::format::{Dtype, TensorView};

use crate::aligned::AlignedBytes;
use crate::manifest::TensorRef;
use crate::mapping::Mapping;
use crate::tensor_file::{self, HEADER_BYTES};

/// A verified tensor. Cheap to clone; the bytes live as long as any clone. `as_ref()` is the payload, 64-byte aligned.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Arc<TensorBytes>,
}

/// What holds the file's bytes, header included.
#[derive(Debug)]
pub(crate) enum TensorBytes {
    /// A local file.
    Mapped(Mapping),
    /// A copy of an object that is no local file.
    Owned(AlignedBytes),
}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map.as_ref(),
            Self::Owned(bytes) => bytes.as_ref(),
        }
    }
}

impl MappedTensor {
    /// Takes bytes that were verified to be a tensor of this dtype and shape.
    pub(crate) fn new(dtype: Dtype, (rows, cols): (usize, usize), bytes: Arc<TensorBytes>) -> Self {
        Self { dtype, rows, cols, bytes }
    }

    /// Takes a copy of a payload that is of this tensor.
    pub fn owned(tensor: &TensorRef, payload: &[u8]) -> Self {
        debug_assert_eq!(tensor.digest, tensor_file::digest(tensor.dtype, &tensor.shape, payload));
        let mut bytes = AlignedBytes::to_fill(HEADER_BYTES + payload.len());
        bytes.as_mut()[..HEADER_BYTES].copy_from_slice(&tensor_file::header(tensor_file::ENCODING_RAW, tensor.dtype, &tensor.shape));
        bytes.as_mut()[HEADER_BYTES..].copy_from_slice(payload);
        let shape = tensor_file::rows_cols(&tensor.shape).expect("refs have shapes that can be stored");
        Self::new(tensor.dtype, shape, Arc::new(TensorBytes::Owned(bytes)))
    }

    /// Element format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Gives back memory that reading the tensor took and its file can give again. Clones read on as before.
    pub fn release_pages(&self) {
        if let TensorBytes::Mapped(map) = &*self.bytes {
            map.release_pages();
        }
    }

    /// The view that the op set takes.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes: self.as_ref() }
    }
}

impl AsRef<[u8]> for MappedTensor {
    fn as_ref(&self) -> &[u8] {
        &(*self.bytes).as_ref()[HEADER_BYTES..]
    }
}
