//! An engine on a card beside one on the CPU: shared prefixes, preemption, proofs.

use crate::common::{options, tiny_config, write_checkpoint};
use std::path::Path;
use std::sync::Arc;
use targon_engine::clock::Clock;
use targon_engine::engine::output::{Event, Fault, Step};
use targon_engine::engine::request::{ProofOptions, Request};
use targon_engine::engine::{Engine, Options};
use targon_engine::models::arithmetic::Arithmetic;
use targon_engine::models::device::Device;
use targon_engine::models::sampler::Sampling;
use targon_engine::models::{Identity, Model};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::Scheme;
use targon_engine::proof::commit::RowProver;

/// A portable model on a device.
fn model_on(device: Device, path: &Path) -> (Arc<Model>, Pool) {
    model_by(Arithmetic::Portable, device, path)
}

/// A model on a device.
pub(crate) fn model_by(arithmetic: Arithmetic, device: Device, path: &Path) -> (Arc<Model>, Pool) {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let model = Model::load_on(device, path, None, &pool, |_, _| {}).unwrap();
    (Arc::new(model.computing(Some(arithmetic)).unwrap()), pool)
}

pub(crate) fn requests(identity: &Identity, tokens: usize) -> Vec<Request> {
    let of = |i: u32| {
        // Two blocks that all begin with, then their own.
        let prompt = (0..70).map(|p| if p < 64 { p * 3 % 250 } else { (p * i + 7) % 250 });
        let mut request = Request::greedy(prompt.collect(), tokens);
        if !i.is_multiple_of(3) {
            request.sampling = Sampling {
                temperature: 0.9,
                noise_key: u64::from(i),
                top_p: if i.is_multiple_of(2) { 0.9 } else { 1.0 },
                ..Sampling::greedy()
            };
        }
        request.stop.ignore_eos = true;
        request.top_logprobs = i as usize % 4;
        let root = [i as u8; 32];
        let prover = RowProver::new(Scheme::Residue, &root, Arc::clone(&identity.calibration));
        request.proof = Some(ProofOptions { root, prover });
        request
    };
    (1..9).map(of).collect()
}

/// Steps of all requests, and prompt tokens that were found in the cache.
pub(crate) fn outputs(engine: &Engine, requests: Vec<Request>) -> (Vec<Vec<Step>>, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let (mut all, mut cached) = (Vec::new(), 0);
        let running: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
        for mut generation in running {
            let mut steps = Vec::new();
            while let Some(event) = generation.next().await {
                let Event::Step(mut step) = event else { panic!("{event:?}") };
                if let Some(finish) = &mut step.finish {
                    // How much was cached is a matter of time.
                    cached += std::mem::take(&mut finish.cached_tokens);
                }
                steps.push(step);
            }
            all.push(steps);
        }
        (all, cached)
    })
}

#[test]
fn preemption_and_shared_prefixes_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 8);
    // Eight requests need four blocks each, two of which they share.
    let options = Options { blocks: 9, sequences_max: 8, ..options() };
    let mut of_devices = Vec::new();
    for device in [Device::Cpu, Device::Cuda(1)] {
        let (model, pool) = model_on(device, dir.path());
        let identity = Identity::compute(&model, &pool).unwrap();
        let engine = Engine::start(model, pool, options, Clock::system()).unwrap();
        let (outputs, cached) = outputs(&engine, requests(&identity, 40));
        let preemptions = engine.stats().snapshot().load.preemptions;
        assert!(preemptions > 0 && cached > 0, "{device}: {preemptions} {cached}");
        if device == Device::Cuda(1) {
            // Most steps decode, in a few kinds of batches.
            let graphs = crate::count(1, crate::Counter::GraphLaunches) as u64;
            let steps = engine.stats().snapshot().steps;
            assert!(graphs * 3 > steps, "{graphs} of {steps} steps");
        }
        of_devices.push((outputs, identity));
    }
    let [(cpu, cpu_identity), (card, card_identity)] = &of_devices[..] else { unreachable!() };
    assert_eq!(cpu_identity.model_hash, card_identity.model_hash, "calibrations differ");
    for (i, (got, want)) in card.iter().zip(cpu).enumerate() {
        assert_eq!(want.len(), 40);
        assert!(want.iter().any(|step| step.proof.is_some()));
        assert_eq!(format!("{got:?}"), format!("{want:?}"), "request {i}");
    }
}

#[test]
fn an_engine_whose_card_is_lost_says_so_and_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 9);
    let (model, pool) = model_on(Device::Cpu, dir.path());
    let identity = Identity::compute(&model, &pool).unwrap();
    let (model, pool) = model_on(Device::Cuda(7), dir.path());
    let engine = Engine::start(model, pool, options(), Clock::system()).unwrap();
    let (healthy, pool) = model_on(Device::Cuda(1), dir.path());
    let healthy = Engine::start(healthy, pool, options(), Clock::system()).unwrap();

    // A launch that is refused ends the requests of that step, and no others.
    crate::fail(7, "gate", 1, 701);
    let mut faults = faults(&engine, requests(&identity, 12));
    assert!(faults.iter().flatten().count() >= 1);
    for fault in faults.drain(..).flatten() {
        assert!(matches!(&fault, Fault::Device(why) if why.contains("gate")), "{fault:?}");
    }
    assert!(!engine.is_dead());
    let (steps, _) = outputs(&engine, requests(&identity, 4));
    assert_eq!(steps.len(), 8);

    crate::fail(7, "", 30, 700);
    let faults: Vec<Fault> =
        self::faults(&engine, requests(&identity, 12)).into_iter().flatten().collect();
    assert_eq!(faults.len(), 8);
    for fault in &faults {
        assert!(matches!(fault, Fault::Lost(_)), "{fault:?}");
    }
    let begun = std::time::Instant::now();
    while !engine.is_dead() && begun.elapsed().as_secs() < 10 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(engine.is_dead());
    let (steps, _) = outputs(&healthy, requests(&identity, 4));
    assert_eq!(steps[0].len(), 4);
}

/// How each request ended, where it failed.
fn faults(engine: &Engine, requests: Vec<Request>) -> Vec<Option<Fault>> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let running: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
        let mut faults = Vec::new();
        for mut generation in running {
            let mut fault = None;
            while let Some(event) = generation.next().await {
                if let Event::Fault(why) = event {
                    fault = Some(why);
                }
            }
            faults.push(fault);
        }
        faults
    })
}
