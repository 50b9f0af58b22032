//! Whose models someone may see: one's own, and those of tenants that the operator declared public (`domains.json`).

use std::collections::BTreeSet;

use crate::model_id::ModelId;
use crate::store::{Domains, StoreError, Zoo};

/// One who looks for relatives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Viewer {
    /// Sees everybody's models: an administrator of servers.
    Administrator,
    /// Sees the models of these tenants.
    Tenant(BTreeSet<String>),
}

impl Viewer {
    /// What `tenant` may see where these domains hold.
    pub fn new(tenant: &str, domains: Domains) -> Self {
        let mut tenants = domains.public;
        tenants.insert(tenant.to_owned());
        Self::Tenant(tenants)
    }

    /// Whether it may see a model.
    pub fn sees(&self, model: &ModelId) -> bool {
        match self {
            Self::Administrator => true,
            Self::Tenant(tenants) => tenants.contains(model.tenant()),
        }
    }
}

impl Zoo {
    /// What a tenant may see now.
    ///
    /// # Errors
    /// When `domains.json` is damaged, or the store fails.
    pub async fn viewer(&self, tenant: &str) -> Result<Viewer, StoreError> {
        Ok(Viewer::new(tenant, self.read_domains().await?))
    }
}
