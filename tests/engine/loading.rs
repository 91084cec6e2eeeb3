//! Loading a model beside others: engines that run go on.

use crate::common::{self, Quiet, options, tiny_config, write_checkpoint};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use targon_engine::clock::Clock;
use targon_engine::config::models_toml::{self, ModelConfig};
use targon_engine::engine::Engine;
use targon_engine::engine::request::Request;
use targon_engine::lifecycle::accounts::MemoryAccounts;
use targon_engine::lifecycle::load::{Loading, locate, start_models};
use targon_engine::models::Model;
use targon_engine::models::device::Device;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::server::registry::{ModelState, Registry};

/// Longer than any step takes here.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn an_engine_answers_while_another_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 5);
    let pool = Pool::new(2, Isa::best()).unwrap();
    let load = |progress: &dyn Fn(usize)| {
        Model::load_on(Device::Cpu, dir.path(), None, &pool, |done, _| progress(done)).unwrap()
    };
    let model = Arc::new(load(&|_| ()));
    let engine = Engine::start(model, pool.clone(), options(), Clock::system()).unwrap();
    let engine = Arc::new(engine);
    let answered = std::cell::Cell::new(0);
    load(&|_| {
        // On a thread of its own, so that a test which fails does not wait for ever.
        let (sender, receiver) = channel();
        let engine = Arc::clone(&engine);
        std::thread::spawn(move || {
            let mut request = Request::greedy(vec![3, 4, 5], 4);
            request.stop.ignore_eos = true;
            let running = engine.submit(request).unwrap();
            let _ = sender.send(running.collect_blocking().unwrap().steps.len());
        });
        let tokens = receiver.recv_timeout(PATIENCE).expect("the engine waits for the load");
        answered.set(answered.get() + tokens);
    });
    let layers = tiny_config()["num_hidden_layers"].as_u64().unwrap() as usize;
    assert_eq!(answered.get(), 4 * layers);
}

/// A model of the models file in `home`, with a KV cache of so many MiB.
fn model(home: &Path, name: &str, kv: usize) -> ModelConfig {
    let text = format!("[[model]]\nname = \"{name}\"\npath = \"m\"\nkv_memory = \"{kv} MiB\"\n");
    models_toml::parse(&home.join("models.toml"), &text, &[]).unwrap().models.remove(0)
}

/// A directory with a checkpoint, and bytes that a model of 8 MiB for its KV cache needs.
async fn home() -> (tempfile::TempDir, u64) {
    let home = tempfile::tempdir().unwrap();
    let path: PathBuf = home.path().join("m");
    write_checkpoint(&path, &tiny_config(), 5);
    let located = locate(model(home.path(), "a", 8), &Quiet).await.unwrap();
    let needed = located.plan_within(1 << 40).unwrap().total();
    (home, needed)
}

fn loading(free: u64) -> Loading {
    // What is promised does not show in what is free.
    let memory = MemoryAccounts::measured_by(move |_| Ok(free));
    Loading { memory, ..common::loading(&Registry::default()) }
}

async fn start(model: ModelConfig, loading: &Loading) -> bool {
    let registry = loading.registry.announce([model.name.clone()]);
    start_models(vec![model], Loading { registry, ..loading.clone() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_model_was_promised_is_not_planned_again() {
    let (home, needed) = home().await;
    let loading = loading(2 * needed - 1);
    assert!(start(model(home.path(), "a", 8), &loading).await);
    assert!(!start(model(home.path(), "b", 8), &loading).await);
    let ModelState::Failed(why) = loading.registry.entry("b").unwrap().state else { panic!() };
    assert!(why.contains("short"), "{why}");
    // Once it has left, there is room.
    loading.registry.remove("a");
    loading.registry.remove("b");
    loading.memory.leave("a");
    assert!(start(model(home.path(), "b", 8), &loading).await);
}

#[tokio::test]
async fn models_that_are_planned_at_once_do_not_get_the_same_memory() {
    let (home, needed) = home().await;
    let located = locate(model(home.path(), "a", 8), &Quiet).await.unwrap();
    let memory = MemoryAccounts::measured_by(move |_| Ok(4 * needed - 1));
    let (together, leases) = (std::sync::Barrier::new(8), parking_lot::Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                together.wait();
                let planned = memory.plan(&located);
                leases.lock().extend(planned.map(|(_, lease)| lease));
            });
        }
    });
    assert_eq!(leases.into_inner().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_model_waits_until_the_requests_of_the_old_one_have_ended() {
    let (home, needed) = home().await;
    let loading = loading(2 * needed - 1);
    assert!(start(model(home.path(), "a", 8), &loading).await);
    // A request holds on to the model that it runs on.
    let request = loading.registry.route(Some("a"), None).ok().unwrap();
    loading.registry.remove("a");
    loading.memory.leave("a");
    let (changed, with) = (model(home.path(), "a", 9), loading.clone());
    let started = tokio::spawn(async move { start(changed, &with).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let entry = loading.registry.entry("a").unwrap();
    assert!(matches!(entry.state, ModelState::Loading) && !started.is_finished());
    drop(request);
    assert!(tokio::time::timeout(PATIENCE, started).await.unwrap().unwrap());
}
