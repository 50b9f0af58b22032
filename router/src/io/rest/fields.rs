//! The strict reading of JSON objects. Each parameter is taken by name into its type; a wrong type or range names it, an unknown one is
//! an error, and one that is known but never taken is a defect. `null` means absent. Nothing is built that the request does not
//! need: unread values stay slices of the body.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use ashlar_wire::code::Code;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::io::backend::ApiError;

/// Deepest nesting of a body.
const NESTING_MAX: u32 = 64;
/// Longest unknown name that an error repeats, in characters.
const NAME_CHARS_MAX: usize = 64;

/// A parameter that exists in OpenAI's API but not here, with the values (JSON) that mean "off" and are accepted.
pub(crate) type Off = (&'static str, &'static [&'static str]);

/// The values of one object that are not taken yet.
pub(crate) struct Fields<'a> {
    /// What stands in front of a name in `param`, such as `messages[0].`.
    path: String,
    values: BTreeMap<&'static str, &'a RawValue>,
}

impl<'a> Fields<'a> {
    /// Reads a body. `known` are the names that may occur, apart from those of `off`.
    pub(crate) fn of_body(body: &'a [u8], known: &[&'static str], off: &[Off]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|_| ApiError::new(Code::InvalidJson, "the body is not UTF-8"))?;
        check_nesting(text)?;
        Self::read(text, String::new(), known, off)
    }

    /// Reads an object inside a body.
    pub(crate) fn of_value(value: &'a RawValue, path: String, known: &[&'static str], off: &[Off]) -> Result<Self, ApiError> {
        Self::read(value.get(), path, known, off)
    }

    fn read(text: &'a str, path: String, known: &[&'static str], off: &[Off]) -> Result<Self, ApiError> {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let object = Object { known, off };
        let read = object.deserialize(&mut deserializer).and_then(|read| deserializer.end().map(|()| read));
        let (values, unknown) = read.map_err(|error| match (error.classify(), path.is_empty()) {
            (Category::Data, true) => ApiError::new(Code::InvalidValue, "the body must be a JSON object"),
            (Category::Data, false) => wrong(path.trim_end_matches('.'), "an object"),
            (_, true) => ApiError::new(Code::InvalidJson, format!("the body is not valid JSON: {error}")),
            (_, false) => malformed(path.trim_end_matches('.'), &error),
        })?;
        if let Some(name) = unknown {
            let name: String = name.chars().take(NAME_CHARS_MAX).collect();
            let param = format!("{path}{name}");
            let message = format!("unknown parameter `{param}`");
            return Err(ApiError::of_param(Code::UnsupportedParameter, param, message));
        }
        let mut fields = Self { path, values };
        for (name, accepted) in off {
            fields.take_off(name, accepted)?;
        }
        Ok(fields)
    }

    /// The full name of a field, as in an error's `param`.
    pub(crate) fn param(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The JSON text of a value.
    pub(crate) fn take_raw(&mut self, name: &'static str) -> Option<&'a RawValue> {
        self.values.remove(name).filter(|raw| raw.get() != "null")
    }

    /// A value of any type; `expected` completes "must be".
    pub(crate) fn take<T: Deserialize<'a>>(&mut self, name: &'static str, expected: &str) -> Result<Option<T>, ApiError> {
        self.take_raw(name).map(|raw| parse(raw, &self.param(name), expected)).transpose()
    }

    /// A value that must be there.
    pub(crate) fn require<T: Deserialize<'a>>(&mut self, name: &'static str, expected: &str) -> Result<T, ApiError> {
        self.take(name, expected)?.ok_or_else(|| self.missing(name))
    }

    /// The error of an absent value.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let param = self.param(name);
        let message = format!("`{param}` is required");
        ApiError::of_param(Code::InvalidValue, param, message)
    }

    /// `true` or `false`.
    pub(crate) fn take_flag(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.take(name, "true or false")
    }

    /// A number within a range, ends included.
    pub(crate) fn take_number(&mut self, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let Some(value) = self.take::<f64>(name, &expected)? else { return Ok(None) };
        if range.contains(&value) { Ok(Some(value as f32)) } else { Err(wrong(&self.param(name), &expected)) }
    }

    /// An integer within a range, ends included.
    pub(crate) fn take_integer(&mut self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let expected = format!("an integer from {} to {}", range.start(), range.end());
        let Some(value) = self.take::<i64>(name, &expected)? else { return Ok(None) };
        if range.contains(&value) { Ok(Some(value)) } else { Err(wrong(&self.param(name), &expected)) }
    }

    /// Refuses a parameter that is not supported unless its value means "off".
    fn take_off(&mut self, name: &'static str, accepted: &[&str]) -> Result<(), ApiError> {
        let Some(raw) = self.take_raw(name) else { return Ok(()) };
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        let given = if raw.get().len() <= 256 { value(raw.get()) } else { None };
        if given.is_some() && accepted.iter().any(|text| value(text) == given) {
            return Ok(());
        }
        Err(unsupported(&self.param(name), accepted))
    }

    /// Ends the reading: each known value must have been taken.
    pub(crate) fn finish(self) {
        assert!(self.values.is_empty(), "parameters are known but not read: {:?}", self.values.keys());
    }
}

