//! `quantization_config` of config.json: which tool quantised the weights, and what their tensors alone do not say. Whether a layer is
//! quantised is seen by its tensors, so lists of layers that are not are not read.

use serde_json::{Value, json};

use crate::family::{Config, ConfigError};

const SECTION: &str = "quantization_config";

/// How the weights of a checkpoint are quantised.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    pub(super) method: Method,
    /// Widths of integer codes, at least one: 4 or 8.
    pub(super) bits: Vec<u32>,
    /// Inputs of a group, at least one; `None`: a whole row.
    pub(super) group_sizes: Vec<Option<u64>>,
    /// Outputs and inputs of blocks that share a scale.
    pub(super) blocks: Vec<[u64; 2]>,
    /// Whether activations or the cache are to be quantised, too. They are not.
    pub(super) activations: bool,
    /// Whether all integers have zero points, so that tensors without are incomplete.
    pub(super) zeros: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Zero points are stored less one, but in version 2.
    Gptq {
        less_one: bool,
    },
    Awq,
    Compressed,
    Fp8,
}

impl Scheme {
    /// What config.json says; `None` for checkpoints that are not quantised.
    ///
    /// # Errors
    /// The key of `quantization_config` that is missing, wrong or not supported.
    pub fn read(config: &Config) -> Result<Option<Self>, ConfigError> {
        let text = config.object("text_config").ok().flatten();
        let Some(section) = config.object(SECTION)?.or(text.map(|text| text.object(SECTION)).transpose()?.flatten()) else {
            return Ok(None);
        };
        read(&section).map(Some).map_err(within)
    }
}

fn read(section: &Config) -> Result<Scheme, ConfigError> {
    let method = section.text("quant_method")?.ok_or_else(|| ConfigError::Missing("quant_method".to_owned()))?;
    match method {
        "gptq" => gptq(section),
        "awq" => awq(section),
        "compressed-tensors" => compressed(section),
        "fp8" => fp8(section),
        _ => Err(unsupported("quant_method", method, "only gptq, awq, compressed-tensors and fp8 are")),
    }
}

fn gptq(section: &Config) -> Result<Scheme, ConfigError> {
    let format = section.text("checkpoint_format")?.or(section.text("format")?).unwrap_or("gptq");
    let less_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        _ => return Err(unsupported("checkpoint_format", format, "only gptq and gptq_v2 are")),
    };
    section.refuse_unless("is_marlin_format", &[json!(false)], "only the layout of gptq is read")?;
    section.refuse_unless("pack_dtype", &[json!("int32"), json!("torch.int32")], "only words of 32 bits are read")?;
    section.refuse_unless("rotation", &[json!("")], "rotated weights are not served")?;
    // `-:PATTERN` leaves layers out; all else gives some of them other bits or groups.
    let patterns = section.object("dynamic")?.unwrap_or_default();
    if let Some(pattern) = patterns.keys().find(|pattern| !pattern.starts_with("-:")) {
        return Err(unsupported("dynamic", pattern, "all layers must have the same bits and groups"));
    }
    let bits = width(section, "bits", &[4, 8])?;
    Ok(Scheme { method: Method::Gptq { less_one }, bits: vec![bits], group_sizes: vec![group_size(section)?], ..empty() })
}

fn awq(section: &Config) -> Result<Scheme, ConfigError> {
    let version = section.text("version")?.unwrap_or("gemm").to_ascii_lowercase();
    if version != "gemm" {
        return Err(unsupported("version", &version, "only gemm is"));
    }
    section.refuse_unless("zero_point", &[json!(true)], "only weights with zero points are read")?;
    let bits = width(section, if section.has_key("bits") { "bits" } else { "w_bit" }, &[4])?;
    let groups = match section.has_key("group_size") {
        false => section.count("q_group_size")?.map(u64::from),
        true => group_size(section)?,
    };
    Ok(Scheme { method: Method::Awq, bits: vec![bits], group_sizes: vec![groups], ..empty() })
}

fn fp8(section: &Config) -> Result<Scheme, ConfigError> {
    section.refuse_unless("fmt", &[json!("e4m3")], "only e4m3 is")?;
    let blocks = section.get("weight_block_size").map(|value| block("weight_block_size", value)).transpose()?;
    Ok(Scheme { method: Method::Fp8, blocks: blocks.into_iter().collect(), activations: true, ..empty() })
}

