//! The offline block zoo: ingest checkpoints, cut them into blocks, store each tensor and block once, verify every
//! read. Start with docs/block-format.md and `manifest`. It is never a server in the request path.

pub mod digest;
pub mod manifest;
