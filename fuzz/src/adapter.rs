//! adapter_config.json of PEFT.

use ashlar_zoo::family::Config;
use ashlar_zoo::family::peft::LoraConfig;

/// What is accepted answers for any module: a rank of at least one, and the same one when it is asked again.
pub fn adapter(data: &[u8]) {
    let Ok(config) = Config::parse(data, "adapter_config.json") else { return };
    let Ok(lora) = LoraConfig::parse(&config) else { return };
    for module in ["lm_head", "model.layers.0.self_attn.q_proj", "transformer.h.11.attn.c_attn", "", ".", "ä.q_proj"] {
        assert!(lora.rank(module) >= 1, "{module}");
        assert_eq!(lora.rank(module), lora.rank(module));
        let _ = (lora.scale(module), lora.targets(module), lora.saves(module));
    }
}
