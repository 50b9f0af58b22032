//! The executor from outside, one module a subject.

#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

#[path = "support/adapters.rs"]
mod adapters;
#[path = "../../../zoo/tests/it/support/mod.rs"]
mod checkpoints;
#[path = "support/stitches.rs"]
mod stitches;
#[path = "support/summed.rs"]
mod summed;
mod support;

mod cards;
mod deltas;
mod goldens;
mod real_models;
mod stitched;
mod surrogate;
mod together;
mod unmerged;
