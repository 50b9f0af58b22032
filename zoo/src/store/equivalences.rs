//! `equivalences/<digest>.json`: records of measured equivalence (`equivalence.rs`). Each is known by its digest and never changes; to revoke one is
//! to take it away.

use object_store::ObjectStoreExt;

use super::{Object, Put, StoreError, Zoo, key, object};
use crate::canonical;
use crate::digest::Digest;
use crate::equivalence::{Equivalence, exchanged};
use crate::manifest::Chain;

impl Zoo {
    /// A record.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_equivalence(&self, digest: Digest) -> Result<Equivalence, StoreError> {
        let record: Equivalence = self.read_manifest(Object::Equivalence(digest), digest).await?;
        record.check().map_err(|e| StoreError::Damaged { object: Object::Equivalence(digest), reason: e.to_string() })?;
        Ok(record)
    }

    /// The records that there are, by digest, in order.
    ///
    /// # Errors
    /// When the store cannot list.
    pub async fn list_equivalences(&self) -> Result<Vec<Digest>, StoreError> {
        let metas = self.list("equivalences").await?;
        let as_record = |meta: &object_store::ObjectMeta| match object(&meta.location) {
            Some(Object::Equivalence(digest)) => Some(digest),
            _ => None,
        };
        let mut digests: Vec<Digest> = metas.iter().filter_map(as_record).collect();
        digests.sort();
        Ok(digests)
    }

    /// Stores the chains of a record's steps, which exchange blocks of `chain`, and then the record. Both models are there.
    ///
    /// # Errors
    /// When a block that stands in is gone by now, or the store fails; then nothing leads to what was stored.
    ///
    /// # Panics
    /// When the record does not pass [`Equivalence::check`], or `chain` is not the one that it is of.
    pub async fn store_equivalence(&self, chain: &Chain, record: &Equivalence) -> Result<Digest, StoreError> {
        assert_eq!(canonical::digest(chain), record.chain, "the chain that the record is of");
        self.storing(|| self.store_equivalence_once(chain, record)).await
    }

    async fn store_equivalence_once(&self, chain: &Chain, record: &Equivalence) -> Result<Digest, StoreError> {
        // The other model may lose its name while this is written.
        for step in &record.steps {
            for tensor in self.read_block(step.other).await?.tensors.values() {
                self.renew(&Object::Tensor(tensor.digest)).await?;
            }
            self.renew(&Object::Block(step.other)).await?;
        }
        for count in 1..=record.steps.len() {
            let swaps = record.steps[..count].iter().map(|step| (step.block_index as usize, step.other));
            self.put_chain(&exchanged(chain, swaps)).await?;
        }
        Ok(self.put_equivalence(record).await?.0)
    }

    /// Stores a record; its chains are there already.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When it does not pass [`Equivalence::check`].
    pub async fn put_equivalence(&self, record: &Equivalence) -> Result<(Digest, Put), StoreError> {
        assert_eq!(record.check(), Ok(()));
        let bytes = canonical::to_bytes(record);
        let digest = Digest::of(&bytes);
        Ok((digest, self.put(&Object::Equivalence(digest), vec![bytes.into()]).await?))
    }

    /// Revokes a record. What its chains have of their own stays until `gc`.
    ///
    /// # Errors
    /// When there is none, or the store fails.
    pub async fn remove_equivalence(&self, digest: Digest) -> Result<(), StoreError> {
        let object = Object::Equivalence(digest);
        let _lock = self.lock().await?;
        if self.head(&object).await?.is_none() {
            return Err(StoreError::Missing { object });
        }
        let key = key(&object);
        self.inner.store.delete(&key).await.map_err(|source| StoreError::Store { action: "delete", key: key.to_string(), source })
    }
}
