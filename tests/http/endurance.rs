//! Hostile and honest clients side by side, for as long as `TARGON_SOAK_SECONDS` says (else for 6):
//! no honest request is lost, memory stays flat, and a probe is answered in time all along.

use crate::common;
use crate::common::Noise;
use crate::common::budget::resident_bytes;
use crate::common::site::{CHAT, COMPLETION, completion, site};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::engine::Options;
use targon_engine::server::listen::serve;
use targon_engine::server::settings::{HttpLimits, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const HONEST: usize = 4;
const HOSTILE: usize = 6;
const TOKENS: usize = 12;
/// For 99 of 100 probes, on two busy cores without optimised code.
const PROBE_MAX: Duration = Duration::from_millis(1_000);
/// Resident memory that may come on top after the first third.
const GROWTH_BYTES_MAX: usize = 96 << 20;

fn soak_time() -> Duration {
    let seconds = std::env::var("TARGON_SOAK_SECONDS").ok().map(|s| s.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(6))
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Sends bytes and reads until the other side closes, for at most `wait`.
async fn exchange(address: SocketAddr, bytes: &[u8], wait: Duration) -> String {
    let Ok(mut socket) = TcpStream::connect(address).await else { return String::new() };
    let mut answer = Vec::new();
    let talk = async {
        // A server that refuses by the head may close before the body is sent.
        let _ = socket.write_all(bytes).await;
        let _ = socket.read_to_end(&mut answer).await;
    };
    let _ = tokio::time::timeout(wait, talk).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// One attack, by number.
fn attack(noise: &mut Noise) -> (Vec<u8>, Duration) {
    let (long, short) = (Duration::from_secs(10), Duration::from_millis(200));
    let chat = |extra: Value| {
        let mut body = json!({"model": "tiny", "max_tokens": 4,
            "messages": [{"role": "user", "content": "a"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        post(CHAT, body.to_string().as_bytes())
    };
    let rules: String = (0..1_000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
    match noise.below(14) {
        0 => (post(COMPLETION, b"{\"prompt\": "), long),
        1 => (post(CHAT, deep(10_000).as_bytes()), long),
        2 => {
            let grammar = format!("start: r0\n{rules}r1000: \"a\"\n");
            (chat(json!({"structured_outputs": {"grammar": grammar}})), long)
        }
        3 => {
            let definitions: serde_json::Map<String, Value> = (0..1_000)
                .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})))
                .collect();
            let schema = json!({"$ref": "#/$defs/d0", "$defs": definitions});
            (chat(json!({"structured_outputs": {"json": schema}})), long)
        }
        4 => (chat(json!({"structured_outputs": {"regex": "a?".repeat(50_000)}})), long),
        5 => {
            let prompt = "a ".repeat(1 << 20);
            let body = json!({"model": "tiny", "prompt": [prompt, "b"]});
            (post(COMPLETION, body.to_string().as_bytes()), long)
        }
        6 => (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le".to_vec(), short),
        7 => {
            let mut bytes = post(COMPLETION, &[b'x'; 100]);
            bytes.truncate(bytes.len() - 50);
            (bytes, short)
        }
        8 => {
            let mut body = completion(json!({"stream": true}));
            body["max_tokens"] = json!(400);
            let mut bytes = post(COMPLETION, body.to_string().as_bytes());
            bytes.push(b'X');
            (bytes, short)
        }
        9 => {
            let mut body = completion(json!({"stream": true, "n": 8}));
            body["max_tokens"] = json!(400);
            (post(COMPLETION, body.to_string().as_bytes()), short)
        }
        10 => (chat(json!({"messages": [{"role": "user", "content": "{{".repeat(5_000)}]})), long),
        11 => (chat(json!({"logit_bias": {"99999999999": 1}, "top_logprobs": 2_000})), long),
        12 => {
            let junk = (0..2_000).map(|_| noise.below(256) as u8).collect();
            (junk, short)
        }
        _ => (b"GET /health HTTP/1.1\r\nhost: x\r\nx: y\r\n\r\nGET".to_vec(), short),
    }
}

async fn honest(address: SocketAddr, seed: u32) {
    let mut body = completion(json!({"stream": true, "seed": seed, "prompt": "x".repeat(40)}));
    body["max_tokens"] = json!(TOKENS);
    let bytes = post(COMPLETION, body.to_string().as_bytes());
    // A full queue says so, and an honest client comes back.
    for _ in 0..200 {
        let text = exchange(address, &bytes, Duration::from_secs(60)).await;
        if text.starts_with("HTTP/1.1 429") || text.starts_with("HTTP/1.1 503") {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        assert!(text.contains("data: [DONE]"), "an honest request was lost: {text:?}");
        assert_eq!(text.matches("\"token_ids\"").count(), TOKENS);
        return;
    }
    panic!("an honest client was turned away 200 times");
}

/// What the clients have done so far, and whether they go on.
#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    served: AtomicUsize,
    attacked: AtomicUsize,
}

fn start_clients(address: SocketAddr) -> (JoinSet<()>, Arc<Counts>) {
    let (mut clients, counts) = (JoinSet::new(), Arc::new(Counts::default()));
    for client in 0..HONEST + HOSTILE {
        let counts = Arc::clone(&counts);
        clients.spawn(async move {
            let mut noise = Noise(client as u32 + 1);
            while !counts.stop.load(Ordering::Relaxed) {
                if client < HONEST {
                    honest(address, noise.next_u32()).await;
                    counts.served.fetch_add(1, Ordering::Relaxed);
                } else {
                    let (bytes, wait) = attack(&mut noise);
                    exchange(address, &bytes, wait).await;
                    counts.attacked.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    (clients, counts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn honest_clients_are_served_while_others_attack() {
    let site = site(Options { blocks: 512, sequences_max: 8, ..common::options() });
    let limits = HttpLimits {
        write_time: Duration::from_millis(500),
        header_time: Duration::from_millis(500),
        body_time: Duration::from_millis(500),
        ..HttpLimits::default()
    };
    site.state.set(Settings { limits, ..Settings::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, site.state.clone(), std::future::pending(), Duration::ZERO));

    let clock = Clock::system();
    let (mut clients, counts) = start_clients(address);
    let (total, mut early) = (soak_time(), 0);
    let mut probes = Vec::new();
    while clock.elapsed() < total {
        let begun = clock.elapsed();
        let probe = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let text = exchange(address, probe, Duration::from_secs(30)).await;
        assert!(text.starts_with("HTTP/1.1 200"), "{text:?}");
        probes.push(clock.elapsed() - begun);
        if early == 0 && clock.elapsed() > total / 3 {
            early = resident_bytes();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    counts.stop.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    let late = resident_bytes();
    probes.sort();
    let p99 = probes[probes.len() * 99 / 100];
    let load = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let (served, attacked) = (load(&counts.served), load(&counts.attacked));
    let (count, early_mib, late_mib) = (probes.len(), early >> 20, late >> 20);
    println!("{served} honest answers, {attacked} attacks, {count} probes, p99 {p99:?}");
    println!("resident memory {early_mib} to {late_mib} MiB");
    assert!(served > 0 && attacked > 0);
    assert!(p99 < PROBE_MAX, "/health takes {p99:?} at the 99th percentile");
    assert!(late < early + GROWTH_BYTES_MAX, "resident memory went from {early} to {late} bytes");
    for _ in 0..500 {
        let load = site.engine.stats().snapshot().load;
        if load.running + load.waiting + load.blocks_used + site.state.in_flight() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("something is left in the engine: {:?}", site.engine.stats().snapshot());
}
