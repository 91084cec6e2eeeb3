//! What proofs cost: microseconds a row for each part and scheme, their share of a decode step, and
//! bytes a token.
//!
//! `cargo bench --bench proof -- MODEL`, on an otherwise idle machine.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use targon_engine::clock::Clock;
use targon_engine::engine::request::{ProofOptions, Request};
use targon_engine::engine::{Engine, Options};
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::commit::{Chain, RowProver};
use targon_engine::proof::residue::{Profile, exact_hash, sketch};
use targon_engine::proof::toploc::{Proof, TOP_K};
use targon_engine::proof::{CHUNK_ROWS, Scheme};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let path = arguments.first().expect("usage: cargo bench --bench proof -- MODEL");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(threads, Isa::best()).expect("threads start");
    let model = Model::load(Path::new(path), None, &pool, |_, _| {}).expect("the model loads");
    let identity = Identity::of(&model, &pool).expect("the identity is computed");
    let row = parts(&model, &identity);
    let options = Options {
        context_max: 1024,
        blocks: 512,
        sequences_max: 16,
        waiting_max: 16,
        step_tokens_max: 512,
    };
    let engine = Engine::start(model, pool, options, Clock::system()).expect("the engine starts");
    for batch in [1, 16] {
        share(&engine, &identity, batch, row * batch as f64 / threads as f64);
    }
}

/// Microseconds of the fastest of several runs of `count` calls, for one call.
fn micros(count: usize, mut f: impl FnMut(usize)) -> f64 {
    let once = |f: &mut dyn FnMut(usize)| {
        let started = Instant::now();
        (0..count).for_each(&mut *f);
        started.elapsed().as_secs_f64()
    };
    (0..7).map(|_| once(&mut f)).fold(f64::INFINITY, f64::min) / count as f64 * 1e6
}

/// Prints the parts; returns the microseconds of a residue-v1 row.
fn parts(model: &Model, identity: &Identity) -> f64 {
    let channels = model.decoder.spec.hidden;
    let rows = 512;
    let bits: Vec<u16> = (0..rows * channels).map(|i| (0x3e00 + i * 7919 % 700) as u16).collect();
    let values: Vec<f32> = bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect();
    let calibration = &identity.calibration;
    let of = |r: usize| r * channels..(r + 1) * channels;
    let u8_sketch = micros(rows, |r| {
        black_box(sketch(calibration, Profile::U8, 7, r as u32, &values[of(r)]));
    });
    let u4_sketch = micros(rows, |r| {
        black_box(sketch(calibration, Profile::U4, 7, r as u32, &values[of(r)]));
    });
    let hash = micros(rows, |r| {
        black_box(exact_hash(7, r as u32, &bits[of(r)]));
    });
    let mut chain = Chain::new([1; 32]);
    let prover = RowProver::new(Scheme::Residue, &[1; 32], Arc::clone(calibration));
    let row = prover.prove(0, &bits[..channels], &values[..channels]);
    let link = micros(rows, |r| {
        black_box(chain.push(r as u32, row.clone()));
    });
    let powv = micros(rows, |r| {
        black_box(model.parameters.powv(100_003 + r as u64, 7 * r as u64).expect("readable"));
    });
    let chunk = CHUNK_ROWS * channels;
    let toploc = micros(16, |i| {
        black_box(Proof::build(&bits[i * chunk..(i + 1) * chunk], TOP_K));
    }) / CHUNK_ROWS as f64;
    println!("{channels} channels, microseconds a row on one thread:");
    println!("  residue-v1    sketch {u8_sketch:.2} + exact hash {hash:.2} + chain {link:.2}");
    println!("  residue-v1-u4 sketch {u4_sketch:.2}");
    println!("  toploc        {toploc:.2}   powv {powv:.2}");
    let verify = (u8_sketch + hash + link) * 512.0 / 1000.0;
    println!("  recomputing 512 rows: {verify:.2} ms on one thread");
    println!("bytes a token: residue-v1 {:.2}, toploc {:.2}", 136.0 / 32.0, 258.0 / 32.0);
    u8_sketch + hash + link
}

/// The share of a decode step: from the parts, and from runs with and without proofs in turns.
fn share(engine: &Engine, identity: &Identity, batch: usize, micros: f64) {
    let mut ratios = Vec::new();
    let mut step = f64::INFINITY;
    for round in 0..10 {
        let plain = seconds(engine, batch, round * 2, None);
        let proved = seconds(engine, batch, round * 2 + 1, Some(identity));
        step = step.min(plain);
        ratios.push(proved / plain - 1.0);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "batch {batch:2}: decode step {:.2} ms; residue-v1 is {:.3} % of it by its parts; \
         measured {:+.2} % (median of 10, {:+.2} to {:+.2})",
        step * 1e3,
        micros / step / 1e4,
        ratios[5] * 100.0,
        ratios[0] * 100.0,
        ratios[9] * 100.0
    );
}

/// Seconds of one decode step.
fn seconds(engine: &Engine, batch: usize, salt: usize, identity: Option<&Identity>) -> f64 {
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
    let mut running: Vec<_> =
        (0..batch).map(|i| engine.submit(request(i)).expect("accepted")).collect();
    running.iter_mut().for_each(|g| {
        g.next_blocking();
    });
    let started = Instant::now();
    running.into_iter().for_each(|g| {
        g.collect_blocking().expect("the engine works");
    });
    started.elapsed().as_secs_f64() / (steps - 1) as f64
}
