//! Measures what the checks of signed requests add to a request: the same answer with and without
//! them, first one after another without a socket, then at 1,000 requests a second over sockets,
//! with the client on the same cores.

use super::host::Say;
use crate::chain::epistula::Envelope;
use crate::chain::keys::Keypair;
use crate::chain::metagraph::{Hyperparameters, Metagraph, Neuron};
use crate::clock::Clock;
use crate::intake::translate::Defaults;
use crate::server::door::{Gate, Policy, STAKE_MIN};
use crate::server::listen::accept;
use crate::server::registry::Registry;
use crate::server::settings::HttpLimits;
use crate::server::state::ServerState;
use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

const BODY_BYTES: usize = 1_500;
const RATE: u32 = 1_000;
const SECONDS: u32 = 6;
const CONNECTIONS: usize = 16;

fn key(seed: u8) -> anyhow::Result<Keypair> {
    Keypair::from_seed(&[seed; 32]).map_err(anyhow::Error::msg)
}

/// The same routes with the checks and without.
fn apps() -> anyhow::Result<(Router, Router)> {
    let member = Neuron::new(0, key(1)?.hotkey(), STAKE_MIN);
    let rate = NonZeroU32::new(1_000_000).context("the rate is zero")?;
    let policy = Policy { rate, ..Policy::default() };
    let gate = Gate::new(key(2)?.hotkey(), policy, Clock::system());
    gate.set_metagraph(Arc::new(Metagraph::new(4, 1, Hyperparameters::default(), vec![member])));
    let state = ServerState::new(Registry::default(), Defaults::default(), Clock::system());
    let state = state.behind(gate.clone());
    let open = crate::server::router(state.clone());
    Ok((crate::server::subnet::router(state, gate), open))
}

/// Headers and body.
type Signed = (Vec<(String, String)>, Vec<u8>);

/// Heads and body of `count` requests to `path`, all signed beforehand.
fn requests(path: &str, count: usize) -> anyhow::Result<Vec<Signed>> {
    let body = vec![b' '; BODY_BYTES];
    let (signer, miner) = (key(1)?, key(2)?.hotkey());
    let one = |i: usize| {
        let uuid = format!("{path}-{i}-{}", Clock::system().unix_ms());
        let uuid = uuid.replace('/', "");
        let timestamp_ms = Clock::system().unix_ms();
        let signed_for = Some(miner);
        let envelope = Envelope { timestamp_ms, uuid: &uuid, signed_for };
        let headers = envelope.sign(&signer, &body);
        let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value));
        (headers.collect(), body.clone())
    };
    Ok((0..count).map(one).collect())
}

/// A route that does next to nothing in both routers: a completion without a model is refused.
const ROUTE: &str = "/v1/completions";

/// Time of one request where one follows another.
async fn without_sockets(app: &Router, count: usize) -> anyhow::Result<Duration> {
    let made = requests(ROUTE, count)?.into_iter().map(|(headers, body)| {
        let mut request = Request::post(ROUTE);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        request.body(Body::from(body))
    });
    let made = made.collect::<Result<Vec<_>, _>>()?;
    let started = Clock::system();
    for request in made {
        let response = app.clone().oneshot(request).await?;
        anyhow::ensure!(response.status() == 400, "{}, not 400", response.status());
        axum::body::to_bytes(response.into_body(), 1 << 16).await?;
    }
    Ok(started.elapsed() / count as u32)
}

/// Sends a request and reads its answer; returns how long that took.
async fn answer(socket: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<Duration> {
    let started = Clock::system();
    socket.write_all(bytes).await?;
    let mut text = Vec::new();
    let mut part = [0; 4096];
    loop {
        let read = socket.read(&mut part).await?;
        anyhow::ensure!(read > 0, "the server closed: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&part[..read]);
        let whole = String::from_utf8_lossy(&text);
        let Some((head, body)) = whole.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
        if body.len() >= length.context("no length")?.parse()? {
            anyhow::ensure!(head.starts_with("HTTP/1.1 400"), "{head}");
            return Ok(started.elapsed());
        }
    }
}

/// Latencies at [`RATE`] over [`CONNECTIONS`] sockets.
async fn paced(app: Router) -> anyhow::Result<Vec<Duration>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let stop = std::future::pending();
    let server =
        tokio::spawn(async move { accept(listener, app, HttpLimits::default, stop).await });
    let count = (RATE * SECONDS) as usize;
    let made: Vec<Vec<u8>> = requests(ROUTE, count)?
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
    let started = Clock::system();
    let clients = (0..CONNECTIONS).map(|first| {
        let started = started.clone();
        let mine: Vec<_> =
            made.iter().cloned().enumerate().skip(first).step_by(CONNECTIONS).collect();
        tokio::spawn(async move {
            let mut socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            let mut all = Vec::new();
            for (place, bytes) in mine {
                let due = Duration::from_secs_f64(place as f64 / f64::from(RATE));
                tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
                all.push(answer(&mut socket, &bytes).await?);
            }
            anyhow::Ok(all)
        })
    });
    let clients: Vec<_> = clients.collect();
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.await??);
    }
    server.abort();
    all.sort();
    Ok(all)
}

/// Measures the checks, on an otherwise idle machine.
///
/// # Errors
/// When no port is free, or a request is not answered as it should be.
pub fn run(say: Say<'_>) -> anyhow::Result<()> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build()?;
    let (signed, open) = apps()?;
    runtime.block_on(async {
        without_sockets(&open, 500).await?;
        without_sockets(&signed, 500).await?;
        let without = without_sockets(&open, 3000).await?;
        let with = without_sockets(&signed, 3000).await?;
        say(format!(
            "one after another, {BODY_BYTES} bytes: {without:?} without the door, {with:?}"
        ));
        say(format!("  with it: it adds {:?} a request", with.saturating_sub(without)));
        let (without, with) = (paced(open).await?, paced(signed).await?);
        let at = |all: &[Duration], share: f64| all[(share * (all.len() - 1) as f64) as usize];
        say(format!("{RATE} requests/s for {SECONDS} s over {CONNECTIONS} sockets:"));
        for (name, share) in [("median", 0.5), ("p90", 0.9), ("p99", 0.99)] {
            let (a, b) = (at(&without, share), at(&with, share));
            say(format!("  {name:<6} {a:?} without, {b:?} with: +{:?}", b.saturating_sub(a)));
        }
        Ok(())
    })
}