/// The error of a parameter that is not supported, but for values (JSON) that mean "off".
fn unsupported(param: &str, accepted: &[&str]) -> ApiError {
    let message = match accepted {
        [] => format!("`{param}` is not supported"),
        _ => format!("`{param}` is not supported: leave it out, or send {}", accepted.join(" or ")),
    };
    ApiError::of_param(Code::UnsupportedParameter, param, message)
}

/// The error of a value that is not supported of a parameter that is; `expected` completes "only".
pub(crate) fn unsupported_value(param: &str, expected: &str) -> ApiError {
    ApiError::of_param(Code::UnsupportedParameter, param, format!("`{param}` is not supported with this value, only {expected}"))
}

/// The error of a wrong type or range; `expected` completes "must be".
pub(crate) fn wrong(param: &str, expected: &str) -> ApiError {
    ApiError::of_param(Code::InvalidValue, param, format!("`{param}` must be {expected}"))
}

/// Integers as token ids of a vocabulary of so many (at least one, as the check of chains sees to).
pub(crate) fn token_ids(integers: &[i64], param: &str, vocab: u32) -> Result<Vec<u32>, ApiError> {
    let id = |integer: &i64| u32::try_from(*integer).ok().filter(|id| *id < vocab);
    let ids: Option<Vec<u32>> = integers.iter().map(id).collect();
    ids.ok_or_else(|| wrong(param, &format!("made of token ids from 0 to {}", vocab - 1)))
}

/// Reads one value.
pub(crate) fn parse<'a, T: Deserialize<'a>>(raw: &'a RawValue, param: &str, expected: &str) -> Result<T, ApiError> {
    serde_json::from_str(raw.get()).map_err(|error| match error.classify() {
        Category::Data => wrong(param, expected),
        _ => malformed(param, &error),
    })
}

/// Text inside a value that is no JSON, such as half of a surrogate pair.
fn malformed(param: &str, error: &serde_json::Error) -> ApiError {
    ApiError::of_param(Code::InvalidJson, param, format!("`{param}` is not valid JSON: {error}"))
}

/// Refuses nesting that no request needs, before anything recursive reads it.
fn check_nesting(text: &str) -> Result<(), ApiError> {
    let (mut depth, mut in_string, mut escaped) = (0u32, false, false);
    for byte in text.bytes() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(ApiError::new(Code::InvalidJson, format!("the body nests deeper than {NESTING_MAX} levels")));
        }
    }
    Ok(())
}

/// Reads known values as slices and remembers the first unknown name. Of equal names the last one counts.
struct Object<'k> {
    known: &'k [&'static str],
    off: &'k [Off],
}

type ReadObject<'de> = (BTreeMap<&'static str, &'de RawValue>, Option<String>);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ReadObject<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ReadObject<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut values, mut unknown) = (BTreeMap::new(), None);
        while let Some(key) = map.next_key::<String>()? {
            let mut names = self.known.iter().copied().chain(self.off.iter().map(|(name, _)| *name));
            if let Some(name) = names.find(|name| *name == key) {
                values.insert(name, map.next_value::<&RawValue>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                unknown.get_or_insert(key);
            }
        }
        Ok((values, unknown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &[u8]) -> (Code, Option<String>) {
        let read = |body| -> Result<(), ApiError> {
            let mut fields = Fields::of_body(body, &["a", "b"], &[("off", &["false", "{}"])])?;
            fields.take_number("a", 0.0..=2.0)?;
            fields.take::<String>("b", "a string")?;
            fields.finish();
            Ok(())
        };
        read(body).err().map_or((Code::NotFound, None), |e| (e.code, e.param))
    }

    #[test]
    fn each_mistake_has_its_code_and_param() {
        let none = (Code::NotFound, None);
        let param = |code, name: &str| (code, Some(name.to_owned()));
        assert_eq!(error(br#"{"a":1,"b":"x","off":null}"#), none);
        assert_eq!(error(br#"{"a":9,"a":1,"off":{ }}"#), none);
        assert_eq!(error(br#"{"a":"1"}"#), param(Code::InvalidValue, "a"));
        assert_eq!(error(br#"{"a":2.5}"#), param(Code::InvalidValue, "a"));
        assert_eq!(error(br#"{"a":1e999}"#), param(Code::InvalidJson, "a"));
        assert_eq!(error(br#"{"b":"\ud800"}"#), param(Code::InvalidJson, "b"));
        assert_eq!(error(br#"{"c":1,"a":"x"}"#), param(Code::UnsupportedParameter, "c"));
        assert_eq!(error(br#"{"off":true}"#), param(Code::UnsupportedParameter, "off"));
        for body in [&b"{"[..], b"", b"{}x", b"\xff", b"{\"a\":1,}", b"nul"] {
            assert_eq!(error(body), (Code::InvalidJson, None), "{body:?}");
        }
        for body in [&b"[]"[..], b"1", b"null"] {
            assert_eq!(error(body), (Code::InvalidValue, None), "{body:?}");
        }
        assert_eq!(error(&[b"{\"a\":".repeat(100_000), b"1".to_vec()].concat()), (Code::InvalidJson, None));
        assert_eq!(error(br#"{"b":"[[[[\"{{{{"}"#), none);
    }
}
