//! The zoo from outside, one module a subject.

#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

#[path = "support/faulty.rs"]
mod faulty;
#[path = "support/flaky.rs"]
mod flaky;
#[path = "support/scripted.rs"]
mod scripted;
#[path = "support/sound.rs"]
mod sound;
mod support;

mod adapters;
mod bad_adapters;
mod bad_input;
mod bad_quantised;
mod changing;
mod compressed;
mod crash;
mod damage;
mod deltas;
mod demo;
mod equivalence;
mod export;
mod failing;
mod hub;
mod ingest;
mod listing;
mod loading;
mod loads;
mod measures;
mod profiles;
mod quantise;
mod racing;
mod relatives;
mod report;
mod stitch;
mod surrogate;
