//! adapter_config.json of PEFT: what a LoRA's factors are worth, by module. Facts are those of peft's `LoraConfig` and
//! `LoraModel`; whatever would give other numbers than plain LoRA is refused by its key, known or not.

use regex::{Regex, RegexBuilder};
use serde_json::{Value, json};

use super::config::{Config, ConfigError, wrong};
use crate::formats::TENSORS_MAX;

/// Most patterns of one file that are more than a module's name.
const REGEXES_MAX: usize = 256;
/// Largest compiled pattern.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// Keys that are read below, or that describe the training alone.
const KNOWN: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out", // How the base lays out its weights; the factors are always [rank, inputs] and [outputs, rank].
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Keys that change the numbers, and why they are not served.
const REFUSED: &[(&str, &str)] = &[
    ("use_dora", "DoRA scales each row by the norm of the merged weights, which plain LoRA cannot express; merge it into its base"),
    ("lora_bias", "a bias on lora_B is not served; merge it into its base"),
    ("use_qalora", "QALoRA pools its inputs, which plain LoRA cannot express"),
    ("alora_invocation_tokens", "an adapter that begins at certain tokens is not served"),
    ("layer_replication", "it makes a model of other layers than the base's"),
    ("trainable_token_indices", "changed rows of the token table are not served; merge it into its base"),
    ("target_parameters", "factors of bare parameters are for mixtures of experts, which are not served yet"),
];

/// What an adapter_config.json says.
#[derive(Debug)]
pub struct LoraConfig {
    /// The base that it asks for, as a path or hub name.
    pub base: Option<String>,
    /// Whether full biases come with it.
    pub biases: bool,
    /// Whether they are those of the whole model, not only of modules with factors.
    pub all_biases: bool,
    /// Names of modules without factors though `target_modules` names them too; `None` where a pattern says it.
    excluded: Option<Vec<String>>,
    rank: u32,
    alpha: f64,
    rank_stabilised: bool,
    ranks: Vec<(Pattern, u32)>,
    alphas: Vec<(Pattern, f64)>,
    /// Module names, or `None` where a pattern says it, which only the trainer needs.
    targets: Option<Vec<String>>,
    layers: Option<Vec<u64>>,
    modules_to_save: Vec<String>,
}

/// A key of `rank_pattern`: matches a module when the module is it or ends with `.` and it.
#[derive(Debug)]
enum Pattern {
    /// A name. Its dots stand for any character, as in a regular expression.
    Name(String),
    Regex(Regex),
}

impl LoraConfig {
    /// Reads it.
    ///
    /// # Errors
    /// The key that is wrong, or that asks for what is not plain LoRA.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let kind = config.text("peft_type")?.ok_or_else(|| ConfigError::Missing("peft_type".to_owned()))?;
        if kind != "LORA" {
            let (key, value) = ("peft_type".to_owned(), kind.chars().take(80).collect());
            return Err(ConfigError::Unsupported { key, value, reason: "only LORA is" });
        }
        refuse_what_is_not_plain(config)?;
        let mut regexes = 0;
        let rank = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0);
        let parsed = Self {
            base: config.text("base_model_name_or_path")?.filter(|base| !base.is_empty()).map(str::to_owned),
            biases: match config.text("bias")? {
                None | Some("none") => false,
                Some("all" | "lora_only") => true,
                Some(_) => return Err(wrong("bias", &config.get("bias").cloned().unwrap_or_default(), "none, all or lora_only")),
            },
            all_biases: config.text("bias")? == Some("all"),
            excluded: match config.get("exclude_modules") {
                Some(Value::String(pattern)) if !pattern.is_empty() => None,
                Some(Value::String(_)) | None => Some(Vec::new()),
                Some(_) => Some(names(config, "exclude_modules")?),
            },
            // As peft's own defaults.
            rank: config.count("r")?.unwrap_or(8),
            alpha: config.number("lora_alpha")?.unwrap_or(8.0),
            rank_stabilised: config.flag("use_rslora")?.unwrap_or(false),
            ranks: patterns(config, "rank_pattern", "positive integers by module", rank, &mut regexes)?,
            alphas: patterns(config, "alpha_pattern", "numbers by module", Value::as_f64, &mut regexes)?,
            targets: match config.get("target_modules") {
                Some(Value::String(_)) | None => None,
                Some(_) => Some(names(config, "target_modules")?),
            },
            layers: layers(config)?,
            modules_to_save: names(config, "modules_to_save")?,
        };
        if config.flag("ensure_weight_tying")? == Some(true) && !parsed.modules_to_save.is_empty() {
            let key = "ensure_weight_tying".to_owned();
            return Err(ConfigError::Unsupported { key, value: "true".to_owned(), reason: "with modules_to_save it is not" });
        }
        Ok(parsed)
    }

    /// Rank of a module's factors. `module` is its path in the base, such as `model.layers.0.self_attn.q_proj`.
    pub fn rank(&self, module: &str) -> u32 {
        first(&self.ranks, module).unwrap_or(self.rank)
    }

    /// The factor on a module's change. Not finite where the file asks for too much.
    pub fn scale(&self, module: &str) -> f32 {
        let (alpha, rank) = (first(&self.alphas, module).unwrap_or(self.alpha), f64::from(self.rank(module)));
        (alpha / if self.rank_stabilised { rank.sqrt() } else { rank }) as f32
    }

    /// Whether peft would put a LoRA there. Where the file gives a pattern, or `all-linear`, it is taken at its factors' word.
    pub fn targets(&self, module: &str) -> bool {
        let Some(targets) = &self.targets else { return true };
        let layer = module.split('.').find_map(|part| part.parse::<u64>().ok());
        let listed = self.layers.as_ref().is_none_or(|layers| layer.is_some_and(|layer| layers.contains(&layer)));
        targets.iter().any(|target| Self::is_named(target, module)) && listed
    }

    /// Whether modules without factors may be meant so.
    pub fn excludes(&self) -> bool {
        self.excluded.as_ref().is_none_or(|excluded| !excluded.is_empty())
    }

    /// Whether peft would leave a module's factors unread. Where the file gives a pattern, it is taken at its factors' word.
    pub fn is_excluded(&self, module: &str) -> bool {
        self.excluded.iter().flatten().any(|entry| Self::is_named(entry, module))
    }

    /// Whether an entry of `target_modules` means a module: it is its path, or the end of it.
    pub fn is_named(target: &str, module: &str) -> bool {
        module.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// The entries of `target_modules`; none where a pattern says it.
    pub fn target_modules(&self) -> &[String] {
        self.targets.as_deref().unwrap_or_default()
    }

    /// The entries of `modules_to_save`.
    pub fn modules_to_save(&self) -> &[String] {
        &self.modules_to_save
    }

    /// Whether only some layers have factors.
    pub fn has_layers(&self) -> bool {
        self.layers.is_some()
    }

    /// Whether the module, or one that it is part of, is stored as a whole.
    pub fn saves(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|entry| Self::is_saved(entry, module))
    }

    /// Whether an entry of `modules_to_save` means a module, or one that it is part of.
    pub fn is_saved(entry: &str, module: &str) -> bool {
        let mut ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
        ends.any(|end| module[..end].ends_with(entry))
    }
}

