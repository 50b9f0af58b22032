//! Quantised checkpoints whose parts do not fit together: one error that names the tensor or key, and nothing written. Each is one of the
//! goldens' checkpoints (executor/tests/data/quantised) with one thing broken.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::add_dir;
use ashlar_zoo::ingest::Recipe;
use ashlar_zoo::store::Zoo;
use serde_json::{Value, json};

/// Tensors by name: type, shape, bytes.
type Tensors = BTreeMap<String, (String, Vec<u64>, Vec<u8>)>;
type Break = Box<dyn Fn(&mut Value, &mut Tensors)>;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../executor/tests/data/quantised").join(case)
}

fn read(path: &Path) -> Tensors {
    let file = std::fs::read(path).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__").map(|(name, entry)| {
        let shape = serde_json::from_value(entry["shape"].clone()).unwrap();
        let [from, to]: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
        (name, (entry["dtype"].as_str().unwrap().to_owned(), shape, data[from..to].to_vec()))
    });
    tensors.collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()).unwrap();
}

fn key(key: &'static str, value: Value) -> Break {
    Box::new(move |config, _| config["quantization_config"][key] = value.clone())
}

/// Changes a tensor of layer 0.
fn part(name: &'static str, change: impl Fn(&mut (String, Vec<u64>, Vec<u8>)) + 'static) -> Break {
    Box::new(move |_, tensors| change(tensors.get_mut(&format!("model.layers.0.{name}")).unwrap_or_else(|| panic!("no {name}"))))
}

/// Leaves a tensor of layer 0 out.
fn without(name: &'static str) -> Break {
    Box::new(move |_, tensors| drop(tensors.remove(&format!("model.layers.0.{name}")).unwrap_or_else(|| panic!("no {name}"))))
}

fn first(bytes: &'static [u8]) -> impl Fn(&mut (String, Vec<u64>, Vec<u8>)) {
    move |tensor| tensor.2[..bytes.len()].copy_from_slice(bytes)
}

/// The last row is cut off.
fn shorter(tensor: &mut (String, Vec<u64>, Vec<u8>)) {
    let row = tensor.2.len() / tensor.1[0] as usize;
    tensor.1[0] -= 1;
    tensor.2.truncate(tensor.1[0] as usize * row);
}

fn of_type(dtype: &'static str) -> impl Fn(&mut (String, Vec<u64>, Vec<u8>)) {
    move |tensor| tensor.0 = dtype.to_owned()
}

