//! Keys from a file, for a mounted secret: tenant -> list of key hashes, as TOML (`acme = ["<64 hex digits>"]`) or JSON.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ashlar_registry::record::{KeyRecord, TenantRecord};
use ashlar_wire::id::TenantName;

use crate::state::tenants::KeyHash;

/// The file of keys is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KeysFileError {
    /// It cannot be read.
    #[error("failed to read the keys file {path}")]
    Read {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is neither TOML nor JSON of that shape. What it holds is not shown: it may hold a key by mistake.
    #[error("the keys file {path} is not a table of TENANT = [\"HASH\", ...]")]
    Shape {
        /// Which.
        path: String,
    },
    /// A tenant's list holds something else than hashes.
    #[error("tenant {tenant} in the keys file {path} has an entry that is no hash: put what `ashlar tenant hash` prints, not the key")]
    Hash {
        /// Which.
        path: String,
        /// Whose.
        tenant: String,
    },
}

/// A file of keys that was read at least once: a server never starts without the keys that it was told of.
#[derive(Debug, Clone)]
pub struct KeysFile {
    path: PathBuf,
    records: BTreeMap<TenantName, TenantRecord>,
}

impl KeysFile {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// When it cannot be read or is not of that shape.
    pub fn open(path: &Path) -> Result<Self, KeysFileError> {
        Ok(Self { path: path.to_owned(), records: read(path)? })
    }

    /// Its tenants, with their keys alone.
    pub fn records(&self) -> &BTreeMap<TenantName, TenantRecord> {
        &self.records
    }

    /// Reads it again; what cannot be read leaves the keys as they were: a half-written secret locks nobody out.
    ///
    /// # Errors
    /// As [`KeysFile::open`].
    pub fn read_again(&mut self) -> Result<(), KeysFileError> {
        self.records = read(&self.path)?;
        Ok(())
    }
}

fn read(path: &Path) -> Result<BTreeMap<TenantName, TenantRecord>, KeysFileError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| KeysFileError::Read { path: name.clone(), source })?;
    parse(&text, &name)
}

fn parse(text: &str, path: &str) -> Result<BTreeMap<TenantName, TenantRecord>, KeysFileError> {
    type Table = BTreeMap<String, Vec<String>>;
    let table: Option<Table> = if text.trim_start().starts_with('{') { serde_json::from_str(text).ok() } else { toml::from_str(text).ok() };
    let table = table.ok_or_else(|| KeysFileError::Shape { path: path.to_owned() })?;
    let mut records = BTreeMap::new();
    for (tenant, hashes) in table {
        if hashes.iter().any(|hash| hash.parse::<KeyHash>().is_err()) {
            return Err(KeysFileError::Hash { path: path.to_owned(), tenant });
        }
        let keys = hashes.into_iter().map(|hash| KeyRecord { hash, created_ms: 0 }).collect();
        records.insert(TenantName(tenant), TenantRecord { keys, ..TenantRecord::default() });
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_and_json_give_the_same() {
        let hash = KeyHash::of("ask_x");
        let toml = parse(&format!("acme = [\"{hash}\"]\n"), "f").unwrap();
        assert_eq!(toml, parse(&format!("{{\"acme\": [\"{hash}\"]}}"), "f").unwrap());
        assert_eq!(toml[&TenantName("acme".into())].keys[0].hash, hash.to_string());
    }

    #[test]
    fn file_that_cannot_be_read_is_named_at_the_start_and_changes_nothing_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.toml");
        let error = KeysFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
        std::fs::write(&path, format!("acme = [\"{}\"]", KeyHash::of("ask_x"))).unwrap();
        let mut file = KeysFile::open(&path).unwrap();
        std::fs::write(&path, "acme = [\"").unwrap();
        assert!(file.read_again().is_err());
        assert!(file.records().contains_key(&TenantName("acme".into())));
    }

    #[test]
    fn key_in_place_of_its_hash_is_refused_and_not_shown() {
        let error = parse("acme = [\"ask_secret\"]", "f").unwrap_err();
        assert!(matches!(error, KeysFileError::Hash { .. }) && !format!("{error:?} {error}").contains("secret"));
        assert!(matches!(parse("acme = 1", "f"), Err(KeysFileError::Shape { .. })));
    }
}
