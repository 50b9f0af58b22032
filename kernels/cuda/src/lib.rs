//! The CUDA device: the op set on a graphics card, with the bits of `cpu-v1`. Its kernels are the sources beside this crate's manifest, which are compiled for
//! the card that is found when a device is opened. [`Cuda`] speaks to the card through a [`Driver`]: the tests give it one that runs the same
//! sources on the CPU (`emulated/`), so that no index is believed for want of a card.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

mod arguments;
mod attend;
mod card;
mod chunk;
mod compile;
mod decode;
mod driver;
mod graph;
mod kv;
mod linear;
mod memory;
mod ops;
mod pinned;
mod plain;
mod plan;
mod probe;
mod queue;
mod recordings;
mod rope;
mod runs;
mod scratch;
mod shared;
mod sources;
mod stacked;
mod tape;
mod task;
mod tiles;

use std::sync::{Arc, Mutex};

pub use card::{Card, CardError, Found, find};
pub use compile::{Cache, CompileError, Compiled, architecture, compile, compiler_version, has_compiler};
pub use driver::{Address, Argument, Driver, DriverError, Launch, Recording};
pub use kv::Kv;
pub use linear::Linear;
pub use memory::Memory;
pub use ops::{Buffer, Vector};
pub use recordings::Counts;
pub use sources::{OPTIONS, SOURCES, Source, entries};

use queue::Queue;
use rope::Ropes;
use scratch::Scratch;

/// A device that computes by kernels of CUDA.
pub struct Cuda {
    /// The queue, as whoever takes memory sees it.
    driver: Arc<dyn Driver>,
    queue: Arc<Queue>,
    /// Held by an op from its first list or byte of scratch to its last launch.
    scratch: Mutex<Scratch>,
    ropes: Mutex<Ropes>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({})", self.driver.describe())
    }
}

impl Cuda {
    /// A device over a driver; takes memory for what lives no longer than an op, and for lists.
    ///
    /// # Errors
    /// When the card has no memory for that.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self, DriverError> {
        let queue = Arc::new(Queue::new(driver)?);
        let driver: Arc<dyn Driver> = Arc::clone(&queue) as _;
        let scratch = Mutex::new(Scratch::new(&driver)?);
        Ok(Self { driver, queue, scratch, ropes: Mutex::default() })
    }

    /// What was asked of the card so far.
    pub fn counts(&self) -> Counts {
        self.queue.counts()
    }
}
