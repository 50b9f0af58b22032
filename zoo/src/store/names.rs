//! `models/<tenant>/<name>.json`, what people change: read, listed, and set by compare-and-swap. A local
//! directory is locked by a file for the swap (its store has no conditional update); elsewhere the put is conditional.

use std::collections::BTreeMap;
use std::fs::File;

use object_store::{GetOptions, ObjectStoreExt, PutMode, PutOptions, UpdateVersion};

use super::{MANIFEST_BYTES_MAX, Object, StoreError, Zoo, key, object};
use crate::blocking::blocking;
use crate::canonical;
use crate::manifest::ModelName;
use crate::model_id::ModelId;

/// Names as they were when they were last listed, each with the tag that tells whether it changed since.
#[derive(Debug, Default)]
pub struct KnownNames(BTreeMap<ModelId, (String, ModelName)>);

/// Held while a local name changes or an object is deleted; released on drop.
pub(crate) struct Lock(Option<File>);

impl Zoo {
    /// What a name points to.
    ///
    /// # Errors
    /// When there is no such name, it is damaged, or the store fails.
    pub async fn read_model(&self, id: &ModelId) -> Result<ModelName, StoreError> {
        let object = Object::Model(id.clone());
        let bytes = self.read(&object, MANIFEST_BYTES_MAX).await?;
        parse(object, &bytes)
    }

    /// All names, in order. One that cannot be read is an error in its place, so that the others are still listed.
    ///
    /// # Errors
    /// When the store cannot list.
    pub async fn list_models(&self) -> Result<Vec<(ModelId, Result<ModelName, StoreError>)>, StoreError> {
        let ids = self.model_ids(None).await?;
        let mut models = Vec::with_capacity(ids.len());
        for id in ids {
            match self.read_model(&id).await {
                Err(StoreError::Missing { .. }) => {} // Removed since the listing.
                model => models.push((id, model)),
            }
        }
        Ok(models)
    }

    /// All names, as [`Zoo::list_models`]. Where a listing tells by tags which names changed, and reads cost requests, as in a bucket, those that did
    /// not are taken from `known`.
    ///
    /// # Errors
    /// When the store cannot list.
    pub async fn list_changed(&self, known: &mut KnownNames) -> Result<Vec<(ModelId, Result<ModelName, StoreError>)>, StoreError> {
        if self.inner.root.is_some() {
            return self.list_models().await;
        }
        let listed = self.list("models").await?.into_iter();
        let tags: BTreeMap<ModelId, Option<String>> =
            listed.filter_map(|meta| Some((as_model(object(&meta.location)?)?, meta.e_tag))).collect();
        let mut models = Vec::with_capacity(tags.len());
        let mut now = KnownNames::default();
        for (id, tag) in tags {
            let model = match known.0.remove(&id) {
                Some((known, model)) if Some(&known) == tag.as_ref() => Ok(model),
                _ => self.read_model(&id).await,
            };
            match (&model, tag) {
                (Err(StoreError::Missing { .. }), _) => continue, // Removed since the listing.
                // Where it changed since the listing its next tag differs from this one, and it is read again.
                (Ok(model), Some(tag)) => {
                    now.0.insert(id.clone(), (tag, model.clone()));
                }
                _ => {}
            }
            models.push((id, model));
        }
        *known = now;
        Ok(models)
    }

    /// The names that there are, of all tenants or of one, in order.
    pub(crate) async fn model_ids(&self, tenant: Option<&str>) -> Result<Vec<ModelId>, StoreError> {
        let folder = tenant.map_or_else(|| "models".to_owned(), |tenant| format!("models/{tenant}"));
        let metas = self.list(&folder).await?;
        let mut ids: Vec<ModelId> = metas.iter().filter_map(|meta| as_model(object(&meta.location)?)).collect();
        ids.sort();
        Ok(ids)
    }