fn refuse_what_is_not_plain(config: &Config) -> Result<(), ConfigError> {
    let off = [json!(false), json!([]), json!({}), json!("")];
    for (key, reason) in REFUSED {
        config.refuse_unless(key, &off, reason)?;
    }
    // PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take something out of the base's weights when they begin.
    let pure = [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal"), json!("mica")];
    let reason = "it changes the base's weights; save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA";
    config.refuse_unless("init_lora_weights", &pure, reason)?;
    for key in config.keys().filter(|key| !KNOWN.contains(key)) {
        config.refuse_unless(key, &off, "this version does not know it, and it may change the numbers")?;
    }
    Ok(())
}

fn patterns<T>(
    config: &Config,
    key: &str,
    expected: &'static str,
    read: impl Fn(&Value) -> Option<T>,
    regexes: &mut usize,
) -> Result<Vec<(Pattern, T)>, ConfigError> {
    let Some(value) = config.get(key) else { return Ok(Vec::new()) };
    let map = value.as_object().filter(|map| map.len() <= TENSORS_MAX).ok_or_else(|| wrong(key, value, expected))?;
    map.iter()
        .map(|(pattern, value)| {
            let worth = read(value).ok_or_else(|| wrong(&format!("{key}.{pattern}"), value, expected))?;
            Ok((Pattern::parse(key, pattern, regexes)?, worth))
        })
        .collect()
}

fn names(config: &Config, key: &str) -> Result<Vec<String>, ConfigError> {
    let Some(value) = config.get(key) else { return Ok(Vec::new()) };
    let list = value.as_array().filter(|list| list.len() <= TENSORS_MAX);
    let names = list.and_then(|list| list.iter().map(|name| name.as_str().filter(|name| !name.is_empty()).map(str::to_owned)).collect());
    names.ok_or_else(|| wrong(key, value, "a list of module names"))
}

/// One index or a list of them; an empty list means all.
fn layers(config: &Config) -> Result<Option<Vec<u64>>, ConfigError> {
    let layers: Option<Vec<u64>> = match config.get("layers_to_transform") {
        None => return Ok(None),
        Some(Value::Array(list)) if list.is_empty() => return Ok(None),
        Some(Value::Array(list)) => list.iter().map(Value::as_u64).collect(),
        Some(one) => one.as_u64().map(|one| vec![one]),
    };
    let value = config.get("layers_to_transform").cloned().unwrap_or_default();
    layers.map(Some).ok_or_else(|| wrong("layers_to_transform", &value, "a layer's index or a list of them"))
}

/// The first pattern in the file's order decides, as peft's `get_pattern_key` does.
fn first<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.matches(module)).map(|(_, worth)| *worth)
}

impl Pattern {
    fn parse(key: &str, text: &str, regexes: &mut usize) -> Result<Self, ConfigError> {
        if text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_')) {
            return Ok(Self::Name(text.to_owned()));
        }
        *regexes += 1;
        let unsupported =
            |reason| ConfigError::Unsupported { key: key.to_owned(), value: text.chars().take(80).collect::<String>(), reason };
        if *regexes > REGEXES_MAX {
            return Err(unsupported("at most 256 patterns are that are no plain names"));
        }
        let regex = RegexBuilder::new(&format!(r"\A(?:.*\.)?(?:{text})\z")).size_limit(REGEX_BYTES_MAX).build();
        regex.map(Self::Regex).map_err(|_| unsupported("only regular expressions without look-around and back-references are"))
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Regex(regex) => regex.is_match(module),
            Self::Name(name) => {
                let (name, module) = (name.as_bytes(), module.as_bytes());
                let Some(start) = module.len().checked_sub(name.len()) else { return false };
                let same = |(a, b): (&u8, &u8)| a == b || *a == b'.';
                (start == 0 || module[start - 1] == b'.') && name.iter().zip(&module[start..]).all(same)
            }
        }
    }
}

#[cfg(test)]
mod tests;
