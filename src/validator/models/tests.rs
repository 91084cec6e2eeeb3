//! Lists of models over HTTP: servers and miners of every kind, on the loopback device.

use super::*;
use crate::chain::epistula::{self, Envelope};
use crate::chain::keys::Keypair;
use crate::entropy::Entropy;
use crate::validator::query::QuerySigner;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use axum::{Router, routing::MethodRouter};
use parking_lot::Mutex;
use std::sync::Arc;

/// A router on a free port; it ends with the runtime of the test.
async fn listen(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

fn answer(body: impl Into<String>) -> MethodRouter {
    let body = body.into();
    get(move || async move { body })
}

fn miner(url: String, signer: Option<Keypair>) -> Target {
    let (read_timeout, timeout) = (Duration::from_secs(60), Duration::from_secs(60));
    let hotkey = signer.as_ref().map(Keypair::hotkey);
    let signer = signer.map(|key| QuerySigner { key: Arc::new(key), entropy: Entropy::seeded(1) });
    let size = Size::LARGE;
    Target { url, hotkey, signer, api_key: None, read_timeout, timeout, size }
}

#[test]
fn files_are_read_and_every_bad_line_is_named() {
    let read = |text: &[u8]| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(CONFIG_FILE);
        std::fs::write(&path, text).unwrap();
        read_file(&path).map_err(|e| e.to_string().replace(&path.display().to_string(), "F"))
    };
    let text = "\u{feff}# ours\na/b\r\n\n  c  \n";
    assert_eq!(read(text.as_bytes()).unwrap(), ["a/b", "c"]);
    let long = "x".repeat(201);
    let error = read(format!("a\nb c\n{long}\na\nd").as_bytes()).unwrap_err();
    assert!(
        error.starts_with("F: line 2: a name must have no ' ', got `b c`; line 3: "),
        "{error}"
    );
    assert!(error.ends_with("; line 4: `a` stands on line 1 already"), "{error}");
    assert_eq!(read("a\n".repeat(40).as_bytes()).unwrap_err().matches("line 1 ").count(), 20);
    assert!(read("a\n".repeat(40).as_bytes()).unwrap_err().ends_with("; and 19 more"));
    assert_eq!(read(b"\n# a\n").unwrap_err(), "F: must name at least one model");
    let many: String = (0..257).map(|n| format!("m{n}\n")).collect();
    assert_eq!(read(many.as_bytes()).unwrap_err(), "F: must name at most 256 models, got 257");
    assert!(read(b"\xff").unwrap_err().starts_with("F: must be UTF-8"));
    assert!(read(&[b'#'; 300 << 10]).unwrap_err().contains("more than 262144 bytes"));
}

#[tokio::test]
async fn modes_give_their_lists_or_say_why_not() {
    let clock = Clock::system();
    assert_eq!(Mode::Default.list(&clock).await.unwrap(), [DEFAULT_MODEL]);
    let missing = Mode::Config("/missing/models.txt".into()).list(&clock).await.unwrap_err();
    assert!(missing.to_string().starts_with("/missing/models.txt: "), "{missing}");
    let url = listen(
        Router::new()
            .route("/names", answer("[\"a\", \"b\", \"a\"]"))
            .route("/objects", answer("[{\"model\": \"a\", \"context_length\": 4096}]"))
            .route("/none", answer("[]"))
            .route("/page", answer("<html>"))
            .route("/long", answer("x".repeat(300 << 10)))
            .route("/refused", get(|| async { (StatusCode::FORBIDDEN, "no") })),
    )
    .await;
    let list = async |path| Mode::Endpoint(format!("{url}/{path}")).list(&clock).await;
    assert_eq!(list("names").await.unwrap(), ["a", "b"]);
    assert_eq!(list("objects").await.unwrap(), ["a"]);
    for (path, error) in [
        ("none", "must list at least one model"),
        ("page", "must be JSON"),
        ("long", "more than 262144 bytes"),
        ("refused", "answered 403 Forbidden: no"),
    ] {
        let got = list(path).await.unwrap_err().to_string();
        assert!(got.contains(error) && got.starts_with(&url), "{got}");
    }
}

/// What a miner was sent: method, headers and body.
type Seen = Arc<Mutex<Vec<(HeaderMap, Bytes)>>>;

