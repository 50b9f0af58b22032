//! Ids as types, each with a printed prefix, so that no bare string or number crosses a function's border.

use std::fmt;

macro_rules! text_id {
    ($name:ident $prefix:literal $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// An id from 64 random bits that the caller drew.
            pub fn from_bits(bits: u64) -> Self {
                Self(format!(concat!($prefix, "{:016x}"), bits))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(ExecutorId "exe_" "An executor process.");
text_id!(RouterId "rtr_" "A router process.");
text_id!(RequestId "req_" "A tenant's request.");

/// A tenant's name, as in `tenant/model`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct TenantName(pub String);

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A sequence as executors know it: drawn by a router, resumed under a new epoch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceKey {
    /// The router that drew the number.
    pub router: RouterId,
    /// Its number there.
    pub number: u64,
}

impl fmt::Display for SequenceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq_{}_{}", self.router, self.number)
    }
}
