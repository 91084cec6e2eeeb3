//! What must not hold up others: long texts, clients that leave, floods of half-sent requests. Each
//! attack has a time within which everybody else is served.

use crate::common;
use crate::common::site::{CHAT, COMPLETION, Site, chat, completion, post, site};
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use targon_engine::server::connections::Connections;
use targon_engine::server::listen::accept_within;
use targon_engine::server::router;
use targon_engine::server::settings::HttpLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// Within this a probe is answered, whatever else goes on.
const PROBE_MAX: Duration = Duration::from_millis(700);
/// Within this what cannot be used is refused.
const REFUSE_MAX: Duration = Duration::from_secs(2);
/// Within this a client that has left is noticed.
const LEAVE_MAX: Duration = Duration::from_secs(1);

/// Serves within `connections`, of which each address may have `per_address`.
async fn listening(site: &Site, most: usize, per_address: usize) -> (SocketAddr, Connections) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limits =
        move || HttpLimits { connections_per_address: per_address, ..HttpLimits::default() };
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

/// The answer over a connection of its own.
fn ask(to: SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    let mut socket = std::net::TcpStream::connect(to).unwrap();
    let text = post_text(path, &body.to_string()).replacen("host: x", CLOSE, 1);
    socket.write_all(text.as_bytes()).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap())
}

const CLOSE: &str = "host: x\r\nconnection: close";

/// The slowest of many probes while `asked` are answered by a server with one thread, how long that
/// took, and the answers: what holds that thread holds the probes.
fn slowest_probe(asked: &[(&str, Value)]) -> (Duration, Duration, Vec<(u16, Value)>) {
    let (sender, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let site = site(common::options());
            sender.send(listening(&site, 64, 64).await.0).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let to = address.recv().unwrap();
    let all = Instant::now();
    std::thread::scope(|scope| {
        let asking: Vec<_> =
            asked.iter().map(|(path, body)| scope.spawn(move || ask(to, path, body))).collect();
        let mut slowest = Duration::ZERO;
        while asking.iter().any(|thread| !thread.is_finished()) {
            let started = Instant::now();
            let mut socket = std::net::TcpStream::connect(to).unwrap();
            socket
                .write_all(format!("GET /health HTTP/1.1\r\n{CLOSE}\r\n\r\n").as_bytes())
                .unwrap();
            let mut text = String::new();
            socket.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
            slowest = slowest.max(started.elapsed());
            std::thread::sleep(Duration::from_millis(2));
        }
        let took = all.elapsed();
        println!("slowest probe {slowest:?}, answers after {took:?}");
        (slowest, took, asking.into_iter().map(|thread| thread.join().unwrap()).collect())
    })
}

fn words(bytes: usize) -> String {
    "a ".repeat(bytes / 2)
}

#[test]
fn what_no_context_can_hold_is_refused_before_it_is_tokenised() {
    let long = completion(json!({"prompt": words(2 << 20)}));
    let (slowest, took, answers) = slowest_probe(&[(COMPLETION, long.clone()), (COMPLETION, long)]);
    for (status, answer) in answers {
        assert_eq!((status, &answer["error"]["code"]), (400, &json!("context_length_exceeded")));
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("has 2097152 bytes and so at least 299594 tokens"), "{message}");
    }
    assert!(took < REFUSE_MAX, "{took:?}");
    assert!(slowest < PROBE_MAX, "{slowest:?}");
}

#[test]
fn long_texts_are_read_beside_the_others() {
    let cut = completion(json!({"prompt": words(1 << 20), "truncate_prompt_tokens": 5}));
    let ids = json!({"model": "tiny", "prompt": words(1 << 20)});
    let tokens = json!({"model": "tiny", "tokens": vec![97; 1 << 20]});
    let asked = [(COMPLETION, cut), ("/tokenize", ids), ("/detokenize", tokens)];
    let (slowest, _, answers) = slowest_probe(&asked);
    assert!(answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
    assert_eq!(answers[0].1["usage"]["prompt_tokens"], 5);
    assert_eq!(answers[1].1["count"], 1 << 20);
    assert_eq!(answers[2].1["prompt"].as_str().unwrap().len(), 1 << 20);
    assert!(slowest < PROBE_MAX, "{slowest:?}");
}

#[tokio::test]
async fn texts_that_no_context_need_hold_have_a_limit_too() {
    let site = site(common::options());
    let cut = json!({"truncate_prompt_tokens": 5});
    for (path, extra) in [(COMPLETION, cut), ("/tokenize", json!({}))] {
        let mut body = completion(extra);
        body["prompt"] = json!(words((1 << 20) + 2));
        let (status, answer) = post(&site.app, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("at most 1048576 bytes, got 1048578"), "{message}");
    }
    let messages = json!([{"role": "user", "content": words(1 << 20)}]);
    let (status, answer) = post(&site.app, CHAT, chat(json!({"messages": messages}))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    assert_eq!(answer["error"]["param"], "messages");
}

#[tokio::test]
async fn a_client_that_sends_too_much_and_leaves_ends_its_sequence() {
    let site = site(common::lasting(1));
    let (address, connections) = listening(&site, 64, 64).await;
    let mut aborted = 0;
    for stream in [true, false] {
        for more in ["X".to_owned(), post_text(COMPLETION, "{}"), "X".repeat(1 << 20)] {
            let body = completion(json!({"max_tokens": common::LASTING_TOKENS, "stream": stream}));
            let mut socket = TcpStream::connect(address).await.unwrap();
            let text = post_text(COMPLETION, &body.to_string()) + &more;
            // The server need not take all of it.
            let sent = socket.write_all(text.as_bytes());
            let _ = tokio::time::timeout(Duration::from_millis(50), sent).await;
            let snapshot = || site.engine.stats().snapshot();
            let running = || snapshot().load.running + snapshot().load.waiting;
            // Whoever sends very much is cut off at once, maybe before anything runs.
            let is_flood = more.len() > 32 << 10;
            while running() == 0 && !is_flood {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let (left, sent) = (Instant::now(), more.len());
            drop(socket);
            while running() > 0 || !connections.is_empty() {
                assert!(left.elapsed() < LEAVE_MAX, "{sent} more bytes, stream {stream}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(is_flood || snapshot().aborted > aborted, "cancelled: stream {stream}");
            aborted = snapshot().aborted;
        }
    }
    assert_eq!(site.engine.stats().snapshot().finished, 0);
}

#[tokio::test]
async fn a_flood_of_half_sent_requests_displaces_only_itself() {
    let site = site(common::lasting(1));
    let (address, connections) = listening(&site, 32, 24).await;
    // A request that runs, and one whose client waits for nothing: the first keeps its place.
    let body =
        completion(json!({"max_tokens": common::LASTING_TOKENS, "stream": true})).to_string();
    let mut running = connect([127, 0, 0, 1], address).await;
    let text = post_text(COMPLETION, &body).replacen("host: x", CLOSE, 1);
    running.write_all(text.as_bytes()).await.unwrap();
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
