//! A whole cluster on a virtual clock, from one seed: the router's and the executors' real `state/` code over modelled devices and links,
//! with named checkers after every event. Start at `simulation`; docs/simulation.md tells it in prose. Nothing here waits, reads
//! a clock or draws chance from outside, so a seed gives the same run every time.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

mod adapters;
mod alone;
mod check;
mod client;
mod cluster;
mod device;
mod dice;
mod events;
mod hosting;
mod links;
pub mod load;
mod models;
mod node;
pub mod report;
mod router;
mod scenario;
pub mod simulation;
pub mod trace;

pub use ashlar_executor::state::canary::Canary;
pub use report::{Failure, Report};
pub use simulation::{Options, run};

/// Virtual time since the start, in microseconds.
pub type Micros = u64;

/// The canaries by name.
pub const CANARIES: [(&str, Canary); 4] = [
    ("publishes-early", Canary::PublishesEarly),
    ("frees-in-flight", Canary::FreesInFlight),
    ("frees-in-window", Canary::FreesInWindow),
    ("leaks-pages", Canary::LeaksPages),
];

fn canary_name(canary: Canary) -> Option<&'static str> {
    CANARIES.iter().find(|(_, known)| *known == canary).map(|(name, _)| *name)
}
