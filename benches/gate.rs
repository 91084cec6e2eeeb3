//! What the signed door adds to a request: the same answer with and without it, one after another
//! without a socket, then paced at 1,000 requests a second over sockets, with the client on the
//! same cores. `cargo bench --bench gate`.

#![allow(clippy::unwrap_used, reason = "a measurement may fail")]

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};
use targon_engine::chain::epistula::Envelope;
use targon_engine::chain::keys::{Hotkey, Keypair};
use targon_engine::chain::metagraph::{Hyperparameters, Metagraph, Neuron, Rao};
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::server::gate::{Gate, Policy, STAKE_MIN};
use targon_engine::server::listen::accept;
use targon_engine::server::registry::Registry;
use targon_engine::server::settings::Limits;
use targon_engine::server::state::ServerState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

const BODY_BYTES: usize = 1_500;
const RATE: u32 = 1_000;
const SECONDS: u32 = 6;
const CONNECTIONS: usize = 16;

fn key(seed: u8) -> Keypair {
    Keypair::from_seed(&[seed; 32]).unwrap()
}

fn apps() -> (Router, Router) {
    let member = Neuron {
        uid: 0,
        hotkey: key(1).hotkey(),
        coldkey: Hotkey([0; 32]),
        stake: STAKE_MIN,
        permit: true,
        axon: None,
        incentive: 0.0,
        consensus: 0.0,
        emission: Rao(0),
        last_update: 0,
    };
    let rate = NonZeroU32::new(1_000_000).unwrap();
    let policy = Policy { rate, ..Policy::default() };
    let gate = Gate::new(key(2).hotkey(), policy, Clock::system());
    gate.set_metagraph(Arc::new(Metagraph::new(4, 1, Hyperparameters::default(), vec![member])));
    let state = ServerState::new(Registry::default(), Defaults::default(), Clock::system());
    let state = state.behind(gate.clone());
    let open = targon_engine::server::router(state.clone());
    (targon_engine::server::subnet::router(state, gate), open)
}

/// Headers and body.
type Signed = (Vec<(String, String)>, Vec<u8>);

/// Heads and body of `count` requests to `path`, all signed beforehand.
fn requests(path: &str, count: usize) -> Vec<Signed> {
    let body = vec![b' '; BODY_BYTES];
    let signer = key(1);
    let one = |i: usize| {
        let uuid = format!("{path}-{i}-{}", Clock::system().unix_ms());
        let uuid = uuid.replace('/', "");
        let timestamp_ms = Clock::system().unix_ms();
        let signed_for = Some(key(2).hotkey());
        let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for };
        let headers = envelope.sign(&signer, &body);
        let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value));
        (headers.collect(), body.clone())
    };
    (0..count).map(one).collect()
}

/// A route that does next to nothing in both routers: a completion without a model is refused.
const ROUTE: &str = "/v1/completions";

async fn without_sockets(app: &Router, count: usize) -> Duration {
    let made = requests(ROUTE, count).into_iter().map(|(headers, body)| {
        let mut request = Request::post(ROUTE);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        request.body(Body::from(body)).unwrap()
    });
    let made: Vec<_> = made.collect();
    let started = Instant::now();
    for request in made {
        let response = app.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 400);
        axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
    }
    started.elapsed() / count as u32
}

async fn answer(socket: &mut TcpStream, bytes: &[u8]) -> Duration {
    let started = Instant::now();
    socket.write_all(bytes).await.unwrap();
    let mut text = Vec::new();
    let mut part = [0; 4096];
    loop {
        let read = socket.read(&mut part).await.unwrap();
        assert!(read > 0, "the server closed: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&part[..read]);
        let whole = String::from_utf8_lossy(&text);
        let Some((head, body)) = whole.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap();
        if body.len() >= length.parse().unwrap() {
            assert!(head.starts_with("HTTP/1.1 400"), "{head}");
            return started.elapsed();
        }
    }
}

/// Latencies at [`RATE`] over [`CONNECTIONS`] sockets.
async fn paced(app: Router) -> Vec<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = std::future::pending();
    let server = tokio::spawn(async move { accept(listener, app, Limits::default, stop).await });
    let count = (RATE * SECONDS) as usize;
    let made: Vec<Vec<u8>> = requests(ROUTE, count)
        .into_iter()
        .map(|(headers, body)| {
            let mut head = format!("POST {ROUTE} HTTP/1.1\r\nhost: x\r\n");
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
            [head.into_bytes(), body].concat()
        })
        .collect();
    let started = tokio::time::Instant::now();
    let clients = (0..CONNECTIONS).map(|first| {
        let mine: Vec<_> =
            made.iter().cloned().enumerate().skip(first).step_by(CONNECTIONS).collect();
        tokio::spawn(async move {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.set_nodelay(true).unwrap();
            let mut all = Vec::new();
            for (place, bytes) in mine {
                let due = started + Duration::from_secs_f64(place as f64 / f64::from(RATE));
                tokio::time::sleep_until(due).await;
                all.push(answer(&mut socket, &bytes).await);
            }
            all
        })
    });
    let clients: Vec<_> = clients.collect();
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.await.unwrap());
    }
    server.abort();
    all.sort();
    all
}

fn main() {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build().unwrap();
    let (signed, open) = apps();
    runtime.block_on(async {
        without_sockets(&open, 500).await;
        without_sockets(&signed, 500).await;
        let (without, with) =
            (without_sockets(&open, 3000).await, without_sockets(&signed, 3000).await);
        println!("one after another, {BODY_BYTES} bytes: {without:?} without the door, {with:?}");
        println!("  with it: it adds {:?} a request", with.saturating_sub(without));
        let (without, with) = (paced(open).await, paced(signed).await);
        let at = |all: &[Duration], share: f64| all[(share * (all.len() - 1) as f64) as usize];
        println!("{RATE} requests/s for {SECONDS} s over {CONNECTIONS} sockets:");
        for (name, share) in [("median", 0.5), ("p90", 0.9), ("p99", 0.99)] {
            let (a, b) = (at(&without, share), at(&with, share));
            println!("  {name:<6} {a:?} without, {b:?} with: +{:?}", b.saturating_sub(a));
        }
    });
}
