//! Both engines over one model, started as a server starts them.

use crate::common;
use serde_json::{Value, json};
use std::sync::OnceLock;
use targon_engine::config::models_toml::{ModelConfig, ModelSource};
use targon_engine::engine::backend::BackendKind;
use targon_engine::engine::output::{Ended, FinishReason, Step};
use targon_engine::engine::plan::{KvMemory, MemoryWanted};
use targon_engine::engine::request::Request;
use targon_engine::lifecycle::load::start_models;
use targon_engine::models::device::Device;
use targon_engine::ops::dtype::Dtype;
use targon_engine::server::registry::{Registry, Served};

/// Requests of different kinds.
pub(crate) const QUESTIONS: [&str; 8] = [
    "What is the capital of France?",
    "Count from one to ten.",
    "Write one sentence about the sea.",
    "Name three colours.",
    "Explain how rain forms, in a few sentences.",
    "What is two plus two?",
    "Write a haiku about winter.",
    "Who wrote Romeo and Juliet?",
];

/// An entry of a models file for SmolLM2.
pub(crate) fn entry(name: &str, backend: BackendKind, isq: Option<&str>) -> ModelConfig {
    ModelConfig {
        name: name.into(),
        source: ModelSource::Path(common::smollm2()),
        backend,
        devices: vec![Device::Cpu],
        arithmetic: None,
        dtype: Some(Dtype::Bf16),
        isq: isq.map(str::to_owned),
        prefix_cache_file: None,
        wanted: MemoryWanted {
            drafts_max: 0,
            context_max: Some(512),
            kv_memory: KvMemory::Auto,
            sequences_max: 8,
        },
    }
}

/// Starts models beside each other.
pub(crate) fn start(models: Vec<ModelConfig>) -> Registry {
    let registry = Registry::default();
    registry.announce(models.iter().map(|m| m.name.clone()));
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let loading = common::loading(&registry);
    runtime.block_on(start_models(models, loading));
    registry
}

/// Both, and what serves them.
pub(crate) struct Pair {
    pub(crate) registry: Registry,
    pub(crate) native: Served,
    pub(crate) other: Served,
}

pub(crate) fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| {
        let registry = start(vec![
            entry("native", BackendKind::Native, None),
            entry("other", BackendKind::Mistralrs, None),
        ]);
        let served = |name: &str| registry.route(Some(name), None).unwrap().served;
        let (native, other) = (served("native"), served("other"));
        Pair { registry, native, other }
    })
}

impl Pair {
    pub(crate) fn both(&self) -> [(&'static str, &Served); 2] {
        [("native", &self.native), ("mistralrs", &self.other)]
    }
}

/// A conversation's first question as a prompt.
pub(crate) fn prompt(question: &str) -> Vec<u32> {
    let text = pair().native.engine.text();
    let variables = json!({
        "messages": [{"role": "user", "content": question}], "add_generation_prompt": true,
    });
    let Value::Object(variables) = variables else { unreachable!() };
    let rendered = text.chat.as_ref().unwrap().render(variables, 0).unwrap();
    text.tokenizer.encode(&rendered, false).unwrap()
}

/// A request that is greedy, or draws at this temperature.
pub(crate) fn request(question: &str, temperature: f32, max_tokens: usize) -> Request {
    let mut request = Request::greedy(prompt(question), max_tokens);
    request.sampling.temperature = temperature;
    request.sampling.noise_key = 5;
    request
}

pub(crate) fn run(served: &Served, request: &Request) -> (Vec<Step>, FinishReason) {
    let generation = served.engine.submit(request.clone()).unwrap();
    let Ended { steps, finish, .. } = generation.collect_blocking().unwrap();
    (steps, finish.reason)
}

pub(crate) fn ids(steps: &[Step]) -> Vec<u32> {
    steps.iter().map(|s| s.token).collect()
}
