//! From the zoo back to a Hugging Face directory: tensors byte for byte as they were added, under transformers' names; config.json and its
//! siblings as the blocks have them. What was written is read again by the family's own reader before it counts. Start with [`export`].

mod adapter;
mod config;
mod tensors;
mod text;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::blocking::blocking;
use crate::digest::Digest;
use crate::family::names::Names;
use crate::inspect::Resolved;
use crate::manifest::BlockKind;
use crate::model_id::ModelId;
use crate::store::{StoreError, Zoo};

/// Why a model was not exported. Nothing is left at the directory.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Something lies where the export should go.
    #[error("{0} is there already, and is no empty directory")]
    Exists(PathBuf),
    /// `.`, `..` or `/`: nothing can be put in its place at once.
    #[error("name the directory that is to be made: `{0}` ends in none")]
    Unnamed(PathBuf),
    /// A model that is base and adapter, and its base cannot be told from it.
    #[error("it is an adapter, and cannot be parted from its base: {0}")]
    Base(String),
    /// A change that PEFT has no name for.
    #[error(
        "`{0}` is its base's and a one-bit delta, which no Hugging Face directory can say; the model that it was compressed from is what to export"
    )]
    OneBit(String),
    /// A family whose names transformers does not have, or that is not known to this build.
    #[error("the family `{0}` has no Hugging Face form here")]
    Architecture(String),
    /// A chain with a stitch.
    #[error("block {0} is a stitch between two models, which no Hugging Face directory can say; export the models that it was made of")]
    Stitched(usize),
    /// An element type that a Hugging Face checkpoint does not have.
    #[error(
        "tensor `{name}` is stored as {dtype}, which is no element type of a Hugging Face checkpoint; only what was added as f32, f16 or bf16 goes back"
    )]
    Quantised {
        /// Name that it would have.
        name: String,
        /// How it is stored.
        dtype: String,
    },
    /// Parts of one fused matrix that are stored in different ways.
    #[error("tensor `{0}` is in parts here that do not fit together")]
    Parts(String),
    /// Numbers that a config.json of the family cannot say.
    #[error("config.json of a {architecture} model cannot say what {what} is here")]
    Unsaid {
        /// The family.
        architecture: String,
        /// What differs when it is read again.
        what: String,
    },
    /// The file system.
    #[error("failed to write {path}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The zoo.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportReport {
    /// Tensors of the checkpoint.
    pub tensors: usize,
    /// Bytes of its weights file.
    pub bytes: u64,
}

/// Writes a model as a Hugging Face directory, or an adapter as a PEFT directory, at `directory`, which must not be there, or be empty. It appears whole or not at all.
///
/// # Errors
/// What of the model has no such form, or what failed.
pub async fn export(zoo: &Zoo, id: &ModelId, directory: &Path) -> Result<ExportReport, ExportError> {
    let model = zoo.resolve(id).await?;
    if let Some(index) = model.blocks.iter().position(|block| matches!(block.params, BlockKind::Stitch { .. })) {
        return Err(ExportError::Stitched(index));
    }
    let names = names(&model.chain.architecture)?;
    let (tensors, files, weights) = if model.adapters.is_empty() {
        let tensors = tensors::of_model(zoo, &model, &names).await?;
        let config = config::config(&model, &tensors)?;
        let files = text::files(zoo, &model, config).await?;
        (tensors, files, "model.safetensors")
    } else {
        let (tensors, files) = adapter::of_model(zoo, &model, &names).await?;
        (tensors, files, "adapter_model.safetensors")
    };
    let directory = directory.to_owned();
    blocking(move || write(&directory, &tensors, &files, weights)).await
}

/// What transformers names the tensors of a whole checkpoint.
fn names(architecture: &str) -> Result<Names, ExportError> {
    match Names::of_architecture(architecture) {
        Some(Names::Llama { fused, sandwich, .. }) => Ok(Names::Llama { body: "model.".to_owned(), head: String::new(), fused, sandwich }),
        Some(Names::Gpt2 { .. }) => Ok(Names::Gpt2 { prefix: "transformer.".to_owned() }),
        Some(Names::Gguf { .. }) | None => Err(ExportError::Architecture(architecture.to_owned())),
    }
}

/// Files by name.
type Files = Vec<(&'static str, Vec<u8>)>;

fn write(directory: &Path, tensors: &[tensors::Tensor], files: &Files, weights: &str) -> Result<ExportReport, ExportError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::Io { path, source }
    };
    match std::fs::read_dir(directory) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(ExportError::Exists(directory.to_owned()));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Err(ExportError::Exists(directory.to_owned())),
        Err(source) => return Err(failed(directory)(source)),
    }
    let Some(name) = directory.file_name() else { return Err(ExportError::Unnamed(directory.to_owned())) };
    let mut partial = name.to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = directory.with_file_name(partial);
    if let Some(parent) = partial.parent() {
        std::fs::create_dir_all(parent).map_err(failed(parent))?;
    }
    // Never one that is there: it is another's.
    std::fs::create_dir(&partial).map_err(failed(&partial))?;
    let written = write_files(&partial, tensors, files, weights);
    let moved = written.and_then(|report| std::fs::rename(&partial, directory).map_err(failed(directory)).map(|()| report));
    if moved.is_err() {
        // What failed is what is told.
        let _ = std::fs::remove_dir_all(&partial);
    }
    moved
}

fn write_files(directory: &Path, tensors: &[tensors::Tensor], files: &Files, weights: &str) -> Result<ExportReport, ExportError> {
    for (name, bytes) in files {
        let path = directory.join(name);
        std::fs::write(&path, bytes).map_err(|source| ExportError::Io { path, source })?;
    }
    let path = directory.join(weights);
    let failed = |source| ExportError::Io { path: path.clone(), source };
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(&path).map_err(failed)?);
    tensors::write(tensors, &mut file).map_err(failed)?;
    file.flush().map_err(failed)?;
    let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    Ok(ExportReport { tensors: tensors.len(), bytes })
}

/// Whether the output projection is the token embedding.
fn is_tied(model: &Resolved) -> bool {
    let tensor = |block: usize, role: &str| model.blocks.get(block).and_then(|block| block.tensors.get(role)).map(|tensor| tensor.digest);
    let embedding: Option<Digest> = tensor(0, "token.weight");
    embedding.is_some() && embedding == tensor(model.blocks.len() - 1, "output.weight")
}

/// JSON as transformers writes it: indented, with a line's end.
fn json(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("text keys and plain values");
    bytes.push(b'\n');
    bytes
}
