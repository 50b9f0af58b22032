//! A small client of the Hugging Face hub: which files a repository has, and their download. Start with [`pull`]. The token
//! goes to the endpoint's own host only and is never printed; file names from the hub are never trusted as paths.

mod download;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use crate::formats::shards::is_plain_name;
use crate::ingest::{Progress, Stage};

/// Where the hub is unless HF_ENDPOINT says otherwise.
pub const ENDPOINT_DEFAULT: &str = "https://huggingface.co";
/// Largest answer of the API that is read.
const LISTING_BYTES_MAX: usize = 64 << 20;
/// What a repository of a PEFT adapter has, and a card.
const ADAPTER_FILES: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "README.md"];
/// Small files of a model, taken where they are there.
const SMALL_FILES: &[&str] =
    &["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"];

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// HF_ENDPOINT or HF_TOKEN cannot be used.
    #[error("{0}")]
    Setting(String),
    /// A name that could leave the download folder.
    #[error("`{0}` is not a plain file name")]
    FileName(String),
    /// The repository has no such file.
    #[error("{repo} has no {file}")]
    NoFile {
        /// Repository.
        repo: String,
        /// What was looked for.
        file: String,
    },
    /// 401 or 403.
    #[error(
        "the hub refuses access to {what} ({status}): set HF_TOKEN to a token that may read it, and accept the model's conditions on its page"
    )]
    Refused {
        /// Repository or file.
        what: String,
        /// Status.
        status: StatusCode,
    },
    /// 404.
    #[error("the hub has no {0}")]
    NotFound(String),
    /// Any other answer.
    #[error("the hub answered {status} for {what}")]
    Status {
        /// Repository or file.
        what: String,
        /// Status.
        status: StatusCode,
    },
    /// The connection failed, or kept failing.
    #[error("failed to fetch {what}")]
    Http {
        /// Repository or file.
        what: String,
        /// Why; without the URL, which may be signed.
        #[source]
        source: reqwest::Error,
    },
    /// An answer that makes no sense.
    #[error("the hub's answer for {what} cannot be used: {reason}")]
    Answer {
        /// Repository or file.
        what: String,
        /// Why.
        reason: String,
    },
    /// The file is not what the hub says it is.
    #[error("{file} has the SHA-256 {actual}, the hub says {expected}; the download was thrown away")]
    Hash {
        /// File.
        file: String,
        /// What the hub says.
        expected: String,
        /// What arrived.
        actual: String,
    },
    /// The local file system.
    #[error("failed to write {path}")]
    File {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// `ORG/NAME` on the hub (old models have no organisation).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId(String);

impl FromStr for RepoId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part_is_valid = |part: &str| {
            let plain = part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
            plain && !part.is_empty() && part.len() <= 96 && part != "." && part != ".."
        };
        let parts: Vec<&str> = text.split('/').collect();
        if (1..=2).contains(&parts.len()) && parts.iter().all(|part| part_is_valid(part)) {
            return Ok(Self(text.to_owned()));
        }
        Err(HubError::Setting(format!("`{}` is not ORG/NAME", text.chars().take(100).collect::<String>())))
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What to pull.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// Repository.
    pub repo: RepoId,
    /// Branch, tag or commit.
    pub revision: String,
    /// One GGUF file, in place of the safetensors.
    pub file: Option<String>,
}

/// A downloaded model, ready for `add`.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// What to add: the directory, or the GGUF file in it.
    pub path: PathBuf,
    /// The folder of this repository and commit.
    pub directory: PathBuf,
    /// `ORG/NAME@commit`, for the chain.
    pub source: String,
}

/// A hub and how to talk to it.
pub struct Hub {
    client: Client,
    endpoint: Url,
    token: Option<HeaderValue>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = if self.token.is_some() { "set" } else { "none" };
        f.debug_struct("Hub").field("endpoint", &self.endpoint.as_str()).field("token", &token).finish_non_exhaustive()
    }
}

