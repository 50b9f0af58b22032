//! The file of the embedded registry: all lasting keys as JSON, replaced as a whole by write, fsync, rename, so that a crash
//! leaves the old or the new one. Writers of several processes take turns by a lock file beside it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::Entries;
use crate::{Entry, RegistryError, Revision};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: Format,
    revision: u64,
    entries: BTreeMap<String, StoredEntry>,
}

/// The only format there is; anything else fails to parse.
#[derive(Serialize, Deserialize)]
enum Format {
    #[serde(rename = "ashlar-registry-1")]
    One,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredEntry {
    revision: Revision,
    value: String,
}

/// What tells one version of the file from another: each is a new inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: SystemTime,
}

/// The file, and which version of it we have read.
#[derive(Debug)]
pub(super) struct LastingFile {
    path: PathBuf,
    seen: Option<Stamp>,
    /// The file was there and is gone; said once.
    vanished: bool,
}

/// The one name of a registry's file, whatever links lead to it: the file is replaced under this name, and what lies beside it lies here.
///
/// # Errors
/// A symbolic link to nothing, a file with several hard links, a folder that cannot be looked into.
pub fn resolve(path: &Path) -> Result<PathBuf, RegistryError> {
    let failed = |action, source| RegistryError::File { action, path: path.display().to_string(), source };
    match std::fs::symlink_metadata(path) {
        Ok(meta) => {
            let resolved = path.canonicalize().map_err(|source| match source.kind() {
                ErrorKind::NotFound if meta.is_symlink() => {
                    let why = "it is a symbolic link to a file that is not there: make the link's target, or name it instead";
                    failed("follow", std::io::Error::new(ErrorKind::NotFound, why))
                }
                _ => failed("follow", source),
            })?;
            #[cfg(unix)]
            {
                let meta = std::fs::metadata(&resolved).map_err(|source| failed("look at", source))?;
                let names = std::os::unix::fs::MetadataExt::nlink(&meta);
                if meta.is_file() && names > 1 {
                    let why = format!(
                        "the file has {names} names (hard links); each change replaces it under one of them, and who uses another would not see \
                         that: leave it one name"
                    );
                    return Err(failed("use", std::io::Error::new(ErrorKind::InvalidInput, why)));
                }
            }
            Ok(resolved)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else { return Ok(path.to_owned()) };
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            match parent.canonicalize() {
                Ok(parent) => Ok(parent.join(name)),
                // It is made with the file.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_owned()),
                Err(source) => Err(failed("follow", source)),
            }
        }
        Err(source) => Err(failed("look at", source)),
    }
}

impl LastingFile {
    /// Of a path as `resolve` gives it.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, seen: None, vanished: false }
    }

    /// Keeps other writers out until dropped.
    pub(super) fn lock(&self) -> Result<File, RegistryError> {
        if let Some(directory) = self.directory() {
            std::fs::create_dir_all(directory).map_err(|source| self.failed("create the directory of", source))?;
        }
        let file = File::create(self.beside("lock")).map_err(|source| self.failed("lock", source))?;
        file.lock().map_err(|source| self.failed("lock", source))?;
        Ok(file)
    }

    /// The file's keys, where it is not the version we read or wrote last. None too where the file is missing: what was read of a
    /// file that vanished stands, for to forget all tenants is worse than to be out of date. The next write makes it again.
    pub(super) fn read_if_changed(&mut self) -> Result<Option<Entries>, RegistryError> {
        let stamp = self.stamp()?;
        if stamp == self.seen {
            return Ok(None);
        }
        let text = match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                if !std::mem::replace(&mut self.vanished, true) {
                    tracing::warn!(path = %self.path.display(), "the registry's file is gone; keeping what was known");
                }
                return Ok(None);
            }
            read => read.map_err(|source| self.failed("read", source))?,
        };
        self.seen = stamp;
        self.vanished = false;
        let format = |source| RegistryError::Format { path: self.path.display().to_string(), source };
        let Stored { format: Format::One, revision, entries } = serde_json::from_str(&text).map_err(format)?;
        let entry = |(key, stored): (String, StoredEntry)| {
            (key.clone(), Entry { key, value: stored.value, revision: stored.revision, lease: None })
        };
        Ok(Some(Entries { map: entries.into_iter().map(entry).collect(), revision }))
    }

    /// Replaces the file by the lasting keys of `entries`. The caller holds the lock.
    pub(super) fn write(&mut self, entries: &Entries) -> Result<(), RegistryError> {
        let stored = |entry: &Entry| (entry.key.clone(), StoredEntry { revision: entry.revision, value: entry.value.clone() });
        let stored = Stored { format: Format::One, revision: entries.revision, entries: entries.lasting().map(stored).collect() };
        let mut text = serde_json::to_vec_pretty(&stored).expect("text keys and plain values");
        text.push(b'\n');
        let new = self.beside("new");
        self.replace(&new, &text).map_err(|source| self.failed("write", source))?;
        self.seen = self.stamp()?;
        self.vanished = false;
        Ok(())
    }

    fn replace(&self, new: &Path, text: &[u8]) -> std::io::Result<()> {
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        // It holds a secret (the cluster's) beside hashes.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(new)?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(new, &self.path)?;
        File::open(self.directory().unwrap_or(Path::new(".")))?.sync_all()
    }

    fn stamp(&self) -> Result<Option<Stamp>, RegistryError> {
        match std::fs::metadata(&self.path) {
            Ok(meta) => {
                let modified = meta.modified().map_err(|source| self.failed("look at", source))?;
                #[cfg(unix)]
                let inode = std::os::unix::fs::MetadataExt::ino(&meta);
                #[cfg(not(unix))]
                let inode = 0;
                Ok(Some(Stamp { inode, bytes: meta.len(), modified }))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("look at", source)),
        }
    }

    fn directory(&self) -> Option<&Path> {
        self.path.parent().filter(|parent| !parent.as_os_str().is_empty())
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".");
        name.push(ending);
        name.into()
    }

    fn failed(&self, action: &'static str, source: std::io::Error) -> RegistryError {
        RegistryError::File { action, path: self.path.display().to_string(), source }
    }
}
