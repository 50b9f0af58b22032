//! Everything in the router that does IO. Start with `backend`, the seam that REST sees; `dispatch` implements it over the
//! pictures of the world that `cluster` (registry) and `catalog` (zoo) keep, and calls executors through `grpc`. `planner` writes the
//! plan while this router is the elected one.

pub mod backend;
pub mod catalog;
pub mod cluster;
pub mod dispatch;
pub mod grpc;
pub mod keys_file;
pub mod metrics;
pub mod planner;
pub mod rest;
#[cfg(test)]
mod testing;
mod times;
