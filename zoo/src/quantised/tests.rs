//! Each layout by hand: a few words written out, and the weights that its documentation gives them.

use ashlar_kernels::format::{TensorView, dequantise};
use serde_json::{Value, json};

use super::*;
use crate::family::Config;
use crate::formats::shards;

/// A checkpoint of tensors `(name, dtype, shape, bytes)`.
fn files(tensors: &[(&str, &str, &[u64], Vec<u8>)]) -> TensorFiles {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        header.insert((*name).to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let dir = tempfile::tempdir().unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    shards::open(dir.path()).unwrap()
}

fn scheme(section: Value) -> Scheme {
    let config = json!({"quantization_config": section}).to_string();
    Scheme::read(&Config::parse(config.as_bytes(), "config.json").unwrap()).unwrap().unwrap()
}

fn matrix(section: Value, files: &TensorFiles) -> Arc<Matrix> {
    Quantised::find(files, &scheme(section)).unwrap().get("a.weight").unwrap().clone()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
}

/// Two outputs would be enough for codes, but a word of zero points is of eight.
fn gptq(zeros: u32, index: [u32; 8]) -> TensorFiles {
    files(&[
        // Input k of output n has code k, but output 1 has 15 - k.
        ("a.qweight", "I32", &[1, 8], words(&[0x7654_3210, 0x89ab_cdef, 0, 0, 0, 0, 0, 0x8888_8888])),
        ("a.qzeros", "I32", &[2, 1], words(&[zeros, zeros])),
        ("a.scales", "F16", &[2, 8], halves(&[1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])),
        ("a.g_idx", "I32", &[8], words(&index)),
    ])
}

#[test]
fn gptq_is_packed_along_inputs_with_zero_points_less_one() {
    let section = json!({"quant_method": "gptq", "bits": 4, "group_size": 4});
    let in_order = [0, 0, 0, 0, 1, 1, 1, 1];
    let files = gptq(0x7777_7777, in_order);
    let found = matrix(section.clone(), &files);
    assert_eq!((found.dtype, found.shape), (Dtype::Int4 { group: 4 }, [8, 8]));
    let all = weights(&found, &files);
    assert_eq!(all[..8], [-8.0, -7.0, -6.0, -5.0, -2.0, -1.5, -1.0, -0.5]);
    assert_eq!(all[8..16], [14.0, 12.0, 10.0, 8.0, 12.0, 8.0, 4.0, 0.0]);
    assert_eq!(all[56..], [0.0; 8]);

    // Output 0 has zero point 4, output 1 has 0 (stored less one, it wraps), the others 8.
    let files = gptq(0x7777_77f3, in_order);
    let found = matrix(section.clone(), &files);
    assert_eq!((found.dtype, found.wrapped), (Dtype::Int4Zero { group: 4 }, true));
    let all = weights(&found, &files);
    assert_eq!(all[..8], [-4.0, -3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5]);
    assert_eq!(all[8..16], [30.0, 28.0, 26.0, 24.0, 44.0, 40.0, 36.0, 32.0]);
    let newer = json!({"quant_method": "gptq", "bits": 4, "group_size": 4, "checkpoint_format": "gptq_v2"});
    assert_eq!(weights(&matrix(newer, &files), &files)[..4], [-3.0, -2.0, -1.0, 0.0]);
}

#[test]
fn gptq_groups_in_the_order_of_activations_become_floats() {
    let section = json!({"quant_method": "gptq", "bits": 4, "group_size": 4, "desc_act": true});
    let files = gptq(0x7777_7777, [1, 0, 1, 0, 0, 1, 0, 1]);
    let found = matrix(section, &files);
    assert_eq!((found.dtype, found.widened), (Dtype::F32, Some(Widened::Order)));
    assert_eq!(weights(&found, &files)[..8], [-4.0, -7.0, -3.0, -5.0, -4.0, -1.5, -2.0, -0.5]);
}

#[test]
fn rows_of_a_part_are_those_of_the_whole() {
    let section = json!({"quant_method": "gptq", "bits": 4, "group_size": 4});
    let files = gptq(0x7777_77f3, [0, 0, 0, 0, 1, 1, 1, 1]);
    let found = matrix(section, &files);
    let view = |bytes, rows| dequantise(&TensorView { dtype: found.dtype, rows, cols: 8, bytes });
    assert_eq!(view(&found.rows(&files, 1..3), 2), weights(&found, &files)[8..24]);
}

#[test]
fn awq_is_packed_along_outputs_two_by_two() {
    let tensors = files(&[
        // Nibbles from the lowest are outputs 0, 2, 4, 6, 1, 3, 5, 7: in both inputs output n has code n, then n + 8.
        ("a.qweight", "I32", &[2, 1], words(&[0x7531_6420, 0xfdb9_eca8])),
        // All zero points are 3, but output 1's is 15.
        ("a.qzeros", "I32", &[1, 1], words(&[0x333f_3333])),
        ("a.scales", "F16", &[1, 8], halves(&[1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0])),
    ]);
    let found = matrix(json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm"}), &tensors);
    assert_eq!((found.dtype, found.shape), (Dtype::Int4Zero { group: 512 }, [8, 2]));
    let expected = [-3.0, 5.0, -7.0, -3.0, -1.0, 7.0, 0.0, 8.0, 1.0, 9.0, 2.0, 10.0, 3.0, 11.0, 8.0, 24.0];
    assert_eq!(weights(&found, &tensors), expected);
}

fn compressed(weights: Value) -> Value {
    json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}})
}

