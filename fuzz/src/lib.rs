//! Fuzz targets as ordinary functions: whatever the bytes, they return. `tests/smoke.rs` mutates a small corpus against
//! each for a few seconds; a longer run is `ASHLAR_FUZZ_SECONDS=600 cargo test -p ashlar-fuzz`.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod adapter;
pub mod encoding;
pub mod gguf;
pub mod manifest;
pub mod mutate;
pub mod quantised;
pub mod safetensors;
