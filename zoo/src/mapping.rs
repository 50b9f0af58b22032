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
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if meta.len() == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the map is read-only and private to this process. Objects of the zoo are never changed in place (they
        // appear by rename, `store/write.rs`, and go by unlink, which keeps the mapped inode); checkpoints belong to whoever
        // runs `add`, and truncating one under the map ends this process by SIGBUS, as documented for `memmap2`.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map: Some(map) })
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
