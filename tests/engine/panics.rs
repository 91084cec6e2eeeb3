//! A panic at every stage of a step costs a request or a step, and never the engine or another one.

use crate::common::{Noise, tiny_model, tiny_served};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use targon_engine::clock::Clock;
use targon_engine::engine::guard::{Stage, Watch};
use targon_engine::engine::output::Fault;
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::lifecycle::watch::last_engine_death;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{ModelState, Registry, Served};

const OPTIONS: Options = Options {
    context_max: 128,
    blocks: 16,
    sequences_max: 4,
    waiting_max: 8,
    step_tokens_max: 32,
    drafts_max: 0,
};

/// Panics when `stage` is entered for the time that counts to zero.
fn bomb(stage: Stage, countdown: &Arc<AtomicU32>) -> Watch {
    let countdown = Arc::clone(countdown);
    Watch::new(move |entered| {
        let is_armed = |left: u32| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if entered == stage && countdown.fetch_update(order, order, is_armed) == Ok(1) {
            panic!("injected while {stage}");
        }
    })
}

fn engine(pool: &Pool, seed: u32, watch: Watch) -> Engine {
    let model = tiny_model(seed, pool);
    Engine::start_watched(model, pool.clone(), OPTIONS, Clock::system(), watch).unwrap()
}

fn request(seed: u32) -> Request {
    let mut noise = Noise(seed);
    Request::greedy((0..20).map(|_| noise.below(256) as u32).collect(), 12)
}

fn run(engine: &Engine, seed: u32) -> Result<Vec<u32>, Fault> {
    let generation = engine.submit(request(seed)).unwrap();
    let steps = generation.collect_blocking()?.steps;
    Ok(steps.iter().map(|s| s.token).collect())
}

fn is_idle(engine: &Engine) -> bool {
    let load = engine.stats().snapshot().load;
    (load.running, load.waiting, load.blocks_used) == (0, 0, 0)
}

#[test]
fn a_panic_at_any_stage_leaves_an_engine_that_answers_as_before() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let (mine, other) = (engine(&pool, 3, Watch::default()), engine(&pool, 4, Watch::default()));
    let expected: Vec<_> = (0..4).map(|seed| run(&mine, seed).unwrap()).collect();
    let of_other = run(&other, 0).unwrap();
    for stage in Stage::ALL {
        for nth in [1, 2, 5] {
            let countdown = Arc::new(AtomicU32::new(0));
            let engine = engine(&pool, 3, bomb(stage, &countdown));
            countdown.store(nth, Ordering::SeqCst);
            let running: Vec<_> =
                (0..4).map(|seed| engine.submit(request(seed)).unwrap()).collect();
            let outcomes: Vec<Result<Vec<u32>, Fault>> = running
                .into_iter()
                .map(|g| Ok(g.collect_blocking()?.steps.iter().map(|s| s.token).collect()))
                .collect();
            let failed = outcomes.iter().filter(|o| o.is_err()).count();
            let is_hit = countdown.load(Ordering::SeqCst) == 0;
            assert_eq!(failed > 0, is_hit, "{stage:?} {nth}: {outcomes:?}");
            if matches!(stage, Stage::Take | Stage::Reduce | Stage::Record) && is_hit {
                assert_eq!(failed, 1, "{stage:?} {nth} costs one request: {outcomes:?}");
            }
            for (outcome, expected) in outcomes.iter().zip(&expected) {
                match outcome {
                    Ok(tokens) => assert_eq!(tokens, expected, "{stage:?} {nth}"),
                    Err(fault) => assert!(matches!(fault, Fault::Panicked(_)), "{fault:?}"),
                }
            }
            assert!(!engine.is_dead());
            countdown.store(0, Ordering::SeqCst);
            // Prefixes that the failed step left behind must not be found.
            for (seed, expected) in expected.iter().enumerate() {
                assert_eq!(run(&engine, seed as u32).as_ref(), Ok(expected), "{stage:?} {nth}");
            }
            assert!((0..200).any(|_| {
                std::thread::sleep(Duration::from_millis(5));
                is_idle(&engine)
            }));
            assert_eq!(run(&other, 0).unwrap(), of_other);
        }
    }
}

#[test]
fn an_engine_that_always_panics_is_given_up_and_says_so() {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let watch = Watch::new(|stage| assert!(stage != Stage::Schedule, "injected"));
    let (broken, other) = (engine(&pool, 3, watch), engine(&pool, 4, Watch::default()));
    let mut faults = Vec::new();
    while !broken.is_dead() && faults.len() < 100 {
        match broken.submit(request(1)) {
            Ok(generation) => faults.extend(generation.collect_blocking().err()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(broken.is_dead() && faults.len() >= 3, "{faults:?}");
    assert!(broken.submit(request(1)).is_err(), "a dead engine takes nothing");
    assert_eq!(run(&other, 2).unwrap().len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_death_is_noticed_though_another_model_was_loading() {
    let patience = Duration::from_secs(60);
    let pool = Pool::new(2, Isa::best()).unwrap();
    let watch = Watch::new(|stage| assert!(stage != Stage::Schedule, "injected"));
    let engine = engine(&pool, 3, watch);
    let registry = Registry::default();
    registry.announce(["a", "b"].map(String::from));
    let ready = Served { engine: engine.clone(), ..tiny_served(3, OPTIONS) };
    registry.set("a", None, ModelState::Ready(Box::new(ready)));
    let death = tokio::spawn(last_engine_death(registry.clone()));
    let begun = Instant::now();
    while !matches!(registry.entry("a").unwrap().state, ModelState::Failed(_)) {
        let _ = engine.submit(request(1));
        assert!(begun.elapsed() < patience);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Long enough for another look.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!death.is_finished(), "b is still loading");
    registry.set("b", None, ModelState::Failed("no such file".into()));
    assert_eq!(tokio::time::timeout(patience, death).await.unwrap().unwrap(), "a");
}
