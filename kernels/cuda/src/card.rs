//! A card of NVIDIA's, through its driver, which is found at run time: the same binary runs where there is none.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use cudarc::driver::result::{self, DriverError as CudaError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::compile::{Cache, CompileError, architecture};
use crate::driver::{Address, Driver, DriverError, Launch, Recording};
use crate::graph::{Graph, Graphs};
use crate::pinned::Pinned;
use crate::sources::{SOURCES, Source};

/// Cards before these have no bf16 and no asynchronous copies.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// Drivers run code that compilers of their own major version or an earlier one made: before this one they do not run that of NVRTC 13. As the driver
/// counts: 1,000 for a major version, 10 for a minor one.
const DRIVER_MIN: i32 = 13_000;
/// Dynamic shared memory that a kernel has without asking.
const SHARED_BYTES_FREE: u32 = 48 << 10;

/// Why a card is not used.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// No driver is installed.
    #[error("no driver of NVIDIA's is installed (libcuda.so.1)")]
    NoDriver,
    /// The driver says no.
    #[error("the driver of NVIDIA's fails at {call}: {reason}")]
    Driver {
        /// What was asked.
        call: &'static str,
        /// What it says.
        reason: String,
    },
    /// The driver is too old.
    #[error("the driver of NVIDIA's is of CUDA {version}: 13.0 is the least that runs the kernels, and comes with driver 580")]
    OldDriver {
        /// Of CUDA, as `12.4`.
        version: String,
    },
    /// The driver is there, and no card.
    #[error("the driver of NVIDIA's shows no card")]
    NoCards,
    /// There is no such card.
    #[error("there is no card {ordinal}: the driver shows {count}, counted from 0")]
    NoCard {
        /// Number asked for.
        ordinal: usize,
        /// Cards that there are.
        count: usize,
    },
    /// The card is too old.
    #[error("card {ordinal}, {name}, has compute capability {}.{}: 8.0 is the least that runs the kernels", capability.0, capability.1)]
    Capability {
        /// Which.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Of the card.
        capability: (i32, i32),
    },
    /// The driver does not take the code of kernels.
    #[error("the driver of NVIDIA's does not load {source_name} for {architecture}: {reason}")]
    Image {
        /// File of `kernels/cuda`.
        source_name: &'static str,
        /// As `sm_90a`.
        architecture: String,
        /// What it says.
        reason: String,
    },
    /// Its kernels cannot be had.
    #[error(transparent)]
    Kernels(#[from] CompileError),
}

fn failed(call: &'static str) -> impl Fn(CudaError) -> CardError {
    move |error| CardError::Driver { call, reason: reason(error) }
}

fn reason(error: CudaError) -> String {
    let text = |text: Result<&std::ffi::CStr, CudaError>| text.ok().map(|text| text.to_string_lossy().into_owned());
    // A stub of a driver knows no words.
    let name = text(error.error_name()).unwrap_or_else(|| format!("{:?}", error.0));
    text(error.error_string()).map_or_else(|| name.clone(), |text| format!("{text} ({name})"))
}

/// A card as the driver shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Number, as in `cuda:0`.
    pub ordinal: usize,
    /// As `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Major and minor.
    pub capability: (i32, i32),
    /// Bytes of all its memory.
    pub memory_bytes: u64,
}

impl Found {
    /// Whether the kernels run on it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), CardError> {
        let Self { ordinal, ref name, capability, .. } = *self;
        if capability < CAPABILITY_MIN { Err(CardError::Capability { ordinal, name: name.clone(), capability }) } else { Ok(()) }
    }
}

/// The driver's version of CUDA, as `13.0`, and all cards, at least one.
///
/// # Errors
/// When there is no driver, it is too old, it fails, or it shows no card.
pub fn find() -> Result<(String, Vec<Found>), CardError> {
    // SAFETY: loads a library by name, which runs its initialisers; the driver's have no other effect.
    if !unsafe { sys::is_culib_present() } {
        return Err(CardError::NoDriver);
    }
    // Before anything else is called: an old driver may lack it.
    let mut version = 0;
    // SAFETY: the target is ours.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    let name = format!("{}.{}", version / 1000, version % 1000 / 10);
    if version < DRIVER_MIN {
        return Err(CardError::OldDriver { version: name });
    }
    result::init().map_err(|error| match error.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => CardError::NoCards,
        _ => failed("cuInit")(error),
    })?;
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    if count == 0 {
        return Err(CardError::NoCards);
    }
    let cards: Result<Vec<Found>, CardError> = (0..count).map(found).collect();
    Ok((name, cards?))
}

fn found(ordinal: i32) -> Result<Found, CardError> {
    let device = result::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
    // SAFETY: the device was given by the driver just now.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map_err(failed("cuDeviceGetAttribute"));
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Found {
        ordinal: ordinal.cast_unsigned() as usize,
        name: result::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
        capability: (major, minor),
        // SAFETY: likewise.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))? as u64,
    })
}

