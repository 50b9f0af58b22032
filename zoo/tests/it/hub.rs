//! `pull` against a stand-in of the hub: breaks and resumes, wrong hashes, refusals, path tricks, and where the token goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::support::peft::Peft;
use crate::support::{Checkpoint, D, add_dir};
use ashlar_zoo::hub::{Hub, HubError, PullOptions, pull};
use ashlar_zoo::ingest::{Recipe, Silent};
use ashlar_zoo::store::Zoo;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt;
use serde_json::json;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the stand-in does and what it saw.
#[derive(Default)]
struct Stand {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Names listed beside the real files.
    extra_names: Vec<String>,
    /// The hash that is claimed for large files, if not the true one.
    claimed_sha: Option<String>,
    /// Bodies of large files end after so many bytes.
    cut_bytes: Mutex<Option<usize>>,
    token: Option<String>,
    /// Address of the store that large files are redirected to.
    store: Mutex<String>,
    /// (what, range, authorization) of each request for data.
    seen: Mutex<Vec<(String, Option<String>, Option<String>)>>,
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header_text(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    headers.get(name).map(|value| value.to_str().unwrap().to_owned())
}

impl Stand {
    fn allowed(&self, headers: &HeaderMap) -> bool {
        self.token.as_ref().is_none_or(|token| header_text(headers, header::AUTHORIZATION) == Some(format!("Bearer {token}")))
    }
}

async fn listing(State(stand): State<Arc<Stand>>, headers: HeaderMap) -> Response {
    if !stand.allowed(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let files = stand.files.lock().unwrap();
    let mut siblings: Vec<_> = files
        .iter()
        .map(|(name, bytes)| match name.ends_with(".safetensors") {
            true => json!({"rfilename": name, "size": bytes.len(), "lfs": {"sha256": stand.claimed_sha.clone().unwrap_or_else(|| sha(bytes)), "size": bytes.len()}}),
            false => json!({"rfilename": name, "size": bytes.len()}),
        })
        .collect();
    siblings.extend(stand.extra_names.iter().map(|name| json!({"rfilename": name, "size": 1})));
    json!({"sha": COMMIT, "siblings": siblings}).to_string().into_response()
}

/// The hub itself: small files from here, large ones by redirect to another host.
async fn resolve(
    State(stand): State<Arc<Stand>>,
    Path((_, _, _, name)): Path<(String, String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    if !stand.allowed(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some(bytes) = stand.files.lock().unwrap().get(&name).cloned() else { return StatusCode::NOT_FOUND.into_response() };
    if name.ends_with(".safetensors") {
        let store = stand.store.lock().unwrap().clone();
        let linked = [
            ("x-linked-etag", format!("\"{}\"", stand.claimed_sha.clone().unwrap_or_else(|| sha(&bytes)))),
            ("x-linked-size", bytes.len().to_string()),
        ];
        return (StatusCode::FOUND, linked, [(header::LOCATION, format!("{store}/data/{name}"))]).into_response();
    }
    let etag = [(header::ETAG, format!("\"{}\"", &sha(&bytes)[..40]))];
    if method == Method::HEAD {
        return (etag, Body::empty()).into_response();
    }
    (etag, bytes).into_response()
}

/// The store: ranges, and bodies that break off.
async fn data(State(stand): State<Arc<Stand>>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    let range = header_text(&headers, header::RANGE);
    stand.seen.lock().unwrap().push((name.clone(), range.clone(), header_text(&headers, header::AUTHORIZATION)));
    let bytes = stand.files.lock().unwrap()[&name].clone();
    let from: usize = range.map_or(0, |range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap());
    let rest = bytes[from..].to_vec();
    let cut = stand.cut_bytes.lock().unwrap().take();
    let status = if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut response = match cut {
        None => (status, rest).into_response(),
        Some(cut) => {
            let parts = vec![Ok(rest[..cut].to_vec()), Err(std::io::Error::other("cut"))];
            // A pause, so that the first part leaves before the connection ends.
            let parts = futures::stream::iter(parts).then(|part| async {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                part
            });
            (status, Body::from_stream(parts)).into_response()
        }
    };
    if from > 0 {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        response.headers_mut().insert(header::CONTENT_RANGE, range.parse().unwrap());
    }
    response
}

async fn listen(app: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    format!("http://{address}")
}

async fn start(stand: Stand) -> (Arc<Stand>, String) {
    // Another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let stand = Arc::new(stand);
    let store = Router::new().route("/data/{name}", get(data)).with_state(stand.clone());
    *stand.store.lock().unwrap() = listen(store).await;
    let hub = Router::new()
        .route("/api/models/{org}/{name}/revision/{revision}", get(listing))
        .route(
            "/{org}/{name}/resolve/{sha}/{file}",
            get(|path: Path<(String, String, String, String)>, state, method, headers| resolve(state, path, method, headers)),
        )
        .with_state(stand.clone());
    let endpoint = listen(hub).await;
    (stand, endpoint)
}

fn files() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    Checkpoint::llama(1).write(dir.path());
    let entries = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())).collect()
}

fn options() -> PullOptions {
    PullOptions { repo: "org/model".parse().unwrap(), revision: "main".to_owned(), file: None }
}

async fn try_pull(stand: Stand, token: Option<&str>) -> (Arc<Stand>, tempfile::TempDir, Result<ashlar_zoo::hub::Pulled, HubError>) {
    let (stand, endpoint) = start(stand).await;
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::new(&endpoint, token).unwrap();
    let pulled = pull(&hub, &options(), dir.path(), &Silent).await;
    (stand, dir, pulled)
}

#[tokio::test]
async fn a_model_is_pulled_and_can_be_added() {
    let (stand, dir, pulled) = try_pull(Stand { files: Mutex::new(files()), ..Stand::default() }, None).await;
    let pulled = pulled.unwrap();
    assert_eq!(pulled.source, "org/model@0123456789ab");
    let zoo = Zoo::create_dir(&dir.path().join("zoo")).await.unwrap();
    add_dir(&zoo, &pulled.path, "demo/a", Recipe::Keep).await.unwrap();
    assert_eq!(stand.seen.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_adapter_is_pulled_and_can_be_added_over_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let mut peft = Peft::over("org/base");
    peft.lora("model.layers.0.self_attn.q_proj", (D, D), 4, 1).write(dir.path());
    let read = |name: &str| (name.to_owned(), std::fs::read(dir.path().join(name)).unwrap());
    let mut files = BTreeMap::from([read("adapter_config.json"), read("adapter_model.safetensors")]);
    files.insert("tokenizer.json".to_owned(), b"not asked for".to_vec());
    let (_, folder, pulled) = try_pull(Stand { files: Mutex::new(files.clone()), ..Stand::default() }, None).await;
    let pulled = pulled.unwrap();
    assert!(!pulled.path.join("tokenizer.json").exists());
    let zoo = Zoo::create_dir(&folder.path().join("zoo")).await.unwrap();
    Checkpoint::llama(1).write(&folder.path().join("base"));
    add_dir(&zoo, &folder.path().join("base"), "demo/base", Recipe::Keep).await.unwrap();
    let report = add_dir(&zoo, &pulled.path, "demo/lora", Recipe::Keep).await.unwrap();
    assert_eq!((report.adapters.total, report.base), (1, Some("demo/base".parse().unwrap())));
    // Pickled factors are not fetched.
    let pickled = files.remove("adapter_model.safetensors").unwrap();
    files.insert("adapter_model.bin".to_owned(), pickled);
    let (_, _folder, pulled) = try_pull(Stand { files: Mutex::new(files), ..Stand::default() }, None).await;
    let error = pulled.unwrap_err().to_string();
    assert_eq!(error, "org/model has no adapter_model.safetensors (pickled weights are never read)");
}

#[tokio::test]
async fn a_broken_download_is_resumed_where_it_ended() {
    let stand = Stand { files: Mutex::new(files()), cut_bytes: Mutex::new(Some(10_000)), ..Stand::default() };
    let (stand, _dir, pulled) = try_pull(stand, None).await;
    let pulled = pulled.unwrap();
    let got = std::fs::read(pulled.path.join("model.safetensors")).unwrap();
    assert!(got == stand.files.lock().unwrap()["model.safetensors"]);
    let ranges: Vec<Option<String>> = stand.seen.lock().unwrap().iter().map(|(_, range, _)| range.clone()).collect();
    assert_eq!(ranges, [None, Some("bytes=10000-".to_owned())]);
}

#[tokio::test]
async fn a_partial_file_of_an_earlier_run_is_taken_up_and_complete_ones_are_not_fetched() {
    let (stand, endpoint) = start(Stand { files: Mutex::new(files()), ..Stand::default() }).await;
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::new(&endpoint, None).unwrap();
    let weights = stand.files.lock().unwrap()["model.safetensors"].clone();
    let folder = dir.path().join("org--model").join(COMMIT);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("model.safetensors.{}.part", sha(&weights))), &weights[..777]).unwrap();
    pull(&hub, &options(), dir.path(), &Silent).await.unwrap();
    pull(&hub, &options(), dir.path(), &Silent).await.unwrap();
    let ranges: Vec<Option<String>> = stand.seen.lock().unwrap().iter().map(|(_, range, _)| range.clone()).collect();
    assert_eq!(ranges, [Some("bytes=777-".to_owned())]);
}

