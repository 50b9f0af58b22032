//! A card for tests that is none: the CUDA device's kernels, compiled for the CPU from their own sources, behind the driver's seam. It stops the process with
//! a line on standard error where a kernel leaves its memory, waits at a barrier that not all threads reach, or is given what it does not take.

#![cfg(emulation)]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ashlar_cuda::{Address, Argument, Driver, DriverError, Launch, Recording};

/// In which order warps and lanes run, each as far as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Ascending,
    /// From the last to the first; asynchronous copies land at once.
    Descending,
    /// Drawn from a seed above 1.
    Shuffled(u64),
}

/// All emulated cards are one: its state is the process's.
static CALLS: Mutex<()> = Mutex::new(());

/// The emulated card.
#[derive(Debug)]
pub struct Emulated {
    /// Of all its memory.
    bytes: u64,
    /// What was taken of it.
    taken: Mutex<BTreeMap<Address, u64>>,
    recordings: Mutex<BTreeMap<Recording, Vec<Recorded>>>,
}

/// A launch of a recording.
#[derive(Debug, Clone)]
struct Recorded {
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    arguments: Vec<Argument>,
}

impl Recorded {
    fn of(launch: &Launch<'_>) -> Self {
        let Launch { kernel, grid, threads, shared_bytes, arguments } = *launch;
        Self { kernel, grid, threads, shared_bytes, arguments: arguments.to_vec() }
    }

    fn launch(&self) -> Launch<'_> {
        let Self { kernel, grid, threads, shared_bytes, ref arguments } = *self;
        Launch { kernel, grid, threads, shared_bytes, arguments }
    }
}

#[repr(C)]
struct Passed {
    at: *const c_void,
    bytes: usize,
}

unsafe extern "C" {
    fn emulated_start(order: u64);
    fn emulated_allocate(bytes: usize) -> u64;
    fn emulated_free(address: u64);
    fn emulated_write(to: u64, from: *const c_void, bytes: usize);
    fn emulated_zero(to: u64, bytes: usize);
    fn emulated_read(to: *mut c_void, from: u64, bytes: usize);
    fn emulated_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        arguments: *const Passed,
        count: usize,
    ) -> c_int;
}

/// Folders of libraries that stand where NVIDIA's would, each alone in its own: LD_LIBRARY_PATH of a process that is to find them.
#[derive(Debug, Clone, Copy)]
pub struct Libraries {
    /// Of the driver, `libcuda.so.1`: emulate/driver.cc says which faults it may have.
    pub driver: &'static str,
    /// Of NVRTC, `libnvrtc.so.13`: emulate/nvrtc.cc says the same.
    pub compiler: &'static str,
}

/// The libraries; `None` where the processor cannot run them.
pub fn libraries() -> Option<Libraries> {
    let libraries = Libraries { driver: concat!(env!("OUT_DIR"), "/driver"), compiler: concat!(env!("OUT_DIR"), "/compiler") };
    is_available().then_some(libraries)
}

/// Whether this processor runs the emulation.
pub fn is_available() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("f16c")
}

fn turn() -> MutexGuard<'static, ()> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Emulated {
    fn recordings(&self) -> MutexGuard<'_, BTreeMap<Recording, Vec<Recorded>>> {
        self.recordings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<Address, u64>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A card that says it has so much memory; `None` where the processor cannot run it.
    pub fn new(order: Order, bytes: u64) -> Option<Self> {
        let seed = match order {
            Order::Ascending => 0,
            Order::Descending => 1,
            Order::Shuffled(seed) => seed.max(2),
        };
        if !is_available() {
            return None;
        }
        let _turn = turn();
        // SAFETY: sets the order and installs a handler of faults; no call is under way, as the turn is ours.
        unsafe { emulated_start(seed) };
        Some(Self { bytes, taken: Mutex::default(), recordings: Mutex::default() })
    }
}

