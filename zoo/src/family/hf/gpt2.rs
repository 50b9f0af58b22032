//! GPT-2: LayerNorm, learned positions, biases everywhere, no gate.

use super::{Config, ConfigError, Decoder, Names, layer_count, need_activation};
use crate::family::{AttentionParams, Bias, Layer, inverse_sqrt};
use crate::manifest::{BlockKind, Norm};

pub(super) fn gpt2(config: &Config, has: &dyn Fn(&str) -> bool) -> Result<Decoder, ConfigError> {
    let width = config.need_count("n_embd")?;
    let heads = config.need_count("n_head")?;
    if !width.is_multiple_of(heads) {
        return Err(ConfigError::Value { key: "n_head".to_owned(), value: heads.to_string(), expected: "a divisor of n_embd" });
    }
    let head_dim = width / heads;
    let norm = Norm::Layer { eps: config.number("layer_norm_epsilon")?.unwrap_or(1e-5) as f32 };
    let attention = AttentionParams {
        norm,
        heads,
        kv_heads: heads,
        head_dim,
        scale: inverse_sqrt(f64::from(head_dim)),
        softcap: None,
        qk_norm: None,
        post_norm: None,
    };
    let feed_forward = BlockKind::FeedForward {
        norm,
        activation: need_activation(config, &["activation_function"], "gelu_new")?,
        inner: config.count("n_inner")?.unwrap_or(4 * width),
        gated: false,
        post_norm: None,
    };
    let prefix = if has("wte.weight") { "" } else { "transformer." };
    let layer = Layer { attention: attention.block(None, None), feed_forward };
    Ok(Decoder {
        architecture: "gpt2",
        width,
        vocab: Some(config.need_count("vocab_size")?),
        context_tokens: match config.count("n_positions")? {
            Some(positions) => positions,
            None => config.need_count("n_ctx")?,
        },
        embed_scale: 1.0,
        learned_positions: true,
        layers: vec![layer; layer_count(config, "n_layer")? as usize],
        head: BlockKind::Head { norm, softcap: None, scale: 1.0 },
        tied: Some(config.flag("tie_word_embeddings")?.unwrap_or(true)),
        bias: Bias { qkv: true, output: true, feed_forward: true },
        names: Names::Gpt2 { prefix: prefix.to_owned() },
    })
}
