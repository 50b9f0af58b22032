//! What lies at a path: a Hugging Face directory or a GGUF file, opened and parsed, nothing interpreted twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::IngestError;
use crate::family::{self, Config, Decoder};
use crate::formats::gguf::{self, Value};
use crate::formats::{FormatError, TensorFiles, shards};
use crate::mapping::Mapping;
use crate::quantised::{Quantised, Scheme};

/// Largest configuration or template file.
pub(super) const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// A checkpoint, opened.
#[derive(Debug)]
pub struct Checkpoint {
    /// Last component of the path.
    pub source: String,
    /// Weights.
    pub tensors: Arc<TensorFiles>,
    /// What the family makes of its configuration.
    pub decoder: Decoder,
    /// Matrices of which several tensors are one.
    pub(super) quantised: Quantised,
    /// The rest, by container.
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory(Box<Directory>),
    Gguf(BTreeMap<String, Value>),
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) generation_config: Option<Config>,
    pub(super) tokenizer_config: Option<Config>,
}

impl Checkpoint {
    /// Opens the directory or file at `path`.
    ///
    /// # Errors
    /// What is missing, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self, IngestError> {
        let source = source_name(path)?;
        if path.is_dir() {
            return open_directory(path, source);
        }
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if is_gguf {
            return open_gguf(path, source);
        }
        Err(IngestError::NoCheckpoint { path: path.to_owned(), reason: "it is neither a directory nor a .gguf file" })
    }
}

fn open_directory(path: &Path, source: String) -> Result<Checkpoint, IngestError> {
    // What may not be looked at is not called absent.
    let has = |name: &str| {
        let file = path.join(name);
        file.try_exists().map_err(|source| IngestError::Io { path: file, source })
    };
    if !has("config.json")? {
        return Err(IngestError::NoCheckpoint { path: path.to_owned(), reason: "it has no config.json" });
    }
    let config = read_config(path, "config.json")?.expect("just seen");
    let weights = ["model.safetensors", "model.safetensors.index.json"];
    if !has(weights[0])? && !has(weights[1])? {
        return Err(IngestError::NoCheckpoint {
            path: path.to_owned(),
            reason: "it has no model.safetensors (pickled weights are never read)",
        });
    }
    let generation_config = read_config(path, "generation_config.json")?;
    let tokenizer_config = read_config(path, "tokenizer_config.json")?;
    let tensors = shards::open(path)?;
    let quantised = match Scheme::read(&config)? {
        Some(scheme) => Quantised::find(&tensors, &scheme)?,
        None => Quantised::default(),
    };
    let decoder = family::from_config(&config, &|name| tensors.get(name).is_some() || quantised.get(name).is_some())?;
    let kind = Kind::Directory(Box::new(Directory { path: path.to_owned(), config, generation_config, tokenizer_config }));
    Ok(Checkpoint { source, tensors: Arc::new(tensors), decoder, quantised, kind })
}

fn open_gguf(path: &Path, source: String) -> Result<Checkpoint, IngestError> {
    let file = Mapping::open(path).map_err(|source| IngestError::Io { path: path.to_owned(), source })?;
    let parsed = gguf::parse(file.as_ref()).map_err(|source| FormatError::Gguf { path: path.to_owned(), source })?;
    let mut tensors = TensorFiles::default();
    tensors.add(file, parsed.tensors).map_err(|reason| FormatError::Tensors { path: path.to_owned(), reason })?;
    let decoder = family::gguf::decoder(&parsed.metadata, &tensors)?;
    Ok(Checkpoint { source, tensors: Arc::new(tensors), decoder, quantised: Quantised::default(), kind: Kind::Gguf(parsed.metadata) })
}

impl family::gguf::Tensors for TensorFiles {
    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn vector(&self, name: &str) -> Option<Vec<f64>> {
        let view = self.view(name).filter(|view| view.rows == 1)?;
        Some(ashlar_kernels::format::dequantise(&view).into_iter().map(f64::from).collect())
    }
}

/// Last component of the path; `.` and links are named by where they lead.
pub(super) fn source_name(path: &Path) -> Result<String, IngestError> {
    let named = path.canonicalize().map_err(|source| IngestError::Io { path: path.to_owned(), source })?;
    Ok(named.file_name().map_or_else(|| "checkpoint".to_owned(), |name| name.to_string_lossy().into_owned()))
}

/// Reads a small file that may be absent.
pub(super) fn read_small(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, IngestError> {
    let io = |source| IngestError::Io { path: path.to_owned(), source };
    let actual = match std::fs::metadata(path) {
        // Opening a pipe would wait for its writer, reading a device might never end.
        Ok(meta) if !meta.is_file() => return Err(io(not_plain())),
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io(source)),
    };
    if actual > bytes_max {
        return Err(IngestError::TooLarge { path: path.to_owned(), actual, max: bytes_max });
    }
    std::fs::read(path).map(Some).map_err(io)
}

fn not_plain() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a plain file")
}

pub(super) fn read_config(dir: &Path, name: &str) -> Result<Option<Config>, IngestError> {
    let Some(bytes) = read_small(&dir.join(name), CONFIG_BYTES_MAX)? else { return Ok(None) };
    Ok(Some(Config::parse(&bytes, name)?))
}
