//! A directory of safetensors: `model.safetensors`, or shards named by `model.safetensors.index.json`. Shard names come
//! from a file that anyone may have written, so they must be plain names within the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::{FormatError, TensorFiles, safetensors};
use crate::mapping::Mapping;

/// Largest index file.
const INDEX_BYTES_MAX: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Maps all tensors of a directory.
///
/// # Errors
/// The file that is missing, malformed or does not agree with the index.
pub fn open(dir: &Path) -> Result<TensorFiles, FormatError> {
    let index_path = dir.join("model.safetensors.index.json");
    let mut files = TensorFiles::default();
    if !index_path.exists() {
        add(&mut files, &dir.join("model.safetensors"))?;
        return Ok(files);
    }
    let index = read_index(&index_path)?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    for shard in shards {
        if !is_plain_name(shard) {
            return Err(FormatError::Index { path: index_path, reason: format!("shard name `{shard}` is not a plain file name") });
        }
        add(&mut files, &dir.join(shard))?;
    }
    for name in index.weight_map.keys() {
        if files.get(name).is_none() {
            return Err(FormatError::Index { path: index_path, reason: format!("tensor `{name}` is in no shard") });
        }
    }
    Ok(files)
}

/// Whether `name` is one ordinary path component: no folders, no `..`, nothing absolute.
pub fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(part)) if part == name) && components.next().is_none();
    plain && !name.contains(['/', '\\', '\0', ':'])
}

/// Maps one file's tensors beside those that are there.
///
/// # Errors
/// When it cannot be read, is malformed, or repeats a name.
pub(crate) fn add(files: &mut TensorFiles, path: &Path) -> Result<(), FormatError> {
    let io = |source| FormatError::Io { path: path.to_owned(), source };
    add_map(files, Mapping::open(path).map_err(io)?, path)
}

/// As [`add`], of a map; `path` names it in errors.
///
/// # Errors
/// When it is malformed, or repeats a name.
pub(crate) fn add_map(files: &mut TensorFiles, file: Mapping, path: &Path) -> Result<(), FormatError> {
    let entries = safetensors::parse(file.as_ref()).map_err(|source| FormatError::Safetensors { path: path.to_owned(), source })?;
    files.add(file, entries).map_err(|reason| FormatError::Tensors { path: path.to_owned(), reason })
}

fn read_index(path: &PathBuf) -> Result<Index, FormatError> {
    let io = |source| FormatError::Io { path: path.clone(), source };
    let meta = std::fs::metadata(path).map_err(io)?;
    if !meta.is_file() {
        return Err(FormatError::Index { path: path.clone(), reason: "not a plain file".to_owned() });
    }
    if meta.len() > INDEX_BYTES_MAX {
        return Err(FormatError::Index { path: path.clone(), reason: format!("more than {INDEX_BYTES_MAX} bytes") });
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::Index { path: path.clone(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    #[test]
    fn shard_names_are_plain_file_names() {
        for good in ["model-00001-of-00002.safetensors", "a", "..a"] {
            assert!(super::is_plain_name(good), "{good}");
        }
        for bad in ["", ".", "..", "../a", "/etc/passwd", "a/b", "a/", "a\\b", "C:a", "a\0b", "./a"] {
            assert!(!super::is_plain_name(bad), "{bad}");
        }
    }
}
