//! The router: REST in, sequences out. `state/` decides (placement, assembly, tenants) without IO, `text/` turns messages into tokens
//! and back, `io/rest` speaks OpenAI's API, `io/backend` is the seam to the part that places, assembles and dispatches. It never
//! touches weights.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod io;
pub mod state;
pub mod text;
