//! `domains.json`: which tenants' models are there for all to see. It changes by compare-and-swap, as names do; where there is none, nobody
//! is public.

use std::collections::BTreeSet;

use object_store::{GetOptions, PutMode, PutOptions, UpdateVersion};
use serde::{Deserialize, Serialize};

use super::{MANIFEST_BYTES_MAX, Object, StoreError, Zoo, key};
use crate::canonical;
use crate::model_id::is_tenant;

/// Times that a change is tried again after someone else made one.
const ATTEMPTS: usize = 8;

/// What `domains.json` holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domains {
    /// Tenants whose models every other one may see, share and take as a base.
    pub public: BTreeSet<String>,
}

impl Zoo {
    /// Which tenants are public.
    ///
    /// # Errors
    /// When it is damaged, or the store fails.
    pub async fn read_domains(&self) -> Result<Domains, StoreError> {
        match self.read(&Object::Domains, MANIFEST_BYTES_MAX).await {
            Ok(bytes) => parse(&bytes),
            Err(StoreError::Missing { .. }) => Ok(Domains::default()),
            Err(other) => Err(other),
        }
    }

    /// Changes which tenants are public, and returns what holds then. `change` may be asked again where others change it meanwhile.
    ///
    /// # Errors
    /// When it is damaged, others change it faster than this can follow, or the store fails.
    pub async fn update_domains(&self, change: impl Fn(&mut Domains)) -> Result<Domains, StoreError> {
        let key = key(&Object::Domains);
        let failed = |action| move |source| StoreError::Store { action, key: "domains.json".to_owned(), source };
        for _ in 0..ATTEMPTS {
            let _lock = self.lock().await?;
            let read = self.retried(|| async {
                let found = self.inner.store.get_opts(&key, GetOptions::default()).await?;
                let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
                Ok((version, found.bytes().await?))
            });
            let (mut domains, mode) = match read.await {
                Ok((version, bytes)) => {
                    let domains = parse(&bytes)?;
                    (domains, if self.inner.root.is_some() { PutMode::Overwrite } else { PutMode::Update(version) })
                }
                Err(object_store::Error::NotFound { .. }) => (Domains::default(), PutMode::Create),
                Err(source) => return Err(failed("read")(source)),
            };
            let before = domains.clone();
            change(&mut domains);
            if domains == before {
                return Ok(domains);
            }
            let options = PutOptions { mode, ..PutOptions::default() };
            match self.inner.store.put_opts(&key, canonical::to_bytes(&domains).into(), options).await {
                Ok(_) => return Ok(domains),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {}
                // The answer may be what was lost.
                Err(source) => match self.read_domains().await {
                    Ok(now) if now == domains => return Ok(domains),
                    _ => return Err(failed("write")(source)),
                },
            }
        }
        Err(StoreError::DomainsContended)
    }
}

fn parse(bytes: &[u8]) -> Result<Domains, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { object: Object::Domains, reason };
    let domains: Domains = serde_json::from_slice(bytes).map_err(|e| damaged(format!("this build cannot read it: {e}")))?;
    match domains.public.iter().find(|tenant| !is_tenant(tenant)) {
        Some(tenant) => Err(damaged(format!("`{}` is no tenant", tenant.chars().take(100).collect::<String>()))),
        None => Ok(domains),
    }
}
