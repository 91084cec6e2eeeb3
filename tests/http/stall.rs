//! What must not hold up others: long texts, clients that leave, floods of half-sent requests. Each
//! attack has a time within which everybody else is served.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, chat, completion, get, post, site};
use axum::http::StatusCode;
use serde_json::json;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use targon_engine::server::connections::Connections;
use targon_engine::server::listen::accept_within;
use targon_engine::server::router;
use targon_engine::server::settings::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Within this a probe is answered, whatever else goes on.
const PROBE_MAX: Duration = Duration::from_millis(500);
/// Within this a client that has left is noticed.
const LEAVE_MAX: Duration = Duration::from_secs(1);

/// Serves within `connections`, of which each address may have `per_address`.
async fn listening(site: &Site, most: usize, per_address: usize) -> (SocketAddr, Connections) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits = move || Limits { connections_per_address: per_address, ..Limits::default() };
    let (app, connections) = (router(site.state.clone()), Connections::new(most));
    let never = std::future::pending();
    tokio::spawn(accept_within(listener, app, limits, connections.clone(), never));
    (address, connections)
}

/// A client at one of this machine's own addresses.
async fn connect(from: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((Ipv4Addr::from(from), 0))).unwrap();
    socket.connect(to).await.unwrap()
}

fn post_text(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// How long a probe over a new connection takes.
async fn probe(from: [u8; 4], to: SocketAddr) -> Duration {
    let started = Instant::now();
    let mut socket = connect(from, to).await;
    let head = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    started.elapsed()
}

/// The slowest of many probes while `work` runs. All share one thread, so that anything that holds
/// it holds the probes.
async fn slowest_probe<T>(site: &Site, work: impl Future<Output = T>) -> (Duration, T) {
    let mut work = std::pin::pin!(work);
    let mut slowest = Duration::ZERO;
    loop {
        let started = Instant::now();
        tokio::select! {
            biased;
            outcome = &mut work => return (slowest.max(started.elapsed()), outcome),
            (status, _) = async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                get(&site.app, "/health").await
            } => assert_eq!(status, StatusCode::OK),
        }
        slowest = slowest.max(started.elapsed());
    }
}

#[tokio::test]
async fn long_texts_hold_nobody_up() {
    let site = site(common::options());
    let text = |bytes: usize| "a ".repeat(bytes / 2);
    // What no context can hold is refused before it is tokenised.
    let long = completion(json!({"prompt": text(2 << 20)}));
    let started = Instant::now();
    let (slowest, answers) = slowest_probe(&site, async {
        tokio::join!(
            post(&site.app, COMPLETION, long.clone()),
            post(&site.app, COMPLETION, long.clone())
        )
    })
    .await;
    assert_eq!(answers.0.1["error"]["code"], "context_length_exceeded", "{}", answers.0.1);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(slowest < PROBE_MAX, "{slowest:?}");
    // What is cut, or only tokenised, takes its time beside the others.
    let cut = completion(json!({"prompt": text(1 << 20), "truncate_prompt_tokens": 5}));
    let ids = json!({"model": "tiny", "prompt": text(1 << 20)});
    let messages = json!([{"role": "user", "content": text(1 << 20)}]);
    let (slowest, answers) = slowest_probe(&site, async {
        tokio::join!(
            post(&site.app, COMPLETION, cut),
            post(&site.app, "/tokenize", ids),
            post(&site.app, CHAT, chat(json!({"messages": messages}))),
        )
    })
    .await;
    let ((cut, answer), (tokenized, list), (refused, error)) = answers;
    assert_eq!((cut, &answer["usage"]["prompt_tokens"]), (StatusCode::OK, &json!(5)), "{answer}");
    assert_eq!((tokenized, &list["count"]), (StatusCode::OK, &json!(1 << 20)));
    assert_eq!(refused, StatusCode::BAD_REQUEST, "{error}");
    assert!(slowest < PROBE_MAX, "{slowest:?}");
    let tokens = json!({"model": "tiny", "tokens": list["tokens"]});
    let (slowest, (status, back)) =
        slowest_probe(&site, post(&site.app, "/detokenize", tokens)).await;
    assert_eq!((status, back["prompt"].as_str().unwrap().len()), (StatusCode::OK, 1 << 20));
    assert!(slowest < PROBE_MAX, "{slowest:?}");
    // There is an end to that, too.
    for (path, extra) in
        [(COMPLETION, json!({"truncate_prompt_tokens": 5})), ("/tokenize", json!({}))]
    {
        let mut body = completion(extra);
        body["prompt"] = json!(text((1 << 20) + 2));
        let (status, answer) = post(&site.app, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("at most 1048576 bytes, got 1048578"), "{message}");
    }
}

#[tokio::test]
async fn a_client_that_sends_too_much_and_leaves_ends_its_sequence() {
    let site = site(common::options());
    let (address, connections) = listening(&site, 64, 64).await;
    for stream in [true, false] {
        for more in ["X".to_owned(), post_text(COMPLETION, "{}"), "X".repeat(1 << 20)] {
            let body = completion(json!({"max_tokens": 500, "stream": stream}));
            let mut socket = TcpStream::connect(address).await.unwrap();
            let text = post_text(COMPLETION, &body.to_string()) + &more;
            // The server need not take all of it.
            let sent = socket.write_all(text.as_bytes());
            let _ = tokio::time::timeout(Duration::from_millis(50), sent).await;
            let running = || site.engine.stats().snapshot().load.running;
            while running() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let left = Instant::now();
            drop(socket);
            while running() > 0 {
                assert!(left.elapsed() < LEAVE_MAX, "still running after {:?}", left.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
    let snapshot = site.engine.stats().snapshot();
    assert_eq!((snapshot.aborted, snapshot.finished), (6, 0), "they were cancelled, not finished");
    while !connections.is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_flood_of_half_sent_requests_displaces_only_itself() {
    let site = site(common::options());
    let (address, connections) = listening(&site, 32, 24).await;
    // A request that runs, and one whose client waits for nothing: the first keeps its place.
    let body = completion(json!({"max_tokens": 450, "stream": true})).to_string();
    let mut running = connect([127, 0, 0, 1], address).await;
    running.write_all(post_text(COMPLETION, &body).as_bytes()).await.unwrap();
    let mut first = [0; 16];
    running.read_exact(&mut first).await.unwrap();
    let mut flood = Vec::new();
    for i in 0..200 {
        let mut socket = connect([127, 0, 0, 1], address).await;
        let half = match i % 2 {
            0 => "POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
            _ => "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        };
        let _ = socket.write_all(half.as_bytes()).await;
        flood.push(socket);
    }
    assert!(connections.len() <= 24, "{} connections", connections.len());
    // Another address is served at once, the flood's own as soon as it is no longer new.
    let other = probe([127, 0, 0, 2], address).await;
    assert!(other < PROBE_MAX, "{other:?}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..30 {
        let own = probe([127, 0, 0, 1], address).await;
        assert!(own < PROBE_MAX, "{own:?}");
    }
    // Who is refused is told why.
    let mut told = 0;
    for mut socket in flood {
        let mut text = String::new();
        let read = socket.read_to_string(&mut text);
        let ended = tokio::time::timeout(Duration::from_millis(5), read).await.is_ok();
        told += usize::from(ended && text.contains("at most 24 connections of one address"));
    }
    assert!(told > 0);
    let mut text = String::new();
    running.read_to_string(&mut text).await.unwrap_or_default();
    assert!(text.contains("data: [DONE]"), "the request that ran was cut off");
}
