//! The file `.serving` beside the file of a registry: one `ashlar serve` at a time holds it, and writes into it where its executor answers
//! operators. (Records under leases are in the memory of their process, so no other process finds them in the registry's file.)

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail};
use ashlar_registry::embedded;
use ashlar_wire::id::ExecutorId;

use crate::config::Config;

/// The file of a registry, held for this server alone: two would undo each other's plans.
#[derive(Debug)]
pub struct Serving(File);

impl Serving {
    /// Holds the file of the registry that the configuration names; None for a registry in memory and for etcd.
    ///
    /// # Errors
    /// When another server holds it, or it cannot be made.
    pub fn hold(config: &Config) -> anyhow::Result<Option<Self>> {
        let Some(registry) = registry_file(config)? else { return Ok(None) };
        let path = format!("{registry}.serving");
        // It is not truncated before it is held: another server's address may be in it.
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).with_context(|| format!("create {path}"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("hold {registry}: another `ashlar serve` runs on it; give this one --registry memory: or a file of its own");
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("lock {path}")),
        }
        // A server that was killed left its address.
        file.set_len(0).with_context(|| format!("write {path}"))?;
        Ok(Some(Self(file)))
    }

    /// Writes where this server's executor answers operators.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn tell(&mut self, id: &ExecutorId, address: SocketAddr) -> std::io::Result<()> {
        self.0.write_all(format!("{id} {address}\n").as_bytes())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // What stays is the address of nobody, and whoever asks there finds that out.
        let _ = self.0.set_len(0);
    }
}

/// The file of the registry that the configuration names, by the name that all links to it lead to; None for a registry in memory and
/// for etcd.
///
/// # Errors
/// When the registry refuses the file for its links, or none is named and the zoo is in a bucket.
pub fn registry_file(config: &Config) -> anyhow::Result<Option<String>> {
    let url = config.registry_url()?;
    if url == "memory:" || url.starts_with("etcd://") {
        return Ok(None);
    }
    let path = url.strip_prefix("file:").unwrap_or(&url).to_owned();
    let resolved = embedded::resolve(Path::new(&path)).with_context(|| format!("find registry {path}"))?;
    Ok(Some(resolved.display().to_string()))
}

/// The executor of the server that holds a registry's file, and where it answers operators; None where no server runs.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn told(registry: &str) -> anyhow::Result<Option<(ExecutorId, String)>> {
    let path = format!("{registry}.serving");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {path}")),
    };
    Ok(text.trim_end().split_once(' ').map(|(id, address)| (ExecutorId(id.to_owned()), address.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_holds_a_registry_and_tells_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let registry = folder.path().canonicalize().unwrap().join("registry.json").display().to_string();
        let mut config = Config::default();
        config.registry.url = format!("file:{registry}");
        assert_eq!(registry_file(&config).unwrap(), Some(registry.clone()));
        assert_eq!(told(&registry).unwrap(), None);

        let mut held = Serving::hold(&config).unwrap().unwrap();
        assert_eq!(told(&registry).unwrap(), None, "it does not answer yet");
        held.tell(&ExecutorId("exe_a".to_owned()), "127.0.0.1:4321".parse().unwrap()).unwrap();
        let here = Some((ExecutorId("exe_a".to_owned()), "127.0.0.1:4321".to_owned()));
        assert_eq!(told(&registry).unwrap(), here);
        assert!(Serving::hold(&config).unwrap_err().to_string().contains("another `ashlar serve`"));
        assert_eq!(told(&registry).unwrap(), here, "who may not hold it leaves it as it is");

        drop(held);
        assert_eq!(told(&registry).unwrap(), None);
        std::fs::write(format!("{registry}.serving"), "exe_killed 127.0.0.1:4321\n").unwrap();
        let _again = Serving::hold(&config).unwrap().unwrap();
        assert_eq!(told(&registry).unwrap(), None, "what a killed server left is gone");
    }

    #[cfg(unix)]
    #[test]
    fn a_registry_is_held_whatever_link_leads_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("real")).unwrap();
        std::fs::write(at("real/registry.json"), "").unwrap();
        std::os::unix::fs::symlink("real/registry.json", at("link.json")).unwrap();
        std::os::unix::fs::symlink("real", at("folder")).unwrap();
        let config_of = |name: &str| {
            let mut config = Config::default();
            config.registry.url = format!("file:{}", at(name).display());
            config
        };
        let mut held = Serving::hold(&config_of("link.json")).unwrap().unwrap();
        held.tell(&ExecutorId("exe_a".to_owned()), "127.0.0.1:4321".parse().unwrap()).unwrap();
        for name in ["real/registry.json", "folder/registry.json", "link.json"] {
            assert!(Serving::hold(&config_of(name)).unwrap_err().to_string().contains("another `ashlar serve`"), "{name}");
            assert!(told(&registry_file(&config_of(name)).unwrap().unwrap()).unwrap().is_some(), "{name}");
        }
        assert!(!at("link.json.serving").exists() && at("real/registry.json.serving").exists());
        // One that is not made yet is held by its folder's name.
        let _held = Serving::hold(&config_of("folder/new.json")).unwrap().unwrap();
        assert!(Serving::hold(&config_of("real/new.json")).is_err());
    }

    #[test]
    fn registries_without_a_file_are_held_by_nobody() {
        for url in ["memory:", "etcd://127.0.0.1:2379"] {
            let mut config = Config::default();
            config.registry.url = url.to_owned();
            assert!(Serving::hold(&config).unwrap().is_none(), "{url}");
        }
    }
}
