//! `tenant/name`: the identity of a model that tenants see. Parsed once; what it holds is safe as an object key.

use std::fmt;
use std::str::FromStr;

/// Longest tenant or name, in bytes.
pub const PART_BYTES_MAX: usize = 96;

/// A tenant and a model name, each matching `[A-Za-z0-9][A-Za-z0-9._-]{0,95}`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId {
    tenant: String,
    name: String,
}

/// The text is no model id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not TENANT/MODEL, each of 1 to 96 letters, digits, `.`, `_` or `-`, and beginning with a letter or digit")]
pub struct ParseModelIdError(String);

impl ModelId {
    /// Puts the two parts together.
    ///
    /// # Errors
    /// When a part has other characters than the two may have, or is too long.
    pub fn new(tenant: &str, name: &str) -> Result<Self, ParseModelIdError> {
        if part_is_valid(tenant) && part_is_valid(name) {
            return Ok(Self { tenant: tenant.to_owned(), name: name.to_owned() });
        }
        Err(ParseModelIdError(format!("{tenant}/{name}").chars().take(200).collect()))
    }

    /// Who owns it.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// The name within the tenant.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.name)
    }
}

impl FromStr for ModelId {
    type Err = ParseModelIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (tenant, name) = text.split_once('/').ok_or_else(|| ParseModelIdError(text.chars().take(200).collect()))?;
        Self::new(tenant, name)
    }
}

/// Whether a text can be a tenant.
pub fn is_tenant(text: &str) -> bool {
    part_is_valid(text)
}

fn part_is_valid(part: &str) -> bool {
    part.len() <= PART_BYTES_MAX
        && part.starts_with(|c: char| c.is_ascii_alphanumeric())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::ModelId;

    #[test]
    fn only_plain_parts_are_taken() {
        for good in ["demo/a", "a.b/c_d-1", "A/0"] {
            assert_eq!(good.parse::<ModelId>().unwrap().to_string(), good);
        }
        let long = format!("a/{}", "b".repeat(97));
        for bad in ["", "a", "a/", "/a", "a/b/c", "../a", "a/..", "a/.b", "a b/c", "ä/b", long.as_str()] {
            assert!(bad.parse::<ModelId>().is_err(), "{bad}");
        }
    }
}
