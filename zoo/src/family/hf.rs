//! config.json of the supported families. Facts are those of transformers' model code; both its spellings are read.

mod gemma;
mod gpt2;
mod llama;

use serde_json::{Value, json};

use super::config::{Config, ConfigError};
use super::names::Names;
use super::{Decoder, LAYERS_MAX, activation};
use ashlar_kernels::ops::Activation;

/// The decoder that a config.json describes. `has` tells whether the checkpoint has a tensor of that name: prefixes vary.
///
/// # Errors
/// The key that is missing, wrong or not supported; or the architecture.
pub fn decoder(config: &Config, has: &dyn Fn(&str) -> bool) -> Result<Decoder, ConfigError> {
    refuse_what_changes_numbers(config)?;
    let architecture = architecture(config)?;
    match architecture.as_str() {
        "LlamaForCausalLM" => llama::llama(config, names(has)?),
        "MistralForCausalLM" => llama::mistral(config, names(has)?),
        "Qwen2ForCausalLM" => llama::qwen2(config, names(has)?),
        "Qwen3ForCausalLM" => llama::qwen3(config, names(has)?),
        "Phi3ForCausalLM" => llama::phi3(config, names(has)?),
        "Gemma2ForCausalLM" => gemma::gemma2(config, names(has)?),
        "Gemma3ForCausalLM" => gemma::gemma3(config, names(has)?),
        "Gemma3ForConditionalGeneration" => {
            let text = config.object("text_config")?.ok_or_else(|| ConfigError::Missing("text_config".to_owned()))?;
            refuse_what_changes_numbers(&text)?;
            gemma::gemma3(&text, names(has)?)
        }
        "GPT2LMHeadModel" => gpt2::gpt2(config, has),
        _ => Err(ConfigError::Architecture(architecture)),
    }
}

/// `architectures[0]`, or for files without it the one that `model_type` implies.
fn architecture(config: &Config) -> Result<String, ConfigError> {
    if let Some(list) = config.get("architectures") {
        let first = list.as_array().and_then(|list| list.first()).and_then(Value::as_str);
        return first.map(str::to_owned).ok_or_else(|| super::config::wrong("architectures", list, "a list of names"));
    }
    let Some(kind) = config.text("model_type")? else { return Err(ConfigError::Missing("architectures".to_owned())) };
    let implied = match kind {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "phi3" => "Phi3ForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        "gemma3_text" => "Gemma3ForCausalLM",
        "gpt2" => "GPT2LMHeadModel",
        other => return Err(ConfigError::Architecture(other.to_owned())),
    };
    Ok(implied.to_owned())
}

/// Keys of other families and of forks, which would silently give other numbers.
fn refuse_what_changes_numbers(config: &Config) -> Result<(), ConfigError> {
    let off = [json!(false), json!(0), json!(0.0)];
    let one = [json!(1), json!(1.0)];
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        config.refuse_unless(key, &off, "mixtures of experts are not served yet")?;
    }
    for key in ["use_bidirectional_attention", "clip_qkv", "qk_layernorm", "add_cross_attention", "scale_attn_by_inverse_layer_idx"] {
        config.refuse_unless(key, &off, "it changes the numbers in a way that is not served")?;
    }
    config.refuse_unless("is_decoder", &[json!(true), json!(false)], "only decoders are served")?;
    config.refuse_unless("scale_attn_weights", &[json!(true)], "it changes the numbers in a way that is not served")?;
    for key in ["logits_scaling", "logit_scale", "embedding_multiplier", "residual_multiplier"] {
        config.refuse_unless(key, &one, "it changes the numbers in a way that is not served")?;
    }
    Ok(())
}

/// The prefix that the checkpoint's tensors have.
fn names(has: &dyn Fn(&str) -> bool) -> Result<Names, ConfigError> {
    // The last two: Gemma 3 with a vision tower, as transformers 5 and 4 save it.
    let prefixes = [("model.", ""), ("", ""), ("model.language_model.", ""), ("language_model.model.", "language_model.")];
    let found = prefixes.iter().find(|(body, _)| has(&format!("{body}embed_tokens.weight")));
    // With no embedding at all the usual prefix makes the usual name appear in the error.
    let (body, head) = found.unwrap_or(&prefixes[0]);
    Ok(Names::Llama { body: (*body).to_owned(), head: (*head).to_owned(), fused: false, sandwich: false })
}

fn layer_count(config: &Config, key: &str) -> Result<u32, ConfigError> {
    let count = config.need_count(key)?;
    if count > LAYERS_MAX {
        return Err(ConfigError::Value { key: key.to_owned(), value: count.to_string(), expected: "at most 2047 layers" });
    }
    Ok(count)
}

fn need_activation(config: &Config, keys: &[&str], default: &str) -> Result<Activation, ConfigError> {
    for key in keys {
        if let Some(name) = config.text(key)? {
            return activation(name).ok_or_else(|| ConfigError::Unsupported {
                key: (*key).to_owned(),
                value: name.to_owned(),
                reason: "only silu, gelu, gelu_new, gelu_pytorch_tanh and relu are",
            });
        }
    }
    Ok(activation(default).expect("defaults are supported"))
}

/// For each layer whether it has a sliding window, from `layer_types` or `otherwise`.
fn sliding(config: &Config, layers: u32, otherwise: impl Fn(u32) -> bool) -> Result<Vec<bool>, ConfigError> {
    let Some(value) = config.get("layer_types") else { return Ok((0..layers).map(otherwise).collect()) };
    let list = value.as_array().filter(|list| list.len() == layers as usize);
    let list = list.ok_or_else(|| super::config::wrong("layer_types", value, "one type for each layer"))?;
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(ConfigError::Unsupported {
                key: "layer_types".to_owned(),
                value: kind.to_string(),
                reason: "only full_attention and sliding_attention are",
            }),
        })
        .collect()
}
