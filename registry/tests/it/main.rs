//! All integration tests of the registry as one program, so that it is linked once.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

mod conformance;
mod etcd_server;
mod file;
mod outage;
