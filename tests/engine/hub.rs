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
use targon_engine::models::hub::{Hub, HubError, WantedFiles};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A change of the listing.
type Lie = fn(&mut Value);

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
    /// Change what the listing says.
    lie: Option<Lie>,
    /// Answer so instead of the first listings, this many of them.
    fails: Option<(StatusCode, usize)>,
    /// Send a byte at a time, with pauses.
    drips: bool,
}

struct Site {
    files: BTreeMap<&'static str, Vec<u8>>,
    faults: Faults,
    requests: Mutex<Vec<String>>,
    listings: Mutex<usize>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

async fn listing(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response<Body> {
    let sent = headers.get("authorization").map(|v| v.to_str().unwrap().to_owned());
    if site.faults.token.is_some_and(|t| sent != Some(format!("Bearer {t}"))) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let listings = {
        let mut listings = site.listings.lock();
        *listings += 1;
        *listings
    };
    if let Some((status, count)) = site.faults.fails
        && listings <= count
    {
        return status.into_response();
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
    let mut listing = json!({"sha": COMMIT, "siblings": siblings});
    if let Some(lie) = site.faults.lie {
        lie(&mut listing);
    }
    Json(listing).into_response()
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
    if site.faults.drips {
        let bytes = futures_util::stream::iter(rest).then(|byte| async move {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            Ok::<_, std::io::Error>(Bytes::from(vec![byte]))
        });
        let answer = Response::builder().status(status).header("content-length", length);
        return answer.body(Body::from_stream(bytes)).unwrap();
    }
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
            // The same bytes as another file's: one blob.
            ("generation_config.json", b"{}".to_vec()),
        ]);
        let site = Arc::new(Site {
            files,
            faults,
            requests: Mutex::default(),
            listings: Mutex::default(),
        });
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

    async fn fetch(&self, wanted: WantedFiles<'_>) -> Result<PathBuf, HubError> {
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
    let dir = hub.fetch("o/m", "main", WantedFiles::Checkpoint, &progress).await.unwrap().directory;
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        assert_eq!(std::fs::read(dir.join(name)).unwrap(), setup.site.files[name], "{name}");
    }
    assert!(!dir.join("README.md").exists() && *seen.lock() >= 3);
    let before = setup.site.requests.lock().len();
    setup.fetch(WantedFiles::Checkpoint).await.unwrap();
    assert_eq!(setup.site.requests.lock().len(), before, "the second time nothing is fetched");
    let offline = setup.hub(None, true);
    let again = offline.fetch("o/m", "main", WantedFiles::Checkpoint, &|_, _, _| {}).await.unwrap();
    assert_eq!(again.directory, dir);
    let error = offline.fetch("o/m", "main", WantedFiles::File("x.gguf"), &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("HF_HUB_OFFLINE is set"));
}

#[tokio::test]
async fn a_configuration_is_fetched_alone_and_leaves_the_kept_checkpoint_where_it_is_found() {
    let setup = Setup::new(Faults::default()).await;
    let dir = setup.fetch(WantedFiles::Configuration).await.unwrap();
    assert_eq!(setup.site.requests.lock().clone(), ["config.json whole"]);
    assert!(dir.join("config.json").exists() && !dir.join("model.safetensors").exists());
    let offline = setup.hub(None, true);
    offline.kept("o/m", "main", WantedFiles::Configuration).unwrap();
    assert!(offline.kept("o/m", "main", WantedFiles::Checkpoint).is_err());
    // Of a revision that has moved on, the checkpoint that is kept stays the one of its name.
    let reference = setup.cache.path().join("models--o--m/refs/main");
    let older = COMMIT.chars().rev().collect::<String>();
    std::fs::write(&reference, &older).unwrap();
    setup.fetch(WantedFiles::Configuration).await.unwrap();
    assert_eq!(std::fs::read_to_string(&reference).unwrap(), older);
    setup.fetch(WantedFiles::Checkpoint).await.unwrap();
    assert_eq!(std::fs::read_to_string(&reference).unwrap(), COMMIT);
}

#[tokio::test]
async fn a_dropped_connection_resumes_where_it_stopped() {
    let setup = Setup::new(Faults { drop_after: Some(70_000), ..Faults::default() }).await;
    let dir = setup.fetch(WantedFiles::Checkpoint).await.unwrap();
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
    let dir = setup.fetch(WantedFiles::File("m.Q4_1.gguf")).await.unwrap();
    assert_eq!(std::fs::read(dir.join("m.Q4_1.gguf")).unwrap(), setup.site.files["m.Q4_1.gguf"]);
}

#[tokio::test]
async fn wrong_bytes_are_refused_with_both_checksums() {
    let setup = Setup::new(Faults { corrupt: true, ..Faults::default() }).await;
    for name in ["m.Q4_1.gguf", "config.json"] {
        let error = setup.fetch(WantedFiles::File(name)).await.unwrap_err().to_string();
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
    let error = setup.fetch(WantedFiles::File("config.json")).await.unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let setup = Setup::new(Faults { token: Some("secret"), ..Faults::default() }).await;
    let error = setup.fetch(WantedFiles::Checkpoint).await.unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    let hub = setup.hub(Some("secret"), false);
    hub.fetch("o/m", "main", WantedFiles::Checkpoint, &|_, _, _| {}).await.unwrap();
    let error = hub.fetch("o/other", "main", WantedFiles::Checkpoint, &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("check the repository's name"));
    let error = hub.fetch("o/m", "main", WantedFiles::File("none"), &|_, _, _| {}).await;
    assert!(error.unwrap_err().to_string().contains("has no none"));
    for name in ["../x", "a/../../b", "", "a b"] {
        let error = hub.fetch(name, "main", WantedFiles::Checkpoint, &|_, _, _| {}).await;
        assert!(matches!(error, Err(HubError::Name(_))), "{name}");
    }
}

/// The entry of a file in a listing.
fn entry<'a>(listing: &'a mut Value, name: &str) -> &'a mut Value {
    let list = listing["siblings"].as_array_mut().unwrap();
    list.iter_mut().find(|e| e["rfilename"] == name).unwrap()
}

