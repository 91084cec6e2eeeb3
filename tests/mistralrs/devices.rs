//! Layers on several devices, in one process.

use crate::pair::{QUESTIONS, entry, request, run, start};
use targon_engine::config::models_toml::ModelConfig;
use targon_engine::engine::backend::BackendKind;
use targon_engine::models::device::Device;
use targon_engine::server::registry::ModelState;

/// All devices are the processor here, so this shows that a model runs with its layers split, not
/// that rows travel between cards. What mistral.rs is told has a test beside it.
#[test]
fn layers_on_three_devices_compute_what_one_device_computes() {
    for isq in [None, Some("q8_0")] {
        let one = entry("one", BackendKind::Mistralrs, isq);
        let devices = vec![Device::Cpu; 3];
        let three = ModelConfig { name: "three".into(), devices, ..one.clone() };
        let registry = start(vec![one, three]);
        let served = |name: &str| match registry.entry(name).unwrap().state {
            ModelState::Ready(served) => *served,
            ModelState::Failed(why) => panic!("{isq:?}: {name}: {why}"),
            _ => panic!("{isq:?}: {name} is not ready"),
        };
        let (one, three) = (served("one"), served("three"));
        assert_eq!(one.identity.model_hash, three.identity.model_hash);
        for question in &QUESTIONS[..3] {
            let asked = request(question, 0.8, 12);
            let [ours, theirs] = [&one, &three].map(|served| {
                let steps = run(served, &asked).0.into_iter();
                steps.map(|step| (step.token, step.logprob.to_bits())).collect::<Vec<_>>()
            });
            assert_eq!(ours, theirs, "{isq:?}: {question}");
        }
    }
}
