//! Every family that mistral.rs is given: tiny checkpoints with random weights, on both engines.

use crate::common::narrow::{copied, narrowed};
use crate::common::quantised::gptq;
use crate::common::tokenizer_json;
use crate::pair::{entry, ids, run, start};
use crate::proofs::{checked, proved};
use std::path::Path;
use targon_engine::config::models_toml::{ModelConfig, ModelSource};
use targon_engine::engine::backend::BackendKind;
use targon_engine::engine::plan::MemoryWanted;
use targon_engine::engine::request::Request;
use targon_engine::server::registry::ModelState;
use targon_engine::verify::Verdict;

const PROMPT: [u32; 12] = [3, 17, 5, 40, 22, 9, 31, 12, 60, 2, 44, 28];
const TOKENS: usize = 40;
/// How far log-probabilities of the two may lie apart.
const LOGPROB_BOUND: f64 = 0.1;

fn entry_of(name: &str, backend: BackendKind, place: &Path) -> ModelConfig {
    let plain = entry(name, backend, None);
    let wanted = MemoryWanted { context_max: Some(64), ..plain.wanted };
    ModelConfig { source: ModelSource::Path(place.to_owned()), dtype: None, wanted, ..plain }
}

/// Holds a checkpoint, which `write` makes of the golden one, to the contract on both engines.
fn check(family: &str, write: fn(&str, &Path)) {
    let place = tempfile::tempdir().unwrap();
    write(family, place.path());
    let tokenizer = tokenizer_json().to_string();
    std::fs::write(place.path().join("tokenizer.json"), tokenizer).unwrap();
    let registry = start(vec![
        entry_of("native", BackendKind::Native, place.path()),
        entry_of("other", BackendKind::Mistralrs, place.path()),
    ]);
    let served = |name: &str| match registry.entry(name).unwrap().state {
        ModelState::Ready(served) => *served,
        ModelState::Failed(why) => panic!("{family}: {name}: {why}"),
        _ => panic!("{family}: {name} is not ready"),
    };
    let (native, other) = (served("native"), served("other"));
    let mut asked = Request::greedy(PROMPT.to_vec(), TOKENS);
    asked.stop.ignore_eos = true;
    let (theirs, ours) = (run(&other, &asked).0, run(&native, &asked).0);
    let equal = ours.iter().zip(&theirs).take_while(|(a, b)| a.token == b.token).count();
    let apart = ours.iter().zip(&theirs).take(equal.max(1));
    let apart = apart.map(|(a, b)| (a.logprob - b.logprob).abs()).fold(0.0, f64::max);
    asked.sampling.temperature = 0.8;
    let (asked, answer) = proved(&other, asked);
    let report = checked(&native, &asked, &answer);
    let energies: Vec<_> = report.chunks.iter().filter_map(|c| c.energy).collect();
    println!(
        "{family}: {equal} of {TOKENS} greedy tokens equal, log-probabilities at most {apart:.5} \
         nats apart, energies of a drawn answer {energies:.1?}"
    );
    assert_eq!(report.verdict, Verdict::Pass, "{family}");
    assert!(apart < LOGPROB_BOUND, "{family}: {apart}");
    assert_eq!(ids(&theirs)[0], ids(&ours)[0], "{family}");
}

#[test]
fn llama_with_stretched_frequencies() {
    check("llama", narrowed);
}

#[test]
fn llama_of_quantised_safetensors() {
    check("llama", |_, place| drop(gptq(place)));
}

#[test]
fn mistral() {
    check("mistral", copied);
}

#[test]
fn qwen2() {
    check("qwen2", narrowed);
}

#[test]
fn qwen3() {
    check("qwen3", copied);
}

#[test]
fn phi3() {
    check("phi3", copied);
}

#[test]
fn mixtral() {
    check("mixtral", narrowed);
}
