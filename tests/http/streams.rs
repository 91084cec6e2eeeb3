//! Many streams at once: how far the times of a validator's reads are from when miners wrote.

use serde_json::{Value, json};
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::validator::query::{Size, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;

const MINERS: usize = 256;
const TOKENS: usize = 120;
const TOKEN_EVERY: Duration = Duration::from_millis(25);
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";

/// Writes a token every 25 ms, each with the time at which it is written.
async fn mine(mut stream: TcpStream, clock: Clock) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; 8192];
    let _ = stream.read(&mut request).await?;
    stream.write_all(HEAD.as_bytes()).await?;
    for _ in 0..TOKENS {
        tokio::time::sleep(TOKEN_EVERY).await;
        let at = clock.elapsed().as_nanos() as u64;
        let chunk = json!({"choices": [{"text": "x", "token_ids": [5], "powv": 77,
            "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [-0.5]}}], "at": at});
        stream.write_all(format!("data: {chunk}\n\n").as_bytes()).await?;
    }
    stream.write_all(b"data: [DONE]\n\n").await
}

/// One address for all miners, on a thread of its own.
fn miners(clock: Clock) -> std::net::SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(mine(stream, clock.clone()));
            }
        });
    });
    receiver.recv().unwrap()
}

async fn errors(address: std::net::SocketAddr, clock: Clock) -> Vec<f64> {
    let target = Target {
        url: format!("http://{address}"),
        hotkey: None,
        signer: None,
        api_key: None,
        read_timeout: Duration::from_secs(5),
        timeout: Duration::from_secs(60),
        size: Size::of_tokens(TOKENS as u32),
    };
    let body = json!({"model": "m", "stream": true});
    // Making a client takes milliseconds, which the arrivals' times do not count.
    target.client().unwrap();
    let started = clock.elapsed();
    let streamed = target.stream("/v1/completions", &body, &clock, |_| {}).await;
    streamed.outcome.unwrap();
    let error = |chunk: &Value, at: Duration| {
        let wrote = Duration::from_nanos(chunk["at"].as_u64().unwrap());
        (started + at).as_secs_f64() - wrote.as_secs_f64()
    };
    streamed.arrivals.iter().map(|arrival| error(&arrival.chunk, arrival.at) * 1e3).collect()
}

/// `cargo nextest run --release --test http --run-ignored only --no-capture streams`, on a machine
/// that does nothing else.
#[test]
#[ignore = "a measurement: it wants the machine for itself"]
fn times_of_256_streams_are_within_5_ms() {
    let clock = Clock::system();
    let address = miners(clock.clone());
    // As many workers as `validate` has on two cores.
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut all: Vec<f64> = runtime.block_on(async {
        let asked = (0..MINERS).map(|_| tokio::spawn(errors(address, clock.clone())));
        let asked: Vec<_> = asked.collect();
        let mut all = Vec::new();
        for one in asked {
            all.extend(one.await.unwrap());
        }
        all
    });
    assert_eq!(all.len(), MINERS * TOKENS);
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    println!(
        "{MINERS} streams of {TOKENS} tokens: error p50 {:.3} ms, p99 {:.3} ms, max {:.3} ms",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    assert!(at(0.0) > -1.0, "read {:.3} ms before it was written", -at(0.0));
    assert!(at(0.99) < 5.0);
}