#[tokio::test]
async fn a_wrong_hash_is_refused_and_nothing_is_left() {
    let stand = Stand { files: Mutex::new(files()), claimed_sha: Some("ab".repeat(32)), ..Stand::default() };
    let (_, dir, pulled) = try_pull(stand, None).await;
    assert!(matches!(pulled, Err(HubError::Hash { .. })), "{pulled:?}");
    let left: Vec<String> = std::fs::read_dir(dir.path().join("org--model").join(COMMIT))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!left.iter().any(|name| name.contains("safetensors")), "{left:?}");
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_not_to_where_it_redirects() {
    let stand = Stand { files: Mutex::new(files()), token: Some("hf_secret".to_owned()), ..Stand::default() };
    let (stand, _dir, pulled) = try_pull(stand, Some("hf_secret")).await;
    pulled.unwrap();
    assert!(stand.seen.lock().unwrap().iter().all(|(_, _, authorization)| authorization.is_none()));
    let hub = Hub::new("http://127.0.0.1:1", Some("hf_secret")).unwrap();
    assert!(!format!("{hub:?}").contains("hf_secret"));
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let (_, _dir, pulled) = try_pull(Stand { files: Mutex::new(files()), token: Some("x".to_owned()), ..Stand::default() }, None).await;
    let error = pulled.unwrap_err();
    assert!(
        matches!(error, HubError::Refused { status: StatusCode::UNAUTHORIZED, .. }) && error.to_string().contains("HF_TOKEN"),
        "{error}"
    );
    let (_, endpoint) = start(Stand::default()).await;
    let hub = Hub::new(&endpoint, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut missing = options();
    missing.repo = "nowhere".parse().unwrap();
    assert!(matches!(pull(&hub, &missing, dir.path(), &Silent).await, Err(HubError::NotFound(_))));
    assert!(matches!(pull(&hub, &options(), dir.path(), &Silent).await, Err(HubError::NoFile { .. })));
}

#[tokio::test]
async fn names_that_leave_the_folder_are_refused() {
    let mut with_index = files();
    with_index.insert("model.safetensors.index.json".to_owned(), br#"{"weight_map":{"a":"../../evil.safetensors"}}"#.to_vec());
    let stand = Stand { files: Mutex::new(with_index), extra_names: vec!["../../evil.safetensors".to_owned()], ..Stand::default() };
    let (_, _dir, pulled) = try_pull(stand, None).await;
    assert!(matches!(pulled, Err(HubError::FileName(_))), "{pulled:?}");
    let (_, endpoint) = start(Stand { files: Mutex::new(files()), extra_names: vec!["../x.gguf".to_owned()], ..Stand::default() }).await;
    let hub = Hub::new(&endpoint, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tricky = PullOptions { file: Some("../x.gguf".to_owned()), ..options() };
    assert!(matches!(pull(&hub, &tricky, dir.path(), &Silent).await, Err(HubError::FileName(_))));
}