fn compressed(section: &Config) -> Result<Scheme, ConfigError> {
    let mut symmetric = Vec::new();
    let (mut bits_known, mut sizes, mut blocks, mut activations) =
        (Vec::new(), Vec::new(), Vec::new(), section.get("kv_cache_scheme").is_some());
    check_format(section)?;
    for key in ["sparsity_config", "transform_config"] {
        let object = section.object(key)?.unwrap_or_default();
        let dense = object.text("format")? == Some("dense") || object.keys().next().is_none();
        if !dense && object.get("config_groups").is_none_or(|groups| *groups != json!({})) {
            return Err(unsupported(key, "an object", "weights that are also sparse or rotated are not served"));
        }
    }
    let groups = section.object("config_groups")?.ok_or_else(|| ConfigError::Missing("config_groups".to_owned()))?;
    for name in groups.keys() {
        let group = groups.object(name)?.unwrap_or_default();
        check_format(&group)?;
        activations |= ["input_activations", "output_activations"].iter().any(|key| group.get(key).is_some());
        let Some(weights) = group.object("weights")? else { continue };
        let kind = weights.text("type")?.unwrap_or("int");
        let bits = match kind {
            "int" => width(&weights, "num_bits", &[4, 8])?,
            "float" => width(&weights, "num_bits", &[8])?,
            _ => return Err(unsupported("type", kind, "only int and float are")),
        };
        match weights.text("strategy")?.unwrap_or("tensor") {
            "tensor" | "channel" => sizes.push(None),
            "group" => {
                let size = group_size(&weights)?;
                sizes.push(size);
                blocks.extend(size.map(|size| [1, size]));
            }
            "block" => {
                let value = weights.get("block_structure").ok_or_else(|| ConfigError::Missing("block_structure".to_owned()))?;
                blocks.push(block("block_structure", value)?);
            }
            other => return Err(unsupported("strategy", other, "only tensor, channel, group and block are")),
        }
        weights.refuse_unless("dynamic", &[json!(false)], "weights have their scales in the file")?;
        if kind == "int" {
            bits_known.push(bits);
            symmetric.push(weights.flag("symmetric")?.unwrap_or(true));
        }
    }
    // Integers that no group speaks of are taken for what is most common, which their shapes then fit or not.
    let Scheme { bits, group_sizes, .. } = empty();
    let bits = if bits_known.is_empty() { bits } else { bits_known };
    let group_sizes = if sizes.is_empty() { group_sizes } else { sizes };
    let zeros = !symmetric.is_empty() && !symmetric.contains(&true);
    Ok(Scheme { method: Method::Compressed, bits, group_sizes, blocks, activations, zeros })
}

fn check_format(section: &Config) -> Result<(), ConfigError> {
    const FORMATS: [&str; 6] = ["dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"];
    match section.text("format")? {
        Some(format) if !FORMATS.contains(&format) => Err(unsupported(
            "format",
            format,
            "only pack-quantized, int-quantized, float-quantized, naive-quantized and mixed-precision are",
        )),
        _ => Ok(()),
    }
}

/// A scheme that says nothing.
fn empty() -> Scheme {
    Scheme { method: Method::Compressed, bits: vec![4], group_sizes: vec![None], blocks: Vec::new(), activations: false, zeros: false }
}

fn width(section: &Config, key: &str, known: &[u32]) -> Result<u32, ConfigError> {
    let bits = section.need_count(key)?;
    if known.contains(&bits) {
        return Ok(bits);
    }
    let reason = if known == [8] {
        "only 8 bits are"
    } else if known == [4] {
        "only 4 bits are"
    } else {
        "only 4 and 8 bits are"
    };
    Err(unsupported(key, &bits.to_string(), reason))
}

fn group_size(section: &Config) -> Result<Option<u64>, ConfigError> {
    if section.get("group_size") == Some(&json!(-1)) {
        return Ok(None);
    }
    Ok(Some(u64::from(section.need_count("group_size")?)))
}

fn block(key: &str, value: &Value) -> Result<[u64; 2], ConfigError> {
    let dims: Option<Vec<u64>> = value.as_array().and_then(|dims| dims.iter().map(Value::as_u64).collect());
    match dims.as_deref() {
        Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok([rows, cols]),
        _ => Err(ConfigError::Value { key: key.to_owned(), value: value.to_string(), expected: "two positive integers" }),
    }
}

fn unsupported(key: &str, value: &str, reason: &'static str) -> ConfigError {
    ConfigError::Unsupported { key: key.to_owned(), value: value.to_owned(), reason }
}

/// Names keys by where they are.
fn within(error: ConfigError) -> ConfigError {
    let inside = |key: String| format!("{SECTION}.{key}");
    match error {
        ConfigError::Missing(key) => ConfigError::Missing(inside(key)),
        ConfigError::Value { key, value, expected } => ConfigError::Value { key: inside(key), value, expected },
        ConfigError::Unsupported { key, value, reason } => ConfigError::Unsupported { key: inside(key), value, reason },
        other => other,
    }
}

#[cfg(test)]
mod tests;
