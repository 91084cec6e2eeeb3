//! What operators rely on: signals of life, metrics, keys, limits, names in logs, tokenizer routes.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, call, chat, completion, get, post, site};
use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::json;
use std::net::SocketAddr;
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::entropy::Entropy;
use targon_engine::intake::translate::Defaults;
use targon_engine::server::listen::serve;
use targon_engine::server::registry::Registry;
use targon_engine::server::router;
use targon_engine::server::settings::{ApiKeys, HttpLimits, Settings};
use targon_engine::server::state::ServerState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

/// Serves in the background until the test ends.
async fn listening(site: &Site) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, site.state.clone(), std::future::pending(), Duration::ZERO));
    address
}

fn quick() -> HttpLimits {
    let short = Duration::from_millis(200);
    HttpLimits { header_time: short, body_time: short, write_time: short, ..HttpLimits::default() }
}

/// Everything the server sends until it closes the connection.
async fn until_closed(socket: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = socket.read_to_end(&mut bytes);
    let _ = tokio::time::timeout(Duration::from_secs(20), read).await.expect("never closed");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn keys_guard_the_api_but_not_the_probes() {
    let site = site(common::options());
    let keys = ApiKeys::new(["a-long-enough-key"]);
    site.state.set(Settings { keys, ..Settings::default() });
    let ask = |path: &str, key: Option<&str>| {
        let mut request = Request::post(path);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.body(Body::from(completion(json!({})).to_string())).unwrap()
    };
    for path in [COMPLETION, CHAT, "/tokenize", "/v1/nothing", "/nothing", "/docsx"] {
        for key in [None, Some("another-long-key!")] {
            let (status, text) = call(&site.app, ask(path, key)).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            assert!(text.contains("AuthenticationError") && !text.contains("a-long"), "{text}");
        }
    }
    let (status, text) = call(&site.app, ask(COMPLETION, Some("a-long-enough-key"))).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    for path in ["/health", "/version", "/load", "/health/decode", "/", "/page/page.js", "/docs/"] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        assert_eq!(call(&site.app, request).await.0, StatusCode::OK, "{path}");
    }
    for path in ["/v1/models", "/v1/models/tiny", "/tokenizer_info"] {
        assert_eq!(get(&site.app, path).await.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    // A reload takes the key away from running clients.
    site.state.set(Settings { keys: ApiKeys::new(["the-next-key-of-all"]), ..Settings::default() });
    let (status, _) = call(&site.app, ask(COMPLETION, Some("a-long-enough-key"))).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

/// The answer to a request whose announced body never comes.
async fn without_its_body(address: SocketAddr, line: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = "host: x\r\nconnection: close\r\nauthorization: Bearer a-long-enough-key\r\n\
                content-length: 1048576";
    socket.write_all(format!("{line} HTTP/1.1\r\n{head}\r\n\r\n").as_bytes()).await.unwrap();
    until_closed(&mut socket).await
}

#[tokio::test]
async fn an_open_route_waits_for_no_body() {
    let site = site(common::options());
    let settings = |limits| {
        let keys = ApiKeys::new(["a-long-enough-key"]);
        site.state.set(Settings { keys, limits, ..Settings::default() });
    };
    settings(HttpLimits::default());
    let address = listening(&site).await;
    for path in ["/health", "/metrics", "/", "/docs/"] {
        let answer = without_its_body(address, &format!("GET {path}")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    let answer = without_its_body(address, "POST /health").await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    // The control: a route that needs a key waits, and says that it waited for nothing.
    settings(quick());
    let answer = without_its_body(address, &format!("POST {COMPLETION}")).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test]
async fn every_answer_carries_the_name_of_its_request() {
    let site = site(common::options());
    let ask = |id: &str| {
        let body = Body::from(completion(json!({})).to_string());
        Request::post(COMPLETION).header("x-request-id", id).body(body).unwrap()
    };
    let response = site.app.clone().oneshot(ask("mine-7")).await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-7");
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    assert!(String::from_utf8_lossy(&bytes).contains("\"id\":\"cmpl-mine-7\""));
    let response = site.app.clone().oneshot(ask("not fit")).await.unwrap();
    assert_eq!(response.headers()["x-request-id"].len(), 32);
    let request = Request::get("/nowhere").body(Body::empty()).unwrap();
    let response = site.app.clone().oneshot(request).await.unwrap();
    assert!(response.headers().contains_key("x-request-id"));
}

#[tokio::test]
async fn metrics_speak_of_every_model_in_vllms_words() {
    let site = site(common::options());
    post(&site.app, COMPLETION, completion(json!({"made_up": 1}))).await;
    post(&site.app, COMPLETION, completion(json!({"max_tokens": -1}))).await;
    call(&site.app, Request::get("/made/up/path").body(Body::empty()).unwrap()).await;
    // The engine counts a request just after its last token has left.
    while site.engine.stats().snapshot().load.running > 0
        || site.engine.stats().snapshot().finished == 0
    {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (status, text) =
        call(&site.app, Request::get("/metrics").body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::OK);
    for line in [
        "vllm:generation_tokens_total{model_name=\"tiny\"} 12",
        "vllm:prompt_tokens_total{model_name=\"tiny\"} 5",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} 1",
        "vllm:num_requests_running{model_name=\"tiny\"} 0",
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1",
        "vllm:inter_token_latency_seconds_count{model_name=\"tiny\"} 11",
        "vllm:e2e_request_latency_seconds_bucket{le=\"0.3\",model_name=\"tiny\"}",
        "vllm:kv_cache_usage_perc{model_name=\"tiny\"} 0",
        "targon_unknown_fields_total{field=\"made_up\"} 1",
        "http_requests_total{method=\"POST\",path=\"/v1/completions\",status=\"400\"} 1",
        "http_requests_total{method=\"GET\",path=\"<unmatched>\",status=\"404\"} 1",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn the_heartbeat_tells_an_idle_engine_from_a_stalled_one() {
    let site = site(common::lasting(1));
    let (status, body) = get(&site.app, "/health/decode").await;
    assert_eq!((status, &body["models"]["tiny"]["status"]), (StatusCode::OK, &json!("ok")));
    let limits = HttpLimits { stall_time: Duration::ZERO, ..HttpLimits::default() };
    site.state.set(Settings { limits, ..Settings::default() });
    let request = Request::post(COMPLETION);
    let long =
        completion(json!({"max_tokens": common::LASTING_TOKENS, "stream": true})).to_string();
    let response = site.app.clone().oneshot(request.body(Body::from(long)).unwrap()).await.unwrap();
    // With no patience at all, any engine that has work counts as stalled.
    let mut seen = json!(null);
    for _ in 0..1000 {
        let (status, body) = get(&site.app, "/health/decode").await;
        if status == StatusCode::SERVICE_UNAVAILABLE {
            seen = body;
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(seen["models"]["tiny"]["status"], "stalled");
    drop(response);
}

#[tokio::test]
async fn texts_become_ids_and_come_back() {
    let site = site(common::options());
    let text = "Grüße, 日本!";
    let body = json!({"model": "tiny", "prompt": text, "return_token_strs": true});
    let (status, body) = post(&site.app, "/tokenize", body).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let tokens = body["tokens"].as_array().unwrap();
    assert_eq!(body["count"], tokens.len());
    assert_eq!(body["token_strs"].as_array().unwrap().len(), tokens.len());
    assert_eq!(body["max_model_len"], 512);
    let (_, back) =
        post(&site.app, "/detokenize", json!({"model": "tiny", "tokens": tokens})).await;
    assert_eq!(back["prompt"], text);
    let (_, of_chat) = post(&site.app, "/tokenize", chat(json!({}))).await;
    assert_eq!(of_chat["count"], "<user>hello<assistant>".len());
    let (_, info) = get(&site.app, "/tokenizer_info?model=tiny").await;
    assert_eq!((&info["eos_token"], &info["vocab_size"]), (&json!("<|end|>"), &json!(261)));
    for (path, body) in [
        ("/tokenize", json!({"model": "tiny"})),
        ("/tokenize", json!({"model": "tiny", "messages": []})),
        ("/detokenize", json!({"model": "tiny", "tokens": [-1]})),
        ("/detokenize", json!({"model": "tiny", "tokens": [999]})),
    ] {
        let (status, answer) = post(&site.app, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    }
}

#[tokio::test]
async fn pages_of_other_origins_ask_only_where_they_may() {
    let site = site(common::options());
    let ask = || {
        let request = Request::options(CHAT).header("origin", "https://a.example");
        request.header("access-control-request-method", "POST").body(Body::empty()).unwrap()
    };
    let header = "access-control-allow-origin";
    let closed = router(site.state.clone()).oneshot(ask()).await.unwrap();
    assert!(!closed.headers().contains_key(header));
    let origins = vec!["https://a.example".to_owned()];
    site.state.set(Settings { cors_origins: origins, ..Settings::default() });
    let open = router(site.state.clone()).oneshot(ask()).await.unwrap();
    assert_eq!(open.headers()[header], "https://a.example");
}

#[tokio::test]
async fn slow_and_oversized_requests_are_cut_off() {
    let site = site(common::options());
    site.state.set(Settings { limits: quick(), ..Settings::default() });
    let address = listening(&site).await;
    // A head that never ends.
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n").await.unwrap();
    until_closed(&mut socket).await;
    // A body that never ends.
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let text = until_closed(&mut socket).await;
    assert!(text.starts_with("HTTP/1.1 408") && text.contains("must arrive within"), "{text}");
    // A head that is too large.
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = format!("GET /health HTTP/1.1\r\nhost: x\r\na: {}\r\n\r\n", "b".repeat(300_000));
    let _ = socket.write_all(head.as_bytes()).await;
    let text = until_closed(&mut socket).await;
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 431"), "{text}");
    // A body that says it is too large is refused before it comes.
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let text = until_closed(&mut socket).await;
    assert!(text.starts_with("HTTP/1.1 413"), "{text}");
}

#[tokio::test]
async fn slashes_that_base_urls_bring_along_do_not_matter() {
    let site = site(common::options());
    for path in ["//v1/models", "/v1/models/", "/v1//models", "/health/", "//health"] {
        assert_eq!(get(&site.app, path).await.0, StatusCode::OK, "{path}");
    }
    assert_eq!(get(&site.app, "/ready/?model=tiny").await.0, StatusCode::OK);
    let (status, answer) = post(&site.app, "//v1/chat/completions/", chat(json!({}))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    // A key is needed however the path is written.
    let keys = ApiKeys::new(["a-long-enough-key"]);
    site.state.set(Settings { keys, ..Settings::default() });
    for path in ["//v1/models", "/v1/models/", "/health/../v1/models", "/docs/../v1/models"] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        assert_ne!(call(&site.app, request).await.0, StatusCode::OK, "{path}");
    }
    for path in ["/", "//", "/docs/", "//docs/", "/page/page.js"] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        assert_eq!(call(&site.app, request).await.0, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_the_name_of_its_header() {
    let site = site(common::options());
    let ask = |encoding: &str| {
        let body = Body::from(completion(json!({})).to_string());
        Request::post(COMPLETION).header("content-encoding", encoding).body(body).unwrap()
    };
    let (status, text) = call(&site.app, ask("gzip")).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    assert!(text.contains("`Content-Encoding` must be identity or absent, got gzip"), "{text}");
    assert_eq!(call(&site.app, ask("identity")).await.0, StatusCode::OK);
}

#[tokio::test]
async fn names_of_requests_come_from_the_servers_own_source() {
    let name = |entropy: Entropy| async {
        let (registry, clock) = (Registry::default(), Clock::manual(1_000));
        let state = ServerState::new(registry, Defaults::default(), clock).drawing_from(entropy);
        let request = Request::get("/health").body(Body::empty()).unwrap();
        let response = router(state).oneshot(request).await.unwrap();
        response.headers()["x-request-id"].to_str().unwrap().to_owned()
    };
    let first = name(Entropy::seeded(3)).await;
    assert_eq!((first.len(), &first), (32, &name(Entropy::seeded(3)).await));
    assert_ne!(first, name(Entropy::seeded(4)).await);
    assert_ne!(name(Entropy::system()).await, name(Entropy::system()).await);
}
