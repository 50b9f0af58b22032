//! config.json out of blocks, as each family has it. It is read again by the family's own reader, and counts only if that gives the same
//! numbers for every block: so what cannot be said is refused, whatever this file knows of it.

use std::collections::BTreeSet;

use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::Activation;
use serde_json::{Map, Value, json};

use super::tensors::Tensor;
use super::{ExportError, is_tied, json as written};
use crate::family::{self, Bias, Config};
use crate::inspect::Resolved;
use crate::manifest::{Block, BlockKind, Norm, Rope, RopeScaling};

/// The configuration of a model whose tensors are these.
pub(super) fn config(model: &Resolved, tensors: &[Tensor]) -> Result<Value, ExportError> {
    let facts = Facts::of(model);
    let mut map = match model.chain.architecture.as_str() {
        "gpt2" => gpt2(&facts),
        "gemma2" | "gemma3" => gemma(&facts),
        _ => llama(&facts),
    };
    let tokens = &model.chain.tokens;
    let mut set = |key: &str, value: Value| drop(map.insert(key.to_owned(), value));
    set("tie_word_embeddings", json!(is_tied(model)));
    set("vocab_size", json!(model.chain.vocab));
    set("torch_dtype", json!(dtype(tensors)));
    set("bos_token_id", json!(tokens.bos));
    set("eos_token_id", if let [eos] = tokens.eos[..] { json!(eos) } else { json!(tokens.eos) });
    let config = Value::Object(map);
    match difference(model, &config, tensors) {
        Some(what) => Err(ExportError::Unsaid { architecture: model.chain.architecture.clone(), what }),
        None => Ok(config),
    }
}

/// What configurations say, as the first layers have it.
struct Facts<'a> {
    model: &'a Resolved,
    norm: Norm,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    scale: f32,
    attention_softcap: Option<f32>,
    logit_softcap: Option<f32>,
    activation: Activation,
    inner: u32,
    bias: Bias,
    /// Of each layer.
    ropes: Vec<Option<Rope>>,
    windows: Vec<Option<u32>>,
}

impl<'a> Facts<'a> {
    fn of(model: &'a Resolved) -> Self {
        let mut facts = Facts {
            model,
            norm: Norm::Layer { eps: 0.0 },
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            scale: 1.0,
            attention_softcap: None,
            logit_softcap: None,
            activation: Activation::Silu,
            inner: 0,
            bias: Bias::default(),
            ropes: Vec::new(),
            windows: Vec::new(),
        };
        for block in model.blocks.iter().rev() {
            match &block.params {
                BlockKind::Attention { norm, heads, kv_heads, head_dim, scale, rope, window, softcap, .. } => {
                    (facts.norm, facts.heads, facts.kv_heads, facts.head_dim) = (*norm, *heads, *kv_heads, *head_dim);
                    (facts.scale, facts.attention_softcap) = (*scale, *softcap);
                    (facts.bias.qkv, facts.bias.output) = (has(block, "q.bias"), has(block, "o.bias"));
                    facts.ropes.insert(0, rope.clone());
                    facts.windows.insert(0, *window);
                }
                BlockKind::FeedForward { activation, inner, .. } => {
                    (facts.activation, facts.inner) = (*activation, *inner);
                    facts.bias.feed_forward = has(block, "up.bias");
                }
                BlockKind::Head { softcap, .. } => facts.logit_softcap = *softcap,
                BlockKind::Embed { .. } | BlockKind::Stitch { .. } => {}
            }
        }
        facts
    }

    fn eps(&self) -> Value {
        match self.norm {
            Norm::Rms { eps, .. } | Norm::Layer { eps } => number(eps),
        }
    }

    /// Keys that all families but GPT-2 have.
    fn common(&self, class: &str, kind: &str, activation_key: &str) -> Map<String, Value> {
        let value = json!({
            "architectures": [class],
            "model_type": kind,
            "hidden_size": self.model.chain.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.windows.len(),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.model.chain.context_tokens,
            "rms_norm_eps": self.eps(),
            activation_key: activation(self.activation),
        });
        object(value)
    }

    fn layer_types(&self) -> Value {
        self.windows.iter().map(|window| if window.is_some() { "sliding_attention" } else { "full_attention" }).collect()
    }

    /// The rope of the first layer that has a window, or of the first that has none.
    fn rope(&self, windowed: bool) -> Option<&Rope> {
        self.ropes.iter().zip(&self.windows).find(|(_, window)| window.is_some() == windowed).and_then(|(rope, _)| rope.as_ref())
    }
}

fn has(block: &Block, role: &str) -> bool {
    block.tensors.contains_key(role)
}

fn llama(facts: &Facts<'_>) -> Map<String, Value> {
    let window = facts.windows.iter().flatten().next().copied();
    let (class, kind) = match facts.model.chain.architecture.as_str() {
        "mistral" => ("MistralForCausalLM", "mistral"),
        "qwen2" => ("Qwen2ForCausalLM", "qwen2"),
        "qwen3" => ("Qwen3ForCausalLM", "qwen3"),
        "phi3" => ("Phi3ForCausalLM", "phi3"),
        _ => ("LlamaForCausalLM", "llama"),
    };
    let mut map = facts.common(class, kind, "hidden_act");
    let more = match kind {
        "mistral" => json!({"sliding_window": window}),
        // Phi-3's class fills padding with a token that other vocabularies do not have.
        "phi3" => json!({"sliding_window": window, "pad_token_id": null}),
        "qwen2" | "qwen3" => json!({
            "use_sliding_window": window.is_some(),
            "sliding_window": window,
            "max_window_layers": facts.windows.len(),
            "layer_types": facts.layer_types(),
            "attention_bias": facts.bias.qkv,
        }),
        _ => json!({"attention_bias": facts.bias.qkv, "mlp_bias": facts.bias.feed_forward}),
    };
    map.extend(object(more));
    if let Some(rope) = facts.ropes.first().and_then(Option::as_ref) {
        map.extend(rope_keys(rope, facts));
    }
    map
}

