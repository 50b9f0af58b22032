//! One file of a repository: asked for, followed through redirects, resumed, checked, and put in place by rename.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};
use sha2::{Digest as _, Sha256};

use super::{Hub, HubError, Sibling, check_status};
use crate::formats::shards::is_plain_name;
use crate::ingest::Progress;

/// Redirects followed for one request.
const REDIRECTS_MAX: usize = 5;
/// Times in a row that a download may break without a byte arriving.
const BREAKS_MAX: u32 = 4;
/// Pause after the first break; it doubles.
const PAUSE: Duration = Duration::from_millis(200);

/// What all files of one pull have in common.
pub(super) struct Fetch<'a> {
    pub(super) hub: &'a Hub,
    pub(super) repo: &'a str,
    pub(super) sha: &'a str,
    pub(super) directory: &'a Path,
    pub(super) progress: &'a dyn Progress,
}

/// What the hub says a file is.
struct Identity {
    /// Names the content; a partial download of another one is not resumed.
    etag: String,
    bytes: Option<u64>,
    sha256: Option<String>,
}

impl Fetch<'_> {
    /// Has the file complete and checked in the folder.
    pub(super) async fn file(&self, sibling: &Sibling) -> Result<(), HubError> {
        let name = sibling.rfilename.as_str();
        if !is_plain_name(name) {
            return Err(HubError::FileName(name.to_owned()));
        }
        let mut path = vec![];
        path.extend(self.repo.split('/'));
        path.extend(["resolve", self.sha, name]);
        let url = self.hub.url(&path);
        let identity = self.identity(sibling, url.clone()).await?;
        let target = self.directory.join(name);
        if target.exists() {
            if check(&target, name, &identity).is_ok() {
                self.progress.advance(sibling.bytes());
                return Ok(());
            }
            std::fs::remove_file(&target).map_err(|source| HubError::File { path: target.clone(), source })?;
        }
        let part = self.directory.join(format!("{name}.{}.part", identity.etag));
        self.download(name, url, &part, &identity).await?;
        if let Err(e) = check(&part, name, &identity) {
            // Resuming what is wrong would never end.
            std::fs::remove_file(&part).map_err(|source| HubError::File { path: part.clone(), source })?;
            return Err(e);
        }
        std::fs::rename(&part, &target).map_err(|source| HubError::File { path: target, source })
    }

    async fn identity(&self, sibling: &Sibling, url: Url) -> Result<Identity, HubError> {
        let name = sibling.rfilename.as_str();
        let response = self.hub.send(Method::HEAD, url, name).await?;
        let headers = response.headers();
        // A large file's own hash and size are in the hub's answer, not in that of the store it redirects to.
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, ETAG.as_str()));
        let etag: String = etag.unwrap_or_default().trim_start_matches("W/").chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        if etag.is_empty() {
            return Err(HubError::Answer { what: name.to_owned(), reason: "it has no ETag".to_owned() });
        }
        let is_sha256 = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let sha256 = sibling.sha256().map(str::to_owned).or_else(|| is_sha256(&etag).then(|| etag.clone()));
        let linked = text(headers, "x-linked-size").and_then(|size| size.parse().ok());
        let listed = sibling.lfs.as_ref().and_then(|lfs| lfs.size).or(sibling.size);
        Ok(Identity { etag, bytes: linked.or(listed), sha256: sha256.map(|sha| sha.to_ascii_lowercase()) })
    }

    /// Fills `part`, going on where it ends. A connection that breaks is taken up again, as long as bytes still arrive.
    async fn download(&self, name: &str, url: Url, part: &Path, identity: &Identity) -> Result<(), HubError> {
        let mut breaks = 0;
        let mut counted = 0; // Bytes that progress has heard of.
        loop {
            let had = std::fs::metadata(part).map_or(0, |meta| meta.len());
            if identity.bytes == Some(had) && had > 0 {
                self.progress.advance(had.saturating_sub(counted));
                return Ok(());
            }
            let error = match self.attempt(name, url.clone(), part, had, identity, &mut counted).await {
                Ok(()) => return Ok(()),
                Err(e @ HubError::Http { .. }) => e,
                Err(other) => return Err(other),
            };
            let has = std::fs::metadata(part).map_or(0, |meta| meta.len());
            breaks = if has > had { 1 } else { breaks + 1 };
            if breaks > BREAKS_MAX {
                return Err(error);
            }
            tracing::debug!(file = name, bytes = has, "download broke off, resuming");
            tokio::time::sleep(PAUSE * 2u32.pow(breaks - 1)).await;
        }
    }

    async fn attempt(&self, name: &str, url: Url, part: &Path, had: u64, identity: &Identity, counted: &mut u64) -> Result<(), HubError> {
        let http = |source: reqwest::Error| HubError::Http { what: name.to_owned(), source: source.without_url() };
        let answer = |reason: &str| HubError::Answer { what: name.to_owned(), reason: reason.to_owned() };
        let io = |source| HubError::File { path: part.to_owned(), source };
        let mut response = self.follow(name, url, had).await?;
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), CONTENT_RANGE.as_str()).unwrap_or_default();
                if !range.starts_with(&format!("bytes {had}-")) {
                    return Err(answer("it sent another range than was asked for"));
                }
                had
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                // What is there is longer than the file: begin anew at the next attempt.
                std::fs::remove_file(part).map_err(io)?;
                return Err(answer("the partial download did not fit and was thrown away; try again"));
            }
            _ => 0,
        };
        let mut file = File::options().create(true).append(start > 0).write(true).truncate(start == 0).open(part).map_err(io)?;
        let mut at = start;
        self.progress.advance(at.saturating_sub(*counted));
        *counted = (*counted).max(at);
        while let Some(bytes) = response.chunk().await.map_err(http)? {
            at += bytes.len() as u64;
            if identity.bytes.is_some_and(|expected| at > expected) {
                return Err(answer("it sent more bytes than it said"));
            }
            file.write_all(&bytes).map_err(io)?;
            self.progress.advance(at.saturating_sub(*counted));
            *counted = (*counted).max(at);
        }
        file.sync_all().map_err(io)
    }

    /// Asks for the bytes from `from` on, through redirects. Only requests to the endpoint's host carry the token.
    async fn follow(&self, name: &str, mut url: Url, from: u64) -> Result<Response, HubError> {
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.hub.request(Method::GET, url.clone());
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.send().await.map_err(|source| HubError::Http { what: name.to_owned(), source: source.without_url() })?;
            if !response.status().is_redirection() {
                let past_end = response.status() == StatusCode::RANGE_NOT_SATISFIABLE;
                return if past_end { Ok(response) } else { check_status(response, name) };
            }
            let next = text(response.headers(), LOCATION.as_str()).and_then(|location| url.join(&location).ok());
            url = match next {
                Some(next) if matches!(next.scheme(), "http" | "https") => next,
                _ => return Err(HubError::Answer { what: name.to_owned(), reason: "it redirects to nowhere".to_owned() }),
            };
        }
        Err(HubError::Answer { what: name.to_owned(), reason: format!("more than {REDIRECTS_MAX} redirects") })
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}

/// Length and, where the hub states it, SHA-256 of a complete file.
fn check(path: &PathBuf, name: &str, identity: &Identity) -> Result<(), HubError> {
    let io = |source| HubError::File { path: path.clone(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if let Some(expected) = identity.bytes.filter(|expected| *expected != bytes) {
        return Err(HubError::Answer { what: name.to_owned(), reason: format!("{bytes} bytes arrived, it said {expected}") });
    }
    let Some(expected) = &identity.sha256 else { return Ok(()) };
    let mut file = File::open(path).map_err(io)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(io)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let actual: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if actual == *expected { Ok(()) } else { Err(HubError::Hash { file: name.to_owned(), expected: expected.clone(), actual }) }
}
