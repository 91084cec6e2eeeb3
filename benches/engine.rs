//! The engine on a real model, as llama-bench and llama-batched-bench measure: prefill of 512,
//! decode at several batch sizes, memory and load time; then the same through HTTP.
//!
//! `cargo bench --bench engine -- MODEL [--json]`, on an otherwise idle machine;
//! `scripts/bench-peers` puts the figures beside llama.cpp's.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use targon_engine::clock::Clock;
use targon_engine::engine::output::Event;
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::intake::translate::Defaults;
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{Registry, Served, State};
use targon_engine::server::state::ServerState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const REPEATS: usize = 6;
const OPTIONS: Options = Options {
    context_max: 2048,
    blocks: 256,
    sequences_max: 64,
    waiting_max: 64,
    step_tokens_max: 512,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let path = arguments.iter().find(|a| !a.starts_with("--"));
    let path = Path::new(path.expect("usage: cargo bench --bench engine -- MODEL [--json]"));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(threads, Isa::best()).expect("threads start");
    let started = Instant::now();
    let model = Model::load(path, None, &pool, |_, _| {}).expect("the model loads");
    let weights = model.decoder.weights.bytes();
    let engine = Engine::start(model, pool, OPTIONS, Clock::system()).expect("the engine starts");
    let mut rows = vec![("load_seconds".to_owned(), vec![started.elapsed().as_secs_f64()])];
    measure(&engine, &mut rows);
    let peak = peak_resident_bytes() as f64;
    let kv = engine.options().blocks * engine.model().decoder.spec.kv_dims().block_bytes();
    rows.push(("weights_bytes".into(), vec![weights as f64]));
    rows.push(("kv_bytes".into(), vec![kv as f64]));
    rows.push(("peak_resident_bytes".into(), vec![peak]));
    http(&engine, &mut rows);
    let is_json = arguments.iter().any(|a| a == "--json");
    print(&rows, is_json);
}

type Rows = Vec<(String, Vec<f64>)>;

fn measure(engine: &Engine, rows: &mut Rows) {
    generate(engine, 1, 32, 16, 0); // warm-up
    let mut salt = 1;
    let mut repeat = |name: &str, f: &dyn Fn(u32) -> f64| {
        let values = (0..REPEATS).map(|_| {
            salt += 1;
            f(salt)
        });
        rows.push((name.to_owned(), values.collect()));
    };
    repeat("pp512", &|salt| generate(engine, 1, 512, 1, salt).prefill);
    repeat("tg128", &|salt| generate(engine, 1, 1, 128, salt).decode);
    for batch in [4, 8, 16] {
        let name = format!("tg64_b{batch}");
        repeat(&name, &|salt| generate(engine, batch, 16, 64, salt).decode);
    }
}

/// Tokens a second.
struct Speed {
    prefill: f64,
    decode: f64,
}

/// Runs `batch` sequences side by side; every prompt is new, so nothing is cached.
fn generate(engine: &Engine, batch: usize, prompt: usize, output: usize, salt: u32) -> Speed {
    let requests = (0..batch).map(|i| request(prompt, output, salt * 100 + i as u32));
    let started = Instant::now();
    let mut running: Vec<_> =
        requests.map(|r| engine.submit(r).expect("the request is accepted")).collect();
    let mut first = 0.0_f64;
    for generation in &mut running {
        let event = generation.next_blocking();
        assert!(matches!(event, Some(Event::Step(_))), "{event:?}");
        first = first.max(started.elapsed().as_secs_f64());
    }
    for generation in running {
        generation.collect_blocking().expect("the engine works");
    }
    let decode = started.elapsed().as_secs_f64() - first;
    Speed {
        prefill: (batch * prompt) as f64 / first,
        decode: (batch * (output - 1)) as f64 / decode,
    }
}

fn request(prompt: usize, output: usize, seed: u32) -> Request {
    let ids = (0..prompt as u32).map(|i| 100 + (i * 7919 + seed * 104_729) % 40_000).collect();
    let mut request = Request::greedy(ids, output);
    request.stop.ignore_eos = true;
    request
}

