//! All integration tests of the registry as one program, so that it is linked once.

mod conformance;
mod etcd_server;
mod file;
mod outage;
