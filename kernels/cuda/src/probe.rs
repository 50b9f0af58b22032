//! What a card reaches at best: the rate at which it reads its memory. Whoever measures steps holds them against it.

use std::time::{Duration, Instant};

use crate::Cuda;
use crate::driver::{Argument, DriverError};
use crate::memory::Memory;

/// Reads that are launched before they are waited for, so that waiting is a small part.
const LAUNCHES: u32 = 8;
/// Ctas of a read: some on each multiprocessor of any card.
const CTAS: u32 = 132 * 8;

impl Cuda {
    /// Waits for all that was asked of the card.
    ///
    /// # Errors
    /// When the card failed at any of it.
    pub fn wait(&self) -> Result<(), DriverError> {
        let scratch = self.scratch();
        self.fetch(&scratch, scratch.memory_at_start(), &mut [0; 4])
    }

    /// Bytes a second at which so many bytes are read, best of what `seconds` allow; they should be many times the card's cache.
    ///
    /// # Errors
    /// When the card has no memory for them, or fails.
    #[expect(clippy::disallowed_methods, reason = "a measurement reads the real clock")]
    pub fn read_bandwidth(&self, bytes: usize, seconds: Duration) -> Result<f64, DriverError> {
        let memory = Memory::new(&self.driver, bytes.next_multiple_of(16))?;
        self.driver.zero(memory.address(), memory.bytes())?;
        let out = Memory::new(&self.driver, 4)?;
        let arguments = [memory.address().into(), Argument::Long((memory.bytes() / 16) as u64), out.address().into()];
        let (begin, mut best) = (Instant::now(), Duration::MAX);
        while best == Duration::MAX || begin.elapsed() < seconds {
            self.wait()?;
            let start = Instant::now();
            for _ in 0..LAUNCHES {
                self.launch("read_all", [CTAS, 1, 1], 256, 0, &arguments)?;
            }
            self.wait()?;
            best = best.min(start.elapsed());
        }
        Ok(memory.bytes() as f64 * f64::from(LAUNCHES) / best.as_secs_f64())
    }
}
