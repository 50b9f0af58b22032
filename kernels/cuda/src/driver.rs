//! What a device needs of a card: memory, copies and launches in one order. Implementors: `Card` (the driver of NVIDIA, found at run time), and
//! the emulated card of the tests.

/// A place in the card's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Address(pub u64);

impl Address {
    /// So many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What a card could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// It has not so much memory left.
    #[error("the card has no memory for {bytes} bytes more")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// It, or its driver, failed: nothing that it holds can be trusted any more.
    #[error("the card failed at {call}: {reason}")]
    Failed {
        /// What was asked of it.
        call: &'static str,
        /// What the driver says.
        reason: String,
    },
}

/// A value that a kernel takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    /// A pointer; 0 is null.
    Address(Address),
    /// `int`, also of what is unsigned there.
    Int(i32),
    /// `float`.
    Float(f32),
    /// `u64`.
    Long(u64),
    /// A struct of 40 bytes.
    Words([u64; 5]),
    /// A struct of 48 bytes.
    SixWords([u64; 6]),
    /// A struct of 80 bytes.
    TenWords([u64; 10]),
}

impl Argument {
    /// Where the value lies, and how many bytes it has: what launches pass on.
    pub fn place(&self) -> (*const std::ffi::c_void, usize) {
        match self {
            Self::Address(Address(value)) | Self::Long(value) => (std::ptr::from_ref(value).cast(), size_of_val(value)),
            Self::Int(value) => (std::ptr::from_ref(value).cast(), size_of_val(value)),
            Self::Float(value) => (std::ptr::from_ref(value).cast(), size_of_val(value)),
            Self::Words(values) => (values.as_ptr().cast(), size_of_val(values)),
            Self::SixWords(values) => (values.as_ptr().cast(), size_of_val(values)),
            Self::TenWords(values) => (values.as_ptr().cast(), size_of_val(values)),
        }
    }
}

/// One launch of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Name of the entry, one of [`super::entries`].
    pub kernel: &'static str,
    /// Ctas along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a cta.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// In the order of the kernel's parameters.
    pub arguments: &'a [Argument],
}

/// Launches that a driver recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Recording(pub u64);

/// A card. Calls may come from any thread. What is *in order* happens after all that was asked in order before, and calls may return
/// before it has happened; [`Driver::fetch`] waits.
pub trait Driver: Send + Sync + 'static {
    /// Name of the card and what it is compiled for, for logs.
    fn describe(&self) -> String;
    /// Bytes of shared memory that a cta may have.
    fn shared_bytes_max(&self) -> usize;
    /// Bytes of memory that are free now, and of all.
    ///
    /// # Errors
    /// When the card fails.
    fn memory_bytes(&self) -> Result<(u64, u64), DriverError>;
    /// Takes memory, aligned to 256 bytes; what it holds is not known.
    ///
    /// # Errors
    /// When there is not so much left, or the card fails.
    fn allocate(&self, bytes: usize) -> Result<Address, DriverError>;
    /// Gives back what [`Driver::allocate`] gave, once what was asked in order before has happened.
    fn free(&self, memory: Address);
    /// Copies to the card before it returns, whatever else is under way: for what no launch uses yet.
    ///
    /// # Errors
    /// When the card fails.
    fn fill(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError>;
    /// Copies to the card in order; the bytes are taken before it returns.
    ///
    /// # Errors
    /// When the card fails.
    fn send(&self, to: Address, bytes: &[u8]) -> Result<(), DriverError>;
    /// Zeroes in order.
    ///
    /// # Errors
    /// When the card fails.
    fn zero(&self, to: Address, bytes: usize) -> Result<(), DriverError>;
    /// Copies from the card in order and waits for it.
    ///
    /// # Errors
    /// When the card fails, now or in anything that was asked in order before.
    fn fetch(&self, from: Address, bytes: &mut [u8]) -> Result<(), DriverError>;
    /// Has a kernel, and those of its unit, ready to be launched: they may have to be compiled, which takes seconds, so whoever loads asks for it.
    ///
    /// # Errors
    /// Why it cannot be had.
    fn prepare(&self, kernel: &'static str) -> Result<(), DriverError> {
        let _ = kernel;
        Ok(())
    }
    /// Launches in order.
    ///
    /// # Errors
    /// When the card fails; not all faults of a kernel are known before the next [`Driver::fetch`].
    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError>;
    /// Records launches, each to run after the one before it, and runs none; `None` from a driver that cannot.
    ///
    /// # Errors
    /// When the card fails.
    fn record(&self, launches: &[Launch<'_>]) -> Result<Option<Recording>, DriverError> {
        let _ = launches;
        Ok(None)
    }
    /// Puts another launch of the same kernel at a place of a recording; what was replayed before keeps the old one.
    ///
    /// # Errors
    /// When the card fails.
    fn amend(&self, recording: Recording, place: usize, launch: &Launch<'_>) -> Result<(), DriverError> {
        unreachable!("{recording:?} was given by nobody, who would amend {} at {place}", launch.kernel)
    }
    /// Runs a recording in order.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    fn replay(&self, recording: Recording) -> Result<(), DriverError> {
        unreachable!("{recording:?} was given by nobody")
    }
    /// Gives a recording back, which may still run.
    fn forget(&self, recording: Recording) {
        unreachable!("{recording:?} was given by nobody")
    }
}