#[test]
fn packed_rows_are_padded_to_words() {
    let shape = [1u64, 10].iter().flat_map(|dim| dim.to_le_bytes()).collect::<Vec<u8>>();
    let tensors = files(&[
        ("a.weight_packed", "I32", &[1, 2], words(&[0x7654_3210, 0xffff_ff98])),
        ("a.weight_shape", "I64", &[2], shape),
        ("a.weight_scale", "F32", &[1, 2], [1.0f32, 2.0].iter().flat_map(|scale| scale.to_le_bytes()).collect()),
        // Codes are stored plus 8, zero points, too: they are 7 and -8 of themselves.
        ("a.weight_zero_point", "I32", &[1, 2], words(&[0xf, 0x0])),
    ]);
    let section = compressed(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": false}));
    let found = matrix(section, &tensors);
    assert_eq!(found.dtype, Dtype::Int4Zero { group: 8 });
    assert_eq!(weights(&found, &tensors), [-15.0, -14.0, -13.0, -12.0, -11.0, -10.0, -9.0, -8.0, 16.0, 18.0]);
}

#[test]
fn zero_points_may_be_bytes() {
    let of = |zeros: Vec<u8>| {
        files(&[
            ("a.weight_packed", "I32", &[1, 1], words(&[0x7654_3210])),
            ("a.weight_shape", "I64", &[2], [1u64, 8].iter().flat_map(|dim| dim.to_le_bytes()).collect()),
            ("a.weight_scale", "BF16", &[1, 2], [0, 0x3f, 0, 0x40].to_vec()),
            ("a.weight_zero_point", "I8", &[1, 2], zeros),
        ])
    };
    let section = compressed(json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 4, "symmetric": false}));
    let tensors = of(vec![0xff, 7]);
    // Of themselves codes are -8 to -1; scales are 0.5 and 2, zero points -1 and 7.
    assert_eq!(weights(&matrix(section.clone(), &tensors), &tensors), [-3.5, -3.0, -2.5, -2.0, -22.0, -20.0, -18.0, -16.0]);
    let scheme = scheme(section);
    let error = Quantised::find(&of(vec![0, 9]), &scheme).unwrap_err();
    assert_eq!(error.to_string(), "tensor `a.weight_zero_point` holds zero points of 8 to 17, expected 0 to 16");
}

