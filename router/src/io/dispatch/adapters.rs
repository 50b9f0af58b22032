//! Adapters that administrators load and unload while the server runs: they are added to the zoo, where all routers find them and a restart
//! does, and served as any model is. They come from one folder of the server's machine and from nowhere else. What a name may be made of and
//! when it may go is `ashlar_zoo::ingest::load`; who may ask, and when an adapter is served, is here.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use ashlar_registry::ChainDigest;
use ashlar_wire::code::Code;
use ashlar_wire::id::TenantName;
use ashlar_zoo::blocking::blocking;
use ashlar_zoo::ingest::{self, AdaptersDir, IngestError, LoadOptions, Silent, UnloadError};
use ashlar_zoo::model_id::ModelId;
use ashlar_zoo::store::{Object, StoreError};
use async_trait::async_trait;
use prometheus::{IntCounterVec, Opts};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{Dispatch, Shared};
use crate::io::backend::{Administration, ApiError, ModelView, NewAdapter};

/// How long a load waits for an executor to have the adapter.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Loads and unloads.
#[derive(Debug)]
pub struct Adapters {
    shared: Arc<Shared>,
    folder: AdaptersDir,
    /// One load or unload at a time: one copy of an adapter's files, and one answer to whoever asks for a name at the same time.
    turn: Mutex<()>,
}

impl Adapters {
    /// Of adapters in `folder`, served by `dispatch`.
    pub fn new(dispatch: &Dispatch, folder: AdaptersDir) -> Self {
        Self { shared: dispatch.shared.clone(), folder, turn: Mutex::default() }
    }

    async fn load(&self, tenant: &TenantName, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError> {
        let model = id(tenant, &adapter.name, "lora_name")?;
        let base = adapter.base.as_deref().map(|base| id(tenant, base, "base_model_name")).transpose()?;
        let report = {
            let _turn = self.turn.lock().await;
            let (folder, path) = (self.folder.clone(), adapter.path);
            let files = blocking(move || folder.open(&path)).await.map_err(|error| refused(&error))?;
            let options = LoadOptions { model: model.clone(), base, replaces: adapter.replaces };
            let zoo = self.shared.catalog.zoo();
            let report = ingest::load(zoo, files, &options, &Silent).await.map_err(|error| refused(&error))?;
            tracing::info!(%model, chain = %report.chain, %tenant, "an adapter was loaded");
            self.shared.catalog.refresh().await.map_err(|error| out_of_reach(&error))?;
            report
        };
        self.shared.until_served(&model, ChainDigest(report.chain.0)).await
    }

    async fn unload(&self, tenant: &TenantName, name: &str) -> Result<String, ApiError> {
        let model = id(tenant, name, "lora_name")?;
        let _turn = self.turn.lock().await;
        let chain = ingest::unload(self.shared.catalog.zoo(), &model).await.map_err(|error| kept(&error))?;
        tracing::info!(%model, %chain, %tenant, "an adapter was unloaded");
        // From here on nobody finds the name at this router.
        self.shared.catalog.refresh().await.map_err(|error| out_of_reach(&error))?;
        Ok(model.to_string())
    }

    fn counted<T>(&self, action: &str, done: Result<T, ApiError>) -> Result<T, ApiError> {
        let code = done.as_ref().err().map_or("ok", |error| error.code.as_str());
        self.shared.adapter_changes.with_label_values(&[action, code]).inc();
        done
    }
}

#[async_trait]
impl Administration for Adapters {
    fn admit(&self, tenant: &TenantName) -> Result<(), ApiError> {
        if self.shared.cluster.state().tenants.may_administer(tenant) {
            return Ok(());
        }
        let message = format!("tenant {tenant} may not load and unload adapters: `ashlar tenant add {tenant} --admin` lets it");
        Err(ApiError::new(Code::Forbidden, message))
    }

    async fn load_adapter(&self, tenant: &TenantName, adapter: NewAdapter) -> Result<Arc<ModelView>, ApiError> {
        self.counted("load", self.load(tenant, adapter).await)
    }

