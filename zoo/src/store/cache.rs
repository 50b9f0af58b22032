//! A directory of decoded tensors in front of a zoo whose own files cannot be mapped: those of a bucket, and those that are stored
//! encoded. Files are what a raw tensor file is; every one is verified when it is opened, so a torn or rotten one costs a second read
//! and nothing else. The least recently used go first.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::digest::Digest;
use crate::mapping::Mapping;

/// Ends the names of files that are being written.
const PARTIAL: &str = ".partial";

/// Decoded tensors in a local directory that this process alone uses.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    bytes_max: u64,
    books: Mutex<Books>,
    /// Numbers files that are being written.
    written: AtomicU64,
    /// Held while the cache is open: two processes would each count their own files only.
    _lock: File,
}

#[derive(Debug, Default)]
struct Books {
    /// Bytes of all files.
    bytes: u64,
    /// Counts uses.
    clock: u64,
    /// By digest: last use and bytes.
    files: HashMap<Digest, (u64, u64)>,
    /// By last use.
    order: BTreeMap<u64, Digest>,
}

/// Why a directory cannot be a cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("the cache {path} is in use by another process: give each its own")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

impl Cache {
    /// Opens the cache in a directory, or begins one there; at most `bytes_max` bytes of files are kept.
    ///
    /// # Errors
    /// When the directory cannot be made, read or locked.
    pub fn open(root: &Path, bytes_max: u64) -> Result<Self, CacheError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::File { action, path, source }
        };
        fs::create_dir_all(root).map_err(failed("create", root))?;
        let path = root.join(".lock");
        let lock = File::options().create(true).append(true).open(&path).map_err(failed("open", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(CacheError::InUse { path: root.to_owned() }),
            Err(fs::TryLockError::Error(source)) => return Err(CacheError::File { action: "lock", path, source }),
        }
        let mut found = scan(root).map_err(failed("read", root))?;
        found.sort();
        let mut books = Books::default();
        for (_, digest, bytes) in found {
            books.add(digest, bytes);
        }
        let cache = Self { root: root.to_owned(), bytes_max, books: Mutex::new(books), written: AtomicU64::new(0), _lock: lock };
        cache.shrink(&mut cache.books());
        Ok(cache)
    }

    /// Bytes of the files that are kept.
    pub fn bytes(&self) -> u64 {
        self.books().bytes
    }

    /// The file of a tensor, unverified, if it is kept.
    pub(crate) fn get(&self, digest: Digest) -> Option<Mapping> {
        let mut books = self.books();
        if !books.use_again(digest) {
            return None;
        }
        let path = self.path(digest);
        match Mapping::open(&path) {
            Ok(map) => {
                // The order of uses outlives the process by the files' times. A hint: where it fails, the order is older.
                let _ = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                Some(map)
            }
            Err(_) => {
                books.remove(digest);
                None
            }
        }
    }

    /// Keeps a verified tensor (header and raw payload) and returns the map of its file; `None` where it is larger than the whole cache.
    pub(crate) fn put(&self, digest: Digest, file: &[u8]) -> io::Result<Option<Mapping>> {
        let bytes = file.len() as u64;
        if bytes > self.bytes_max {
            return Ok(None);
        }
        let path = self.path(digest);
        fs::create_dir_all(path.parent().expect("a file on a shelf"))?;
        // Numbered: another thread may be writing the same tensor.
        let partial = path.with_extension(format!("{}{PARTIAL}", self.written.fetch_add(1, Ordering::Relaxed)));
        // Not synced: whatever a crash leaves of it does not pass the check when it is opened.
        let written = File::create(&partial).and_then(|mut out| out.write_all(file)).and_then(|()| fs::rename(&partial, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&partial); // What stays is swept when the cache is opened.
            return Err(error);
        }
        let map = Mapping::open(&path)?;
        let mut books = self.books();
        books.remove(digest);
        books.add(digest, bytes);
        self.shrink(&mut books);
        Ok(Some(map))
    }

    /// Drops a file that turned out not to be the tensor.
    pub(crate) fn drop_damaged(&self, digest: Digest) {
        self.books().remove(digest);
        let _ = fs::remove_file(self.path(digest));
    }

    /// Removes the least recently used files until the rest fits. What maps one of them reads on.
    fn shrink(&self, books: &mut Books) {
        while books.bytes > self.bytes_max
            && let Some((_, &digest)) = books.order.first_key_value()
        {
            books.remove(digest);
            if let Err(error) = fs::remove_file(self.path(digest))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, %digest, cache = %self.root.display(), "a file of the cache cannot be removed");
            }
        }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join(&name[..2]).join(name)
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // A panic while holding them leaves counts that the next opening makes right.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn add(&mut self, digest: Digest, bytes: u64) {
        self.clock += 1;
        self.bytes += bytes;
        self.files.insert(digest, (self.clock, bytes));
        self.order.insert(self.clock, digest);
    }

    fn remove(&mut self, digest: Digest) {
        if let Some((used, bytes)) = self.files.remove(&digest) {
            self.order.remove(&used);
            self.bytes -= bytes;
        }
    }

    /// Whether it is there; it is the most recently used one then.
    fn use_again(&mut self, digest: Digest) -> bool {
        let Some(&(_, bytes)) = self.files.get(&digest) else { return false };
        self.remove(digest);
        self.add(digest, bytes);
        true
    }
}