/// A file as the API lists it.
#[derive(Debug, Clone, Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Listing {
    sha: Option<String>,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

impl Hub {
    /// The hub that HF_ENDPOINT and HF_TOKEN name. A TLS provider must be installed (main does).
    ///
    /// # Errors
    /// When a variable cannot be used.
    pub fn from_env() -> Result<Self, HubError> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        Self::new(set("HF_ENDPOINT").as_deref().unwrap_or(ENDPOINT_DEFAULT), set("HF_TOKEN").as_deref())
    }

    /// A hub at an address.
    ///
    /// # Errors
    /// When the address is no http URL or the token is no header value.
    pub fn new(endpoint: &str, token: Option<&str>) -> Result<Self, HubError> {
        let bad = |what: &str| HubError::Setting(format!("{what} cannot be used"));
        let mut endpoint = Url::parse(endpoint.trim()).map_err(|_| bad("HF_ENDPOINT"))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host_str().is_none() {
            return Err(bad("HF_ENDPOINT"));
        }
        if !endpoint.path().ends_with('/') {
            endpoint.set_path(&format!("{}/", endpoint.path()));
        }
        let token = match token {
            None => None,
            Some(token) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| bad("HF_TOKEN"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        // Redirects are followed by hand: the token must not travel, and the first answer's headers are needed.
        let client = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(30))
            .read_timeout(Duration::from_secs(60))
            .user_agent(concat!("ashlar/", env!("CARGO_PKG_VERSION")));
        let client = client.build().map_err(|source| HubError::Http { what: "the hub".to_owned(), source: source.without_url() })?;
        Ok(Self { client, endpoint, token })
    }

    /// A request, with the token if `url` is on the endpoint's own host.
    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        let own = url.origin() == self.endpoint.origin();
        let request = self.client.request(method, url);
        match &self.token {
            Some(token) if own => request.header(AUTHORIZATION, token.clone()),
            _ => request,
        }
    }

    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        // Segments are percent-encoded: a revision may hold a slash.
        url.path_segments_mut().expect("http URLs have a path").pop_if_empty().extend(path.iter().copied());
        url
    }

    async fn list(&self, options: &PullOptions) -> Result<Listing, HubError> {
        let what = format!("{}@{}", options.repo, options.revision);
        let mut path = vec!["api", "models"];
        path.extend(options.repo.0.split('/'));
        path.extend(["revision", options.revision.as_str()]);
        let mut url = self.url(&path);
        url.set_query(Some("blobs=true"));
        let mut response = self.send(Method::GET, url, &what).await?;
        let mut body = Vec::new();
        while let Some(part) =
            response.chunk().await.map_err(|source| HubError::Http { what: what.clone(), source: source.without_url() })?
        {
            body.extend_from_slice(&part);
            if body.len() > LISTING_BYTES_MAX {
                return Err(HubError::Answer { what, reason: format!("more than {LISTING_BYTES_MAX} bytes") });
            }
        }
        serde_json::from_slice(&body).map_err(|e| HubError::Answer { what, reason: e.to_string() })
    }

    async fn send(&self, method: Method, url: Url, what: &str) -> Result<Response, HubError> {
        let response = self.request(method, url).send().await;
        let response = response.map_err(|source| HubError::Http { what: what.to_owned(), source: source.without_url() })?;
        check_status(response, what)
    }
}

/// Turns what is neither success nor redirect into an error.
fn check_status(response: Response, what: &str) -> Result<Response, HubError> {
    let what = || what.to_owned();
    match response.status() {
        status if status.is_success() || status.is_redirection() => Ok(response),
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Err(HubError::Refused { what: what(), status }),
        StatusCode::NOT_FOUND => Err(HubError::NotFound(what())),
        status => Err(HubError::Status { what: what(), status }),
    }
}

