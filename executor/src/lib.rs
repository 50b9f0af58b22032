//! An executor: holds blocks on a device and runs sequences through them. `state` is the engine (free of IO), `model`
//! the forward pass and the sampler, `io` the device thread, gRPC and loading. It does not know how chains are chosen.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod io;
pub mod model;
pub mod state;
