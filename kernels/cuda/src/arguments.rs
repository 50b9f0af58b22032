//! Values as arguments of kernels.

use crate::driver::{Address, Argument};

impl From<Address> for Argument {
    fn from(address: Address) -> Self {
        Self::Address(address)
    }
}

impl From<usize> for Argument {
    /// Kernels count in `int`: what is larger is a bug of the caller.
    fn from(count: usize) -> Self {
        Self::Int(i32::try_from(count).expect("kernels count up to 2^31"))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// The null pointer.
pub(crate) const NULL: Argument = Argument::Address(Address(0));

/// A pointer, or null.
pub(crate) fn or_null(address: Option<Address>) -> Argument {
    address.map_or(NULL, Argument::Address)
}