/// Downloads what `add` needs of a repository into a folder of its own under `downloads`. Complete files that are there
/// already are checked, not fetched; partial ones are resumed.
///
/// # Errors
/// What the hub refused, what did not arrive, or what does not have the hash that the hub states.
pub async fn pull(hub: &Hub, options: &PullOptions, downloads: &Path, progress: &dyn Progress) -> Result<Pulled, HubError> {
    let listing = hub.list(options).await?;
    let sha = match listing.sha {
        Some(sha) if sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit()) => sha,
        _ => return Err(HubError::Answer { what: options.repo.to_string(), reason: "it names no commit".to_owned() }),
    };
    let repo = options.repo.to_string();
    let find = |name: &str| listing.siblings.iter().find(|sibling| sibling.rfilename == name).cloned();
    let directory = downloads.join(repo.replace('/', "--")).join(&sha);
    let created = std::fs::create_dir_all(&directory);
    created.map_err(|source| HubError::File { path: directory.clone(), source })?;
    let fetch = download::Fetch { hub, repo: &repo, sha: &sha, directory: &directory, progress };

    let mut path = directory.clone();
    let mut files: Vec<Sibling> = Vec::new();
    let index = "model.safetensors.index.json";
    if let Some(file) = &options.file {
        if !is_plain_name(file) {
            return Err(HubError::FileName(file.clone()));
        }
        files.push(find(file).ok_or_else(|| HubError::NoFile { repo: repo.clone(), file: file.clone() })?);
        path.push(file);
    } else if find(ADAPTER_FILES[0]).is_some() {
        // As `add` does, which takes a directory with both for an adapter.
        let [_, weights, _] = ADAPTER_FILES;
        if find(weights).is_none() {
            return Err(HubError::NoFile { repo, file: format!("{weights} (pickled weights are never read)") });
        }
        files.extend(ADAPTER_FILES.iter().filter_map(|name| find(name)));
    } else if let Some(sibling) = find(index) {
        fetch.file(&sibling).await?;
        for shard in shards(&directory.join(index))? {
            files.push(find(&shard).ok_or_else(|| HubError::NoFile { repo: repo.clone(), file: shard.clone() })?);
        }
    } else {
        let file = "model.safetensors";
        files.push(
            find(file)
                .ok_or_else(|| HubError::NoFile { repo: repo.clone(), file: format!("{file} (for a GGUF file name it with --file)") })?,
        );
    }
    let is_adapter = files.first().is_some_and(|file| file.rfilename == ADAPTER_FILES[0]);
    if options.file.is_none() && !is_adapter {
        files.splice(0..0, SMALL_FILES.iter().filter_map(|name| find(name)));
    }
    progress.begin(Stage::Download, files.iter().map(Sibling::bytes).sum());
    for sibling in &files {
        fetch.file(sibling).await?;
    }
    progress.end();
    Ok(Pulled { path, directory, source: format!("{repo}@{}", &sha[..12]) })
}

/// Shard names of a downloaded index; plain names only.
fn shards(index: &Path) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let bytes = std::fs::read(index).map_err(|source| HubError::File { path: index.to_owned(), source })?;
    let parsed: Index =
        serde_json::from_slice(&bytes).map_err(|e| HubError::Answer { what: "the shard index".to_owned(), reason: e.to_string() })?;
    let names: std::collections::BTreeSet<String> = parsed.weight_map.into_values().collect();
    match names.iter().find(|name| !is_plain_name(name)) {
        Some(name) => Err(HubError::FileName(name.clone())),
        None => Ok(names.into_iter().collect()),
    }
}

impl Sibling {
    fn bytes(&self) -> u64 {
        self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size).unwrap_or(0)
    }

    fn sha256(&self) -> Option<&str> {
        self.lfs.as_ref().and_then(|lfs| lfs.sha256.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names_are_plain() {
        for good in ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M-Instruct"] {
            assert!(good.parse::<RepoId>().is_ok(), "{good}");
        }
        for bad in ["", "a/b/c", "../a", "a/..", "a b", "a/", "/a", "a?b", "a#b"] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad}");
        }
    }
}