fn gemma(facts: &Facts<'_>) -> Map<String, Value> {
    let is_second = facts.model.chain.architecture == "gemma2";
    let (class, kind) = if is_second { ("Gemma2ForCausalLM", "gemma2") } else { ("Gemma3ForCausalLM", "gemma3_text") };
    let mut map = facts.common(class, kind, "hidden_activation");
    map.extend(object(json!({
        "query_pre_attn_scalar": pre_attention_scalar(facts.scale),
        "attention_bias": facts.bias.qkv,
        "final_logit_softcapping": facts.logit_softcap.map(number),
        "attn_logit_softcapping": facts.attention_softcap.map(number),
        "sliding_window": facts.windows.iter().flatten().next(),
        "layer_types": facts.layer_types(),
    })));
    let (global, local) = (facts.rope(false), facts.rope(true));
    if let Some(rope) = global.or(local) {
        map.extend(rope_keys(rope, facts));
    }
    if let Some(local) = local.filter(|_| !is_second) {
        map.insert("rope_local_base_freq".to_owned(), json!(local.theta));
    }
    map
}

fn gpt2(facts: &Facts<'_>) -> Map<String, Value> {
    let context = facts.model.chain.context_tokens;
    object(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": facts.model.chain.width,
        "n_head": facts.heads,
        "n_layer": facts.windows.len(),
        "n_inner": facts.inner,
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": facts.eps(),
        "activation_function": if facts.activation == Activation::GeluTanh { "gelu_new" } else { activation(facts.activation) },
    }))
}

/// In the spelling that versions 4 and 5 of transformers both read.
fn rope_keys(rope: &Rope, facts: &Facts<'_>) -> Map<String, Value> {
    let mut map = Map::from_iter([("rope_theta".to_owned(), json!(rope.theta))]);
    if rope.dim != facts.head_dim {
        map.insert("partial_rotary_factor".to_owned(), json!(f64::from(rope.dim) / f64::from(facts.head_dim)));
    }
    let context = facts.model.chain.context_tokens;
    let scaling = match &rope.scaling {
        RopeScaling::None => return map,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context,
        }),
        // Within the context that is served the long factors are never used.
        RopeScaling::Factors { factors, attention_factor } => {
            map.insert("original_max_position_embeddings".to_owned(), json!(context));
            json!({
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": attention_factor,
                "original_max_position_embeddings": context,
            })
        }
    };
    map.insert("rope_scaling".to_owned(), scaling);
    map
}

/// The number whose inverse square root is the scale: a whole one if there is.
fn pre_attention_scalar(scale: f32) -> Value {
    let exact = f64::from(scale).powi(-2);
    let whole = exact.round();
    if family::inverse_sqrt(whole) == scale { json!(whole as u64) } else { json!(exact) }
}

fn activation(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Gelu => "gelu",
        Activation::Relu => "relu",
    }
}

/// The element type of most bytes.
fn dtype(tensors: &[Tensor]) -> &'static str {
    let elements = |dtype: Dtype| {
        tensors.iter().filter(|tensor| tensor.dtype == dtype).map(|tensor| tensor.shape.iter().product::<u64>()).sum::<u64>()
    };
    let types = [(Dtype::F32, "float32"), (Dtype::F16, "float16"), (Dtype::Bf16, "bfloat16")];
    types.into_iter().max_by_key(|(dtype, _)| elements(*dtype)).map_or("float32", |(_, name)| name)
}

/// What is not as it was when the configuration is read as ingest reads it.
fn difference(model: &Resolved, config: &Value, tensors: &[Tensor]) -> Option<String> {
    let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let parsed =
        Config::parse(&written(config), "config.json").and_then(|config| family::from_config(&config, &|name| names.contains(name)));
    let read = match parsed {
        Ok(read) => read,
        Err(error) => return Some(format!("the model ({error})")),
    };
    let layers = read.layers.iter().flat_map(|layer| [layer.attention.clone(), layer.feed_forward.clone()]);
    let embed = BlockKind::Embed { scale: read.embed_scale };
    let blocks: Vec<BlockKind> = std::iter::once(embed).chain(layers).chain([read.head.clone()]).collect();
    if blocks.len() != model.blocks.len() {
        return Some(format!("the number of layers ({} blocks, {} are read again)", model.blocks.len(), blocks.len()));
    }
    if let Some(index) = (0..blocks.len()).find(|index| blocks[*index] != model.blocks[*index].params) {
        return Some(format!("block {index}"));
    }
    let facts = Facts::of(model);
    let same = [
        ("the width", read.width == model.chain.width),
        ("the vocabulary", read.vocab == Some(model.chain.vocab)),
        ("the context", read.context_tokens == model.chain.context_tokens),
        ("the biases", read.bias == facts.bias || read.architecture == "gpt2"),
        ("the tie of head and embedding", read.tied == Some(is_tied(model))),
        ("the family", read.architecture == model.chain.architecture),
    ];
    same.into_iter().find(|(_, same)| !same).map(|(what, _)| what.to_owned())
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made as an object"),
    }
}

/// In its shortest form, which reads back as the same f32.
pub(super) fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}
