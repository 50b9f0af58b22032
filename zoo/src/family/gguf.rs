//! GGUF metadata of the supported families. llama.cpp keeps some facts in its code and not in the file; they are here.

use std::collections::BTreeMap;

use super::config::ConfigError;
use super::names::Names;
use super::rope::long_rope_attention_factor;
use super::{AttentionParams, Bias, Decoder, LAYERS_MAX, Layer, inverse_sqrt};
use crate::formats::gguf::Value;
use crate::manifest::{BlockKind, Norm, Rope, RopeScaling};
use ashlar_kernels::ops::Activation;

/// What a decoder needs to know of the file's tensors.
pub trait Tensors {
    /// Whether there is one of that name.
    fn has(&self, name: &str) -> bool;
    /// The values of a vector, if there is one of that name.
    fn vector(&self, name: &str) -> Option<Vec<f64>>;
}

/// The decoder that a GGUF file describes.
///
/// # Errors
/// The key that is missing, wrong or not supported; or the architecture.
pub fn decoder(metadata: &BTreeMap<String, Value>, tensors: &dyn Tensors) -> Result<Decoder, ConfigError> {
    let architecture = metadata.get("general.architecture").and_then(Value::as_str);
    let architecture = architecture.ok_or_else(|| ConfigError::Missing("general.architecture".to_owned()))?;
    let family = match architecture {
        "llama" => "llama",
        "mistral" => "mistral",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "gemma2" => "gemma2",
        "gemma3" => "gemma3",
        "phi3" => "phi3",
        "gpt2" => "gpt2",
        other => return Err(ConfigError::Architecture(other.to_owned())),
    };
    let keys = Keys { metadata, architecture };
    if keys.number("expert_count")?.is_some_and(|count| count > 0.0) {
        let key = format!("{architecture}.expert_count");
        return Err(ConfigError::Unsupported { key, value: "above 0".to_owned(), reason: "mixtures of experts are not served yet" });
    }
    build(family, &keys, tensors)
}

struct Keys<'a> {
    metadata: &'a BTreeMap<String, Value>,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn wrong(&self, name: &str, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::Value { key: self.key(name), value: format!("{value:?}").chars().take(80).collect(), expected }
    }

    fn count(&self, name: &str) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.metadata.get(&self.key(name)) else { return Ok(None) };
        match value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0) {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(name, value, "an integer from 1 to 4294967295")),
        }
    }

    fn need(&self, name: &str) -> Result<u32, ConfigError> {
        self.count(name)?.ok_or_else(|| ConfigError::Missing(self.key(name)))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.metadata.get(&self.key(name)) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(name, value, "a number"))
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.metadata.get(&self.key(name)).and_then(Value::as_str)
    }
}

/// A number that was written as f32, as the decimal that was meant: 0.000009999999747378752 is 1e-5.
fn decimal(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn build(family: &'static str, keys: &Keys<'_>, tensors: &dyn Tensors) -> Result<Decoder, ConfigError> {
    let width = keys.need("embedding_length")?;
    let layers = keys.need("block_count")?;
    if layers > LAYERS_MAX {
        return Err(ConfigError::Value { key: keys.key("block_count"), value: layers.to_string(), expected: "at most 2047 layers" });
    }
    let heads = keys.need("attention.head_count")?;
    let head_dim = match keys.count("attention.key_length")? {
        Some(length) => length,
        None => width / heads,
    };
    if keys.count("attention.value_length")?.is_some_and(|length| length != head_dim) {
        let key = keys.key("attention.value_length");
        return Err(ConfigError::Unsupported {
            key,
            value: "another length than the keys'".to_owned(),
            reason: "values and keys of one length are",
        });
    }
    let gemma = matches!(family, "gemma2" | "gemma3");
    let norm = match family {
        "gpt2" => Norm::Layer { eps: need_number(keys, "attention.layer_norm_epsilon")? as f32 },
        // llama.cpp's converter has added Gemma's 1 to the weights.
        _ => Norm::Rms { eps: need_number(keys, "attention.layer_norm_rms_epsilon")? as f32, weight_offset: 0.0 },
    };
    let attention = AttentionParams {
        norm,
        heads,
        kv_heads: keys.count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        scale: inverse_sqrt(score_divisor(family, layers, width, heads, head_dim)),
        softcap: softcap(keys, "attn_logit_softcapping", family)?,
        qk_norm: tensors.has("blk.0.attn_q_norm.weight").then_some(norm),
        post_norm: gemma.then_some(norm),
    };
    let feed_forward = BlockKind::FeedForward {
        norm,
        activation: if gemma || family == "gpt2" { Activation::GeluTanh } else { Activation::Silu },
        inner: keys.need("feed_forward_length")?,
        gated: family != "gpt2",
        post_norm: gemma.then_some(norm),
    };
    let context = keys.need("context_length")?;
    let (global, context_tokens) = if family == "gpt2" { (None, context) } else { rope(family, keys, tensors, head_dim, context)? };
    let local = match &global {
        Some(global) if family == "gemma3" => {
            let theta = keys.number("rope.freq_base_swa")?.map_or(10_000.0, decimal);
            Some(Rope { theta, dim: global.dim, scaling: RopeScaling::None })
        }
        other => other.clone(),
    };
    let window = keys.window(family)?;
    let layer = |layer: u32| {
        let sliding = window.is_some() && is_sliding(family, layer);
        let rope = if sliding { local.clone() } else { global.clone() };
        Layer { attention: attention.block(rope, window.filter(|_| sliding)), feed_forward: feed_forward.clone() }
    };
    Ok(Decoder {
        architecture: family,
        width,
        vocab: None,
        context_tokens,
        embed_scale: if gemma { f64::from(width).sqrt() as f32 } else { 1.0 },
        learned_positions: family == "gpt2",
        layers: (0..layers).map(layer).collect(),
        head: BlockKind::Head { norm, softcap: softcap(keys, "final_logit_softcapping", family)?, scale: 1.0 },
        tied: None,
        bias: Bias {
            qkv: tensors.has("blk.0.attn_q.bias") || tensors.has("blk.0.attn_qkv.bias"),
            output: tensors.has("blk.0.attn_output.bias"),
            feed_forward: tensors.has("blk.0.ffn_up.bias"),
        },
        names: Names::Gguf {
            permuted: matches!(family, "llama" | "mistral"),
            fused_qkv: tensors.has("blk.0.attn_qkv.weight"),
            fused_gate_up: family == "phi3",
        },
    })
}

impl Keys<'_> {
    /// Sliding window, 0 meaning none.
    fn window(&self, family: &str) -> Result<Option<u32>, ConfigError> {
        match self.metadata.get(&self.key("attention.sliding_window")) {
            Some(value) if value.as_u64() == Some(0) => Ok(None),
            Some(_) => self.count("attention.sliding_window"),
            None if family == "gemma2" => Ok(Some(4096)),
            None if family == "gemma3" => Err(ConfigError::Missing(self.key("attention.sliding_window"))),
            None => Ok(None),
        }
    }
}

