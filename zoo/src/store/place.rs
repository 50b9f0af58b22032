//! Where a zoo is: a directory, or a bucket of S3 or of a store that speaks its protocol. A place is for people and configuration, so it holds no
//! secrets: credentials, region and endpoint come from the usual `AWS_*` variables. Start with [`Place`].

use std::fmt;
use std::path::{Path as FilePath, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use serde::{Deserialize, Serialize};

use super::{StoreError, Zoo};

const SCHEME: &str = "s3://";
/// Longest time of one request: a part of an upload on a slow line.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The client tries so often again within one request of ours, as a store wishes that throttles; `Retries` does the rest.
const CLIENT_RETRIES: usize = 2;

/// A directory, or `s3://BUCKET[/PREFIX]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Place {
    /// In the local file system.
    Directory(PathBuf),
    /// In a bucket.
    Bucket {
        /// Its name.
        bucket: String,
        /// What all keys of the zoo begin with, without slashes at its ends; empty: nothing.
        prefix: String,
    },
}

/// Why a text names no place. It does not repeat what may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Nothing is named.
    #[error("a zoo's place is empty: expected a directory or s3://BUCKET[/PREFIX]")]
    Empty,
    /// Another kind of store.
    #[error("zoos in `{0}://` are not supported: expected a directory or s3://BUCKET[/PREFIX]")]
    Scheme(String),
    /// Credentials or options in the place.
    #[error("s3://BUCKET[/PREFIX] takes no `@`, `?` or `#`: credentials, region and endpoint are read from AWS_* variables")]
    Secret,
    /// A bucket that S3 would refuse.
    #[error("`{0}` is no bucket: expected 3 to 63 lower-case letters, digits, `.` or `-`, as in s3://BUCKET[/PREFIX]")]
    Bucket(String),
    /// A prefix that is no path.
    #[error("`{0}` is no prefix of a bucket's keys: expected names with single slashes between, none of them `.` or `..`")]
    Prefix(String),
}

impl Place {
    /// The directory, where it is one.
    pub fn directory(&self) -> Option<&FilePath> {
        match self {
            Self::Directory(root) => Some(root),
            Self::Bucket { .. } => None,
        }
    }
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(PlaceError::Empty);
        }
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return match text.split_once("://") {
                Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+') => {
                    Err(PlaceError::Scheme(scheme.to_owned()))
                }
                _ => Ok(Self::Directory(PathBuf::from(text))),
            };
        };
        if rest.contains(['@', '?', '#']) {
            return Err(PlaceError::Secret);
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_bucket = (3..=63).contains(&bucket.len())
            && bucket.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-')
            && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
            && bucket.ends_with(|c: char| c.is_ascii_alphanumeric());
        if !is_bucket {
            return Err(PlaceError::Bucket(bucket.chars().take(80).collect()));
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        // Keys are written as they are: a prefix that would be escaped is another one to other tools.
        if Path::parse(prefix).is_err() || prefix.starts_with('/') || prefix.ends_with('/') {
            return Err(PlaceError::Prefix(prefix.chars().take(80).collect()));
        }
        Ok(Self::Bucket { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(root) => write!(f, "{}", root.display()),
            Self::Bucket { bucket, prefix } if prefix.is_empty() => write!(f, "{SCHEME}{bucket}"),
            Self::Bucket { bucket, prefix } => write!(f, "{SCHEME}{bucket}/{prefix}"),
        }
    }
}

impl TryFrom<String> for Place {
    type Error = PlaceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

impl Zoo {
    /// Opens the zoo at a place. For a bucket the process must have installed rustls' provider.
    ///
    /// # Errors
    /// As [`Zoo::open_dir`], and when the `AWS_*` variables cannot be used.
    pub async fn open_place(place: &Place) -> Result<Self, StoreError> {
        match place {
            Place::Directory(root) => Self::open_dir(root).await,
            Place::Bucket { bucket, prefix } => Self::open(bucket_store(bucket, prefix)?, &place.to_string()).await,
        }
    }

    /// Opens the zoo at a place, or begins one there; the bucket must be there. For a bucket the process must have installed rustls' provider.
    ///
    /// # Errors
    /// As [`Zoo::create_dir`], and when the `AWS_*` variables cannot be used.
    pub async fn create_place(place: &Place) -> Result<Self, StoreError> {
        match place {
            Place::Directory(root) => Self::create_dir(root).await,
            Place::Bucket { bucket, prefix } => Self::create(bucket_store(bucket, prefix)?, &place.to_string()).await,
        }
    }
}

fn bucket_store(bucket: &str, prefix: &str) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let retries = RetryConfig {
        backoff: BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(2), base: 2.0 },
        max_retries: CLIENT_RETRIES,
        retry_timeout: REQUEST_TIMEOUT,
    };
    // Before the variables: AWS_ALLOW_HTTP is one of these options.
    let client = ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(CONNECT_TIMEOUT);
    let mut builder = AmazonS3Builder::new().with_client_options(client);
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        // Others that begin so are other programs'.
        if let Some(key) = name.starts_with("AWS_").then(|| name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().ok()).flatten() {
            builder = builder.with_config(key, value);
        }
    }
    // One at a time is all that is ever deleted, and not every store takes a list.
    let builder = builder.with_bucket_name(bucket).with_conditional_put(S3ConditionalPut::ETagMatch).with_disable_bulk_delete(true);
    let built = builder.with_retry(retries).build();
    let store =
        built.map_err(|source| StoreError::Store { action: "use the AWS_* variables for", key: format!("{SCHEME}{bucket}"), source })?;
    Ok(match prefix.is_empty() {
        true => Arc::new(store),
        false => Arc::new(PrefixStore::new(store, prefix)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_printed() {
        for (text, printed) in [
            ("zoo-data", "zoo-data"),
            ("/srv/zoo data/", "/srv/zoo data/"),
            ("s3:/a", "s3:/a"),
            ("s3://my-bucket", "s3://my-bucket"),
            ("s3://my-bucket/", "s3://my-bucket"),
            ("s3://my.bucket/zoos/a/", "s3://my.bucket/zoos/a"),
        ] {
            let place: Place = text.parse().unwrap();
            assert_eq!(place.to_string(), printed);
            assert_eq!(place.directory().is_some(), !text.starts_with("s3://"));
            assert_eq!(serde_json::from_str::<Place>(&serde_json::to_string(&place).unwrap()).unwrap(), place);
        }
    }

    #[test]
    fn what_is_no_place_is_refused_and_no_secret_repeated() {
        let error = |text: &str| text.parse::<Place>().unwrap_err();
        assert_eq!(error(""), PlaceError::Empty);
        assert_eq!(error("gs://bucket"), PlaceError::Scheme("gs".to_owned()));
        for secret in ["s3://key:secret@bucket/zoo", "s3://bucket/zoo?secret=1", "s3://bucket#secret"] {
            assert!(!error(secret).to_string().contains("secret=") && error(secret) == PlaceError::Secret);
        }
        for bucket in ["", "ab", "Bucket", "a_b_c", "-abc", "abc.", &"a".repeat(64)] {
            assert!(matches!(error(&format!("s3://{bucket}/zoo")), PlaceError::Bucket(_)), "{bucket}");
        }
        for prefix in ["//", "a//b", "..", "a/./b", "a//"] {
            assert!(matches!(error(&format!("s3://bucket/{prefix}")), PlaceError::Prefix(_)), "{prefix}");
        }
    }
}
