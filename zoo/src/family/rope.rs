//! Rotary embedding settings in both spellings: transformers 5 (`rope_parameters`, perhaps for each layer type) and 4
//! (`rope_theta`, `rope_scaling`, `partial_rotary_factor` beside them).

use serde_json::Value;

use super::config::{Config, ConfigError};
use crate::manifest::{Rope, RopeScaling};

/// What the keys say, and how many positions are left of the context where scaling limits it.
pub(super) struct RopeSettings {
    pub(super) rope: Rope,
    /// Positions for which the chosen factors hold (Phi-3's short factors: the original context).
    pub(super) context_tokens_max: Option<u32>,
}

/// Which keys hold the base frequency where the new spelling is absent.
pub(super) struct OldKeys<'a> {
    pub(super) theta: &'a str,
    /// `None`: this kind of layer is never scaled (Gemma 3's local layers).
    pub(super) scaling: Option<&'a str>,
}

/// Settings of layers of `layer_type` (`full_attention`, `sliding_attention`), for heads of `head_dim`.
pub(super) fn settings(
    config: &Config,
    layer_type: &str,
    old: &OldKeys<'_>,
    head_dim: u32,
    theta_default: f64,
) -> Result<RopeSettings, ConfigError> {
    let parameters = config.object("rope_parameters")?.unwrap_or_default();
    let per_layer_type = parameters.has_key("full_attention") || parameters.has_key("sliding_attention");
    let mut scaling = match per_layer_type {
        true => parameters.object(layer_type)?.unwrap_or_default(),
        false => parameters,
    };
    // Where a file has both spellings the old one wins.
    if let Some(key) = old.scaling {
        scaling.merge(config.object(key)?.unwrap_or_default());
    }
    let theta = match scaling.number("rope_theta")? {
        Some(theta) => theta,
        None => config.number(old.theta)?.unwrap_or(theta_default),
    };
    let partial = match scaling.number("partial_rotary_factor")? {
        Some(factor) => factor,
        None => config.number("partial_rotary_factor")?.unwrap_or(1.0),
    };
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(ConfigError::Value {
            key: "partial_rotary_factor".to_owned(),
            value: partial.to_string(),
            expected: "a share above 0 and at most 1",
        });
    }
    let dim = (f64::from(head_dim) * partial) as u32;
    let (scaling, context_tokens_max) = scaling_of(config, &scaling, dim)?;
    Ok(RopeSettings { rope: Rope { theta, dim, scaling }, context_tokens_max })
}

fn scaling_of(config: &Config, scaling: &Config, dim: u32) -> Result<(RopeScaling, Option<u32>), ConfigError> {
    let kind = match scaling.text("rope_type")? {
        Some(kind) => kind,
        None => scaling.text("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok((RopeScaling::None, None)),
        "linear" => Ok((RopeScaling::Linear { factor: scaling.need_number("factor")? }, None)),
        "llama3" => {
            let scaled = RopeScaling::Llama3 {
                factor: scaling.need_number("factor")?,
                low_freq_factor: scaling.need_number("low_freq_factor")?,
                high_freq_factor: scaling.need_number("high_freq_factor")?,
                original_context: u64::from(scaling.need_count("original_max_position_embeddings")?),
            };
            Ok((scaled, None))
        }
        "longrope" | "su" => long_rope(config, scaling, dim),
        other => Err(ConfigError::Unsupported {
            key: "rope_type".to_owned(),
            value: Value::from(other).to_string(),
            reason: "only default, linear, llama3 and longrope are",
        }),
    }
}

/// Phi-3's long rope within the original context, where the short factors hold: beyond it transformers changes the
/// factors of all positions, so that cached keys would be wrong; the context is limited instead.
fn long_rope(config: &Config, scaling: &Config, dim: u32) -> Result<(RopeScaling, Option<u32>), ConfigError> {
    let factors = scaling.numbers("short_factor")?.ok_or_else(|| ConfigError::Missing("short_factor".to_owned()))?;
    if factors.len() != dim as usize / 2 {
        let value = format!("a list of {}", factors.len());
        return Err(ConfigError::Value { key: "short_factor".to_owned(), value, expected: "one factor for each rotated pair" });
    }
    let key = "original_max_position_embeddings";
    let original = match scaling.count(key)? {
        Some(original) => original,
        None => config.need_count(key)?,
    };
    let attention_factor = match scaling.number("attention_factor")? {
        Some(factor) => factor,
        None => {
            let longest = f64::from(config.need_count("max_position_embeddings")?);
            long_rope_attention_factor(scaling.number("factor")?.unwrap_or(longest / f64::from(original)), original)
        }
    };
    Ok((RopeScaling::Factors { factors, attention_factor }, Some(original)))
}

/// The paper's factor on cosines and sines when the context grows by `factor`.
pub(super) fn long_rope_attention_factor(factor: f64, original_context: u32) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / f64::from(original_context).ln()).sqrt() }
}