#[tokio::test]
async fn a_lying_hub_writes_nothing_outside_and_is_refused() {
    let cases: [(Lie, &str); 14] = [
        (|l| entry(l, "config.json")["blobId"] = json!("x.lock"), "checksum of 40 hexadecimal"),
        (|l| entry(l, "config.json")["blobId"] = json!("../../../evil"), "40 hexadecimal digits"),
        (|l| entry(l, "config.json")["blobId"] = json!(null), "config.json: expected a checksum"),
        (|l| entry(l, "config.json")["blobId"] = json!("A".repeat(40)), "40 hexadecimal digits"),
        (
            |l| entry(l, "model.safetensors")["lfs"]["sha256"] = json!("0".repeat(40)),
            "a checksum of 64 hexadecimal digits",
        ),
        (|l| l["sha"] = json!("main"), "expected a commit of 40 hexadecimal digits, got \"main\""),
        (|l| l["sha"] = json!("../../x"), "expected a commit of 40 hexadecimal digits"),
        (
            |l| {
                l["siblings"].as_array_mut().unwrap().push(json!({
                "rfilename": "model/../../../x.safetensors", "size": 1, "blobId": "0".repeat(40)}))
            },
            "", // not a name that anybody asked for
        ),
        (
            |l| {
                l["siblings"].as_array_mut().unwrap().push(json!({
                "rfilename": "model\\..\\x.safetensors", "size": 1, "blobId": "0".repeat(40)}))
            },
            "is not a valid name",
        ),
        (
            |l| {
                let twice = entry(l, "config.json").clone();
                l["siblings"].as_array_mut().unwrap().push(twice);
            },
            "config.json: expected one file of this name, got two",
        ),
        (|l| entry(l, "config.json")["size"] = json!(u64::MAX), "at most 268435456 bytes"),
        (
            |l| entry(l, "model.safetensors")["lfs"]["size"] = json!(1_u64 << 41),
            "model.safetensors: expected at most 1099511627776 bytes",
        ),
        (|l| entry(l, "generation_config.json")["size"] = json!(3), "expected 2 bytes, got 3"),
        (
            |l| l["siblings"] = json!(vec![entry(l, "config.json").clone(); 10_001]),
            "expected at most 10000 files, got 10001",
        ),
    ];
    for (lie, want) in cases {
        let setup = Setup::new(Faults { lie: Some(lie), ..Faults::default() }).await;
        match setup.fetch(WantedFiles::Checkpoint).await {
            Ok(_) => assert_eq!(want, ""),
            Err(e) => {
                let e = e.to_string();
                assert!(!want.is_empty() && e.contains(want), "expected `{want}` in `{e}`");
            }
        }
        let outside: Vec<PathBuf> = std::fs::read_dir(setup.cache.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| !p.ends_with("models--o--m"))
            .collect();
        assert!(outside.is_empty(), "{outside:?}");
    }
    let setup = Setup::new(Faults::default()).await;
    let hub = setup.hub(None, false);
    for repo in ["o/m/x", "o--m/x", "o/.."] {
        let error = hub.fetch(repo, "main", WantedFiles::Checkpoint, &|_, _, _| {}).await;
        assert!(matches!(error, Err(HubError::Name(_))), "{repo}");
    }
}

