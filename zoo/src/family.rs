//! Model families: from a checkpoint's configuration to one config-driven decoder and the names of its tensors.
//! `hf` reads config.json, `gguf` reads GGUF metadata; both end in a [`Decoder`]. A family is data here, not code that runs
//! a model.

pub mod config;
pub mod gguf;
mod hf;
pub mod names;
pub mod peft;
mod rope;

use ashlar_kernels::ops::Activation;

pub use config::{Config, ConfigError};
pub use hf::decoder as from_config;

use crate::manifest::{BlockKind, Norm, Rope};
use names::Names;

/// What a family's configuration says about the numbers of a model, in one shape for all families.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// Family, for people.
    pub architecture: &'static str,
    /// Width of hidden states.
    pub width: u32,
    /// Rows of the token embedding; `None` where only the tensor knows (GGUF).
    pub vocab: Option<u32>,
    /// Positions the model can take.
    pub context_tokens: u32,
    /// Embedding rows are multiplied by it.
    pub embed_scale: f32,
    /// Whether positions are learned and added to the embedding.
    pub learned_positions: bool,
    /// Attention and feed-forward of each layer.
    pub layers: Vec<Layer>,
    /// The head's hyper-parameters.
    pub head: BlockKind,
    /// Whether the output projection is the token embedding; `None`: it is where the checkpoint has no output tensor.
    pub tied: Option<bool>,
    /// Which linear layers have biases.
    pub bias: Bias,
    /// How the checkpoint names its tensors.
    pub names: Names,
}

/// One layer's two blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// [`BlockKind::Attention`].
    pub attention: BlockKind,
    /// [`BlockKind::FeedForward`].
    pub feed_forward: BlockKind,
}

/// Which linear layers have biases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bias {
    /// q, k and v.
    pub qkv: bool,
    /// The attention's output projection.
    pub output: bool,
    /// All of the feed-forward.
    pub feed_forward: bool,
}

/// What attention blocks of most families have in common; the layers differ in rope and window.
#[derive(Debug, Clone)]
struct AttentionParams {
    norm: Norm,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    softcap: Option<f32>,
    qk_norm: Option<Norm>,
    post_norm: Option<Norm>,
}

impl AttentionParams {
    fn block(&self, rope: Option<Rope>, window: Option<u32>) -> BlockKind {
        BlockKind::Attention {
            norm: self.norm,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            rope,
            window,
            softcap: self.softcap,
            qk_norm: self.qk_norm,
            post_norm: self.post_norm,
        }
    }
}

/// `x^-0.5` as every family computes its score multiplier.
pub(crate) fn inverse_sqrt(x: f64) -> f32 {
    x.powf(-0.5) as f32
}

/// Our name for an activation, by Hugging Face's.
fn activation(name: &str) -> Option<Activation> {
    Some(match name {
        "silu" | "swish" => Activation::Silu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        "relu" => Activation::Relu,
        _ => return None,
    })
}

/// Most layers of a model: [`crate::roles::CHAIN_BLOCKS_MAX`] blocks less embed and head, two a layer.
pub const LAYERS_MAX: u32 = 2047;