/// The files of a cache with their times and sizes. Takes what a killed process left half-written; leaves what is not the cache's.
fn scan(root: &Path) -> io::Result<Vec<(SystemTime, Digest, u64)>> {
    let mut found = Vec::new();
    for shelf in fs::read_dir(root)? {
        let shelf = shelf?;
        if !shelf.file_type()?.is_dir() || shelf.file_name().len() != 2 {
            continue;
        }
        for entry in fs::read_dir(shelf.path())? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(PARTIAL) {
                if name.split('.').next().is_some_and(|digest| digest.parse::<Digest>().is_ok()) {
                    fs::remove_file(entry.path())?;
                }
            } else if let Ok(digest) = name.parse() {
                let meta = entry.metadata()?;
                found.push((meta.modified()?, digest, meta.len()));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest([n; 32])
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_order_outlives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 300).unwrap();
        for n in 1..=3 {
            assert_eq!(cache.put(digest(n), &[n; 100]).unwrap().unwrap().as_ref(), [n; 100]);
        }
        assert!(cache.get(digest(1)).is_some());
        let map = cache.get(digest(2)).unwrap();
        cache.put(digest(4), &[4; 150]).unwrap().unwrap();
        // 3 went, and 1 with it: 2 and 4 fit.
        assert_eq!((cache.bytes(), cache.get(digest(1)).is_none(), cache.get(digest(3)).is_none()), (250, true, true));
        drop(cache);
        fs::write(dir.path().join("04").join(format!("{}.7.partial", digest(9))), [0; 1000]).unwrap();
        File::options()
            .append(true)
            .open(dir.path().join("04").join(digest(4).to_string()))
            .unwrap()
            .set_modified(SystemTime::UNIX_EPOCH)
            .unwrap();
        let cache = Cache::open(dir.path(), 200).unwrap();
        assert_eq!((cache.bytes(), cache.get(digest(2)).is_some(), cache.get(digest(4)).is_none()), (100, true, true));
        assert_eq!(fs::read_dir(dir.path().join("04")).unwrap().count(), 0);
        assert_eq!(map.as_ref(), [2; 100]);
    }

    #[test]
    fn what_is_larger_than_the_cache_is_not_kept_and_a_removed_file_is_no_hit() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), 100).unwrap();
        assert!(cache.put(digest(1), &[1; 101]).unwrap().is_none());
        cache.put(digest(2), &[2; 100]).unwrap().unwrap();
        fs::remove_file(dir.path().join("02").join(digest(2).to_string())).unwrap();
        assert!(cache.get(digest(2)).is_none());
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn a_second_process_is_told_that_the_directory_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let _cache = Cache::open(dir.path(), 100).unwrap();
        assert!(matches!(Cache::open(dir.path(), 100), Err(CacheError::InUse { .. })));
    }
}
