//! The engine: which rows of which sequences run next, in which pages. Free of IO: `handle_*(now, event)` in,
//! `poll_output()` out, time as an argument. Start with `engine`; docs/scheduling.md tells it in prose.
//!
//! A sequence has `computed[s]` tokens for each segment of its path, never increasing with depth, and wants its known
//! tokens computed. A step advances one segment where the input of the next tokens is at hand. Prefill, decode,
//! reuse of cached pages and resume are this rule with different numbers.

mod abreast;
mod advance;
mod affinity;
pub mod batch;
mod boundary;
pub mod canary;
mod claim;
mod clock;
pub mod cost;
pub mod counters;
pub mod engine;
mod holdings;
mod integrity;
mod lane;
pub mod limits;
mod meeting;
mod pace;
pub mod pages;
mod planner;
mod prompts;
mod ready;
mod recut;
mod reuse;
pub mod segments;
pub mod sequence;
mod slab;
mod span;
mod stall;
mod start;
pub mod targets;
mod tenants;
#[cfg(test)]
mod tests;
mod waiting;

use std::time::Duration;

/// Time since the executor started; handed in by the caller.
pub type Now = Duration;