/// A card's primary context, which is given back, with all that is in it, when it is dropped: a process that computes on the CPU after all holds no memory of a card.
struct Context {
    handle: sys::CUcontext,
    device: sys::CUdevice,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, and whoever has it dropped what is in it before. A card that failed has nothing to give back.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// An open card: a context, a stream in whose order all is done, one for loads beside it, and the kernels.
pub struct Card {
    name: String,
    architecture: String,
    in_order: sys::CUstream,
    loads: sys::CUstream,
    kernels: RwLock<BTreeMap<&'static str, sys::CUfunction>>,
    shared_bytes_max: usize,
    /// Dynamic shared memory that kernels were allowed, where that is more than all have.
    allowed: Mutex<BTreeMap<&'static str, u32>>,
    graphs: Mutex<Graphs>,
    pinned: Mutex<Pinned>,
    /// One compiles at a time.
    compiling: Mutex<()>,
    cache: Cache,
    /// The driver's version.
    driver: String,
    /// Dropped last.
    context: Context,
}

// SAFETY: the driver's handles may be used from any thread whose current context is the card's, which every call sees to.
unsafe impl Send for Card {}
// SAFETY: likewise, and the driver itself locks what threads share.
unsafe impl Sync for Card {}

impl Card {
    /// Opens a card and loads its kernels, which are compiled first where the cache has them not.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(ordinal: usize, cache: &Cache) -> Result<Self, CardError> {
        let (driver, cards) = find()?;
        let count = cards.len();
        let Some(found) = cards.into_iter().nth(ordinal) else { return Err(CardError::NoCard { ordinal, count }) };
        found.check()?;
        let Found { name, capability, .. } = found;
        let architecture = architecture(capability.0, capability.1);
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device is the driver's; its context is given back when the card is dropped.
        let handle = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let context = Context { handle, device };
        // SAFETY: the context was retained just now.
        unsafe { result::ctx::set_current(context.handle) }.map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: the device is the driver's.
        let shared = unsafe { result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) };
        let shared_bytes_max = shared.map_err(failed("cuDeviceGetAttribute"))?.cast_unsigned() as usize;
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"));
        let (in_order, loads) = (stream()?, stream()?);
        let pinned = Mutex::new(Pinned::new().map_err(failed("cuMemHostAlloc"))?);
        let card = Self {
            name,
            architecture,
            in_order,
            loads,
            kernels: RwLock::default(),
            shared_bytes_max,
            allowed: Mutex::default(),
            graphs: Mutex::default(),
            pinned,
            compiling: Mutex::default(),
            cache: cache.clone(),
            driver,
            context,
        };
        for source in SOURCES.iter().filter(|source| source.always) {
            card.load(source)?;
        }
        Ok(card)
    }

    /// Loads the kernels of a source.
    fn load(&self, source: &Source) -> Result<(), CardError> {
        let (architecture, driver) = (self.architecture.as_str(), self.driver.as_str());
        let compiled = || self.module(source, &self.cache.compiled(source, architecture, driver)?);
        let module = match self.cache.kept(source, architecture, driver).map(|code| self.module(source, &code)) {
            None => compiled()?,
            Some(Err(error @ CardError::Image { .. })) => {
                tracing::warn!("kept kernels are compiled again: {error}");
                compiled()?
            }
            Some(outcome) => outcome?,
        };
        let mut loaded = Vec::new();
        for entry in source.entries() {
            let name = CString::new(entry).expect("names have no zero byte");
            // SAFETY: the module was loaded, and stays.
            let kernel = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
            loaded.push((entry, kernel));
        }
        self.kernels.write().unwrap_or_else(PoisonError::into_inner).extend(loaded);
        Ok(())
    }

    fn module(&self, source: &Source, code: &[u8]) -> Result<sys::CUmodule, CardError> {
        // SAFETY: the code is a whole cubin, by the compiler or by its digest; the driver refuses one that the card does not run.
        unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_INVALID_IMAGE | sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
                CardError::Image { source_name: source.name, architecture: self.architecture.clone(), reason: reason(error) }
            }
            _ => failed("cuModuleLoadData")(error),
        })
    }

    fn kernel(&self, name: &str) -> Option<sys::CUfunction> {
        self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    /// A launch's kernel, which may have as much shared memory as the launch asks for.
    pub(crate) fn kernel_for(&self, launch: &Launch<'_>) -> Result<sys::CUfunction, DriverError> {
        let kernel = self.kernel(launch.kernel).expect("kernels are prepared by whoever loads what needs them");
        if launch.shared_bytes > SHARED_BYTES_FREE {
            let mut allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
            let allowed = allowed.entry(launch.kernel).or_insert(SHARED_BYTES_FREE);
            if launch.shared_bytes > *allowed {
                let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the kernel is of a module that stays.
                unsafe { result::function::set_function_attribute(kernel, attribute, launch.shared_bytes.cast_signed()) }
                    .map_err(lost("cuFuncSetAttribute"))?;
                *allowed = launch.shared_bytes;
            }
        }
        Ok(kernel)
    }

    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the card's context this thread's.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context stays as long as the card.
        unsafe { result::ctx::set_current(self.context.handle) }.map_err(lost("cuCtxSetCurrent"))
    }

    fn wait(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the stream stays as long as the card.
        unsafe { result::stream::synchronize(stream) }.map_err(lost("cuStreamSynchronize"))
    }
}

