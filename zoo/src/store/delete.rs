//! Taking objects away, for `gc` alone: each is looked at again right before, under the lock that `add` touches under.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use object_store::ObjectStoreExt;

use super::{Object, StoreError, Zoo, key};
use crate::blocking::blocking;
use crate::gc::is_young;

/// Where writes are staged beside their targets.
const FOLDERS: [&str; 12] =
    ["tensors", "bases", "blocks", "adapters", "chains", "assets", "sketches", "measures", "profiles", "equivalences", "scratch", "models"];

impl Zoo {
    /// Deletes an object unless it was renewed meanwhile. Returns whether it did.
    pub(crate) async fn delete_if_old(&self, object: &Object, grace: Duration) -> Result<bool, StoreError> {
        let _lock = self.lock().await?;
        match self.head(object).await? {
            Some(meta) if is_young(&meta, grace) => return Ok(false),
            Some(_) => {}
            None => return Ok(false),
        }
        let key = key(object);
        // Not tried again: a sweep's requests must end with its round.
        match self.inner.store.delete(&key).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(StoreError::Store { action: "delete", key: key.to_string(), source }),
        }
    }

    /// Takes the temporary files (`name#n`) that a killed write left in a local directory. Returns their count and bytes.
    pub(crate) async fn sweep_staged(&self, grace: Duration, dry_run: bool) -> Result<(u64, u64), StoreError> {
        let Some(root) = self.inner.root.clone() else { return Ok((0, 0)) };
        let swept = blocking(move || {
            let (mut count, mut bytes) = (0, 0);
            let mut folders: Vec<PathBuf> = FOLDERS.iter().map(|folder| root.join(folder)).collect();
            // Two levels: shelves of tensors and tenants' folders.
            for depth in 0..2 {
                for folder in std::mem::take(&mut folders) {
                    for entry in read_dir(&folder)? {
                        let meta = entry.metadata()?;
                        if meta.is_dir() && depth == 0 {
                            folders.push(entry.path());
                        }
                        let age = SystemTime::now().duration_since(meta.modified()?).unwrap_or_default();
                        if meta.is_file() && is_staged(&entry.file_name().to_string_lossy()) && age >= grace {
                            count += 1;
                            bytes += meta.len();
                            if !dry_run {
                                std::fs::remove_file(entry.path())?;
                            }
                        }
                    }
                }
            }
            Ok::<_, std::io::Error>((count, bytes))
        });
        let failed = |source| StoreError::File { action: "sweep", path: self.inner.place.clone(), source };
        swept.await.map_err(failed)
    }
}

fn read_dir(folder: &std::path::Path) -> std::io::Result<Vec<std::fs::DirEntry>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// `LocalFileSystem` stages a write in `name#1` beside its target.
fn is_staged(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}
