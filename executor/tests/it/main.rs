//! The executor from outside, one module a subject, in one binary: each further one would compile the same generic code and link it once more.

#[path = "support/adapters.rs"]
mod adapters;
#[path = "../../../zoo/tests/it/support/mod.rs"]
mod checkpoints;
#[path = "support/summed.rs"]
mod summed;
mod support;

mod deltas;
mod goldens;
mod real_models;
mod surrogate;
mod together;
mod unmerged;
