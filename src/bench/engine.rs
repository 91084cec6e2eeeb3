//! Measures the engine on a real model, as llama-bench and llama-batched-bench do: prefill of 512,
//! decode at several batch sizes, memory and load time. Then it measures what those do not:
//! scoring, the first token of a short prompt, a long context, the ceilings of the machine, and
//! streams through HTTP (`serve`).

use super::arguments::BenchArgs;
use super::ceilings::{dot_peak, fma_peak, read_bandwidth, tile_peak};
use super::figures::Figures;
use super::load::{REPEATS, request};
use super::{host, runs, serve};
use crate::clock::Clock;
use crate::engine::request::Request;
use crate::engine::{Engine, Options};
use crate::models::Model;
use crate::models::device::Device;
use std::path::Path;
use std::sync::Arc;

/// Requests at once that begin with one system prompt, its tokens, and those of each alone.
const SHARING: usize = 64;
const SYSTEM: usize = 1000;
const QUESTION: usize = 24;
/// Tokens before the decode of a long context.
const LONG: usize = 8000;
const OPTIONS: Options = Options {
    context_max: 8192,
    blocks: 256 + 8192 / 32,
    sequences_max: 64,
    waiting_max: 64,
    step_tokens_max: 512,
    drafts_max: 0,
};

/// What `cargo bench --bench engine` prints: the figures, as JSON where the arguments ask for it.
///
/// # Errors
/// An argument that cannot be read, and as for [`run`].
pub fn run_by(mut args: BenchArgs) -> anyhow::Result<String> {
    let device: Option<Device> = args.value("--device")?;
    let path = host::model_or_fetched(args.word())?;
    let extent = if args.has("--short") { Extent::Short } else { Extent::Whole };
    let figures = run(device.unwrap_or_default(), &path, extent)?;
    Ok(if args.has("--json") { figures.json().to_string() } else { figures.to_string() })
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Everything.
    Whole,
    /// Without what takes hours on a large model and few cores: long contexts, shared prompts and
    /// HTTP.
    Short,
}

/// Measures the model at `path` on a device of an otherwise idle machine: tokens a second, seconds
/// and bytes.
///
/// # Errors
/// When the model cannot be loaded, or the engine or its server fails.
pub fn run(device: Device, path: &Path, extent: Extent) -> anyhow::Result<Figures> {
    let pool = host::pool()?;
    let mut figures = Figures::default();
    figures.push("read_gb_per_second", vec![read_bandwidth(&pool.turn())? / 1e9]);
    figures.push("fma_gflop_per_second", vec![fma_peak(&pool.turn()) / 1e9]);
    if let Some(peak) = dot_peak(&pool.turn()) {
        figures.push("dot_gflop_per_second", vec![peak / 1e9]);
    }
    if let Some(peak) = tile_peak(&pool.turn()) {
        figures.push("amx_gflop_per_second", vec![peak / 1e9]);
    }
    let started = Clock::system();
    let model = Arc::new(Model::load_on(device, path, None, &pool, |_, _| {})?);
    let weights = model.weights.bytes();
    let engine = Engine::start(Arc::clone(&model), pool, OPTIONS, Clock::system())?;
    figures.push("load_seconds", vec![started.elapsed().as_secs_f64()]);
    measure(&engine, extent, &mut figures)?;
    let peak = host::resident_bytes("VmHWM:")?;
    let kv = engine.options().blocks * engine.info().spec.kv_dims().block_bytes();
    figures.push("weights_bytes", vec![weights as f64]);
    figures.push("kv_bytes", vec![kv as f64]);
    figures.push("peak_resident_bytes", vec![peak]);
    if extent == Extent::Whole {
        serve::measure(&engine, &model, &mut figures)?;
    }
    Ok(figures)
}

fn measure(engine: &Engine, extent: Extent, figures: &mut Figures) -> anyhow::Result<()> {
    decode(engine, 1, (32, 16), 0)?; // warm-up
    let mut salt = 1;
    let mut repeat = |name: &str, f: &dyn Fn(u32) -> anyhow::Result<f64>| {
        let values = (0..REPEATS).map(|_| {
            salt += 1;
            f(salt)
        });
        figures.push(name, values.collect::<Result<_, _>>()?);
        anyhow::Ok(())
    };
    repeat("pp512", &|salt| prefill(engine, 1, 512, salt))?;
    repeat("tg128", &|salt| decode(engine, 1, (1, 128), salt))?;
    for batch in [4, 8, 16, 64] {
        let name = format!("tg64_b{batch}");
        repeat(&name, &|salt| decode(engine, batch, (16, 64), salt))?;
    }
    repeat("pp512_scored", &|salt| score(engine, 512, salt))?;
    repeat("ttft32_seconds", &|salt| Ok(32.0 / prefill(engine, 1, 32, salt)?))?;
    if extent == Extent::Short {
        return Ok(());
    }
    repeat("system1000_b64_seconds", &|salt| system_prompt(engine, salt, |_| 0))?;
    if engine.info().spec.context >= OPTIONS.context_max {
        repeat("tg64_at_8000", &|salt| decode(engine, 1, (LONG, 64), salt))?;
    }
    // Once: it computes every prompt whole, which takes minutes on few cores.
    let apart = system_prompt(engine, salt + 1, |i| 1 + i)?;
    figures.push("system1000_b64_apart_seconds", vec![apart]);
    Ok(())
}

/// Prompt tokens a second when each is scored as a verifier does: its log-probability, its rank and
/// the six most probable ones.
fn score(engine: &Engine, prompt: usize, salt: u32) -> anyhow::Result<f64> {
    let request = Request { prompt_logprobs: Some(6), ..request(prompt, 0, salt * 100) };
    let started = Clock::system();
    engine.submit(request)?.collect_blocking()?;
    Ok(prompt as f64 / started.elapsed().as_secs_f64())
}

/// Seconds that requests at once with one system prompt take to their ends, of 16 tokens each.
/// Requests of different salts share no prefix.
fn system_prompt(engine: &Engine, seed: u32, salt: impl Fn(u64) -> u64) -> anyhow::Result<f64> {
    let system = request(SYSTEM, 0, seed * 100).prompt;
    let question = |i: u32| {
        let own = request(QUESTION, 16, seed * 100 + 1 + i);
        let prompt = [system.as_slice(), &own.prompt].concat();
        Request { prompt, cache_salt: salt(u64::from(i)), ..own }
    };
    let started = Clock::system();
    let running = (0..SHARING as u32).map(|i| engine.submit(question(i)));
    for generation in running.collect::<Result<Vec<_>, _>>()? {
        generation.collect_blocking()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Tokens a second of `batch` prompts that no other run has, until each has its first token.
fn prefill(engine: &Engine, batch: usize, prompt: usize, salt: u32) -> anyhow::Result<f64> {
    let requests = (0..batch).map(|i| request(prompt, 1, salt * 100 + i as u32)).collect();
    Ok(runs::prefill(engine, None, requests)?.rate())
}

/// Tokens a second of `batch` sequences that decode side by side.
fn decode(
    engine: &Engine,
    batch: usize,
    (prompt, tokens): (usize, usize),
    salt: u32,
) -> anyhow::Result<f64> {
    let request = |i: usize, tokens: usize| request(prompt, tokens, salt * 100 + i as u32);
    Ok(runs::decode(engine, None, (batch, tokens), &request)?.rate())
}