/// The same decode through HTTP streams and without: what the server costs.
fn http(engine: &Engine, rows: &mut Rows) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("the runtime starts");
    let registry = Registry::default();
    registry.announce(["m".to_owned()]);
    let pool = Pool::new(1, Isa::best()).expect("threads start");
    let identity = Identity::of(engine.model(), &pool).expect("the identity is computed");
    let identity = Arc::new(identity);
    let served = Served { engine: engine.clone(), fingerprint: "bench".into(), identity };
    registry.set("m", None, State::Ready(Box::new(served)));
    let state = ServerState::new(registry, Defaults::default(), Clock::system());
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
    let listener = listener.expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    let forever = std::future::pending::<()>();
    runtime.spawn(targon_engine::server::listen::serve(
        listener,
        state,
        forever,
        Default::default(),
    ));
    for batch in [1, 16, 64] {
        let (mut ratios, mut tails) = (Vec::new(), Vec::new());
        for repeat in 0..REPEATS as u32 {
            let salt = 1_000 * (repeat + 1) + batch;
            let (seconds, gaps) = through_http(&runtime, address, batch, salt);
            ratios.push(alone(engine, batch, salt + 500) / seconds);
            tails.push(gaps[gaps.len() * 99 / 100] / gaps[gaps.len() / 2]);
        }
        rows.push((format!("http_over_engine_b{batch}"), ratios));
        rows.push((format!("gap_p99_over_median_b{batch}"), tails));
    }
}

/// Seconds for `batch` streams of 128 tokens, and the sorted gaps between chunks of a stream.
fn through_http(
    runtime: &tokio::runtime::Runtime,
    address: std::net::SocketAddr,
    batch: u32,
    salt: u32,
) -> (f64, Vec<f64>) {
    let bodies: Vec<String> = (0..batch).map(|i| body(salt * 100 + i)).collect();
    let started = Instant::now();
    let streams = bodies.into_iter().map(|b| runtime.spawn(stream(address, b)));
    let mut gaps = Vec::new();
    for stream in streams.collect::<Vec<_>>() {
        let frames = runtime.block_on(stream).expect("no panic").expect("the stream ends");
        assert_eq!(frames.len(), 128 + 1, "tokens and [DONE]");
        // [DONE] comes with the last token.
        gaps.extend(frames[..128].windows(2).map(|f| (f[1] - f[0]).as_secs_f64()));
    }
    let seconds = started.elapsed().as_secs_f64();
    gaps.sort_by(f64::total_cmp);
    (seconds, gaps)
}

/// Seconds for the same without HTTP.
fn alone(engine: &Engine, batch: u32, salt: u32) -> f64 {
    let started = Instant::now();
    let running: Vec<_> =
        (0..batch).map(|i| engine.submit(request(16, 128, salt * 100 + i))).collect();
    for generation in running {
        generation.expect("accepted").collect_blocking().expect("the engine works");
    }
    started.elapsed().as_secs_f64()
}

fn body(seed: u32) -> String {
    let prompt = request(16, 1, seed).prompt;
    format!(
        "{{\"model\":\"m\",\"prompt\":{prompt:?},\"max_tokens\":128,\"ignore_eos\":true,\
         \"temperature\":0,\"stream\":true,\"logprobs\":1,\"return_tokens_as_token_ids\":true}}"
    )
}

/// Reads one stream to its end; returns when each of its frames came.
async fn stream(address: std::net::SocketAddr, body: String) -> std::io::Result<Vec<Instant>> {
    let mut socket = tokio::net::TcpStream::connect(address).await?;
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
        frames.extend(std::iter::repeat_n(Instant::now(), new));
        seen = bytes.len();
    }
    Ok(frames)
}

fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The median, which a noisy neighbour moves least.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

fn print(rows: &Rows, is_json: bool) {
    if is_json {
        let medians: serde_json::Map<String, serde_json::Value> =
            rows.iter().map(|(name, values)| (name.clone(), median(values).into())).collect();
        println!("{}", serde_json::Value::Object(medians));
        return;
    }
    for (name, values) in rows {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        println!("{name:24} {:14.3}   {least:.3} to {most:.3}", median(values));
    }
}
