//! The offline block zoo: ingest checkpoints, cut them into blocks, store each tensor and block once, verify every
//! read. Start with docs/block-format.md and `manifest`. It is never a server in the request path.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod adapter;
mod aligned;
mod apart;
pub mod blocking;
pub mod canonical;
pub mod diff;
pub mod digest;
pub mod draft;
pub mod encoding;
pub mod equivalence;
pub mod export;
pub mod family;
pub mod formats;
pub mod gc;
pub mod hub;
pub mod ingest;
pub mod inspect;
pub mod joint;
pub mod manifest;
mod mapping;
pub mod measures;
pub mod model_id;
pub mod profiles;
pub mod quantise;
pub mod quantised;
pub mod relatives;
pub mod repair;
pub mod report;
pub mod roles;
pub mod stitch;
pub mod store;
pub mod surrogate;
pub mod tensor;
pub mod tensor_file;
pub mod tokenizer;
pub mod verify;