#[tokio::test]
async fn each_is_refused_by_name_before_anything_is_written() {
    let (gptq, order, awq) = ("gptq-llama", "gptq-qwen2-order", "awq-phi3");
    let (int4, int8, fp8, blocks) = ("ct-gemma3-int4", "ct-mistral-int8", "ct-qwen3-fp8", "fp8-qwen3-blocks");
    let groups = |change: Value| -> Break {
        Box::new(move |config, _| {
            let weights = config["quantization_config"]["config_groups"]["group_0"]["weights"].as_object_mut().unwrap();
            weights.extend(change.as_object().unwrap().clone());
        })
    };
    let cases: Vec<(&str, &str, Break, &str)> = vec![
        ("method", gptq, key("quant_method", json!("quip")), "`quantization_config.quant_method` = quip is not supported: only gptq, awq"),
        ("no method", gptq, key("quant_method", Value::Null), "`quantization_config.quant_method` is missing"),
        ("3 bits", gptq, key("bits", json!(3)), "`quantization_config.bits` = 3 is not supported: only 4 and 8 bits are"),
        ("bits of text", gptq, key("bits", json!("4")), "`quantization_config.bits` is \"4\", expected an integer from 1 to 4294967295"),
        ("no group size", gptq, key("group_size", Value::Null), "`quantization_config.group_size` is missing"),
        ("group size 0", gptq, key("group_size", json!(0)), "`quantization_config.group_size` is 0"),
        ("layout", gptq, key("checkpoint_format", json!("marlin")), "`quantization_config.checkpoint_format` = marlin is not supported"),
        ("layers of their own", gptq, key("dynamic", json!({"+:.*down.*": {"bits": 8}})), "`quantization_config.dynamic` = +:.*down.*"),
        ("version", awq, key("version", json!("gemv")), "`quantization_config.version` = gemv is not supported: only gemm is"),
        ("no zero points", awq, key("zero_point", json!(false)), "`quantization_config.zero_point` = false is not supported"),
        ("4-bit floats", int4, key("format", json!("nvfp4-pack-quantized")), "`quantization_config.format` = nvfp4-pack-quantized"),
        ("sparse", int4, key("sparsity_config", json!({"format": "sparse-24-bitmask"})), "`quantization_config.sparsity_config`"),
        ("rotated", int4, key("transform_config", json!({"config_groups": {"a": {}}})), "`quantization_config.transform_config`"),
        ("2 bits of a group", int4, groups(json!({"num_bits": 2})), "`quantization_config.num_bits` = 2 is not supported"),
        ("strategy", int4, groups(json!({"strategy": "tensor_group"})), "`quantization_config.strategy` = tensor_group is not supported"),
        ("other fp8", blocks, key("fmt", json!("e5m2")), "`quantization_config.fmt` = \"e5m2\" is not supported"),
        ("block of one number", blocks, key("weight_block_size", json!([128])), "`quantization_config.weight_block_size` is [128]"),
        ("scales missing", gptq, without("mlp.down_proj.scales"), "tensor `model.layers.0.mlp.down_proj.scales` is missing"),
        ("zeros missing", gptq, without("mlp.down_proj.qzeros"), "tensor `model.layers.0.mlp.down_proj.qzeros` is missing"),
        ("codes missing", gptq, without("mlp.down_proj.qweight"), "tensor `model.layers.0.mlp.down_proj.weight` is missing"),
        (
            "scales too few",
            gptq,
            part("mlp.down_proj.scales", shorter),
            "`model.layers.0.mlp.down_proj.scales` has shape [3, 64], expected [4, 64]",
        ),
        (
            "zeros too few",
            gptq,
            part("mlp.down_proj.qzeros", shorter),
            "`model.layers.0.mlp.down_proj.qzeros` has shape [3, 8], expected [4, 8]",
        ),
        (
            "codes too few",
            gptq,
            part("self_attn.q_proj.qweight", shorter),
            "`model.layers.0.self_attn.q_proj.g_idx` has shape [64], expected [56]",
        ),
        ("other groups", gptq, key("group_size", json!(16)), ".scales` has shape ["),
        (
            "a scale that is NaN",
            gptq,
            part("mlp.up_proj.scales", first(&[0, 0x7e])),
            "`model.layers.0.mlp.up_proj.scales` holds NaN (element 0)",
        ),
        (
            "an infinite scale",
            awq,
            part("mlp.down_proj.scales", first(&[0, 0x7c])),
            "`model.layers.0.mlp.down_proj.scales` holds inf (element 0)",
        ),
        (
            "codes that are floats",
            gptq,
            part("mlp.up_proj.qweight", of_type("F32")),
            "`model.layers.0.mlp.up_proj.qweight` has type f32, expected I32",
        ),
        (
            "scales that are words",
            gptq,
            part("mlp.up_proj.g_idx", of_type("U32")),
            "`model.layers.0.mlp.up_proj.g_idx` has type U32, expected I32",
        ),
        (
            "a group that is not there",
            order,
            part("mlp.down_proj.g_idx", first(&[4, 0, 0, 0])),
            "`model.layers.0.mlp.down_proj.g_idx` holds 4 (element 0), expected a group, 0 to 3",
        ),
        (
            "a negative group",
            order,
            part("mlp.down_proj.g_idx", first(&[0xfe, 0xff, 0xff, 0xff])),
            "`model.layers.0.mlp.down_proj.g_idx` holds -2 (element 0)",
        ),
        (
            "both weights",
            gptq,
            Box::new(|_, tensors| {
                drop(
                    tensors
                        .insert("model.layers.0.mlp.up_proj.weight".to_owned(), ("F16".to_owned(), vec![112, 64], vec![0; 112 * 64 * 2])),
                )
            }),
            "tensor `model.layers.0.mlp.up_proj.weight` is there beside `model.layers.0.mlp.up_proj.qweight`",
        ),
        (
            "a bias that adds something",
            gptq,
            part("mlp.up_proj.bias", first(&[0, 0x3c])),
            "tensor `model.layers.0.mlp.up_proj.bias` is not part of a llama model",
        ),
        ("shape missing", int4, without("mlp.up_proj.weight_shape"), "tensor `model.layers.0.mlp.up_proj.weight_shape` is missing"),
        (
            "a shape that lies",
            int4,
            part("mlp.up_proj.weight_shape", first(&[95])),
            "`model.layers.0.mlp.up_proj.weight_packed` has shape [96, 8], expected [95, 8] for 4 bits (weight_shape is [95, 64])",
        ),
        (
            "an absurd shape",
            int4,
            part("mlp.up_proj.weight_shape", first(&[0xff; 8])),
            "`model.layers.0.mlp.up_proj.weight_shape` holds 18446744073709551615 (element 0), expected a dimension of a matrix",
        ),
        (
            "words of zero points",
            int4,
            part("mlp.up_proj.weight_zero_point", shorter),
            "`model.layers.0.mlp.up_proj.weight_zero_point` has shape [11, 4], expected [12, 4]",
        ),
        (
            "int8 scales",
            int8,
            part("mlp.up_proj.weight_scale", shorter),
            "`model.layers.0.mlp.up_proj.weight_scale` has shape [127, 1], expected [128, 1]",
        ),
        ("int8 without scales", int8, without("mlp.up_proj.weight_scale"), "tensor `model.layers.0.mlp.up_proj.weight_scale` is missing"),
        (
            "fp8 scales",
            fp8,
            part("mlp.up_proj.weight_scale", shorter),
            "`model.layers.0.mlp.up_proj.weight_scale` has shape [79, 1], expected [80, 1]",
        ),
        ("fp8 without scales", fp8, without("mlp.up_proj.weight_scale"), "tensor `model.layers.0.mlp.up_proj.weight_scale` is missing"),
        ("an fp8 NaN", fp8, part("mlp.up_proj.weight", first(&[0, 0x7f])), "`model.layers.0.mlp.up_proj.weight` holds NaN (element 1)"),
        ("blocks", blocks, key("weight_block_size", json!([32, 32])), "or [3, 2] for blocks of 32 x 32)"),
        (
            "a scale that overflows",
            blocks,
            part("mlp.up_proj.weight_scale_inv", first(&[0, 0, 0, 0x7f])),
            "`model.layers.0.mlp.up_proj.weight_scale_inv` holds 17014",
        ),
    ];
    for (what, case, change, message) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (golden(case), dir.path().join("a"));
        std::fs::create_dir(&to).unwrap();
        let mut config: Value = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        let mut tensors = read(&from.join("model.safetensors"));
        change(&mut config, &mut tensors);
        std::fs::write(to.join("config.json"), config.to_string()).unwrap();
        write(&to.join("model.safetensors"), &tensors);
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(from.join(name), to.join(name)).unwrap();
        }
        let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
        let error = add_dir(&zoo, &to, "demo/a", Recipe::Keep).await.expect_err(what);
        let error = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source()).map(ToString::to_string);
        let error = error.collect::<Vec<_>>().join(": ");
        assert!(error.contains(message), "{what}: {error}");
        let written: Vec<_> = std::fs::read_dir(dir.path().join("zoo")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(written, ["format.json"], "{what}");
    }
}