/// Which layers slide where there is a window: llama.cpp has the patterns in its code.
fn is_sliding(family: &str, layer: u32) -> bool {
    match family {
        "gemma3" => !(layer + 1).is_multiple_of(6),
        "gemma2" => layer.is_multiple_of(2),
        _ => true,
    }
}

/// What the score multiplier is the inverse square root of. Gemma's largest sizes use width / heads, which the file does not say.
fn score_divisor(family: &str, layers: u32, width: u32, heads: u32, head_dim: u32) -> f64 {
    match (family, layers) {
        ("gemma3", 62) | ("gemma2", 46) => f64::from(width) / f64::from(heads),
        _ => f64::from(head_dim),
    }
}

fn softcap(keys: &Keys<'_>, name: &str, family: &str) -> Result<Option<f32>, ConfigError> {
    let default = match (family, name) {
        ("gemma2", "attn_logit_softcapping") => Some(50.0),
        ("gemma2", _) => Some(30.0),
        _ => None,
    };
    Ok(keys.number(name)?.or(default).filter(|cap| *cap != 0.0).map(|cap| cap as f32))
}

/// Rope of all layers (of the global ones for Gemma 3), and the context it holds for.
fn rope(family: &str, keys: &Keys<'_>, tensors: &dyn Tensors, head_dim: u32, context: u32) -> Result<(Option<Rope>, u32), ConfigError> {
    let dim = keys.count("rope.dimension_count")?.unwrap_or(head_dim);
    let theta = keys.number("rope.freq_base")?.map_or(10_000.0, decimal);
    let scaled = |scaling, context| Ok((Some(Rope { theta, dim, scaling }), context));
    if let Some(factors) = tensors.vector("rope_freqs.weight") {
        return scaled(RopeScaling::Factors { factors, attention_factor: 1.0 }, context);
    }
    if let Some(factors) = tensors.vector("rope_factors_short.weight") {
        let original = keys.need("rope.scaling.original_context_length")?;
        let attention_factor = match keys.number("rope.scaling.attn_factor")? {
            Some(factor) => factor,
            None => long_rope_attention_factor(f64::from(context) / f64::from(original), original),
        };
        return scaled(RopeScaling::Factors { factors, attention_factor }, context.min(original));
    }
    match keys.text("rope.scaling.type") {
        None | Some("none") => {
            if let Some(factor) = keys.number("rope.scale_linear")?.filter(|factor| *factor != 1.0) {
                return scaled(RopeScaling::Linear { factor: decimal(factor) }, context);
            }
            scaled(RopeScaling::None, context)
        }
        Some("linear") => scaled(RopeScaling::Linear { factor: decimal(need_number(keys, "rope.scaling.factor")?) }, context),
        Some(other) => Err(ConfigError::Unsupported {
            key: keys.key("rope.scaling.type"),
            value: format!("{other} ({family})"),
            reason: "only linear, and factors given as tensors, are",
        }),
    }
}

fn need_number(keys: &Keys<'_>, name: &str) -> Result<f64, ConfigError> {
    keys.number(name)?.ok_or_else(|| ConfigError::Missing(keys.key(name)))
}
