//! Everything in the router that does IO. Start with `backend`, the seam that REST sees.

pub mod backend;
pub mod metrics;
pub mod rest;
