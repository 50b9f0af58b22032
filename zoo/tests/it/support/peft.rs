//! Small PEFT adapters made on the spot.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::{safetensors, values};

/// A PEFT adapter in memory: its configuration, and f32 tensors by name.
#[derive(Clone)]
pub struct Peft {
    pub config: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Peft {
    /// Rank 4 and alpha 8 over `base`, with no factors yet.
    pub fn over(base: &str) -> Self {
        let config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 4, "lora_alpha": 8, "bias": "none",
            "lora_dropout": 0.1, "fan_in_fan_out": false, "init_lora_weights": true, "inference_mode": true, "target_modules": null,
            "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": false, "use_dora": false, "modules_to_save": null,
        });
        Self { config, tensors: BTreeMap::new() }
    }

    /// Adds both factors of a module, `[rank, inputs]` and `[outputs, rank]`; their values are a function of `seed` and name.
    pub fn lora(&mut self, module: &str, (inputs, outputs): (usize, usize), rank: usize, seed: u64) -> &mut Self {
        for (factor, shape) in [("lora_A", vec![rank, inputs]), ("lora_B", vec![outputs, rank])] {
            self.tensor(&format!("{module}.{factor}.weight"), shape, seed);
        }
        self
    }

    /// Adds a tensor by its name behind `base_model.model.`.
    pub fn tensor(&mut self, name: &str, shape: Vec<usize>, seed: u64) -> &mut Self {
        let name = format!("base_model.model.{name}");
        let values = values(seed, &name, shape.iter().product());
        self.tensors.insert(name, (shape, values));
        self
    }

    /// The values of a tensor by its name behind `base_model.model.`.
    pub fn values(&self, name: &str) -> &[f32] {
        &self.tensors[&format!("base_model.model.{name}")].1
    }

    /// Writes it as `save_pretrained` does.
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("adapter_model.safetensors"), safetensors(&self.tensors)).unwrap();
    }
}
