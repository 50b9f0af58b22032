//! The REST server over real HTTP, with a backend that plays scripts. One file a route, and one for what all share.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

mod adapters;
mod chat;
mod completions;
mod disconnect;
mod drain;
mod errors;
mod health;
mod limits;
mod metrics;
mod models;
mod support;
mod tokenize;
