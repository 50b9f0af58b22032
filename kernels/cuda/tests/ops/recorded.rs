//! A card that remembers what it was asked for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ashlar_cuda::{Address, Cuda, Driver, DriverError, Launch};
use ashlar_kernels::ops::Ops;

use super::open;

/// What was asked of a card in order, copies to it being `send`.
#[derive(Clone, Default)]
pub(super) struct Record(Arc<Mutex<Vec<&'static str>>>);

impl Record {
    fn calls(&self) -> MutexGuard<'_, Vec<&'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was asked since the last time, now that it has happened.
    pub(super) fn take(&self, cuda: &Cuda) -> Vec<&'static str> {
        cuda.submit();
        std::mem::take(&mut *self.calls())
    }
}

struct Recorded {
    card: Arc<dyn Driver>,
    record: Record,
}

/// A device whose card remembers, where there is one.
pub(super) fn recorded() -> Option<(Cuda, Record)> {
    let record = Record::default();
    let card = Recorded { card: open()?, record: record.clone() };
    Some((Cuda::new(Arc::new(card)).unwrap(), record))
}

impl Driver for Recorded {
    fn describe(&self) -> String {
        self.card.describe()
    }
    fn shared_bytes_max(&self) -> usize {
        self.card.shared_bytes_max()
    }
    fn memory_bytes(&self) -> Result<(u64, u64), DriverError> {
        self.card.memory_bytes()
    }
    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        self.card.allocate(bytes)
    }
    fn free(&self, memory: Address) {
        self.card.free(memory);
    }
    fn fill(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.card.fill(to, bytes)
    }
    fn send(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.record.calls().push("send");
        self.card.send(to, bytes)
    }
    fn zero(&self, to: Address, bytes: usize) -> Result<(), DriverError> {
        self.card.zero(to, bytes)
    }
    fn fetch(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.card.fetch(from, bytes)
    }
    fn prepare(&self, kernel: &'static str) -> Result<(), DriverError> {
        self.card.prepare(kernel)
    }
    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.record.calls().push(launch.kernel);
        self.card.launch(launch)
    }
}
