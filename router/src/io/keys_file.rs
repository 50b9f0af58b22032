//! Keys from a file, for a mounted secret: tenant -> list of key hashes, as TOML (`acme = ["<64 hex digits>"]`) or JSON.

use std::collections::BTreeMap;
use std::path::Path;

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

/// Reads the file.
///
/// # Errors
/// When it cannot be read or is not of that shape.
pub fn read(path: &Path) -> Result<BTreeMap<TenantName, TenantRecord>, KeysFileError> {
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
    fn key_in_place_of_its_hash_is_refused_and_not_shown() {
        let error = parse("acme = [\"ask_secret\"]", "f").unwrap_err();
        assert!(matches!(error, KeysFileError::Hash { .. }) && !format!("{error:?} {error}").contains("secret"));
        assert!(matches!(parse("acme = 1", "f"), Err(KeysFileError::Shape { .. })));
    }
}
