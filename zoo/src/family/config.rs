//! Typed access to config.json (and its siblings). A key of the wrong type, or missing where there is no default, is an
//! error that names it.

use serde_json::{Map, Value};

/// Why a configuration cannot be served.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not JSON, or no object.
    #[error("{file} is not a JSON object: {reason}")]
    Json {
        /// File.
        file: String,
        /// Where.
        reason: String,
    },
    /// A family that is not served.
    #[error("architecture `{0}` is not supported (supported: llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, gpt2)")]
    Architecture(String),
    /// A key that must be there.
    #[error("`{0}` is missing from the configuration")]
    Missing(String),
    /// A key of another type, or out of range.
    #[error("`{key}` is {value}, expected {expected}")]
    Value {
        /// Key.
        key: String,
        /// What it holds.
        value: String,
        /// What it should.
        expected: &'static str,
    },
    /// A setting that changes the numbers in a way that is not served.
    #[error("`{key}` = {value} is not supported: {reason}")]
    Unsupported {
        /// Key.
        key: String,
        /// What it holds.
        value: String,
        /// Why not, or what is.
        reason: &'static str,
    },
}

/// A JSON object with typed getters. `null` counts as absent, as it does to transformers.
#[derive(Debug, Clone, Default)]
pub struct Config {
    map: Map<String, Value>,
}

impl Config {
    /// Parses `bytes`; `file` is for messages.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn parse(bytes: &[u8], file: &str) -> Result<Self, ConfigError> {
        let json = |reason: String| ConfigError::Json { file: file.to_owned(), reason };
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self { map }),
            Ok(_) => Err(json("it is another type".to_owned())),
            Err(e) => Err(json(e.to_string())),
        }
    }

    /// The value of a key, unless absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Whether the key is there at all, be it null.
    pub fn has_key(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Takes over the keys of another object.
    pub fn merge(&mut self, other: Config) {
        self.map.extend(other.map);
    }

    /// An object within this one.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn object(&self, key: &str) -> Result<Option<Config>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map: map.clone() })),
            Some(other) => Err(wrong(key, other, "an object")),
        }
    }

    /// A positive count that fits u32.
    ///
    /// # Errors
    /// When it is of another type or range.
    pub fn count(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0) {
            Some(count) => Ok(Some(count)),
            None => Err(wrong(key, value, "an integer from 1 to 4294967295")),
        }
    }

    /// A positive count that must be there.
    ///
    /// # Errors
    /// When it is missing, or of another type or range.
    pub fn need_count(&self, key: &str) -> Result<u32, ConfigError> {
        self.count(key)?.ok_or_else(|| ConfigError::Missing(key.to_owned()))
    }

    /// A number.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| wrong(key, value, "a number"))
    }

    /// A number within bounds, told as `expected`.
    ///
    /// # Errors
    /// When it is of another type, or outside.
    pub fn number_in(&self, key: &str, bounds: std::ops::RangeInclusive<f64>, expected: &'static str) -> Result<Option<f64>, ConfigError> {
        let number = self.number(key)?;
        match (number, self.get(key)) {
            (Some(number), Some(value)) if !bounds.contains(&number) => Err(wrong(key, value, expected)),
            _ => Ok(number),
        }
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// When it is missing or of another type.
    pub fn need_number(&self, key: &str) -> Result<f64, ConfigError> {
        self.number(key)?.ok_or_else(|| ConfigError::Missing(key.to_owned()))
    }

    /// A truth value.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| wrong(key, value, "true or false"))
    }

    /// Text.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| wrong(key, value, "text"))
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.map(Some).ok_or_else(|| wrong(key, value, "a list of numbers"))
    }

    /// One token id or a list of them.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| wrong(key, value, "a token id or a list of them"))
    }

    /// Refuses a key unless it is absent or one of the values that change nothing.
    ///
    /// # Errors
    /// When it holds anything else.
    pub fn refuse_unless(&self, key: &str, harmless: &[Value], reason: &'static str) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if !harmless.contains(value) => Err(ConfigError::Unsupported { key: key.to_owned(), value: short(value), reason }),
            _ => Ok(()),
        }
    }
}

pub(super) fn wrong(key: &str, value: &Value, expected: &'static str) -> ConfigError {
    ConfigError::Value { key: key.to_owned(), value: short(value), expected }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(77).chain("...".chars()).collect() }
}
