//! `measures/<chain>/<record>.json`: what was measured of a chain that approximates another one. Records are immutable and go with their
//! chain; a chain may have several, of several texts or sources.

use super::{Object, StoreError, Zoo, object};
use crate::canonical;
use crate::digest::Digest;
use crate::measures::{MEASURE_BYTES_MAX, MEASURES_SHOWN_MAX, Measure};

impl Zoo {
    /// Stores a record of a chain that is there. Returns the record's digest; writing it twice is harmless.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the record does not pass [`Measure::check`]: who measured has checked it.
    pub async fn put_measure(&self, chain: Digest, measure: &Measure) -> Result<Digest, StoreError> {
        assert_eq!(measure.check(), Ok(()));
        let bytes = canonical::to_bytes(measure);
        let record = Digest::of(&bytes);
        self.put(&Object::Measure { chain, record }, vec![bytes.into()]).await?;
        Ok(record)
    }

    /// One record of a chain.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_measure(&self, chain: Digest, record: Digest) -> Result<Measure, StoreError> {
        let object = Object::Measure { chain, record };
        let measure: Measure = self.read_json(object.clone(), record, MEASURE_BYTES_MAX).await?;
        measure.check().map_err(|e| StoreError::Damaged { object, reason: e.to_string() })?;
        Ok(measure)
    }

    /// What was measured of a chain, newest first, at most [`MEASURES_SHOWN_MAX`] records. Damaged ones are left out; `verify` tells of them.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn read_measures(&self, chain: Digest) -> Result<Vec<Measure>, StoreError> {
        let mut metas = self.list(&format!("measures/{chain}")).await?;
        // Of many the latest written are read; a record that was renewed since is none the worse for it.
        metas.sort_by_key(|meta| std::cmp::Reverse((meta.last_modified, meta.location.clone())));
        let mut measures = Vec::new();
        for meta in metas {
            let Some(Object::Measure { record, .. }) = object(&meta.location) else { continue };
            match self.read_measure(chain, record).await {
                Ok(measure) => measures.push(measure),
                Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => {}
                Err(other) => return Err(other),
            }
            if measures.len() == MEASURES_SHOWN_MAX {
                break;
            }
        }
        measures.sort_by(|a, b| b.created_ms.cmp(&a.created_ms).then_with(|| a.method.cmp(&b.method)));
        Ok(measures)
    }
}
