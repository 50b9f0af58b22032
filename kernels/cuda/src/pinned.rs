//! Memory of the host that the card reads and writes by itself: what is sent is copied there, and the caller goes on.

use std::ptr::NonNull;

use cudarc::driver::result::{self, DriverError as CudaError};
use cudarc::driver::sys;

use crate::card::lost;
use crate::driver::{Address, DriverError};

/// Bytes of a half. What is larger is sent piece by piece.
const HALF_BYTES: usize = 4 << 20;

/// Two halves, of which one is filled while the other may still be read by the card.
pub(crate) struct Pinned {
    memory: NonNull<u8>,
    /// Set when a half was filled: the card has read it when that has happened.
    read: [sys::CUevent; 2],
    half: usize,
    /// Of the half.
    used: usize,
}

// SAFETY: memory and events are the driver's and may be used from any thread, one at a time, which the lock around this sees to.
unsafe impl Send for Pinned {}

impl Pinned {
    /// For the context that is current.
    pub(crate) fn new() -> Result<Self, CudaError> {
        // SAFETY: what it holds is written before it is read.
        let memory = unsafe { result::malloc_host(2 * HALF_BYTES, 0) }?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let memory = NonNull::new(memory.cast()).expect("the driver gives memory or an error");
        Ok(Self { memory, read: [event()?, event()?], half: 0, used: 0 })
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= HALF_BYTES, "inside a half");
        // SAFETY: both halves are of the memory that was taken.
        unsafe { self.memory.as_ptr().add(self.half * HALF_BYTES + offset) }
    }

    /// The other half, once the card has read it.
    fn turn(&mut self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: event and stream stay as long as the card.
        unsafe { result::event::record(self.read[self.half], stream) }.map_err(lost("cuEventRecord"))?;
        self.half = 1 - self.half;
        self.used = 0;
        // SAFETY: likewise. An event that was never recorded has happened.
        unsafe { result::event::synchronize(self.read[self.half]) }.map_err(lost("cuEventSynchronize"))
    }

    /// Copies to the card in the stream's order.
    pub(crate) fn send(&mut self, to: Address, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let mut sent = 0;
        while sent < bytes.len() {
            if self.used == HALF_BYTES {
                self.turn(stream)?;
            }
            let count = (bytes.len() - sent).min(HALF_BYTES - self.used);
            let from = self.at(self.used);
            // SAFETY: so many bytes are left in the half, which the card does not read any more; the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(bytes[sent..].as_ptr(), from, count) };
            // SAFETY: the bytes were written just now, and stay until the half is filled again, after the card has read it.
            let piece = unsafe { std::slice::from_raw_parts(from, count) };
            // SAFETY: `Memory` has as many bytes there.
            unsafe { result::memcpy_htod_async(to.0 + sent as u64, piece, stream) }.map_err(lost("cuMemcpyHtoDAsync"))?;
            // So that copies begin where the card likes it.
            self.used = (self.used + count).next_multiple_of(256).min(HALF_BYTES);
            sent += count;
        }
        Ok(())
    }

    /// Copies from the card in the stream's order, and waits.
    pub(crate) fn fetch(&mut self, from: Address, bytes: &mut [u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let mut fetched = 0;
        for piece in bytes.chunks_mut(HALF_BYTES) {
            self.turn(stream)?;
            // SAFETY: the half is so long, and the card has read it.
            let to = unsafe { std::slice::from_raw_parts_mut(self.at(0), piece.len()) };
            // SAFETY: `Memory` has as many bytes there, and the half is ours until the stream was waited for.
            unsafe { result::memcpy_dtoh_async(to, from.0 + fetched, stream) }.map_err(lost("cuMemcpyDtoHAsync"))?;
            // SAFETY: the stream stays as long as the card.
            unsafe { result::stream::synchronize(stream) }.map_err(lost("cuStreamSynchronize"))?;
            piece.copy_from_slice(to);
            fetched += piece.len() as u64;
        }
        Ok(())
    }
}
