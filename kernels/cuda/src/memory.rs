//! Memory of a card that is given back when it is dropped.

use std::sync::Arc;

use crate::driver::{Address, Driver, DriverError};
use ashlar_kernels::ops::PackError;

/// So many bytes of a card.
pub struct Memory {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// Takes memory.
    ///
    /// # Errors
    /// When the card has not so much left, or fails.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DriverError> {
        // Nothing is a place too.
        let address = driver.allocate(bytes.max(1))?;
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    /// Takes memory and copies bytes there.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub fn holding(driver: &Arc<dyn Driver>, bytes: &[u8]) -> Result<Self, DriverError> {
        let memory = Self::new(driver, bytes.len())?;
        driver.fill(memory.address, bytes)?;
        Ok(memory)
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A place in it, so many bytes from its beginning, with so many bytes from there on.
    ///
    /// # Panics
    /// When that is not inside.
    pub fn at(&self, start: usize, bytes: usize) -> Address {
        assert!(start.checked_add(bytes).is_some_and(|end| end <= self.bytes), "{bytes} bytes from {start} of {}", self.bytes);
        self.address.plus(start)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({} bytes)", self.bytes)
    }
}

impl From<DriverError> for PackError {
    fn from(error: DriverError) -> Self {
        match error {
            DriverError::Memory { bytes } => Self::Memory(bytes),
            failed @ DriverError::Failed { .. } => Self::Device(failed.to_string()),
        }
    }
}
