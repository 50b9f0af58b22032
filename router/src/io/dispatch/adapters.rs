//! Adapters that administrators load and unload while the server runs: they are added to the zoo, where all routers find them and a restart
//! does, and served as any model is. They come from one folder of the server's machine and from nowhere else.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::ChainDigest;
use ashlar_wire::code::Code;
use ashlar_wire::id::TenantName;
use ashlar_zoo::ingest::{self, AddOptions, IngestError, Recipe, Silent};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::StoreError;
use async_trait::async_trait;
use tokio::time::Instant;

use super::{Dispatch, Shared};
use crate::io::backend::{Administration, ApiError, ModelView, NewAdapter};

/// How long a load waits for an executor to have the adapter.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest path that an error repeats, in characters.
const PATH_CHARS_MAX: usize = 200;

#[async_trait]
impl Administration for Dispatch {
    async fn load_adapter(&self, tenant: &TenantName, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError> {
        let shared = &self.shared;
        let model = shared.administers(tenant, &adapter.name)?;
        let base = adapter.base.as_deref().map(|base| id(tenant, base, "base_model_name")).transpose()?;
        let path = shared.folder_of(&adapter.path).await?;
        let zoo = shared.catalog.zoo();
        let is_there = match zoo.read_model(&model).await {
            Ok(_) => true,
            Err(StoreError::Missing { .. }) => false,
            Err(error) => return Err(out_of_reach(&error)),
        };
        if is_there && !adapter.replaces {
            let message = format!("the model `{model}` is there already: unload it first, or send `\"load_inplace\": true`");
            return Err(ApiError::of_param(Code::ModelExists, "lora_name", message));
        }
        let options = AddOptions { model: model.clone(), recipe: Recipe::Keep, parent: base, source: None };
        let report = ingest::add(zoo, &path, &options, &Silent).await.map_err(|error| refused(&error))?;
        tracing::info!(%model, chain = %report.chain, %tenant, "an adapter was loaded");
        shared.catalog.refresh().await.map_err(|error| out_of_reach(&error))?;
        shared.until_served(&model, ChainDigest(report.chain.0)).await
    }

    async fn unload_adapter(&self, tenant: &TenantName, name: &str) -> Result<String, ApiError> {
        let shared = &self.shared;
        let model = shared.administers(tenant, name)?;
        let zoo = shared.catalog.zoo();
        let missing = || ApiError::of_param(Code::ModelNotFound, "lora_name", format!("the model `{model}` does not exist"));
        let name = match zoo.read_model(&model).await {
            Ok(name) => name,
            Err(StoreError::Missing { .. }) => return Err(missing()),
            Err(error) => return Err(out_of_reach(&error)),
        };
        let chain = zoo.read_chain(name.chain).await.map_err(|error| out_of_reach(&error))?;
        if chain.adapters.is_empty() {
            let message = format!("the model `{model}` is no adapter; `ashlar zoo rm {model}` drops its name");
            return Err(ApiError::of_param(Code::InvalidValue, "lora_name", message));
        }
        match zoo.remove_model(&model).await {
            Ok(()) => {}
            Err(StoreError::Missing { .. }) => return Err(missing()),
            Err(error) => return Err(out_of_reach(&error)),
        }
        tracing::info!(%model, %tenant, "an adapter was unloaded");
        shared.catalog.refresh().await.map_err(|error| out_of_reach(&error))?;
        Ok(model.to_string())
    }
}

impl Shared {
    /// The id that a name means, where the tenant is an administrator.
    fn administers(&self, tenant: &TenantName, name: &str) -> Result<ModelId, ApiError> {
        if !self.cluster.state().tenants.may_administer(tenant) {
            let message = format!("tenant {tenant} may not load and unload adapters: `ashlar tenant add {tenant} --admin` lets it");
            return Err(ApiError::new(Code::Forbidden, message));
        }
        id(tenant, name, "lora_name")
    }

    /// The adapter's folder, within that of adapters whatever links there are.
    async fn folder_of(&self, path: &str) -> Result<PathBuf, ApiError> {
        let shown: String = path.chars().take(PATH_CHARS_MAX).collect();
        let wrong = |why: &str| ApiError::of_param(Code::InvalidValue, "lora_path", format!("`{shown}` {why}"));
        let root = self.options.adapters_root.clone().ok_or_else(|| ApiError::new(Code::NotFound, "this server loads no adapters"))?;
        let named = root.join(path);
        let found = tokio::task::spawn_blocking(move || {
            let folder = named.canonicalize().ok().filter(|folder| folder.starts_with(&root) && *folder != root)?;
            Some((ingest::is_adapter(&folder), folder))
        });
        match found.await.expect("looking does not panic") {
            Some((true, folder)) => Ok(folder),
            Some((false, _)) => Err(wrong("holds no PEFT adapter (a folder with adapter_config.json and adapter_model.safetensors)")),
            None => Err(wrong("is nothing in this server's folder of adapters (router.adapters_root)")),
        }
    }

    /// Waits until some executor has all of a model that was just added.
    async fn until_served(&self, model: &ModelId, chain: ChainDigest) -> Result<Arc<ModelView>, ApiError> {
        let deadline = Instant::now() + SERVED_WITHIN;
        loop {
            let view = self.catalog.view();
            let added = view.models.get(&model.to_string()).filter(|view| view.chain_digest.0 == chain.0);
            let Some(added) = added else {
                let message = format!("the model `{model}` was added, and changed again by somebody else");
                return Err(ApiError::of_param(Code::Unavailable, "lora_name", message));
            };
            let why = match self.assemble(&self.path(added), None, &BTreeSet::new()) {
                Ok(_) => return Ok(added.clone()),
                Err(error) => error.reason,
            };
            if Instant::now() >= deadline {
                return Err(ApiError::new(Code::ModelNotReady, format!("the model `{model}` was added, and cannot be served yet: {why}")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// `tenant/name`, or a bare name: one of the tenant's.
fn id(tenant: &TenantName, name: &str, param: &str) -> Result<ModelId, ApiError> {
    let parsed = if name.contains('/') { name.parse().ok() } else { ModelId::new(&tenant.0, name).ok() };
    parsed.ok_or_else(|| {
        let message = format!(
            "`{param}` must be NAME or TENANT/NAME, each of 1 to 96 letters, digits, `.`, `_` or `-`, beginning with a letter or digit"
        );
        ApiError::of_param(Code::InvalidValue, param, message)
    })
}

/// The adapter's own faults are the administrator's to know, with all their causes.
fn refused(error: &IngestError) -> ApiError {
    if let IngestError::Store(error) = error
        && !matches!(error, StoreError::Missing { .. })
    {
        return out_of_reach(error);
    }
    let (mut message, mut cause) = (error.to_string(), error.source());
    while let Some(inner) = cause {
        message += &format!(": {inner}");
        cause = inner.source();
    }
    ApiError::of_param(Code::AdapterRefused, "lora_path", message)
}

fn out_of_reach(error: &StoreError) -> ApiError {
    tracing::error!(error = error as &dyn Error, "failed to change the zoo");
    ApiError::new(Code::Unavailable, "the zoo cannot be read or changed now")
}

/// The folder of adapters by its real name.
///
/// # Errors
/// When it is no folder that can be looked into.
pub fn adapters_root(path: &Path) -> std::io::Result<PathBuf> {
    let root = path.canonicalize()?;
    if root.is_dir() { Ok(root) } else { Err(std::io::Error::new(std::io::ErrorKind::NotADirectory, "it is no folder")) }
}
