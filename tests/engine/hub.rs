//! Downloads against a local server that speaks the Hub's protocol and misbehaves on demand.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::response::{IntoResponse, Json, Redirect};
use axum::routing::get;
use futures_util::StreamExt;
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use targon_engine::models::hub::{Hub, HubError, Wanted};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong.
#[derive(Clone, Copy, Default)]
struct Faults {
    /// Drop the connection after this many bytes of each answer.
    drop_after: Option<usize>,
    /// Change a byte of every answer.
    corrupt: bool,
    /// Send the whole file whatever range was asked for.
    ignores_range: bool,
    /// Answer 401 without this token.
    token: Option<&'static str>,
}

struct Site {
    files: BTreeMap<&'static str, Vec<u8>>,
    faults: Faults,
    requests: Mutex<Vec<String>>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

async fn listing(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response<Body> {
    let sent = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
    if site.faults.token.is_some_and(|t| sent != Some(format!("Bearer {t}"))) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let siblings: Vec<Value> = site
        .files
        .iter()
        .map(|(name, bytes)| {
            let mut sha1 = Sha1::new();
            sha1.update(format!("blob {}\0", bytes.len()));
            sha1.update(bytes);
            let mut entry = json!({"rfilename": name, "size": bytes.len(),
                "blobId": hex(&sha1.finalize())});
            if name.ends_with(".safetensors") || name.ends_with(".gguf") {
                entry["lfs"] = json!({"sha256": hex(&Sha256::digest(bytes)), "size": bytes.len()});
            }
            entry
        })
        .collect();
    Json(json!({"sha": COMMIT, "siblings": siblings})).into_response()
}

async fn resolve(Path((commit, name)): Path<(String, String)>) -> Response<Body> {
    assert_eq!(commit, COMMIT, "files must be asked for by commit");
    Redirect::temporary(&format!("/cdn/{name}")).into_response()
}

async fn cdn(
    State(site): State<Arc<Site>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response<Body> {
    let range = headers.get("range").map(|v| v.to_str().unwrap().to_owned());
    site.requests.lock().push(format!("{name} {}", range.as_deref().unwrap_or("whole")));
    let mut bytes = site.files[name.as_str()].clone();
    if site.faults.corrupt {
        bytes[0] ^= 1;
    }
    let from: usize = match &range {
        Some(r) if !site.faults.ignores_range => {
            r.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap()
        }
        _ => 0,
    };
    let status = if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let rest = bytes.split_off(from);
    let length = rest.len();
    let body = match site.faults.drop_after.filter(|n| *n < length) {
        None => Body::from(rest),
        Some(count) => {
            let sent = Bytes::from(rest[..count].to_vec());
            // The pause lets what was sent leave before the connection breaks.
            let broken = async {
                tokio::time::sleep(std::time::Duration::from_millis(30)).await;
                Err(std::io::Error::other("connection dropped"))
            };
            let sent = futures_util::stream::once(async { Ok(sent) });
            Body::from_stream(sent.chain(futures_util::stream::once(broken)))
        }
    };
    Response::builder().status(status).header("content-length", length).body(body).unwrap()
}

struct Setup {
    site: Arc<Site>,
    endpoint: String,
    cache: tempfile::TempDir,
}

impl Setup {
    async fn new(faults: Faults) -> Self {
        let weights: Vec<u8> = (0..300_000_u32).map(|i| (i * 31 % 251) as u8).collect();
        let files = BTreeMap::from([
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{\"a\": 1}".to_vec()),
            ("model.safetensors", weights.clone()),
            ("m.Q4_1.gguf", weights[..1000].to_vec()),
            ("README.md", b"not fetched".to_vec()),
        ]);
        let site = Arc::new(Site { files, faults, requests: Mutex::new(Vec::new()) });
        let app = Router::new()
            .route("/api/models/o/m/revision/{revision}", get(listing))
            .route("/o/m/resolve/{commit}/{*name}", get(resolve))
            .route("/cdn/{*name}", get(cdn))
            .with_state(Arc::clone(&site));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { site, endpoint, cache: tempfile::tempdir().unwrap() }
    }

    fn hub(&self, token: Option<&str>, offline: bool) -> Hub {
        let cache = self.cache.path().to_owned();
        Hub::new(&self.endpoint, cache, token.map(str::to_owned), offline).unwrap()
    }

    async fn fetch(&self, wanted: Wanted<'_>) -> Result<PathBuf, HubError> {
        let snapshot = self.hub(None, false).fetch("o/m", "main", wanted, &|_, _, _| {}).await?;
        assert_eq!(snapshot.commit, COMMIT);
        Ok(snapshot.directory)
    }
}

#[tokio::test]
async fn a_checkpoint_is_fetched_once_and_found_offline() {
    let setup = Setup::new(Faults::default()).await;
    let seen = Mutex::new(0);
    let progress = |_: &str, done: u64, total: u64| {
        assert!(done <= total);
        *seen.lock() += 1;
    };
    let hub = setup.hub(None, false);
    let dir = hub.fetch("o/m", "main", Wanted::Checkpoint, &progress).await.unwrap().directory;
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        assert_eq!(std::fs::read(dir.join(name)).unwrap(), setup.site.files[name], "{name}");
    }
    assert!(!dir.join("README.md").exists() && *seen.lock() >= 3);
    let before = setup.site.requests.lock().len();
    setup.fetch(Wanted::Checkpoint).await.unwrap();
    assert_eq!(setup.site.requests.lock().len(), before, "the second time nothing is fetched");
    let offline = setup.hub(None, true);
    let again = offline.fetch("o/m", "main", Wanted::Checkpoint, &|_, _, _| {}).await.unwrap();
    assert_eq!(again.directory, dir);
    let error = offline.fetch("o/m", "main", Wanted::File("x.gguf"), &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("HF_HUB_OFFLINE is set"));
}

#[tokio::test]
async fn a_dropped_connection_resumes_where_it_stopped() {
    let setup = Setup::new(Faults { drop_after: Some(70_000), ..Faults::default() }).await;
    let dir = setup.fetch(Wanted::Checkpoint).await.unwrap();
    let name = "model.safetensors";
    assert_eq!(std::fs::read(dir.join(name)).unwrap(), setup.site.files[name]);
    let requests: Vec<String> =
        setup.site.requests.lock().iter().filter(|r| r.starts_with(name)).cloned().collect();
    assert!(requests.len() >= 3, "{requests:?}");
    assert!(requests[1..].iter().all(|r| r.contains("bytes=")), "{requests:?}");
}

#[tokio::test]
async fn a_server_without_ranges_still_works() {
    let faults = Faults { ignores_range: true, ..Faults::default() };
    let setup = Setup::new(faults).await;
    let partial = setup.cache.path().join("models--o--m/blobs");
    std::fs::create_dir_all(&partial).unwrap();
    let blob = hex(&Sha256::digest(&setup.site.files["m.Q4_1.gguf"]));
    std::fs::write(partial.join(format!("{blob}.incomplete")), b"half a file").unwrap();
    let dir = setup.fetch(Wanted::File("m.Q4_1.gguf")).await.unwrap();
    assert_eq!(std::fs::read(dir.join("m.Q4_1.gguf")).unwrap(), setup.site.files["m.Q4_1.gguf"]);
}

#[tokio::test]
async fn wrong_bytes_are_refused_with_both_checksums() {
    let setup = Setup::new(Faults { corrupt: true, ..Faults::default() }).await;
    for name in ["m.Q4_1.gguf", "config.json"] {
        let error = setup.fetch(Wanted::File(name)).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{name}: expected checksum ")), "{error}");
        let blobs = setup.cache.path().join("models--o--m/blobs");
        let left = std::fs::read_dir(blobs).unwrap().map(|e| e.unwrap().path());
        let kept: Vec<PathBuf> =
            left.filter(|p| p.extension().is_none_or(|e| e != "lock")).collect();
        assert!(kept.is_empty(), "nothing wrong is kept: {kept:?}");
    }
}

#[tokio::test]
async fn connections_that_bring_nothing_are_given_up() {
    let setup = Setup::new(Faults { drop_after: Some(0), ..Faults::default() }).await;
    let error = setup.fetch(Wanted::File("config.json")).await.unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let setup = Setup::new(Faults { token: Some("secret"), ..Faults::default() }).await;
    let error = setup.fetch(Wanted::Checkpoint).await.unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    let hub = setup.hub(Some("secret"), false);
    hub.fetch("o/m", "main", Wanted::Checkpoint, &|_, _, _| {}).await.unwrap();
    let error = hub.fetch("o/other", "main", Wanted::Checkpoint, &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("check the repository's name"));
    let error = hub.fetch("o/m", "main", Wanted::File("none"), &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("has no none"));
    for name in ["../x", "a/../../b", "", "a b"] {
        let error = hub.fetch(name, "main", Wanted::Checkpoint, &|_, _, _| {}).await;
        assert!(matches!(error, Err(HubError::Name(_))), "{name}");
    }
}