#[tokio::test]
async fn a_miner_is_told_in_the_bytes_that_are_signed_and_then_asked() {
    let seen = Seen::default();
    let note = |answer: &'static str| {
        let seen = seen.clone();
        move |headers: HeaderMap, body: Bytes| async move {
            seen.lock().push((headers, body));
            answer
        }
    };
    let models = get(note("[\"a\", \"b\", \"a\"]")).post(note("\"\""));
    let url = listen(Router::new().route("/models", models)).await;
    let signer = Keypair::from_seed(&[7; 32]).unwrap();
    let hotkey = signer.hotkey();
    let wanted = ["a/b".to_owned(), "é".to_owned()];
    let bytes = broadcast(&wanted);
    assert_eq!(bytes, b"[\"a/b\", \"\\u00e9\"]");
    let clock = Clock::system();
    let names = exchange(&miner(url, Some(signer)), bytes.clone(), &clock).await.unwrap();
    assert_eq!(names, ["a", "b"]);
    let seen = seen.lock();
    assert_eq!(seen.iter().map(|(_, body)| body.to_vec()).collect::<Vec<_>>(), [bytes, vec![]]);
    for (headers, body) in seen.iter() {
        let text = |name: &str| headers[name].to_str().unwrap();
        let envelope = Envelope {
            timestamp_ms: epistula::timestamp(text(epistula::HEADER_TIMESTAMP)).unwrap(),
            uuid: text(epistula::HEADER_UUID),
            signed_for: Some(hotkey),
        };
        let signature = epistula::signature(text(epistula::HEADER_SIGNATURE)).unwrap();
        assert!(envelope.verify(&hotkey, body, &signature));
        assert!(!envelope.verify(&hotkey, b"[\"a/b\",\"\xc3\xa9\"]", &signature));
    }
}

#[tokio::test]
async fn miners_of_every_version_are_understood() {
    let refuse = || async { StatusCode::METHOD_NOT_ALLOWED };
    let clock = Clock::system();
    let ask = async |methods: MethodRouter| {
        let url = listen(Router::new().route("/models", methods)).await;
        exchange(&miner(url, None), broadcast(&[]), &clock).await.map_err(|e| e.to_string())
    };
    let list = || async { "[\"a\"]" };
    let map = || async { "{\"a\": 3, \"b\": 1}" };
    assert_eq!(ask(get(list).post(|| async { "\"\"" })).await.unwrap(), ["a"]);
    assert_eq!(ask(get(map).post(map)).await.unwrap(), ["a", "b"]);
    // It refuses to be told, or to be asked.
    assert_eq!(ask(get(list).post(refuse)).await.unwrap(), ["a"]);
    assert_eq!(ask(get(refuse).post(map)).await.unwrap(), ["a", "b"]);
    let error = ask(get(refuse).post(|| async { "\"\"" })).await.unwrap_err();
    assert!(error.contains("answered 405"), "{error}");
    let error = ask(get(|| async { "[1]" }).post(refuse)).await.unwrap_err();
    assert!(error.contains("entry 0 must be a name"), "{error}");
    let long = || async { "x".repeat(300 << 10) };
    assert!(ask(get(long).post(long)).await.unwrap_err().contains("more than 262144 bytes"));
    // It points elsewhere: a signed request is for nobody else.
    let moved = || async { (StatusCode::FOUND, [("location", "http://127.0.0.1:1/models")]) };
    assert!(ask(get(moved).post(moved)).await.unwrap_err().contains("answered 302"));
}

#[tokio::test]
async fn an_address_is_named_without_its_keys() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let target = miner(format!("http://user:secret@{address}/secret?key=secret"), None);
    let error = exchange(&target, broadcast(&[]), &Clock::system()).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("http://{address}: ")), "{error}");
    assert!(!error.contains("secret"), "{error}");
}

#[tokio::test]
async fn a_miner_that_does_not_answer_costs_three_seconds() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let clock = Clock::system();
    let started = clock.elapsed();
    // Connections are taken by the operating system, and nobody reads from them.
    let error = exchange(&miner(url, None), broadcast(&[]), &clock).await.unwrap_err();
    let took = clock.elapsed() - started;
    assert!(matches!(error, QueryError::Network { .. }), "{error}");
    assert!((2.9..5.0).contains(&took.as_secs_f64()), "{took:?}");
}
