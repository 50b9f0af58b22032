//! Numbers: storage formats, the op set, the scalar reference and the CPU backend. Start with `ops` (the seam) and
//! docs/numerics.md (the contract). Nothing here knows what a tenant, a model or a sequence is.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod bench;
pub mod cpu;
pub mod format;
pub mod ops;
pub mod reference;
pub mod table;
pub mod timed;

pub use cpu::probe;

/// Length of the slices that the reduced dimension of a linear layer is cut into (docs/numerics.md, rule 1).
pub const SLICE: usize = 512;
