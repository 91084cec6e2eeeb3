//! Ten thousand signed requests over sockets, one in a hundred each a replay, stale, from the
//! future or forged: every bad one is refused with its status and words, every good one is served.

use crate::common;
use crate::common::Noise;
use serde_json::Value;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use targon_engine::chain::epistula::Envelope;
use targon_engine::chain::keys::Keypair;
use targon_engine::chain::metagraph::{Hyperparameters, Metagraph, Neuron};
use targon_engine::clock::Clock;
use targon_engine::intake::translate::Defaults;
use targon_engine::server::door::{Gate, Policy, STAKE_MIN, SignedOutcome};
use targon_engine::server::listen::accept;
use targon_engine::server::registry::{ModelState, Registry};
use targon_engine::server::settings::HttpLimits;
use targon_engine::server::state::ServerState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const REQUESTS: usize = 10_000;
const CLIENTS: usize = 16;
const BODY: &str = "{\"model\":\"tiny\",\"prompt\":\"ab\",\"max_tokens\":1,\"temperature\":0}";

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Good,
    Replay,
    Stale,
    Future,
    Forged,
}

impl Kind {
    fn want(self) -> (u16, &'static str) {
        match self {
            Kind::Good => (200, ""),
            Kind::Replay => (400, "Request was received already"),
            Kind::Stale => (400, "Request is too stale"),
            Kind::Future => (400, "Request is dated too far in the future"),
            Kind::Forged => (400, "Signature Mismatch"),
        }
    }
}

fn key(seed: usize) -> Keypair {
    Keypair::from_seed(&[seed as u8; 32]).unwrap()
}

fn miner() -> (axum::Router, Gate) {
    let served = common::tiny_served(3, common::options());
    let registry = Registry::default();
    registry.announce(["tiny".to_owned()]);
    registry.set("tiny", None, ModelState::Ready(Box::new(served)));
    let rate = NonZeroU32::new(100_000).unwrap();
    let policy = Policy { rate, slots: 16, waiting_max: 64, ..Policy::default() };
    let gate = Gate::new(key(99).hotkey(), policy, Clock::system());
    let member = |uid: usize| Neuron::new(uid as u16, key(uid + 1).hotkey(), STAKE_MIN);
    let members = (0..CLIENTS).map(member).collect();
    gate.set_metagraph(Arc::new(Metagraph::new(4, 1, Hyperparameters::default(), members)));
    let state = ServerState::new(registry, Defaults::default(), Clock::system());
    let state = state.behind(gate.clone());
    (targon_engine::server::subnet::router(state, gate.clone()), gate)
}

fn signed(signer: &Keypair, kind: Kind, number: usize) -> Vec<u8> {
    let uuid = format!("{}-{number}", signer.hotkey());
    let now = Clock::system().unix_ms();
    let timestamp_ms = match kind {
        Kind::Stale => now - 9_000,
        Kind::Future => now + 60_000,
        _ => now,
    };
    let signed_for = Some(key(99).hotkey());
    let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for };
    let signed_body = if kind == Kind::Forged { "another" } else { BODY };
    let mut head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n".to_owned();
    for (name, value) in envelope.sign(signer, signed_body.as_bytes()) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    format!("{head}content-length: {}\r\n\r\n{BODY}", BODY.len()).into_bytes()
}

async fn answer(socket: &mut TcpStream, bytes: &[u8]) -> (u16, Value) {
    socket.write_all(bytes).await.unwrap();
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let read = socket.read(&mut part).await.unwrap();
        assert!(read > 0, "the server closed: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&part[..read]);
        let whole = String::from_utf8_lossy(&text);
        let Some((head, body)) = whole.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap();
        if body.len() >= length.parse().unwrap() {
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            return (status, serde_json::from_str(body).unwrap());
        }
    }
}

async fn client(address: std::net::SocketAddr, place: usize) -> BTreeMap<Kind, usize> {
    let signer = key(place + 1);
    let mut noise = Noise(place as u32 + 7);
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let (mut counts, mut last) = (BTreeMap::new(), None);
    for number in 0..REQUESTS / CLIENTS {
        let kind = match noise.below(100) {
            0 if last.is_some() => Kind::Replay,
            1 => Kind::Stale,
            2 => Kind::Future,
            3 => Kind::Forged,
            _ => Kind::Good,
        };
        let bytes = match (&last, kind) {
            (Some(last), Kind::Replay) => Vec::clone(last),
            _ => signed(&signer, kind, number),
        };
        let (status, body) = answer(&mut socket, &bytes).await;
        let (want, detail) = kind.want();
        assert_eq!(status, want, "{kind:?}: {body}");
        match kind {
            Kind::Good => {
                assert_eq!(body["usage"]["completion_tokens"], 1, "{body}");
                last = Some(bytes);
            }
            _ => assert_eq!(body["detail"], detail, "{kind:?}"),
        }
        *counts.entry(kind).or_insert(0) += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_signed_requests() {
    let (app, gate) = miner();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let never = std::future::pending();
    let server =
        tokio::spawn(async move { accept(listener, app, HttpLimits::default, never).await });
    let started = std::time::Instant::now();
    let clients: Vec<_> = (0..CLIENTS).map(|c| tokio::spawn(client(address, c))).collect();
    let mut counts = BTreeMap::new();
    for task in clients {
        for (kind, count) in task.await.unwrap() {
            *counts.entry(kind).or_insert(0) += count;
        }
    }
    server.abort();
    println!("{counts:?} in {:?}", started.elapsed());
    assert_eq!(counts.values().sum::<usize>(), REQUESTS);
    for kind in [Kind::Replay, Kind::Stale, Kind::Future, Kind::Forged] {
        assert!(counts[&kind] > REQUESTS / 200, "{kind:?}: {counts:?}");
    }
    for (kind, outcome) in [
        (Kind::Good, SignedOutcome::Accepted),
        (Kind::Replay, SignedOutcome::Replayed),
        (Kind::Forged, SignedOutcome::BadSignature),
    ] {
        assert_eq!(gate.counted(outcome), counts[&kind] as u64, "{kind:?}");
    }
    assert_eq!(
        gate.counted(SignedOutcome::Stale) as usize,
        counts[&Kind::Stale] + counts[&Kind::Future]
    );
}
