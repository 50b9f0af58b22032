//! What processes say to each other: ids, protobuf messages, error codes. No IO. Start with proto/ashlar.proto.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions"))]

pub mod code;
pub mod id;

/// Generated messages and the gRPC service (proto/ashlar.proto has the field comments).
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("ashlar.v1");
}

/// Largest gRPC message, in bytes: one chunk of hidden states, or the longest prompt's admission, with room.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
