//! Read-only maps of whole files: stored tensors and the checkpoints that are read at ingest. The crate's only `unsafe`.

use std::fs::File;
use std::io;
use std::path::Path;

/// A file mapped read-only. Empty files are an empty slice.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Option<memmap2::Mmap>,
}

impl Mapping {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// When it cannot be opened or mapped, or is no plain file.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Before it is opened: opening a pipe waits for its writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        Self::of(&File::open(path)?)
    }

    /// Maps an open file.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the map is read-only and private to this process. Objects of the zoo are never changed in place (they
        // appear by rename, `store/write.rs`, and go by unlink, which keeps the mapped inode); adapters are
        // copied to files without a name first (`Zoo::private_file`); other checkpoints belong to whoever runs `add`, and truncating one
        // under the map ends this process by SIGBUS, as documented for `memmap2`.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self { map: Some(map) })
    }

    /// Gives the pages back that were read; those that are read again come from the file.
    pub(crate) fn release_pages(&self) {
        let Some(map) = &self.map else { return };
        // SAFETY: the map is read-only and has the file behind it, so what is dropped is read again with the same bytes (files of the zoo
        // are never changed in place, see `open`).
        // A hint: where the system does not take it, memory stays as it was.
        let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
