//! Checkpoint files as named tensors in mapped files, whatever the container: safetensors (one or sharded) and GGUF.
//! Parsers are strict and bounded; they know nothing of model families.

pub mod cursor;
pub mod gguf;
pub mod safetensors;
pub mod shards;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ashlar_kernels::format::{Dtype, TensorView};

use crate::mapping::Mapping;

/// Most tensors of one model.
pub const TENSORS_MAX: usize = 65_536;

/// Why a checkpoint's files cannot be read. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The file system refused.
    #[error("failed to read {path}")]
    Io {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The safetensors file is malformed.
    #[error("{path} is not valid safetensors")]
    Safetensors {
        /// File.
        path: PathBuf,
        /// How.
        source: safetensors::SafetensorsError,
    },
    /// The GGUF file is malformed or of an unsupported kind.
    #[error("{path} cannot be read as GGUF")]
    Gguf {
        /// File.
        path: PathBuf,
        /// How.
        source: gguf::GgufError,
    },
    /// The index of a sharded checkpoint is malformed.
    #[error("{path} is not a valid shard index: {reason}")]
    Index {
        /// File.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// Two shards hold a tensor of the same name, or there are too many.
    #[error("{path}: {reason}")]
    Tensors {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The element type of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ElementType {
    /// One that the zoo stores.
    Stored(Dtype),
    /// Any other, by the container's name for it: the tensor can be skipped, not used.
    Other(String),
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stored(dtype) => dtype.fmt(f),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// Where a tensor lies in its file. The range is within the file; for stored types its length fits type and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type.
    pub element: ElementType,
    /// Dimensions, outermost (rows) first.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// The tensors of a checkpoint, by name.
#[derive(Debug, Default)]
pub struct TensorFiles {
    files: Vec<Arc<Mapping>>,
    tensors: BTreeMap<String, (usize, TensorEntry)>,
}

impl TensorFiles {
    /// Adds a mapped file and what its header names.
    ///
    /// # Errors
    /// The name that is there twice, or too many tensors.
    pub(crate) fn add(&mut self, file: Mapping, entries: Vec<(String, TensorEntry)>) -> Result<(), String> {
        let index = self.files.len();
        self.files.push(Arc::new(file));
        for (name, entry) in entries {
            if self.tensors.contains_key(&name) {
                return Err(format!("tensor `{name}` is there twice"));
            }
            self.tensors.insert(name, (index, entry));
        }
        if self.tensors.len() > TENSORS_MAX {
            return Err(format!("more than {TENSORS_MAX} tensors"));
        }
        Ok(())
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The entry of a name.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name).map(|(_, entry)| entry)
    }

    /// The bytes of a name, with the map that holds them.
    pub fn bytes(&self, name: &str) -> Option<FileSlice> {
        let (file, entry) = self.tensors.get(name)?;
        Some(FileSlice { file: self.files[*file].clone(), start: entry.start, len: entry.len })
    }

    /// A view of a stored vector or matrix.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let (file, entry) = self.tensors.get(name)?;
        let ElementType::Stored(dtype) = entry.element else { return None };
        let (rows, cols) = crate::tensor_file::rows_cols(&entry.shape)?;
        let bytes = (*self.files[*file]).as_ref().get(entry.start..entry.start + entry.len)?;
        (dtype.bytes(rows, cols) == Some(bytes.len())).then_some(TensorView { dtype, rows, cols, bytes })
    }
}

/// Part of a mapped file.
#[derive(Debug, Clone)]
pub struct FileSlice {
    file: Arc<Mapping>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for FileSlice {
    fn as_ref(&self) -> &[u8] {
        &(*self.file).as_ref()[self.start..self.start + self.len]
    }
}
