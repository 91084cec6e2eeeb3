//! Models of one process on several cards: each is planned for its own card and computed there.

use crate::common::{loading, tiny_config, write_checkpoint};
use crate::failures::{alone, is_alone};
use crate::{Counter, count};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use targon_engine::config::models_toml;
use targon_engine::engine::request::Request;
use targon_engine::lifecycle::load::{Loading, Plans, Progress, start_models};
use targon_engine::models::device::Device;
use targon_engine::server::registry::{ModelState, Registry, Served};

/// Three models on two cards, and one on a card that is too small.
const MODELS: &str = r#"
    [[model]]
    name = "a"
    path = "model"
    device = "cuda:0"
    kv_memory = "1 MiB"
    [[model]]
    name = "b"
    path = "model"
    device = "cuda:1"
    kv_memory = "1 MiB"
    [[model]]
    name = "c"
    path = "model"
    device = "cuda:1"
    arithmetic = "portable"
    kv_memory = "2 MiB"
    [[model]]
    name = "d"
    path = "model"
    device = "cuda:5"
    kv_memory = "1 MiB"
"#;

/// Keeps the plans: bytes by model, and what each device had.
#[derive(Default)]
struct Kept {
    plans: Mutex<BTreeMap<String, Option<u64>>>,
    free: Mutex<BTreeMap<Device, u64>>,
}

impl Progress for Kept {
    fn file(&self, _: &str, _: u64, _: u64) {}
    fn planned(&self, plans: &Plans, free: &[(Device, u64)]) {
        let bytes = |(name, plan): &(String, _)| {
            let plan: &anyhow::Result<targon_engine::engine::plan::MemoryPlan> = plan;
            (name.clone(), plan.as_ref().ok().map(|plan| plan.total()))
        };
        *self.plans.lock() = plans.iter().map(bytes).collect();
        *self.free.lock() = free.iter().copied().collect();
    }
    fn layers(&self, _: &str, _: usize, _: usize) {}
    fn ended(&self, _: &str) {}
}

/// The tokens and their log-probabilities of a greedy answer.
fn answer(served: &Served) -> Vec<(u32, f64)> {
    let mut request = Request::greedy(vec![5, 80, 7, 200], 20);
    request.stop.ignore_eos = true;
    let steps = served.engine.submit(request).unwrap().collect_blocking().unwrap().steps;
    steps.iter().map(|step| (step.token, step.logprob)).collect()
}

#[test]
fn models_are_planned_and_computed_on_their_own_cards() {
    if !is_alone() {
        let cache = tempfile::tempdir().unwrap();
        return alone(
            "devices::models_are_planned_and_computed_on_their_own_cards",
            &[("TARGON_CACHE", cache.path().to_str().unwrap())],
            &[],
        );
    }
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    write_checkpoint(&model, &tiny_config(), 4);
    let config = models_toml::parse(&dir.path().join("models.toml"), MODELS, &[]).unwrap();
    let (registry, kept) = (Registry::default(), Arc::new(Kept::default()));
    registry.announce(config.models.iter().map(|m| m.name.clone()));
    let free = |card: usize| Device::Cuda(card).free_memory().unwrap().unwrap();
    let before = [0, 1].map(free);
    let shown = Arc::clone(&kept);
    let loading = Loading { shown, ..loading(&registry) };
    let started = start_models(config.models, loading);
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    assert!(runtime.block_on(started));

    // What was planned, and what each card holds of it.
    let (plans, had) = (kept.plans.lock(), kept.free.lock());
    assert_eq!([0, 1].map(|card| had[&Device::Cuda(card)]), before);
    let planned = |name: &str| plans[name].unwrap();
    assert_eq!(plans["d"], None);
    for (card, names) in [(0, &["a"][..]), (1, &["b", "c"])] {
        let taken = before[card] - free(card);
        let most: u64 = names.iter().map(|name| planned(name)).sum();
        assert!(taken > 0 && taken <= most, "cuda:{card}: {taken} of {most} planned");
    }
    let small = registry.entries().into_iter().find(|entry| entry.name == "d").unwrap();
    let ModelState::Failed(why) = small.state else { panic!("cuda:5 has room for nothing") };
    assert!(why.contains("hold") || why.contains("short"), "{why}");

    // Each answers on its own card; the two that compute alike answer alike.
    let served = |name: &str| registry.route(Some(name), None).unwrap().served;
    let answers = ["a", "b", "c"].map(|name| {
        let launches = || [0, 1].map(|card| count(card, Counter::Launches));
        let (served, before) = (served(name), launches());
        let answer = answer(&served);
        let after = launches();
        let card = usize::from(name != "a");
        assert_eq!(served.model.weights.device(), Device::Cuda(card));
        assert!(after[card] > before[card] && after[1 - card] == before[1 - card], "{name}");
        let canon = if name == "c" { "canon-2" } else { "mma-sm90-2" };
        assert_eq!(served.identity.canon, canon);
        answer
    });
    assert_eq!(answers[0].len(), 20);
    assert_eq!(answers[0], answers[1]);
    assert_ne!(answers[0], answers[2]);
}
