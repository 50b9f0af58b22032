//! What the zoo's JSON objects hold: block descriptors, chain manifests, names. Parsed at the door into types that
//! cannot be wrong; byte-exact rules are in docs/block-format.md. It does no IO.

use std::collections::BTreeMap;

use ashlar_kernels::ops::Activation;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// A tensor as a block refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRef {
    /// Identity of dtype, shape and bytes.
    pub digest: Digest,
    /// Element format, by name.
    pub dtype: ashlar_kernels::format::Dtype,
    /// `[K]` or `[N, K]`.
    pub shape: Vec<u64>,
}

/// Which norm a block owns in front of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Norm {
    /// Root mean square; the weight is used as `weight_offset + w`.
    Rms {
        /// Added to the variance.
        eps: f32,
        /// 0, or 1 for Gemma.
        weight_offset: f32,
    },
    /// Mean and variance, with bias.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

/// Rotary position embedding of one attention block (halves style).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that are rotated (even, at most head_dim).
    pub dim: u32,
    /// How frequencies are changed for long contexts.
    pub scaling: RopeScaling,
}

/// Frequency scaling of [`Rope`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's wavelength-dependent scaling.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are not.
        high_freq_factor: f64,
        /// Context that the model was first trained with.
        original_context: u64,
    },
    /// One divisor for each frequency (Phi-3's long rope, within the original context; GGUF's `rope_freqs` tensor), and a factor on cos and sin.
    Factors {
        /// `dim / 2` divisors.
        factors: Vec<f64>,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

/// Hyper-parameters by kind. Everything here changes numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum BlockKind {
    /// Token (and position) embedding: `[vocab, width]`.
    Embed {
        /// Rows are multiplied by it (Gemma: sqrt(width) ), after the lookup.
        scale: f32,
    },
    /// Norm, q/k/v, rope, attention, output projection, residual.
    Attention {
        /// The norm in front.
        norm: Norm,
        /// Query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Elements of a head.
        head_dim: u32,
        /// Score multiplier.
        scale: f32,
        /// None: learned positions in the embedding.
        rope: Option<Rope>,
        /// Sliding window in tokens: position p sees keys at positions greater than p - window.
        window: Option<u32>,
        /// Soft cap of scores.
        softcap: Option<f32>,
        /// Norm on each q and k head (`q_norm.weight`, `k_norm.weight`).
        qk_norm: Option<Norm>,
        /// Norm on the block's output before the residual (`post_norm.weight`).
        post_norm: Option<Norm>,
    },
    /// Norm, up (and gate), activation, down, residual.
    FeedForward {
        /// The norm in front.
        norm: Norm,
        /// Non-linearity of the gate, or of `up` where there is no gate.
        activation: Activation,
        /// Inner width.
        inner: u32,
        /// Whether `gate.weight` exists: `act(gate) * up`.
        gated: bool,
        /// Norm on the block's output before the residual.
        post_norm: Option<Norm>,
    },
    /// Final norm and output projection: `[vocab, width]`.
    Head {
        /// The final norm.
        norm: Norm,
        /// Soft cap of logits.
        softcap: Option<f32>,
        /// Logits are multiplied by it before the cap (1 for most).
        scale: f32,
    },
    /// From the hidden rows of one family to those of another: `y = W x + b + u / (1 + p)` at position p, without norm and without residual
    /// (docs/stitch.md).
    Stitch {
        /// Width D' of the rows that it gives.
        to: u32,
    },
}

/// A block descriptor: what `blocks/<digest>.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Width D of the hidden state that flows through; of a stitch, that flows in.
    pub width: u32,
    /// Kind and hyper-parameters.
    pub params: BlockKind,
    /// Tensors by role (docs/block-format.md).
    pub tensors: BTreeMap<String, TensorRef>,
}

impl Block {
    /// Width of the hidden rows that it gives: its own, but for a stitch. Of the head, whose rows are logits, its own.
    pub fn output_width(&self) -> u32 {
        match self.params {
            BlockKind::Stitch { to } => to,
            _ => self.width,
        }
    }
}

/// Files that belong to a model but hold no weights, by digest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assets {
    /// Hugging Face `tokenizer.json`.
    pub tokenizer: Option<Digest>,
    /// Jinja chat template.
    pub chat_template: Option<Digest>,
    /// Model card (README.md).
    pub card: Option<Digest>,
}

/// Special tokens and text conventions of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// Tokens that end a generation (config, generation_config and tokenizer together), ascending.
    pub eos: Vec<u32>,
    /// Text of bos and eos for the chat template.
    pub bos_text: Option<String>,
    /// Text of eos for the chat template.
    pub eos_text: Option<String>,
}

/// Generation defaults that the checkpoint brings (generation_config.json).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Softmax temperature; 0 takes the likeliest token, which the checkpoint calls `do_sample: false`.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// What an adapter does to one matrix `W` of its block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// `y += scale * (x A^T) B^T` (LoRA, arXiv 2106.09685, section 4.1).
    LowRank {
        /// alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        scale: f32,
        /// Shrink, `[rank, K]`.
        a: TensorRef,
        /// Expand, `[N, rank]`.
        b: TensorRef,
    },
    /// `y += x D^T`, where D has one bit for each weight and a scale for each group of them (BitDelta, arXiv 2402.10193, section 3.1).
    OneBit {
        /// D, `[N, K]`, int1.
        signs: TensorRef,
    },
}

/// An adapter on one block: what `adapters/<digest>.json` holds. It does not name its block, so that one adapter of equal
/// bytes is one object wherever it is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// By role of the matrix in the block (`q.weight`); not empty.
    pub changes: BTreeMap<String, Change>,
}

/// An adapter on one block of a chain. A block has at most one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterRef {
    /// Index of the block in the chain.
    pub block_index: u32,
    /// Identity of the adapter.
    pub digest: Digest,
}

/// A chain manifest: what `chains/<digest>.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// 1.
    pub format: u32,
    /// Family name for people (`llama`, `gemma3`, ...).
    pub architecture: String,
    /// Width D of hidden states: those of the first block, where stitches change it.
    pub width: u32,
    /// Rows of the output projection.
    pub vocab: u32,
    /// Positions the model can take.
    pub context_tokens: u32,
    /// embed, (attention, feed_forward) * layers, head; in front of an attention block but the first there may be a stitch.
    pub blocks: Vec<Digest>,
    /// Adapters, by block index.
    pub adapters: Vec<AdapterRef>,
    /// Tokenizer, template, card.
    pub assets: Assets,
    /// Special tokens.
    pub tokens: Tokens,
    /// Generation defaults.
    pub defaults: Defaults,
    /// Licence as the source states it.
    pub licence: Option<String>,
    /// Where it came from: a path's last component or hub name, and for GGUF the file name.
    pub source: String,
}

/// What `models/<tenant>/<name>.json` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelName {
    /// The chain the name points to now.
    pub chain: Digest,
    /// Unix time of the change.
    pub created_ms: u64,
    /// `tenant/name` of the model it was tuned from, where known.
    pub parent: Option<String>,
    /// Earlier chains, newest first.
    pub history: Vec<Past>,
    /// Whether a server was asked to load it as an adapter, and so may be asked to unload it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub loaded: bool,
}

/// An earlier value of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    /// The chain it pointed to.
    pub chain: Digest,
    /// When it had been set.
    pub created_ms: u64,
}
