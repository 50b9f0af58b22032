//! From a checkpoint or adapter on disk to blocks in the zoo. Start with [`add`]. Order: open and parse everything, plan and check
//! every tensor, hash the converted bytes, and only then write: payloads, blocks and assets, the chain, the name.

mod adapter;
mod add;
mod checkpoint;
mod convert;
pub(crate) mod gather;
mod load;
mod plan;
mod report;
mod sight;
mod text;

use std::path::PathBuf;

pub use adapter::{ADAPTER_BYTES_MAX, AdapterFiles, AdaptersDir, PeftError, is_adapter};
pub use add::{AddOptions, add};
pub use checkpoint::Checkpoint;
pub use convert::Recipe;
pub use load::{LoadOptions, UnloadError, load, unload};
pub use report::{AddReport, Progress, Shared, Silent, Stage, human_bytes};

use ashlar_kernels::format::Dtype;

use crate::family::ConfigError;
use crate::formats::FormatError;
use crate::quantised::QuantisedError;
use crate::roles::ManifestError;
use crate::store::StoreError;
use crate::tokenizer::TokenizerError;

/// Why a checkpoint was not added. Nothing was named, and except for `Store` and `TensorChanged` nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// A path that holds no checkpoint.
    #[error("{path} holds no checkpoint: {reason}")]
    NoCheckpoint {
        /// Path.
        path: PathBuf,
        /// What was looked for.
        reason: &'static str,
    },
    /// adapter_config.json.
    #[error("the adapter cannot be served")]
    AdapterConfig(#[source] ConfigError),
    /// A tensor of an adapter.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// No base is named.
    #[error("adapter_config.json does not say what base the adapter is over: give it with --base TENANT/MODEL")]
    BaseUnsaid,
    /// The base that the adapter names is not one model here.
    #[error("the adapter asks for the base `{wanted}`, and {} that name or source{}: give it with --base TENANT/MODEL", how_many_have(.found), some_of(.found))]
    BaseUnclear {
        /// As adapter_config.json has it.
        wanted: String,
        /// Models that it may mean.
        found: Vec<crate::model_id::ModelId>,
    },
    /// The base is itself base and adapter.
    #[error(
        "{base} has adapters of its own, and a block has at most one: give {parent} with --base, and see that the adapter was trained over it"
    )]
    BaseAdapted {
        /// The base that was given.
        base: crate::model_id::ModelId,
        /// What it is over.
        parent: String,
    },
    /// The base belongs to another tenant, who is not public.
    #[error("{base} is not {tenant}'s to build on: `ashlar zoo public {}` lets every tenant see and share what {} has", .base.tenant(), .base.tenant())]
    BaseHidden {
        /// The base that was given.
        base: crate::model_id::ModelId,
        /// Whom the new model is for.
        tenant: String,
    },
    /// A small file of the checkpoint could not be read.
    #[error("failed to read {path}")]
    Io {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file that is larger than it can honestly be.
    #[error("{path} has {actual} bytes, more than {max}")]
    TooLarge {
        /// File.
        path: PathBuf,
        /// Its size.
        actual: u64,
        /// Limit.
        max: u64,
    },
    /// A name that leads to nothing below the folder that adapters may be loaded from.
    #[error("`{name}` is nothing in the folder that adapters are loaded from")]
    Outside {
        /// As it was given, shortened.
        name: String,
    },
    /// A file that somebody wrote to while it was copied.
    #[error("{path} was changed while it was read: try again once it is whole")]
    FileChanged {
        /// File.
        path: PathBuf,
    },
    /// A tensor that was another one when its digest was computed.
    #[error("tensor `{name}` was changed in its file meanwhile: try again once the file is whole")]
    TensorChanged {
        /// Name in the checkpoint.
        name: String,
    },
    /// A name that means something else.
    #[error("a model {0} is there already")]
    Exists(crate::model_id::ModelId),
    /// Weights file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Configuration.
    #[error("the model cannot be served")]
    Config(#[from] ConfigError),
    /// Tokenizer.
    #[error("the tokenizer cannot be used")]
    Tokenizer(#[from] TokenizerError),
    /// Blocks that the configuration implies are impossible.
    #[error("the configuration makes no sense for {block}")]
    Block {
        /// Which block.
        block: String,
        /// How.
        source: ManifestError,
    },
    /// A tensor that the family needs.
    #[error("tensor `{name}` is missing (it is `{role}` of {block})")]
    MissingTensor {
        /// Name in the checkpoint.
        name: String,
        /// Role.
        role: String,
        /// Which block.
        block: String,
    },
    /// A tensor that the family does not have.
    #[error("tensor `{name}` is not part of a {architecture} model{more}")]
    UnexpectedTensor {
        /// Name in the checkpoint.
        name: String,
        /// Family.
        architecture: &'static str,
        /// How many more there are.
        more: String,
    },
    /// A tensor of another shape than the configuration implies.
    #[error("tensor `{name}` has shape {actual:?}, the configuration implies {expected}")]
    TensorShape {
        /// Name in the checkpoint.
        name: String,
        /// Its shape.
        actual: Vec<u64>,
        /// What it should be.
        expected: String,
    },
    /// A tensor of a type that is not stored.
    #[error("tensor `{name}` has type {element}, which is not supported{advice}")]
    TensorType {
        /// Name in the checkpoint.
        name: String,
        /// Its type.
        element: String,
        /// What is supported.
        advice: &'static str,
    },
    /// A tensor of a quantised matrix.
    #[error(transparent)]
    Quantised(#[from] QuantisedError),
    /// NaN or infinity.
    #[error("tensor `{name}` holds {value} (element {index})")]
    NotFinite {
        /// Name in the checkpoint.
        name: String,
        /// Index of the element.
        index: usize,
        /// Which.
        value: &'static str,
    },
    /// A value that would be another one altogether in the format to store: an infinity, the largest that it has, or zero.
    #[error("tensor `{name}` holds {value:e} (element {index}), which would be {stored:e} in {dtype}: add it with another --dtype")]
    OutOfRange {
        /// Name in the checkpoint.
        name: String,
        /// Index of the element, which is the largest.
        index: usize,
        /// The element.
        value: f32,
        /// What it was to be stored as.
        dtype: Dtype,
        /// What would be read back.
        stored: f32,
    },
    /// The output projection contradicts the configuration.
    #[error("the configuration ties the output projection to the embedding, but `{name}` differs from it")]
    Untied {
        /// Name in the checkpoint.
        name: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Names changed faster than we could follow.
    #[error("model {0} is being changed by others; try again")]
    Contended(crate::model_id::ModelId),
}

fn how_many_have(models: &[crate::model_id::ModelId]) -> String {
    match models.len() {
        0 => "no model here has".to_owned(),
        1 => "1 model here has".to_owned(),
        count => format!("{count} models here have"),
    }
}

/// Up to four of the models, in brackets; nothing where there are none.
fn some_of(models: &[crate::model_id::ModelId]) -> String {
    let names: Vec<String> = models.iter().take(4).map(ToString::to_string).collect();
    match models.len() {
        0 => String::new(),
        1..=4 => format!(" ({})", names.join(", ")),
        _ => format!(" ({}, ...)", names.join(", ")),
    }
}