#[test]
fn weights_that_are_said_to_have_zero_points_have_them() {
    let tensors = files(&[("a.weight", "I8", &[1, 4], vec![1, 2, 3, 4]), ("a.weight_scale", "BF16", &[1, 1], [0, 0x3f].to_vec())]);
    let section = |symmetric: bool| compressed(json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": symmetric}));
    assert_eq!(weights(&matrix(section(true), &tensors), &tensors), [0.5, 1.0, 1.5, 2.0]);
    let error = Quantised::find(&tensors, &scheme(section(false))).unwrap_err().to_string();
    assert!(error.contains("a.weight_zero_point"), "{error}");
}

#[test]
fn groups_of_two_sizes_that_fit_alike_are_refused() {
    let shape = [1u64, 20].iter().flat_map(|dim| dim.to_le_bytes()).collect();
    let tensors = files(&[
        ("a.weight_packed", "I32", &[1, 3], words(&[0; 3])),
        ("a.weight_shape", "I64", &[2], shape),
        ("a.weight_scale", "F16", &[1, 2], halves(&[1.0, 2.0])),
    ]);
    let weights = |size: u32| json!({"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size}});
    let of = |more: u32| json!({"quant_method": "compressed-tensors", "config_groups": {"a": weights(16), "b": weights(more)}});
    assert_eq!(Quantised::find(&tensors, &scheme(of(8))).unwrap().get("a.weight").unwrap().dtype, Dtype::Int4 { group: 16 });
    let error = Quantised::find(&tensors, &scheme(of(12))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `a.weight_scale` has shape [1, 2], expected groups of one size: those of 16 and of 12 inputs fit alike"
    );
}

#[test]
fn scales_that_no_f16_holds_make_floats() {
    let of = |scale: f32| {
        files(&[("a.weight", "I8", &[2, 2], vec![1, 0xff, 0x80, 127]), ("a.weight_scale", "F32", &[1], scale.to_le_bytes().to_vec())])
    };
    let section = compressed(json!({"num_bits": 8, "type": "int", "strategy": "tensor"}));
    let tensors = of(0.25);
    let found = matrix(section.clone(), &tensors);
    assert_eq!((found.dtype, found.widened), (Dtype::Int8 { group: 512 }, None));
    assert_eq!(weights(&found, &tensors), [0.25, -0.25, -32.0, 31.75]);
    let tensors = of(0.1);
    let found = matrix(section, &tensors);
    assert_eq!((found.dtype, found.widened), (Dtype::F32, Some(Widened::Scales)));
    assert_eq!(weights(&found, &tensors), [0.1, -0.1, -12.8, 12.7]);
}

#[test]
fn blocks_of_fp8_share_scales() {
    let scales = [1.0f32, 10.0, 100.0, 1000.0].iter().flat_map(|scale| scale.to_le_bytes()).collect();
    // 1, 1.5, -2 and the smallest.
    let codes = [0x38, 0x3c, 0xc0, 0x38, 0x38, 0x38, 0x38, 0x01, 0x38];
    let tensors = files(&[("a.weight", "F8_E4M3", &[3, 3], codes.to_vec()), ("a.weight_scale_inv", "F32", &[2, 2], scales)]);
    let found = matrix(json!({"quant_method": "fp8", "weight_block_size": [2, 2]}), &tensors);
    assert_eq!(found.dtype, Dtype::Fp8 { group: 2 });
    assert_eq!(weights(&found, &tensors), [1.0, 1.5, -20.0, 1.0, 1.0, 10.0, 100.0, 100.0 / 512.0, 1000.0]);
}

#[test]
fn groups_of_the_zoo_divide_those_of_checkpoints() {
    for (size, inputs, stored) in [(32, 4096, 32), (128, 4096, 128), (1024, 4096, 512), (96, 960, 32), (100, 1000, 4), (4096, 4096, 512)] {
        assert_eq!(stored_group(size, inputs), stored, "{size} of {inputs}");
        assert!(size >= inputs || size % u64::from(stored) == 0);
    }
}
