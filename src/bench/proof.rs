//! Measures what proofs cost: microseconds a row for each part and scheme, their share of a decode
//! step, and bytes a token.

use super::host::{self, Say};
use crate::clock::Clock;
use crate::engine::request::{ProofOptions, Request};
use crate::engine::{Engine, Options};
use crate::models::{Identity, Model};
use crate::proof::commit::{ChunkChain, RowProver};
use crate::proof::residue::{ResidueBits, exact_hash, sketch};
use crate::proof::toploc::{Proof, TOP_K};
use crate::proof::{CHUNK_ROWS, Scheme};
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

/// Measures the model at `path`, on an otherwise idle machine.
///
/// # Errors
/// When the model cannot be loaded or its engine fails.
pub fn run(path: &Path, say: Say<'_>) -> anyhow::Result<()> {
    let pool = host::pool()?;
    let threads = pool.threads();
    let model = Model::load(path, None, &pool, |_, _| {})?;
    let identity = Identity::of(&model, &pool)?;
    let row = parts(say, &model, &identity)?;
    let options = Options {
        context_max: 1024,
        blocks: 512,
        sequences_max: 16,
        waiting_max: 16,
        step_tokens_max: 512,
        drafts_max: 0,
    };
    let engine = Engine::start(model, pool, options, Clock::system())?;
    for batch in [1, 16] {
        say(share(&engine, &identity, batch, row * batch as f64 / threads as f64)?);
    }
    Ok(())
}

/// Microseconds of the fastest of several runs of `count` calls, for one call.
fn micros(count: usize, mut f: impl FnMut(usize)) -> f64 {
    let once = |f: &mut dyn FnMut(usize)| {
        let started = Clock::system();
        (0..count).for_each(&mut *f);
        started.elapsed().as_secs_f64()
    };
    (0..7).map(|_| once(&mut f)).fold(f64::INFINITY, f64::min) / count as f64 * 1e6
}

/// Tells the parts; returns the microseconds of a residue-v1 row.
fn parts(say: Say<'_>, model: &Model, identity: &Identity) -> anyhow::Result<f64> {
    let channels = model.spec.hidden;
    let rows = 512;
    let bits: Vec<u16> = (0..rows * channels).map(|i| (0x3e00 + i * 7919 % 700) as u16).collect();
    let values: Vec<f32> = bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect();
    let calibration = &identity.calibration;
    let of = |r: usize| r * channels..(r + 1) * channels;
    let u8_sketch = micros(rows, |r| {
        black_box(sketch(calibration, ResidueBits::U8, 7, r as u32, &values[of(r)]));
    });
    let u4_sketch = micros(rows, |r| {
        black_box(sketch(calibration, ResidueBits::U4, 7, r as u32, &values[of(r)]));
    });
    let hash = micros(rows, |r| {
        black_box(exact_hash(7, r as u32, &bits[of(r)]));
    });
    let mut chain = ChunkChain::new([1; 32]);
    let prover = RowProver::new(Scheme::Residue, &[1; 32], Arc::clone(calibration));
    let row = prover.prove(0, &bits[..channels], &values[..channels]);
    let link = micros(rows, |r| {
        black_box(chain.push(r as u32, row.clone()));
    });
    let parameters = &model.parameters;
    let value = |r: usize| parameters.powv(100_003 + r as u64, 7 * r as u64);
    value(0)?; // what cannot be read fails here
    let powv = micros(rows, |r| {
        black_box(value(r).ok());
    });
    let chunk = CHUNK_ROWS * channels;
    let toploc = micros(16, |i| {
        black_box(Proof::build(&bits[i * chunk..(i + 1) * chunk], TOP_K));
    }) / CHUNK_ROWS as f64;
    say(format!("{channels} channels, microseconds a row on one thread:"));
    say(format!("  residue-v1    sketch {u8_sketch:.2} + exact hash {hash:.2} + chain {link:.2}"));
    say(format!("  residue-v1-u4 sketch {u4_sketch:.2}"));
    say(format!("  toploc        {toploc:.2}   powv {powv:.2}"));
    let verify = (u8_sketch + hash + link) * 512.0 / 1000.0;
    say(format!("  recomputing 512 rows: {verify:.2} ms on one thread"));
    say(format!("bytes a token: residue-v1 {:.2}, toploc {:.2}", 136.0 / 32.0, 258.0 / 32.0));
    Ok(u8_sketch + hash + link)
}

/// The share of a decode step: from the parts, and from runs with and without proofs in turns.
fn share(
    engine: &Engine,
    identity: &Identity,
    batch: usize,
    micros: f64,
) -> anyhow::Result<String> {
    let mut ratios = Vec::new();
    let mut step = f64::INFINITY;
    for round in 0..10 {
        let plain = seconds(engine, batch, round * 2, None)?;
        let proved = seconds(engine, batch, round * 2 + 1, Some(identity))?;
        step = step.min(plain);
        ratios.push(proved / plain - 1.0);
    }
    ratios.sort_by(f64::total_cmp);
    Ok(format!(
        "batch {batch:2}: decode step {:.2} ms; residue-v1 is {:.3} % of it by its parts; \
         measured {:+.2} % (median of 10, {:+.2} to {:+.2})",
        step * 1e3,
        micros / step / 1e4,
        ratios[5] * 100.0,
        ratios[0] * 100.0,
        ratios[9] * 100.0
    ))
}

/// Seconds of one decode step.
fn seconds(
    engine: &Engine,
    batch: usize,
    salt: usize,
    identity: Option<&Identity>,
) -> anyhow::Result<f64> {
    let steps = 96;
    let request = |i: usize| {
        let ids = (0..8).map(|t| 100 + ((salt * 977 + i * 131 + t) % 30_000) as u32).collect();
        let mut request = Request::greedy(ids, steps);
        request.stop.ignore_eos = true;
        request.proof = identity.map(|identity| {
            let calibration = Arc::clone(&identity.calibration);
            let prover = RowProver::new(Scheme::Residue, &[7; 32], calibration);
            ProofOptions { root: [7; 32], prover }
        });
        request
    };
    let running = (0..batch).map(|i| engine.submit(request(i)));
    let mut running = running.collect::<Result<Vec<_>, _>>()?;
    running.iter_mut().for_each(|g| {
        g.next_blocking();
    });
    let started = Clock::system();
    for generation in running {
        generation.collect_blocking()?;
    }
    Ok(started.elapsed().as_secs_f64() / (steps - 1) as f64)
}
