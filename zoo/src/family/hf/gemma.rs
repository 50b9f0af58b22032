//! Gemma 2 and 3: norms before and after each half, weights used as 1 + w, scaled embedding, alternating windows,
//! soft caps (2), q/k norms and two rope bases (3).

use super::{Config, ConfigError, Decoder, Names, layer_count, need_activation, sliding};
use crate::family::rope::{self, OldKeys};
use crate::family::{AttentionParams, Bias, Layer, inverse_sqrt};
use crate::manifest::{BlockKind, Norm};

/// What the two generations differ in: defaults of keys that configurations leave out, and structure.
struct Generation {
    architecture: &'static str,
    vocab: u32,
    context_tokens: u32,
    pattern: u32,
    qk_norm: bool,
    attention_softcap: Option<f64>,
    logit_softcap: Option<f64>,
    rope: OldKeys<'static>,
    rope_local: OldKeys<'static>,
    theta: f64,
}

pub(super) fn gemma2(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let generation = Generation {
        architecture: "gemma2",
        vocab: 256_000,
        context_tokens: 8192,
        pattern: 2,
        qk_norm: false,
        attention_softcap: Some(50.0),
        logit_softcap: Some(30.0),
        rope: OldKeys { theta: "rope_theta", scaling: Some("rope_scaling") },
        rope_local: OldKeys { theta: "rope_theta", scaling: Some("rope_scaling") },
        theta: 10_000.0,
    };
    build(config, names, &generation)
}

pub(super) fn gemma3(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let generation = Generation {
        architecture: "gemma3",
        vocab: 262_208,
        context_tokens: 131_072,
        pattern: 6,
        qk_norm: true,
        attention_softcap: None,
        logit_softcap: None,
        rope: OldKeys { theta: "rope_theta", scaling: Some("rope_scaling") },
        rope_local: OldKeys { theta: "rope_local_base_freq", scaling: None },
        theta: 1_000_000.0,
    };
    build(config, names, &generation)
}

fn build(config: &Config, names: Names, generation: &Generation) -> Result<Decoder, ConfigError> {
    // What the classes of transformers default to, as published configurations rely on it.
    let or = |key: &str, default: u32| config.count(key).map(|value| value.unwrap_or(default));
    let width = or("hidden_size", 2304)?;
    let layers = match config.get("num_hidden_layers") {
        Some(_) => layer_count(config, "num_hidden_layers")?,
        None => 26,
    };
    let head_dim = or("head_dim", 256)?;
    let norm = Norm::Rms { eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32, weight_offset: 1.0 };
    let attention = AttentionParams {
        norm,
        heads: or("num_attention_heads", 8)?,
        kv_heads: or("num_key_value_heads", 4)?,
        head_dim,
        scale: inverse_sqrt(config.number("query_pre_attn_scalar")?.unwrap_or(256.0)),
        // Gemma 3's configurations have the key as well, and transformers does not use it.
        softcap: match generation.attention_softcap {
            Some(default) => softcap(config, "attn_logit_softcapping", Some(default))?,
            None => None,
        },
        qk_norm: generation.qk_norm.then_some(norm),
        post_norm: Some(norm),
    };
    let global = rope::settings(config, "full_attention", &generation.rope, head_dim, generation.theta)?;
    let local = rope::settings(config, "sliding_attention", &generation.rope_local, head_dim, 10_000.0)?;
    let feed_forward = BlockKind::FeedForward {
        norm,
        activation: need_activation(config, &["hidden_activation"], "gelu_pytorch_tanh")?,
        inner: or("intermediate_size", 9216)?,
        gated: true,
        post_norm: Some(norm),
    };
    let pattern = match config.count("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => or("_sliding_window_pattern", generation.pattern)?,
    };
    let window = or("sliding_window", 4096)?;
    let layer = |sliding: bool| {
        let (rope, window) = if sliding { (&local, Some(window)) } else { (&global, None) };
        Layer { attention: attention.block(Some(rope.rope.clone()), window), feed_forward: feed_forward.clone() }
    };
    let sliding = sliding(config, layers, |layer| !(layer + 1).is_multiple_of(pattern))?;
    let bias = config.flag("attention_bias")?.unwrap_or(false);
    let Names::Llama { body, head, fused, .. } = names else { unreachable!("HF names are Llama's") };
    Ok(Decoder {
        architecture: generation.architecture,
        width,
        vocab: Some(or("vocab_size", generation.vocab)?),
        context_tokens: or("max_position_embeddings", generation.context_tokens)?,
        // transformers rounds it to the dtype that the model runs in; here activations are f32.
        embed_scale: f64::from(width).sqrt() as f32,
        learned_positions: false,
        layers: sliding.into_iter().map(layer).collect(),
        head: BlockKind::Head { norm, softcap: softcap(config, "final_logit_softcapping", generation.logit_softcap)?, scale: 1.0 },
        tied: Some(config.flag("tie_word_embeddings")?.unwrap_or(true)),
        bias: Bias { qkv: bias, output: bias, feed_forward: false },
        names: Names::Llama { body, head, fused, sandwich: true },
    })
}

/// An explicit `null` turns the cap off; an absent key means the class's default.
fn softcap(config: &Config, key: &str, default: Option<f64>) -> Result<Option<f32>, ConfigError> {
    match config.has_key(key) {
        true => Ok(config.number(key)?.map(|cap| cap as f32)),
        false => Ok(default.map(|cap| cap as f32)),
    }
}
