//! What can be wrong with the tensors of an adapter. Each names the tensor.

use crate::adapter::{RANK_MAX, SCALE_MAX};

/// Why a tensor of adapter_model.safetensors cannot be taken.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum PeftError {
    /// No name that peft gives.
    #[error("tensor `{0}` is no LoRA factor: peft's are named base_model.model.MODULE.lora_A.weight and lora_B.weight")]
    Unknown(String),
    /// A DoRA that the configuration does not tell of.
    #[error("tensor `{0}` belongs to DoRA, which plain LoRA cannot express; merge it into its base")]
    Dora(String),
    /// A bias on lora_B.
    #[error("tensor `{0}` is a bias on lora_B, which is not served; merge it into its base")]
    FactorBias(String),
    /// A factor of what no adapter can change.
    #[error(
        "tensor `{name}` is of a LoRA of the {what}: adapters change the linear layers of attention and feed-forward blocks alone; merge it into its base"
    )]
    NotAdapted {
        /// Tensor.
        name: String,
        /// What it would change.
        what: &'static str,
    },
    /// One factor without the other.
    #[error("tensor `{name}` has no {missing} beside it")]
    Half {
        /// Tensor that is there.
        name: String,
        /// Factor that is not.
        missing: &'static str,
    },
    /// A module or layer that the base does not have.
    #[error("tensor `{name}` is of `{module}`, which {base} does not have")]
    NoModule {
        /// Tensor.
        name: String,
        /// Module as the tensor's name has it.
        module: String,
        /// The base.
        base: String,
    },
    /// Factors that peft would not load.
    #[error("tensor `{0}` is of a module that target_modules and layers_to_transform in adapter_config.json do not name")]
    Untargeted(String),
    /// Two names for one matrix.
    #[error("tensors `{name}` and `{other}` change the same matrix")]
    Twice {
        /// Tensor.
        name: String,
        /// The other.
        other: String,
    },
    /// A rank that lies.
    #[error("tensor `{name}` has rank {actual}, adapter_config.json says {expected}")]
    Rank {
        /// Tensor.
        name: String,
        /// Its rank.
        actual: u64,
        /// What the configuration says for the module.
        expected: u32,
    },
    /// A rank that is not believed.
    #[error("tensor `{name}` has rank {rank}, more than {RANK_MAX}")]
    RankMax {
        /// Tensor.
        name: String,
        /// Its rank.
        rank: u64,
    },
    /// A factor that is no matrix.
    #[error("tensor `{name}` has shape {actual:?}, a LoRA factor is a matrix")]
    NoMatrix {
        /// Tensor.
        name: String,
        /// Its shape.
        actual: Vec<u64>,
    },
    /// A factor or whole tensor of another base.
    #[error("tensor `{name}` has shape {actual:?}, over {base} it is {expected:?}")]
    Shape {
        /// Tensor.
        name: String,
        /// Its shape.
        actual: Vec<u64>,
        /// The base.
        base: String,
        /// What it should be.
        expected: Vec<u64>,
    },
    /// An alpha that makes everything infinite.
    #[error("tensor `{name}` would be scaled by {scale:e}, more than {SCALE_MAX}: its lora_alpha is too large")]
    Scale {
        /// Tensor.
        name: String,
        /// Alpha over rank, as f32.
        scale: f32,
    },
    /// A whole tensor that the configuration does not tell of.
    #[error("tensor `{0}` is a whole one, which neither modules_to_save nor bias in adapter_config.json names")]
    Unlisted(String),
    /// A file with nothing in it, as a save that failed leaves one.
    #[error("adapter_model.safetensors has neither LoRA factors nor tensors saved whole: nothing would differ from the base")]
    Empty,
    /// What was trained is not there.
    #[error("the adapter is incomplete: {key} in adapter_config.json names `{entry}`, of which adapter_model.safetensors has no tensors")]
    NoTensors {
        /// Key of the configuration.
        key: &'static str,
        /// Its entry.
        entry: String,
    },
    /// Biases that were trained are not there.
    #[error(
        "the adapter is incomplete: bias in adapter_config.json says that biases such as `{0}` were trained, and adapter_model.safetensors has none"
    )]
    NoBiases(String),
    /// Factors that other layers have.
    #[error(
        "the adapter is incomplete: target_modules in adapter_config.json names `{module}`, of which adapter_model.safetensors has no factors"
    )]
    MissingModule {
        /// Module as the file would have it.
        module: String,
    },
    /// Factors that peft would not read.
    #[error("exclude_modules in adapter_config.json names `{module}`, of which adapter_model.safetensors has factors")]
    Excluded {
        /// Module as the file has it.
        module: String,
    },
    /// A norm over a base that holds its norms otherwise.
    #[error(
        "tensor `{name}` is a norm, and {base} comes from a GGUF file, which holds this family's norms otherwise; merge it into its base"
    )]
    GgufNorm {
        /// Tensor.
        name: String,
        /// The base.
        base: String,
    },
}
