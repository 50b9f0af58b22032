//! The CUDA device: the op set on a graphics card, with the bits of `cpu-v1`. Its kernels are the sources beside this crate's manifest, which are compiled for
//! the card that is found when a device is opened. [`Cuda`] speaks to the card through a [`Driver`]: the tests give it one that runs the same
//! sources on the CPU (`emulated/`), so that no index is believed for want of a card.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

mod arguments;
mod card;
mod compile;
mod decode;
mod driver;
mod kv;
mod linear;
mod memory;
mod ops;
mod probe;
mod scratch;
mod sources;
mod tiles;

use std::sync::{Arc, Mutex};

pub use card::{Card, CardError, Found, find};
pub use compile::{Cache, CompileError, Compiled, architecture, compile, compiler_version, has_compiler};
pub use driver::{Address, Argument, Driver, DriverError, Launch};
pub use kv::Kv;
pub use linear::Linear;
pub use memory::Memory;
pub use ops::{Buffer, Vector};
pub use sources::{OPTIONS, SOURCES, Source, entries};

use scratch::Scratch;

/// A device that computes by kernels of CUDA.
pub struct Cuda {
    driver: Arc<dyn Driver>,
    scratch: Mutex<Scratch>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({})", self.driver.describe())
    }
}

impl Cuda {
    /// A device over a driver; takes memory for what lives no longer than an op.
    ///
    /// # Errors
    /// When the card has no memory for that.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self, DriverError> {
        let scratch = Mutex::new(Scratch::new(&driver)?);
        Ok(Self { driver, scratch })
    }
}
