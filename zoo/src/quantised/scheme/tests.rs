use super::*;

fn scheme(section: Value) -> Result<Option<Scheme>, ConfigError> {
    let config = json!({"quantization_config": section});
    Scheme::read(&Config::parse(config.to_string().as_bytes(), "config.json").unwrap())
}

#[test]
fn tools_say_what_their_tensors_do_not() {
    assert_eq!(scheme(Value::Null), Ok(None));
    let gptq = scheme(json!({"quant_method": "gptq", "bits": 8, "group_size": -1})).unwrap().unwrap();
    assert_eq!((gptq.method, gptq.bits, gptq.group_sizes), (Method::Gptq { less_one: true }, vec![8], vec![None]));
    let newer = scheme(json!({"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"})).unwrap().unwrap();
    assert_eq!((newer.method, newer.group_sizes), (Method::Gptq { less_one: false }, vec![Some(64)]));
    let awq = scheme(json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"})).unwrap().unwrap();
    assert_eq!((awq.method, awq.bits, awq.group_sizes), (Method::Awq, vec![4], vec![Some(128)]));
    let fp8 = scheme(json!({"quant_method": "fp8", "weight_block_size": [128, 64]})).unwrap().unwrap();
    assert_eq!((fp8.method, fp8.blocks), (Method::Fp8, vec![[128, 64]]));
}

#[test]
fn groups_of_layers_may_differ() {
    let weights = |bits: u32, kind: &str, more: Value| {
        let mut weights = json!({"num_bits": bits, "type": kind});
        weights.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"targets": ["Linear"], "weights": weights, "input_activations": null})
    };
    let section = json!({
        "quant_method": "compressed-tensors", "format": "mixed-precision", "kv_cache_scheme": {"num_bits": 8},
        "config_groups": {
            "a": weights(4, "int", json!({"strategy": "group", "group_size": 64})),
            "b": weights(8, "int", json!({"strategy": "channel"})),
            "c": weights(8, "float", json!({"strategy": "block", "block_structure": [128, 128]})),
        },
    });
    let scheme = scheme(section).unwrap().unwrap();
    assert_eq!((scheme.bits, scheme.group_sizes), (vec![4, 8], vec![Some(64), None]));
    assert_eq!(scheme.blocks, [[1, 64], [128, 128]]);
    assert!(scheme.activations, "the cache's scheme is told of");
}

#[test]
fn a_section_of_the_text_model_counts() {
    let config = json!({"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 5, "group_size": 32}}});
    let error = Scheme::read(&Config::parse(config.to_string().as_bytes(), "config.json").unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "`quantization_config.bits` = 5 is not supported: only 4 and 8 bits are");
}

#[test]
fn weights_whose_scales_are_found_as_they_are_used_are_refused() {
    let weights = json!({"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": true});
    let error = scheme(json!({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}})).unwrap_err();
    assert!(error.to_string().contains("dynamic` = true is not supported: weights have their scales in the file"), "{error}");
}
