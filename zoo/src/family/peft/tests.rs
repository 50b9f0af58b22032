//! Ranks and scales by peft's own rules, and what is refused by its key.

use super::*;

fn parse(changes: Value) -> Result<LoraConfig, ConfigError> {
    let mut config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16});
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LoraConfig::parse(&Config::parse(config.to_string().as_bytes(), "adapter_config.json").unwrap())
}

const Q0: &str = "model.layers.0.self_attn.q_proj";
const Q10: &str = "model.layers.10.self_attn.q_proj";

#[test]
fn a_pattern_matches_at_a_dot_or_the_whole_and_the_first_one_decides() {
    // (pattern, module, whether): what re.match(rf"(.*\.)?({key})$", module) says.
    for (pattern, module, matches) in [
        ("q_proj", Q0, true),
        ("proj", Q0, false),
        (Q0, Q0, true),
        (Q0, Q10, false),
        ("layers.0.self_attn.q_proj", Q0, true),
        ("layers.0.self_attn.q_proj", "model.layers.00self_attn.q_proj", true),
        ("layers.0.self_attn.q_proj", "model.layersx0.self_attn.q_proj", true),
        ("self_attn", Q0, false),
        (r".*\.(q|k)_proj", Q0, true),
        (r"layers\.\d\.self_attn\.q_proj", Q0, true),
        (r"layers\.\d\.self_attn\.q_proj", Q10, false),
        (r"^model.layers.0.self_attn.q_proj", Q0, true),
        (r"^layers.0.self_attn.q_proj", Q0, false),
        (r"q_proj|k_proj", "model.layers.0.self_attn.k_proj", true),
    ] {
        let config = parse(json!({"rank_pattern": {pattern: 3}})).unwrap();
        assert_eq!(config.rank(module) == 3, matches, "{pattern} against {module}");
    }
    // The order of the file, not of the alphabet.
    let config = parse(json!({"rank_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"k_proj": 1}})).unwrap();
    assert_eq!((config.rank(Q0), config.rank("a.v_proj")), (3, 8));
}

#[test]
fn scales_are_alpha_over_the_rank_or_its_root() {
    let plain = parse(json!({})).unwrap();
    assert_eq!((plain.rank(Q0), plain.scale(Q0)), (8, 2.0));
    let config = parse(json!({"use_rslora": true, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5, "v_proj": 0.5}})).unwrap();
    assert_eq!(config.scale(Q0), (5.0 / 3f64.sqrt()) as f32);
    assert_eq!(config.scale("a.v_proj"), (0.5 / 8f64.sqrt()) as f32);
    assert_eq!(config.scale("a.k_proj"), (16.0 / 8f64.sqrt()) as f32);
    assert_eq!(parse(json!({"lora_alpha": 1e300})).unwrap().scale(Q0), f32::INFINITY);
    // What is absent is peft's default.
    let bare = LoraConfig::parse(&Config::parse(br#"{"peft_type":"LORA"}"#, "adapter_config.json").unwrap()).unwrap();
    assert_eq!((bare.rank(Q0), bare.scale(Q0), bare.biases, bare.base.as_deref()), (8, 1.0, false, None));
}

#[test]
fn targets_and_saved_modules_are_those_of_peft() {
    let config =
        parse(json!({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "modules_to_save": ["lm_head", "mlp"]}));
    let config = config.unwrap();
    assert!(config.targets(Q0) && !config.targets(Q10) && !config.targets("model.layers.0.self_attn.k_proj"));
    assert!(!config.targets("model.layers.0.self_attn.xq_proj"));
    assert!(config.saves("lm_head") && config.saves("model.layers.3.mlp.up_proj") && !config.saves(Q0));
    assert!(parse(json!({"target_modules": "all-linear"})).unwrap().targets(Q0));
    assert!(parse(json!({"target_modules": ["q_proj"], "layers_to_transform": 10})).unwrap().targets(Q10));
}

#[test]
fn what_is_no_plain_lora_is_refused_by_its_key() {
    for (changes, message) in [
        (json!({"peft_type": "IA3"}), "`peft_type` = IA3 is not supported: only LORA is"),
        (json!({"peft_type": null}), "`peft_type` is missing"),
        (json!({"use_dora": true}), "`use_dora` = true is not supported: DoRA"),
        (json!({"lora_bias": true}), "`lora_bias` = true is not supported"),
        (json!({"trainable_token_indices": [1, 2]}), "`trainable_token_indices` = [1,2] is not supported"),
        (json!({"layer_replication": [[0, 4]]}), "`layer_replication`"),
        (json!({"init_lora_weights": "pissa_niter_4"}), "`init_lora_weights` = \"pissa_niter_4\" is not supported"),
        (json!({"use_newlora": true}), "`use_newlora` = true is not supported: this version does not know it"),
        (json!({"ensure_weight_tying": true, "modules_to_save": ["embed_tokens"]}), "`ensure_weight_tying`"),
        (json!({"r": 0}), "`r` is 0, expected an integer from 1 to 4294967295"),
        (json!({"r": "8"}), "`r` is \"8\""),
        (json!({"lora_alpha": [1]}), "`lora_alpha` is [1]"),
        (json!({"bias": "some"}), "`bias` is \"some\", expected none, all or lora_only"),
        (json!({"rank_pattern": {"q_proj": [true]}}), "`rank_pattern.q_proj` is [true]"),
        (json!({"rank_pattern": {"(q": 1}}), "`rank_pattern` = (q is not supported"),
        (json!({"rank_pattern": {"(?=q)q": 1}}), "without look-around"),
        (json!({"rank_pattern": {"(a{99}){999}{999}": 1}}), "`rank_pattern`"),
        (json!({"modules_to_save": "lm_head"}), "`modules_to_save` is \"lm_head\", expected a list"),
        (json!({"layers_to_transform": [-1]}), "`layers_to_transform`"),
    ] {
        let error = parse(changes.clone()).map(|_| ()).expect_err(&changes.to_string()).to_string();
        assert!(error.contains(message), "{changes}: {error}");
    }
    // Off is off, whatever the key.
    let off = json!({"use_dora": false, "use_newlora": false, "trainable_token_indices": null, "loftq_config": {}, "kasa_config": null});
    assert!(parse(off).is_ok());
}
