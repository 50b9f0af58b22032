//! Small checkpoints made on the spot, honest or broken, for the tests of this folder.
#![allow(dead_code, unreachable_pub, reason = "tests of several crates include this file and use a part")]

pub mod peft;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ashlar_zoo::ingest::{AddOptions, AddReport, IngestError, Recipe, Silent, add};
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

/// Width, heads, kv heads, head size, inner width, vocabulary, layers of the small model.
pub const D: usize = 64;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 16;
pub const INNER: usize = 96;
pub const VOCAB: usize = 270;
pub const LAYERS: usize = 2;

/// A Llama checkpoint in memory: f32 tensors by name, and its JSON files.
#[derive(Clone)]
pub struct Checkpoint {
    pub config: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Checkpoint {
    /// Weights are a function of `seed` and the tensor's name.
    pub fn llama(seed: u64) -> Self {
        Self::sized(seed, [D, LAYERS, VOCAB])
    }

    /// The same of another width (a multiple of 32), with other layers and another vocabulary.
    pub fn sized(seed: u64, [width, layers, vocab]: [usize; 3]) -> Self {
        let (heads, kv_heads, inner) = (HEADS * width / D, KV_HEADS * width / D, INNER * width / D);
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "bos_token_id": 0, "eos_token_id": 1,
        });
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, width]),
            ("model.norm.weight".to_owned(), vec![width]),
            ("lm_head.weight".to_owned(), vec![vocab, width]),
        ];
        for layer in 0..layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            shapes.extend([
                (name("input_layernorm"), vec![width]),
                (name("post_attention_layernorm"), vec![width]),
                (name("self_attn.q_proj"), vec![heads * HEAD_DIM, width]),
                (name("self_attn.k_proj"), vec![kv_heads * HEAD_DIM, width]),
                (name("self_attn.v_proj"), vec![kv_heads * HEAD_DIM, width]),
                (name("self_attn.o_proj"), vec![width, heads * HEAD_DIM]),
                (name("mlp.gate_proj"), vec![inner, width]),
                (name("mlp.up_proj"), vec![inner, width]),
                (name("mlp.down_proj"), vec![width, inner]),
            ]);
        }
        let tensors = shapes.into_iter().map(|(name, shape)| {
            let values = values(seed, &name, shape.iter().product());
            (name, (shape, values))
        });
        let files = BTreeMap::from([
            ("tokenizer.json".to_owned(), tokenizer(VOCAB - 2)),
            (
                "tokenizer_config.json".to_owned(),
                br#"{"bos_token":"<s>","eos_token":{"content":"</s>"},"chat_template":"{{ messages }}"}"#.to_vec(),
            ),
        ]);
        Self { config, tensors: tensors.collect(), files }
    }

    /// Gives tensors whose name contains `part` other values.
    pub fn retrain(&mut self, part: &str, seed: u64) -> &mut Self {
        for (name, (_, data)) in self.tensors.iter_mut().filter(|(name, _)| name.contains(part)) {
            *data = values(seed, name, data.len());
        }
        self
    }

    /// Moves all values a little, as a fine-tune does.
    pub fn nudge(&mut self, by: f32, seed: u64) -> &mut Self {
        for (name, (_, data)) in &mut self.tensors {
            let moves = values(seed, name, data.len());
            data.iter_mut().zip(moves).for_each(|(value, step)| *value += by * step);
        }
        self
    }

    /// Writes it as a Hugging Face directory.
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), self.safetensors()).unwrap();
        for (name, bytes) in &self.files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }

    pub fn safetensors(&self) -> Vec<u8> {
        safetensors(&self.tensors)
    }
}

/// A safetensors file of f32 tensors.
pub fn safetensors(tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}

/// A byte-level tokenizer of `size` ids.
pub fn tokenizer(size: usize) -> Vec<u8> {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<s>".to_owned(), json!(0));
    vocab.insert("</s>".to_owned(), json!(1));
    for id in 2..size {
        vocab.insert(char::from_u32(0x100 + id as u32).unwrap().to_string(), json!(id));
    }
    let added = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let value = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<s>"), added(1, "</s>")],
        "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    serde_json::to_vec(&value).unwrap()
}

/// Reproducible values in [-1, 1), of a name.
fn values(seed: u64, name: &str, count: usize) -> Vec<f32> {
    let mut state = name
        .bytes()
        .fold(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Adds a directory under a name, with the given recipe.
pub async fn add_dir(zoo: &Zoo, dir: &Path, model: &str, recipe: Recipe) -> Result<AddReport, IngestError> {
    let options = AddOptions { recipe, ..AddOptions::new(model.parse().unwrap()) };
    add(zoo, dir, &options, &Silent).await
}

/// Declares tenants public.
pub async fn make_public(zoo: &Zoo, tenants: &[&str]) {
    zoo.update_domains(|domains| domains.public.extend(tenants.iter().map(|tenant| (*tenant).to_owned()))).await.unwrap();
}

/// Where the tiny models of every family are, with their goldens.
pub fn tiny() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../executor/tests/data/tiny"))
}
