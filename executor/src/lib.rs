//! executor

pub mod model;
