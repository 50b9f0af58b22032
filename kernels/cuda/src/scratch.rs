//! What lives no longer than an op: sums of slices, quantised rows, indices. All ops of a device run in order, so each begins with all of it free.

use std::sync::Arc;

use crate::driver::{Address, Driver, DriverError};
use crate::memory::Memory;

/// Bytes at first. Partial sums are cut to rows that fit; what cannot be cut (page tables of a batch) makes it grow.
const BYTES: usize = 64 << 20;
const ALIGNMENT: usize = 256;

/// Memory that is given out from its beginning, anew for each op.
pub(crate) struct Scratch {
    memory: Memory,
    used: usize,
}

impl Scratch {
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> Result<Self, DriverError> {
        Ok(Self { memory: Memory::new(driver, BYTES)?, used: 0 })
    }

    /// All of it is free again, and at least so much.
    pub(crate) fn begin(&mut self, driver: &Arc<dyn Driver>, bytes: usize) -> Result<(), DriverError> {
        self.used = 0;
        if bytes > self.memory.bytes() {
            // What was asked in order before may still use the old one, which is given back after that.
            self.memory = Memory::new(driver, bytes.next_power_of_two())?;
        }
        Ok(())
    }

    /// The next so many bytes.
    ///
    /// # Panics
    /// When fewer are left: whoever begins an op says what it takes.
    pub(crate) fn take(&mut self, bytes: usize) -> Address {
        let address = self.memory.at(self.used, bytes);
        self.used = (self.used + bytes).next_multiple_of(ALIGNMENT);
        address
    }

    /// A place that is always there.
    pub(crate) fn memory_at_start(&self) -> Address {
        self.memory.address()
    }
}
