//! Llama and its near kin: RMSNorm, rotary positions, gated feed-forward. They differ in biases, q/k norms, windows
//! and, for Phi-3, fused projections.

use super::{Config, ConfigError, Decoder, Names, layer_count, need_activation, sliding};
use crate::family::rope::{self, OldKeys};
use crate::family::{AttentionParams, Bias, Layer, inverse_sqrt};
use crate::manifest::{BlockKind, Norm};

const ROPE_KEYS: OldKeys<'static> = OldKeys { theta: "rope_theta", scaling: Some("rope_scaling") };

/// What the families differ in.
struct Kin {
    architecture: &'static str,
    bias: Bias,
    qk_norm: bool,
    names: Names,
    head_dim_default: Option<u32>,
    /// Window of each layer.
    windows: Vec<Option<u32>>,
}

pub(super) fn llama(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let attention = config.flag("attention_bias")?.unwrap_or(false);
    let feed_forward = config.flag("mlp_bias")?.unwrap_or(false);
    let bias = Bias { qkv: attention, output: attention, feed_forward };
    let windows = vec![None; layer_count(config, "num_hidden_layers")? as usize];
    build(config, Kin { architecture: "llama", bias, qk_norm: false, names, head_dim_default: None, windows })
}

pub(super) fn mistral(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    // transformers' Mistral has one window for all layers, whatever `layer_types` says.
    let windows = vec![window_or_default(config)?; layer_count(config, "num_hidden_layers")? as usize];
    build(config, Kin { architecture: "mistral", bias: Bias::default(), qk_norm: false, names, head_dim_default: None, windows })
}

pub(super) fn qwen2(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let bias = Bias { qkv: true, ..Bias::default() };
    let windows = qwen_windows(config)?;
    build(config, Kin { architecture: "qwen2", bias, qk_norm: false, names, head_dim_default: None, windows })
}

pub(super) fn qwen3(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let attention = config.flag("attention_bias")?.unwrap_or(false);
    let bias = Bias { qkv: attention, output: attention, feed_forward: false };
    let windows = qwen_windows(config)?;
    build(config, Kin { architecture: "qwen3", bias, qk_norm: true, names, head_dim_default: Some(128), windows })
}

pub(super) fn phi3(config: &Config, names: Names) -> Result<Decoder, ConfigError> {
    let windows = vec![config.count("sliding_window")?; layer_count(config, "num_hidden_layers")? as usize];
    let Names::Llama { body, head, sandwich, .. } = names else { unreachable!("HF names are Llama's") };
    let names = Names::Llama { body, head, fused: true, sandwich };
    build(config, Kin { architecture: "phi3", bias: Bias::default(), qk_norm: false, names, head_dim_default: None, windows })
}

/// Absent means the class's 4096, `null` none.
fn window_or_default(config: &Config) -> Result<Option<u32>, ConfigError> {
    if config.has_key("sliding_window") { config.count("sliding_window") } else { Ok(Some(4096)) }
}

/// `use_sliding_window` gives the layers from `max_window_layers` on a window, unless `layer_types` says which.
fn qwen_windows(config: &Config) -> Result<Vec<Option<u32>>, ConfigError> {
    let layers = layer_count(config, "num_hidden_layers")?;
    let window = match config.flag("use_sliding_window")?.unwrap_or(false) {
        true => window_or_default(config)?,
        false => None,
    };
    let first = match config.get("max_window_layers").map(|v| v.as_u64()) {
        None => 28,
        Some(Some(first)) => first,
        Some(None) => return Err(ConfigError::Missing("max_window_layers".to_owned())),
    };
    let sliding = sliding(config, layers, |layer| u64::from(layer) >= first)?;
    Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
}

fn build(config: &Config, kin: Kin) -> Result<Decoder, ConfigError> {
    let width = config.need_count("hidden_size")?;
    let heads = config.need_count("num_attention_heads")?;
    let head_dim = match (config.count("head_dim")?, kin.head_dim_default) {
        (Some(dim), _) | (None, Some(dim)) => dim,
        (None, None) => width / heads,
    };
    let eps_default = if kin.architecture == "phi3" { 1e-5 } else { 1e-6 };
    let norm = Norm::Rms { eps: config.number("rms_norm_eps")?.unwrap_or(eps_default) as f32, weight_offset: 0.0 };
    let attention = AttentionParams {
        norm,
        heads,
        kv_heads: config.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        scale: inverse_sqrt(f64::from(head_dim)),
        softcap: None,
        qk_norm: kin.qk_norm.then_some(norm),
        post_norm: None,
    };
    let rope = rope::settings(config, "full_attention", &ROPE_KEYS, head_dim, 10_000.0)?;
    let feed_forward = BlockKind::FeedForward {
        norm,
        activation: need_activation(config, &["hidden_act"], "silu")?,
        inner: config.need_count("intermediate_size")?,
        gated: true,
        post_norm: None,
    };
    let layer =
        |window: &Option<u32>| Layer { attention: attention.block(Some(rope.rope.clone()), *window), feed_forward: feed_forward.clone() };
    let context = config.need_count("max_position_embeddings")?;
    Ok(Decoder {
        architecture: kin.architecture,
        width,
        vocab: Some(config.need_count("vocab_size")?),
        context_tokens: rope.context_tokens_max.map_or(context, |max| max.min(context)),
        embed_scale: 1.0,
        learned_positions: false,
        layers: kin.windows.iter().map(layer).collect(),
        head: BlockKind::Head { norm, softcap: None, scale: 1.0 },
        tied: Some(config.flag("tie_word_embeddings")?.unwrap_or(false)),
        bias: kin.bias,
        names: kin.names,
    })
}
