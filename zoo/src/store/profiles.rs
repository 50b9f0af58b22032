//! `profiles/<block>/<device>.json`: what a block was measured to cost on a kind of device. Measuring again replaces the device's record and
//! no other. Records go with their block.

use super::{Object, StoreError, Zoo};
use crate::digest::Digest;
use crate::profiles::{DeviceKey, PROFILE_BYTES_MAX, Profile};

impl Zoo {
    /// Stores the record of a block that is there, in place of the device's present one. Readers see one or the other, whole.
    ///
    /// # Errors
    /// When the store fails.
    ///
    /// # Panics
    /// When the record does not pass [`Profile::check`]: who measured has checked it.
    pub async fn put_profile(&self, profile: &Profile) -> Result<(), StoreError> {
        assert!(profile.check().is_ok(), "a profile is checked before it is stored: {:?}", profile.check());
        let object = Object::Profile { block: profile.block, device: profile.device.clone() };
        self.write(&object, vec![profile.to_bytes().into()]).await
    }

    /// The record of a block on a device.
    ///
    /// # Errors
    /// When it is missing or damaged, or the store fails.
    pub async fn read_profile(&self, block: Digest, device: &DeviceKey) -> Result<Profile, StoreError> {
        let object = Object::Profile { block, device: device.clone() };
        let bytes = self.read(&object, PROFILE_BYTES_MAX).await?;
        let damaged = |reason: String| StoreError::Damaged { object: object.clone(), reason };
        let profile = Profile::parse(&bytes).map_err(|e| damaged(e.to_string()))?;
        if (profile.block, &profile.device) != (block, device) {
            return Err(damaged(format!("it is that of block {} on {}", profile.block, profile.device)));
        }
        Ok(profile)
    }
}