    /// Sets a name, if it still is `expected` (`None`: if it does not exist).
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it is something else by now.
    pub async fn set_model(&self, id: &ModelId, expected: Option<&ModelName>, new: &ModelName) -> Result<(), StoreError> {
        let key = key(&Object::Model(id.clone()));
        let _lock = self.lock().await?;
        let failed = |source| match source {
            object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => StoreError::Conflict { id: id.clone() },
            source => StoreError::Store { action: "write", key: key.to_string(), source },
        };
        let mode = match expected {
            None => PutMode::Create,
            Some(expected) => self.swap_mode(id, expected).await?,
        };
        let options = PutOptions { mode, ..PutOptions::default() };
        let Err(source) = self.inner.store.put_opts(&key, canonical::to_bytes(new).into(), options).await else { return Ok(()) };
        // The answer may be what was lost, or the refusal be of a second request after a first one that was done: what the name is now decides.
        match self.read_model(id).await {
            Ok(now) if now == *new => Ok(()),
            _ => Err(failed(source)),
        }
    }

    /// Drops a name; its objects stay until `gc`.
    ///
    /// # Errors
    /// When there is no such name, or the store fails.
    pub async fn remove_model(&self, id: &ModelId) -> Result<(), StoreError> {
        let object = Object::Model(id.clone());
        let _lock = self.lock().await?;
        if self.head(&object).await?.is_none() {
            return Err(StoreError::Missing { object });
        }
        self.delete_name(id).await
    }

    /// Drops a name, if it still is `expected`. Where the store is remote, names can be swapped and not be dropped by condition: it is looked at
    /// right before.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it is something else by now, or gone.
    pub async fn remove_model_if(&self, id: &ModelId, expected: &ModelName) -> Result<(), StoreError> {
        let _lock = self.lock().await?;
        self.swap_mode(id, expected).await?;
        self.delete_name(id).await
    }

    /// Not tried again: someone may have set the name since.
    async fn delete_name(&self, id: &ModelId) -> Result<(), StoreError> {
        let object = Object::Model(id.clone());
        let key = key(&object);
        let Err(source) = self.inner.store.delete(&key).await else { return Ok(()) };
        // The answer may be what was lost.
        match self.head(&object).await {
            Ok(None) => Ok(()),
            _ => Err(StoreError::Store { action: "delete", key: key.to_string(), source }),
        }
    }

    /// The lock of a local directory, shared by all processes that use it. Elsewhere nothing: stores compare themselves.
    pub(crate) async fn lock(&self) -> Result<Lock, StoreError> {
        let Some(root) = &self.inner.root else { return Ok(Lock(None)) };
        let path = root.join(".lock");
        let failed = |source| StoreError::File { action: "lock", path: path.display().to_string(), source };
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        let locked = blocking(move || file.lock().map(|()| file)).await;
        Ok(Lock(Some(locked.map_err(failed)?)))
    }

    /// How to put so that only `expected` is replaced. The caller holds the lock.
    async fn swap_mode(&self, id: &ModelId, expected: &ModelName) -> Result<PutMode, StoreError> {
        let object = Object::Model(id.clone());
        let key = key(&object);
        let failed = |source| match source {
            object_store::Error::NotFound { .. } => StoreError::Conflict { id: id.clone() },
            source => StoreError::Store { action: "read", key: key.to_string(), source },
        };
        let read = self.retried(|| async {
            let result = self.inner.store.get_opts(&key, GetOptions::default()).await?;
            let version = UpdateVersion { e_tag: result.meta.e_tag.clone(), version: result.meta.version.clone() };
            Ok((version, result.bytes().await?))
        });
        let (version, bytes) = read.await.map_err(failed)?;
        if parse(object, &bytes)? != *expected {
            return Err(StoreError::Conflict { id: id.clone() });
        }
        Ok(if self.inner.root.is_some() { PutMode::Overwrite } else { PutMode::Update(version) })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(file) = self.0.take() {
            // Closing the file releases the lock as well; unlocking first makes it prompt where a child inherited it.
            let _ = file.unlock();
        }
    }
}

fn parse(object: Object, bytes: &[u8]) -> Result<ModelName, StoreError> {
    serde_json::from_slice(bytes).map_err(|e| StoreError::Damaged { object, reason: format!("this build cannot read it: {e}") })
}

fn as_model(object: Object) -> Option<ModelId> {
    match object {
        Object::Model(id) => Some(id),
        _ => None,
    }
}