#[tokio::test]
async fn equal_files_are_one_blob_and_do_not_wait_for_each_other() {
    let setup = Setup::new(Faults::default()).await;
    let fetch = setup.fetch(WantedFiles::Checkpoint);
    let fetched = tokio::time::timeout(std::time::Duration::from_secs(20), fetch).await;
    let dir = fetched.expect("two names of one blob wait for each other").unwrap();
    for name in ["config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(dir.join(name)).unwrap(), b"{}", "{name}");
    }
    let requests = setup.site.requests.lock();
    assert_eq!(requests.iter().filter(|r| r.contains("config.json")).count(), 1, "{requests:?}");
}

#[tokio::test]
async fn a_hub_that_sends_a_byte_now_and_then_is_given_up() {
    let setup = Setup::new(Faults { drips: true, ..Faults::default() }).await;
    let hub = setup.hub(None, false).with_patience(std::time::Duration::from_millis(100));
    let fetch = hub.fetch("o/m", "main", WantedFiles::File("model.safetensors"), &|_, _, _| {});
    let error = fetch.await.unwrap_err();
    assert!(matches!(error, HubError::Slow { .. }), "{error}");
    assert!(error.to_string().contains("sent less than 65536 bytes in 0.1 seconds"), "{error}");
}

#[tokio::test]
async fn a_hub_that_fails_for_a_moment_is_asked_again() {
    for (status, count, asked) in [
        (StatusCode::SERVICE_UNAVAILABLE, 2, 3),
        (StatusCode::TOO_MANY_REQUESTS, 1, 2),
        (StatusCode::BAD_GATEWAY, 9, 4),
        (StatusCode::FORBIDDEN, 1, 1), // the control: asking again does not help
    ] {
        let setup = Setup::new(Faults { fails: Some((status, count)), ..Faults::default() }).await;
        let fetched = setup.fetch(WantedFiles::Configuration).await;
        assert_eq!(*setup.site.listings.lock(), asked, "{status}");
        match fetched {
            Ok(_) => assert!(count < asked, "{status}"),
            Err(e) => assert!(e.may_pass() != (asked == 1) && count >= asked, "{status}: {e}"),
        }
    }
}

#[tokio::test]
async fn what_is_kept_whole_serves_while_the_hub_cannot_be_asked() {
    let setup = Setup::new(Faults::default()).await;
    let dir = setup.fetch(WantedFiles::Checkpoint).await.unwrap();
    let failing =
        Faults { fails: Some((StatusCode::SERVICE_UNAVAILABLE, 99)), ..Faults::default() };
    let failing = Setup::new(failing).await;
    let cache = || setup.cache.path().to_owned();
    let at = |endpoint: &str| Hub::new(endpoint, cache(), None, false).unwrap();
    let hubs = [at(&failing.endpoint), at("http://127.0.0.1:1")];
    let wanted = WantedFiles::Checkpoint;
    for hub in &hubs {
        let kept = hub.fetch("o/m", "main", wanted, &|_, _, _| {}).await.unwrap();
        assert_eq!((kept.directory, kept.commit.as_str()), (dir.clone(), COMMIT));
        // Nothing is kept of another revision.
        let error = hub.fetch("o/m", "other", wanted, &|_, _, _| {}).await.unwrap_err();
        assert!(error.may_pass(), "{error}");
    }
    // An index names shards, of which one is gone.
    let index = json!({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let error = hubs[0].fetch("o/m", "main", wanted, &|_, _, _| {}).await.unwrap_err();
    assert!(error.to_string().contains("503"), "{error}");
    std::fs::write(dir.join("model-2.safetensors"), "").unwrap();
    hubs[0].fetch("o/m", "main", wanted, &|_, _, _| {}).await.unwrap();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let error = hubs[1].fetch("o/m", "main", wanted, &|_, _, _| {}).await.unwrap_err();
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    // The Hub says no: what is kept does not hide that.
    let refusing = Setup::new(Faults { token: Some("secret"), ..Faults::default() }).await;
    let hub = at(&refusing.endpoint);
    let fetch = hub.fetch("o/m", "main", WantedFiles::Configuration, &|_, _, _| {});
    assert!(fetch.await.unwrap_err().to_string().contains("401"));
}

#[tokio::test]
async fn a_whole_commit_that_was_fetched_is_not_asked_for_again() {
    let setup = Setup::new(Faults::default()).await;
    let wanted = WantedFiles::Checkpoint;
    let hub = setup.hub(None, false);
    let fetch = || hub.fetch("o/m", COMMIT, wanted, &|_, _, _| {});
    // Fetched by a name that moves: files may be missing that only the listing tells of.
    setup.fetch(wanted).await.unwrap();
    let first = fetch().await.unwrap();
    assert_eq!(*setup.site.listings.lock(), 2);
    assert_eq!(fetch().await.unwrap().directory, first.directory);
    assert_eq!(*setup.site.listings.lock(), 2);
    std::fs::remove_file(first.directory.join("model.safetensors")).unwrap();
    fetch().await.unwrap();
    assert_eq!(*setup.site.listings.lock(), 3);
    assert!(first.directory.join("model.safetensors").exists());
}
