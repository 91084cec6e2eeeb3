//! The prefix cache: what many requests begin with is computed once, and again after a restart.

use crate::common;
use std::path::Path;
use std::time::{Duration, Instant};
use targon_engine::config::models_toml::{self, ModelConfig};
use targon_engine::engine::output::{Ended, Finish};
use targon_engine::engine::request::Request;
use targon_engine::engine::{Engine, Options};
use targon_engine::lifecycle::load::start_models;
use targon_engine::server::registry::{ModelState, Registry};

/// Requests that run at once, each with the same 224 tokens and eight of its own.
const REQUESTS: usize = 64;
const SYSTEM: usize = 224;
const OWN: usize = 8;

fn request(index: usize, salt: u64) -> Request {
    let own = (0..OWN).map(|i| 3 + ((index * 7 + i * i) % 200) as u32);
    let prompt: Vec<u32> = (0..SYSTEM).map(|i| 3 + (i * 31 % 200) as u32).chain(own).collect();
    Request { cache_salt: salt, ..Request::greedy(prompt, 4) }
}

/// The ends of all requests, which run at the same time, and their tokens.
fn run(engine: &Engine, salt: impl Fn(usize) -> u64) -> Vec<(Finish, Vec<u32>)> {
    let submit = |i| engine.submit(request(i, salt(i))).unwrap();
    let running: Vec<_> = (0..REQUESTS).map(submit).collect();
    let end = |Ended { steps, finish, .. }: Ended| {
        (finish, steps.iter().map(|step| step.token).collect())
    };
    running.into_iter().map(|r| end(r.collect_blocking().unwrap())).collect()
}

/// Whether so many rows of prompts were computed; a prompt's last row alone counts as an output's.
#[track_caller]
fn assert_rows(computed: u64, expected: usize) {
    let expected = expected as u64;
    let most = expected - REQUESTS as u64..=expected;
    assert!(most.contains(&computed), "{computed} rows are computed, not {expected}");
}

fn options() -> Options {
    Options { blocks: 1024, sequences_max: REQUESTS, waiting_max: REQUESTS, ..common::options() }
}

#[test]
fn requests_with_one_system_prompt_compute_it_once() {
    let engine = common::tiny_engine(5, options());
    let ends = run(&engine, |_| 0);
    let first = engine.stats().snapshot();
    assert_rows(first.prefill_tokens, SYSTEM + REQUESTS * OWN);
    let shared = ends.iter().filter(|(end, _)| end.cached_tokens == SYSTEM).count();
    assert_eq!(shared, REQUESTS - 1);
    let hits = ((REQUESTS - 1) * SYSTEM) as u64;
    let all = (REQUESTS * (SYSTEM + OWN)) as u64;
    assert_eq!((first.cached_tokens, first.prompt_tokens), (hits, all));

    // A salt shares with itself alone; answers are the same.
    let salted = run(&engine, |i| 1 + (i % 2) as u64);
    let second = engine.stats().snapshot();
    let computed = second.prefill_tokens - first.prefill_tokens;
    assert_rows(computed, 2 * SYSTEM + REQUESTS * OWN);
    let tokens = |ends: &[(Finish, Vec<u32>)]| -> Vec<Vec<u32>> {
        ends.iter().map(|(_, tokens)| tokens.clone()).collect()
    };
    assert_eq!(tokens(&salted), tokens(&ends));
    // The control: where nobody shares, all of it is computed.
    let alone = run(&engine, |i| 100 + i as u64);
    let computed = engine.stats().snapshot().prefill_tokens - second.prefill_tokens;
    assert_rows(computed, all as usize);
    assert_eq!(tokens(&alone), tokens(&ends));
}

fn models(home: &Path) -> Vec<ModelConfig> {
    let text = "[[model]]\nname = \"m\"\npath = \"m\"\nkv_memory = \"16 MiB\"\n\
                prefix_cache_file = \"kept/prefixes.json\"\n";
    models_toml::parse(&home.join("models.toml"), text, &[]).unwrap().models
}

/// The engine of a program that starts anew, and what keeps it.
async fn start(home: &Path) -> (Registry, Engine) {
    let registry = Registry::default();
    registry.announce(["m".to_owned()]);
    let loading = common::loading(&registry);
    assert!(start_models(models(home), loading).await);
    let ModelState::Ready(served) = registry.entries().remove(0).state else { panic!("not ready") };
    (registry, served.engine)
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_prefixes_are_computed_before_the_first_request_after_a_restart() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    common::write_checkpoint(&home.join("m"), &common::tiny_config(), 5);
    std::fs::create_dir(home.join("kept")).unwrap();
    let file = home.join("kept/prefixes.json");
    std::fs::write(&file, "{\"version\": 7}").unwrap();
    let (registry, engine) = start(home).await;
    // A bad file is an empty list: the model answers, and nothing is computed beforehand.
    tokio::task::block_in_place(|| run(&engine, |i| (i % 2) as u64));
    let computed = engine.stats().snapshot().prefill_tokens;
    assert_rows(computed, 2 * SYSTEM + REQUESTS * OWN);
    let kept = || std::fs::read_to_string(&file).unwrap_or_default();
    until("the file is written", || kept().contains("\"reuses\":31")).await;
    assert_eq!(kept().matches("\"tokens\":").count(), 1, "only the unsalted one: {}", kept());
    registry.remove("m");
    drop(engine);

    let (_registry, engine) = start(home).await;
    let snapshot = || engine.stats().snapshot();
    until("it is computed", || snapshot().prefill_tokens == SYSTEM as u64).await;
    until("the engine is idle", || snapshot().load.running == 0).await;
    assert_eq!((snapshot().finished, snapshot().prompt_tokens), (0, 0), "it is no request");
    let ends = tokio::task::block_in_place(|| run(&engine, |_| 0));
    assert!(ends.iter().all(|(end, _)| end.cached_tokens == SYSTEM));
    assert_rows(snapshot().prefill_tokens, SYSTEM + REQUESTS * OWN);
}

#[test]
fn what_a_warm_up_finds_is_not_reused_by_anybody() {
    let engine = common::tiny_engine(5, options());
    engine.stats().keep_hot_prefixes();
    let hot = |is_warmup: bool| {
        for index in 0..6 {
            let request = Request { is_warmup, ..request(index, 0) };
            engine.submit(request).unwrap().collect_blocking().unwrap();
        }
        engine.stats().hot_prefixes()
    };
    assert_eq!(hot(true), vec![]);
    // The control: requests of others that find the same are counted, all six of them.
    let found = hot(false);
    assert_eq!(found.iter().map(|p| (p.reuses, p.tokens.len())).collect::<Vec<_>>(), [(6, SYSTEM)]);
}