impl Driver for Emulated {
    fn describe(&self) -> String {
        "cuda emulated on the CPU".to_owned()
    }

    /// As Hopper has.
    fn shared_bytes_max(&self) -> usize {
        227 << 10
    }

    fn memory_bytes(&self) -> Result<(u64, u64), DriverError> {
        let taken: u64 = self.taken().values().sum();
        Ok((self.bytes - taken, self.bytes))
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        if bytes as u64 > self.memory_bytes()?.0 {
            return Err(DriverError::Memory { bytes });
        }
        let _turn = turn();
        // SAFETY: any number of bytes may be asked for; the turn is ours.
        let address = Address(unsafe { emulated_allocate(bytes) });
        self.taken().insert(address, bytes as u64);
        Ok(address)
    }

    fn free(&self, memory: Address) {
        self.taken().remove(&memory);
        let _turn = turn();
        // SAFETY: what was not taken is refused there; the turn is ours.
        unsafe { emulated_free(memory.0) };
    }

    fn fill(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.send(to, bytes)
    }

    fn send(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        let _turn = turn();
        // SAFETY: the source is a slice; a target that was not taken is refused there; the turn is ours.
        unsafe { emulated_write(to.0, bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<(), DriverError> {
        let _turn = turn();
        // SAFETY: a target that was not taken is refused there; the turn is ours.
        unsafe { emulated_zero(to.0, bytes) };
        Ok(())
    }

    fn fetch(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        let _turn = turn();
        // SAFETY: the target is a slice; a source that was not taken is refused there; the turn is ours.
        unsafe { emulated_read(bytes.as_mut_ptr().cast(), from.0, bytes.len()) };
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let name = CString::new(launch.kernel).expect("names have no zero byte");
        let passed: Vec<Passed> = launch.arguments.iter().map(Argument::place).map(|(at, bytes)| Passed { at, bytes }).collect();
        let _turn = turn();
        // SAFETY: name, grid and arguments outlive the call, and each argument points to a value of so many bytes; a kernel that leaves its memory
        // stops the process. The turn is ours.
        let status = unsafe {
            emulated_launch(name.as_ptr(), launch.grid.as_ptr(), launch.threads, launch.shared_bytes, passed.as_ptr(), passed.len())
        };
        if status == 0 { Ok(()) } else { Err(DriverError::Failed { call: "launch", reason: format!("no kernel `{}`", launch.kernel) }) }
    }

    fn record(&self, launches: &[Launch<'_>]) -> Result<Option<Recording>, DriverError> {
        let mut recordings = self.recordings();
        let next = recordings.last_key_value().map_or(0, |(Recording(last), _)| last + 1);
        recordings.insert(Recording(next), launches.iter().map(Recorded::of).collect());
        Ok(Some(Recording(next)))
    }

    /// Refuses, as drivers do, what is no change of a launch that was recorded.
    fn amend(&self, recording: Recording, place: usize, launch: &Launch<'_>) -> Result<(), DriverError> {
        let mut recordings = self.recordings();
        let recorded = recordings.get_mut(&recording).and_then(|launches| launches.get_mut(place));
        match recorded.filter(|recorded| recorded.kernel == launch.kernel) {
            Some(recorded) => *recorded = Recorded::of(launch),
            None => {
                return Err(DriverError::Failed { call: "amend", reason: format!("{recording:?} has no {} at {place}", launch.kernel) });
            }
        }
        Ok(())
    }

    fn replay(&self, recording: Recording) -> Result<(), DriverError> {
        let launches = self.recordings().get(&recording).cloned();
        let missing = || DriverError::Failed { call: "replay", reason: format!("there is no {recording:?}") };
        launches.ok_or_else(missing)?.iter().try_for_each(|recorded| self.launch(&recorded.launch()))
    }

    fn forget(&self, recording: Recording) {
        assert!(self.recordings().remove(&recording).is_some(), "{recording:?} was not recorded");
    }
}