/// Where a launch's arguments lie.
pub(crate) fn places(launch: &Launch<'_>) -> Vec<*mut c_void> {
    launch.arguments.iter().map(|argument| argument.place().0.cast_mut()).collect()
}

pub(crate) fn lost(call: &'static str) -> impl Fn(CudaError) -> DriverError {
    move |error| DriverError::Failed { call, reason: reason(error) }
}

impl Driver for Card {
    fn describe(&self) -> String {
        format!("cuda {} {}", self.architecture, self.name)
    }

    fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    fn memory_bytes(&self) -> Result<(u64, u64), DriverError> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(lost("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<Address, DriverError> {
        self.enter()?;
        // SAFETY: what it holds is written before it is read (`Memory`, `Buffer`).
        match unsafe { result::malloc_sync(bytes) } {
            Ok(address) => Ok(Address(address)),
            Err(CudaError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(DriverError::Memory { bytes }),
            Err(error) => Err(lost("cuMemAlloc")(error)),
        }
    }

    fn free(&self, memory: Address) {
        // Launches that use it may be under way still.
        let outcome = self.enter().and_then(|()| self.wait(self.in_order)).and_then(|()| {
            // SAFETY: `Memory` frees what it took, once, and nothing uses it any more.
            unsafe { result::free_sync(memory.0) }.map_err(lost("cuMemFree"))
        });
        // A card that failed fails every call: whoever computes said so, and ends by it.
        if let Err(error) = outcome
            && !std::thread::panicking()
        {
            tracing::error!(%error, "memory of the card was not given back");
        }
    }

    fn fill(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: `Memory` has as many bytes there, and the source stays until the stream was waited for.
        unsafe { result::memcpy_htod_async(to.0, bytes, self.loads) }.map_err(lost("cuMemcpyHtoDAsync"))?;
        self.wait(self.loads)
    }

    fn send(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError> {
        self.enter()?;
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.send(to, bytes, self.in_order)
    }

    fn zero(&self, to: Address, bytes: usize) -> Result<(), DriverError> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: `Memory` has as many bytes there.
        unsafe { result::memset_d8_async(to.0, 0, bytes, self.in_order) }.map_err(lost("cuMemsetD8Async"))
    }

    fn fetch(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError> {
        self.enter()?;
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.fetch(from, bytes, self.in_order)
    }

    fn prepare(&self, kernel: &'static str) -> Result<(), DriverError> {
        let _one = self.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kernel(kernel).is_some() {
            return Ok(());
        }
        self.enter()?;
        let source = SOURCES.iter().find(|source| source.entries().any(|entry| entry == kernel)).expect("the device knows its own kernels");
        self.load(source).map_err(|error| DriverError::Failed { call: "prepare", reason: error.to_string() })
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.enter()?;
        let kernel = self.kernel_for(launch)?;
        let mut arguments = places(launch);
        let [x, y, z] = launch.grid;
        // SAFETY: number and sizes of the arguments are the kernel's (the emulated card checks that for every launch of the tests), they are copied
        // before the call returns, and addresses are of memory that is given back in order.
        unsafe { result::launch_kernel(kernel, (x, y, z), (launch.threads, 1, 1), launch.shared_bytes, self.in_order, &mut arguments) }
            .map_err(lost("cuLaunchKernel"))
    }

    fn record(&self, launches: &[Launch<'_>]) -> Result<Option<Recording>, DriverError> {
        self.enter()?;
        Graph::new(self, launches).map(|graph| Some(self.graphs().add(graph)))
    }

    fn amend(&self, recording: Recording, place: usize, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.enter()?;
        self.graphs().of(recording).amend(self, place, launch)
    }

    fn replay(&self, recording: Recording) -> Result<(), DriverError> {
        self.enter()?;
        self.graphs().of(recording).launch(self.in_order)
    }

    fn forget(&self, recording: Recording) {
        // A graph that runs still is given back by the driver when it has run.
        if let Err(error) = self.enter().and_then(|()| self.graphs().take(recording).destroy()) {
            tracing::error!(%error, "a recording of the card was not given back");
        }
    }
}
