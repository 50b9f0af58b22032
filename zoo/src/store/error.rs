//! What can go wrong with a stored zoo, naming the object, and whether trying again can help.

use std::fmt;

use crate::digest::Digest;
use crate::model_id::ModelId;
use crate::profiles::DeviceKey;

/// An object of the zoo, for messages.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// `format.json`.
    Format,
    /// A tensor.
    Tensor(Digest),
    /// A tensor, and the block and role that refer to it.
    TensorOf {
        /// The tensor.
        tensor: Digest,
        /// The block.
        block: Digest,
        /// Its role in the block.
        role: Box<str>,
    },
    /// A tensor, and the adapter and place that refer to it.
    TensorOfAdapter {
        /// The tensor.
        tensor: Digest,
        /// The adapter.
        adapter: Digest,
        /// Role and factor (`q.weight.a`).
        role: Box<str>,
    },
    /// The mark that one tensor is stored as a delta of another one.
    Base {
        /// The delta.
        tensor: Digest,
        /// What it is a delta of.
        base: Digest,
    },
    /// A block descriptor.
    Block(Digest),
    /// An adapter descriptor.
    Adapter(Digest),
    /// A chain manifest.
    Chain(Digest),
    /// A tokenizer, template or card.
    Asset(Digest),
    /// The sketch of a chain, by the chain.
    Sketch(Digest),
    /// What was measured of a chain.
    Measure {
        /// The chain.
        chain: Digest,
        /// The record.
        record: Digest,
    },
    /// What a block was measured to cost on a device.
    Profile {
        /// The block.
        block: Digest,
        /// The device.
        device: DeviceKey,
    },
    /// A record of measured equivalence.
    Equivalence(Digest),
    /// What a tenant adds that does not see that it is there already: written, and deleted.
    Scratch(Digest),
    /// `domains.json`.
    Domains,
    /// A name.
    Model(ModelId),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format => f.write_str("format.json"),
            Self::Tensor(digest) => write!(f, "tensor {digest}"),
            Self::TensorOf { tensor, block, role } => write!(f, "tensor {tensor} (`{role}` of block {block})"),
            Self::TensorOfAdapter { tensor, adapter, role } => write!(f, "tensor {tensor} (`{role}` of adapter {adapter})"),
            Self::Base { tensor, base } => write!(f, "mark that tensor {tensor} is stored over {base}"),
            Self::Block(digest) => write!(f, "block {digest}"),
            Self::Adapter(digest) => write!(f, "adapter {digest}"),
            Self::Chain(digest) => write!(f, "chain {digest}"),
            Self::Asset(digest) => write!(f, "asset {digest}"),
            Self::Sketch(chain) => write!(f, "sketch of chain {chain}"),
            Self::Measure { chain, record } => write!(f, "measure {record} of chain {chain}"),
            Self::Profile { block, device } => write!(f, "profile of block {block} on {device}"),
            Self::Equivalence(digest) => write!(f, "equivalence {digest}"),
            Self::Scratch(tensor) => write!(f, "scratch of tensor {tensor}"),
            Self::Domains => f.write_str("domains.json"),
            Self::Model(id) => write!(f, "model {id}"),
        }
    }
}

/// What a caller may do after the world failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It will fail again until someone changes something.
    Never,
    /// The same call may succeed.
    Same,
    /// Another store or replica may have it: this one's copy is gone or damaged.
    Elsewhere,
}

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no zoo at that place.
    #[error("no zoo at {place} (it has no format.json)")]
    NoZoo {
        /// Directory or bucket.
        place: String,
    },
    /// The zoo was written by another version.
    #[error("zoo at {place} has format {found}, this build reads 1")]
    Format {
        /// Directory or bucket.
        place: String,
        /// What its format.json says.
        found: String,
    },
    /// It is not there.
    #[error("{object} is not in the zoo")]
    Missing {
        /// What was asked for.
        object: Object,
    },
    /// What is stored is not what its name promises.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// What was read.
        object: Object,
        /// How that shows.
        reason: String,
    },
    /// Someone else changed the name at the same time.
    #[error("model {id} was changed by someone else meanwhile")]
    Conflict {
        /// The name.
        id: ModelId,
    },
    /// The store did not give an object, however often it was asked.
    #[error("failed to read {object} from {place}")]
    Read {
        /// What was read.
        object: Object,
        /// Directory or bucket.
        place: Box<str>,
        /// Why the last time.
        #[source]
        source: Box<object_store::Error>,
    },
    /// Another `gc` deletes there.
    #[error("another gc sweeps {place}; one that was killed is taken for dead after {dead_s} seconds")]
    Sweeping {
        /// Bucket.
        place: String,
        /// Seconds after which it is no more waited for.
        dead_s: u64,
    },
    /// Others changed `domains.json` faster than we could follow.
    #[error("domains.json is being changed by others; try again")]
    DomainsContended,
    /// The store did not answer, or refused.
    #[error("failed to {action} `{key}`")]
    Store {
        /// What was tried.
        action: &'static str,
        /// The object's key.
        key: String,
        /// Why.
        #[source]
        source: object_store::Error,
    },
    /// The local file system did not.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// Advice for whoever handles it.
    pub fn retry(&self) -> Retry {
        match self {
            Self::NoZoo { .. } | Self::Format { .. } => Retry::Never,
            Self::Missing { .. } | Self::Damaged { .. } => Retry::Elsewhere,
            Self::Conflict { .. }
            | Self::Sweeping { .. }
            | Self::DomainsContended
            | Self::Read { .. }
            | Self::Store { .. }
            | Self::File { .. } => Retry::Same,
        }
    }

    /// The same error, with a tensor named as the `role` of `block`.
    #[must_use]
    pub fn in_block(self, block: Digest, role: &str) -> Self {
        self.with_tensor(|tensor| Object::TensorOf { tensor, block, role: role.into() })
    }

    /// The same error, with a tensor named as the factor `role` (`q.weight.a`) of `adapter`.
    #[must_use]
    pub fn in_adapter(self, adapter: Digest, role: &str) -> Self {
        self.with_tensor(|tensor| Object::TensorOfAdapter { tensor, adapter, role: role.into() })
    }

    fn with_tensor(self, name: impl Fn(Digest) -> Object) -> Self {
        let name = |object| match object {
            Object::Tensor(tensor) => name(tensor),
            other => other,
        };
        match self {
            Self::Missing { object } => Self::Missing { object: name(object) },
            Self::Damaged { object, reason } => Self::Damaged { object: name(object), reason },
            Self::Read { object, place, source } => Self::Read { object: name(object), place, source },
            other => other,
        }
    }
}
