//! Where the engine meets the world: the device thread, the task that drives the engine, links to other executors,
//! the gRPC service, and the loading of blocks that the plan asks for. Start with `executor`.

pub mod adapters;
pub mod attach;
pub mod device;
pub mod executor;
pub mod handle;
pub mod hosting;
pub mod links;
pub mod metrics;
pub mod service;
mod told;