    async fn unload_adapter(&self, tenant: &TenantName, name: &str) -> Result<String, ApiError> {
        self.counted("unload", self.unload(tenant, name).await)
    }
}

/// Loads and unloads, by action and code. Servers that load no adapters show it too, with zeros.
pub(super) fn counter() -> Result<IntCounterVec, prometheus::Error> {
    let help = "Adapters that administrators loaded and unloaded, by action (`load`, `unload`) and code (`ok`, or an error's code).";
    let changes = IntCounterVec::new(Opts::new("ashlar_adapter_changes_total", help), &["action", "code"])?;
    for action in ["load", "unload"] {
        changes.with_label_values(&[action, "ok"]);
    }
    Ok(changes)
}

impl Shared {
    /// Waits until some executor has all of a model that was just added.
    async fn until_served(&self, model: &ModelId, chain: ChainDigest) -> Result<Arc<ModelView>, ApiError> {
        let deadline = Instant::now() + SERVED_WITHIN;
        loop {
            let view = self.catalog.view();
            let added = view.models.get(&model.to_string()).filter(|view| view.chain_digest.0 == chain.0);
            let Some(added) = added else {
                let message = format!("the model `{model}` was loaded, and changed or unloaded again by somebody else");
                return Err(ApiError::of_param(Code::Unavailable, "lora_name", message));
            };
            let why = match self.assemble(&self.path(added), None, &BTreeSet::new()) {
                Ok(_) => return Ok(added.clone()),
                Err(error) => error.reason,
            };
            if Instant::now() >= deadline {
                return Err(ApiError::new(Code::ModelNotReady, format!("the model `{model}` was loaded, and cannot be served yet: {why}")));
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

/// Why an adapter was not loaded. Its own faults are the administrator's to know, with all their causes.
fn refused(error: &IngestError) -> ApiError {
    const BASE: &str = "base_model_name";
    match error {
        IngestError::Outside { .. } => ApiError::of_param(Code::InvalidValue, "lora_path", format!("{error} (router.adapters_dir)")),
        IngestError::Exists(model) => {
            let message = format!(
                "the model `{model}` is there already: unload it first, or send `\"load_inplace\": true`, where it was loaded; where it was added, `ashlar zoo rm` takes it away"
            );
            ApiError::of_param(Code::ModelExists, "lora_name", message)
        }
        IngestError::Contended(_) => ApiError::of_param(Code::Unavailable, "lora_name", error.to_string()),
        IngestError::BaseUnsaid => {
            ApiError::of_param(Code::AdapterRefused, BASE, format!("the adapter does not say what base it is over: send `{BASE}`"))
        }
        IngestError::BaseUnclear { wanted, found } => {
            let message = format!("the adapter asks for the base `{wanted}`, which {} models here may be: send `{BASE}`", found.len());
            ApiError::of_param(Code::AdapterRefused, BASE, message)
        }
        IngestError::BaseAdapted { base, parent } => {
            let message =
                format!("{base} has adapters of its own, and a block has at most one: send `{parent}`, if the adapter was made for it");
            ApiError::of_param(Code::AdapterRefused, BASE, message)
        }
        IngestError::Store(StoreError::Missing { object: Object::Model(base) }) => {
            ApiError::of_param(Code::ModelNotFound, BASE, format!("the model `{base}` does not exist"))
        }
        IngestError::Store(error) => out_of_reach(error),
        _ => {
            let (mut message, mut cause) = (error.to_string(), error.source());
            while let Some(inner) = cause {
                message += &format!(": {inner}");
                cause = inner.source();
            }
            ApiError::of_param(Code::AdapterRefused, "lora_path", message)
        }
    }
}

/// Why a name was not unloaded.
fn kept(error: &UnloadError) -> ApiError {
    let code = match error {
        UnloadError::Store(error) => return out_of_reach(error),
        UnloadError::Missing(model) => {
            return ApiError::of_param(Code::ModelNotFound, "lora_name", format!("the model `{model}` does not exist"));
        }
        UnloadError::NotLoaded(_) => Code::NotLoaded,
        UnloadError::Changed(_) => Code::Unavailable,
    };
    ApiError::of_param(code, "lora_name", error.to_string())
}

fn out_of_reach(error: &StoreError) -> ApiError {
    tracing::error!(error = error as &dyn Error, "failed to change the zoo");
    ApiError::new(Code::Unavailable, "the zoo cannot be read or changed now")
}

#[cfg(test)]
mod tests;
