//! Measures what HTTP costs: the same decode runs through streams of the server and without them.

use super::figures::Figures;
use super::load::{REPEATS, request};
use super::stats::{median, quantile};
use crate::clock::Clock;
use crate::engine::Engine;
use crate::intake::translate::Defaults;
use crate::models::{Identity, Model};
use crate::ops::lanes::Isa;
use crate::ops::pool::Pool;
use crate::server::listen;
use crate::server::registry::{ModelState, Registry, Served};
use crate::server::state::ServerState;
use anyhow::Context;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};

/// Tokens of each stream.
const TOKENS: usize = 128;

/// Serves `engine` on a free port of this machine, and adds for several batch sizes the tokens a
/// second over those without HTTP, and how much longer a rare gap between chunks is than a usual
/// one.
///
/// # Errors
/// When no port is free, or a stream or the engine fails.
pub(super) fn measure(
    engine: &Engine,
    model: &Arc<Model>,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime?;
    let address = start(&runtime, engine, model)?;
    for batch in [1, 16, 64] {
        let (mut ratios, mut tails) = (Vec::new(), Vec::new());
        for repeat in 0..REPEATS as u32 {
            let salt = 1_000 * (repeat + 1) + batch;
            let (seconds, gaps) = through_http(&runtime, address, batch, salt)?;
            ratios.push(alone(engine, batch, salt + 500)? / seconds);
            let (rare, usual) = (quantile(&gaps, 0.99), median(&gaps));
            tails.extend(rare.zip(usual).map(|(rare, usual)| rare / usual));
        }
        figures.push(format!("http_over_engine_b{batch}"), ratios);
        figures.push(format!("gap_p99_over_median_b{batch}"), tails);
    }
    Ok(())
}

fn start(runtime: &Runtime, engine: &Engine, model: &Arc<Model>) -> anyhow::Result<SocketAddr> {
    let registry = Registry::default();
    registry.announce(["m".to_owned()]);
    let pool = Pool::new(1, Isa::best())?;
    let identity = Identity::of(model, &pool)?;
    let identity = Arc::new(identity);
    let (engine, model) = (engine.clone(), Arc::clone(model));
    let served = Served { engine, model, fingerprint: "bench".into(), identity };
    registry.set("m", None, ModelState::Ready(Box::new(served)));
    let state = ServerState::new(registry, Defaults::default(), Clock::system());
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"));
    let listener = listener.context("no port is free")?;
    let address = listener.local_addr()?;
    let forever = std::future::pending::<()>();
    runtime.spawn(listen::serve(listener, state, forever, Default::default()));
    Ok(address)
}

/// Seconds for `batch` streams, and the sorted gaps between chunks of a stream.
fn through_http(
    runtime: &Runtime,
    address: SocketAddr,
    batch: u32,
    salt: u32,
) -> anyhow::Result<(f64, Vec<f64>)> {
    let bodies: Vec<String> = (0..batch).map(|i| body(salt * 100 + i)).collect();
    let started = Clock::system();
    let streams = bodies.into_iter().map(|b| runtime.spawn(stream(address, b, started.clone())));
    let mut gaps = Vec::new();
    for stream in streams.collect::<Vec<_>>() {
        let frames = runtime.block_on(stream)?;
        let frames = frames.context("a stream breaks")?;
        let (tokens, end) = frames.split_at(TOKENS.min(frames.len()));
        if end.len() != 1 {
            anyhow::bail!("{TOKENS} tokens and [DONE] make no {} frames", frames.len());
        }
        // [DONE] comes with the last token.
        gaps.extend(tokens.windows(2).map(|f| (f[1] - f[0]).as_secs_f64()));
    }
    let seconds = started.elapsed().as_secs_f64();
    gaps.sort_by(f64::total_cmp);
    Ok((seconds, gaps))
}

/// Seconds for the same without HTTP.
fn alone(engine: &Engine, batch: u32, salt: u32) -> anyhow::Result<f64> {
    let started = Clock::system();
    let running: Vec<_> =
        (0..batch).map(|i| engine.submit(request(16, TOKENS, salt * 100 + i))).collect();
    for generation in running {
        let generation = generation?;
        generation.collect_blocking()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

fn body(seed: u32) -> String {
    let prompt = request(16, 1, seed).prompt;
    format!(
        "{{\"model\":\"m\",\"prompt\":{prompt:?},\"max_tokens\":{TOKENS},\"ignore_eos\":true,\
         \"temperature\":0,\"stream\":true,\"logprobs\":1,\"return_tokens_as_token_ids\":true}}"
    )
}

/// Reads one stream to its end; returns when each of its frames came.
async fn stream(address: SocketAddr, body: String, clock: Clock) -> std::io::Result<Vec<Duration>> {
    let mut socket = TcpStream::connect(address).await?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(head.as_bytes()).await?;
    let (mut bytes, mut seen, mut frames) = (Vec::new(), 0, Vec::new());
    while socket.read_buf(&mut bytes).await? > 0 {
        // Only what is new is searched, and the end of what is old.
        let from = seen.max(6) - 6;
        let new = bytes[from..].windows(7).filter(|w| w == b"\ndata: ").count();
        frames.extend(std::iter::repeat_n(clock.elapsed(), new));
        seen = bytes.len();
    }
    Ok(frames)
}
