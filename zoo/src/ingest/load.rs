//! Adapters that come and go while servers run. A load makes a name that was not there, marked as loaded and without a history; an unload
//! drops a name that has the mark, and no other. Both compare and swap, so that of two at one time one wins and the other is told.

use super::IngestError;
use super::adapter::{AdapterFiles, prepare};
use super::add::{AddOptions, now_ms};
use super::report::{AddReport, Progress};
use crate::digest::Digest;
use crate::manifest::ModelName;
use crate::model_id::ModelId;
use crate::relatives::Viewer;
use crate::store::{StoreError, Zoo};

/// What a load was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    /// The name to make.
    pub model: ModelId,
    /// The model that it is over; `None`: the one that the adapter asks for.
    pub base: Option<ModelId>,
    /// Whether a name that was loaded before is to mean this adapter from now on.
    pub replaces: bool,
}

/// Why a name was not unloaded. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum UnloadError {
    /// There is no such name.
    #[error("{0} is not in the zoo")]
    Missing(ModelId),
    /// It was added, not loaded.
    #[error("{0} was added to the zoo, not loaded: `ashlar zoo rm {0}` drops its name")]
    NotLoaded(ModelId),
    /// Somebody else changed it at the same time.
    #[error("{0} was changed by someone else meanwhile")]
    Changed(ModelId),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
}

/// Adds an adapter, for an administrator, under a name that is not there yet, or means this very chain already. The name is looked at before anything is written, and
/// again when it is made. What a replaced name meant is not kept: `gc` takes it.
///
/// # Errors
/// As `add`, and [`IngestError::Exists`] where the name means another chain.
pub async fn load(zoo: &Zoo, files: AdapterFiles, options: &LoadOptions, progress: &dyn Progress) -> Result<AddReport, IngestError> {
    // Raw, as somebody waits for it.
    let add = AddOptions { parent: options.base.clone(), compress: false, ..AddOptions::new(options.model.clone()) };
    let prepared = prepare(zoo, files, &add, &Viewer::Administrator, progress).await?;
    let model = &options.model;
    let free = Free { options, chain: prepared.digest };
    free.check(current(zoo, model).await?.as_ref())?;
    let done = prepared.store(zoo, &add, progress).await?;
    let found = current(zoo, model).await?;
    let is_there = free.check(found.as_ref())?;
    if !is_there {
        let new = ModelName { chain: prepared.digest, created_ms: now_ms(), parent: prepared.parent(), history: Vec::new(), loaded: true };
        match zoo.set_model(model, found.as_ref(), &new).await {
            // Whoever came first may have made the same of it.
            Err(StoreError::Conflict { .. }) if free.check(current(zoo, model).await?.as_ref())? => {}
            Err(StoreError::Conflict { .. }) => return Err(IngestError::Contended(model.clone())),
            set => set?,
        }
    }
    let replaced = found.map(|found| found.chain).filter(|chain| *chain != prepared.digest);
    Ok(prepared.report(model, replaced, done))
}

/// Drops a name that was loaded. Returns the chain that it meant.
///
/// # Errors
/// What it is instead, or that the store failed.
pub async fn unload(zoo: &Zoo, model: &ModelId) -> Result<Digest, UnloadError> {
    let found = current(zoo, model).await.map_err(UnloadError::Store)?.ok_or_else(|| UnloadError::Missing(model.clone()))?;
    if !found.loaded {
        return Err(UnloadError::NotLoaded(model.clone()));
    }
    match zoo.remove_model_if(model, &found).await {
        Ok(()) => Ok(found.chain),
        Err(StoreError::Conflict { .. }) if current(zoo, model).await.map_err(UnloadError::Store)?.is_none() => {
            Err(UnloadError::Missing(model.clone()))
        }
        Err(StoreError::Conflict { .. }) => Err(UnloadError::Changed(model.clone())),
        Err(error) => Err(UnloadError::Store(error)),
    }
}

/// Whether a load may have its name.
struct Free<'a> {
    options: &'a LoadOptions,
    chain: Digest,
}

impl Free<'_> {
    /// Whether the name means the chain already.
    fn check(&self, current: Option<&ModelName>) -> Result<bool, IngestError> {
        match current {
            None => Ok(false),
            Some(current) if current.chain == self.chain => Ok(true),
            Some(current) if current.loaded && self.options.replaces => Ok(false),
            Some(_) => Err(IngestError::Exists(self.options.model.clone())),
        }
    }
}

async fn current(zoo: &Zoo, model: &ModelId) -> Result<Option<ModelName>, StoreError> {
    match zoo.read_model(model).await {
        Ok(current) => Ok(Some(current)),
        Err(StoreError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
