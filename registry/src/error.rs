//! What can fail in a registry, and whether trying again helps.

use crate::LeaseId;

pub use ashlar_wire::code::Retry;

/// A registry operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The store did not answer, or refused for a reason that passes.
    #[error("failed to {action}: the registry is out of reach")]
    Unreachable {
        /// What was tried.
        action: &'static str,
        /// Why, from the client library.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The lease has ended (or never was).
    #[error("{0} has ended")]
    LeaseLost(LeaseId),
    /// The URL names no registry.
    #[error("`{url}` is no registry URL: {reason}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The embedded registry's file could not be read or written.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The embedded registry's file is not what we write.
    #[error("{path} is not a registry file of format 1")]
    Format {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A key holds something else than the record it should.
    #[error("`{key}` does not hold a valid record")]
    Record {
        /// The key.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A key's value is not UTF-8, so it is not ours.
    #[error("`{key}` does not hold text")]
    NotText {
        /// The key.
        key: String,
    },
}

impl RegistryError {
    /// Whether the same call may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Unreachable { .. } | Self::LeaseLost(_) | Self::File { .. } => Retry::Same,
            _ => Retry::Never,
        }
    }
}
