//! Every family against a live reference: random small configurations, computed by the engine and
//! by a decoder over `candle-nn` (`decoder.rs`).
//!
//! The reference rounds where the engine rounds, so only the order of additions differs. What
//! happens when a configuration is read wrongly is shown by references that read it so.

mod decoder;

use crate::common::{self, Noise};
use candle_core::DType;
use decoder::Reference;
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::config;
use targon_engine::models::cpu::CpuPass;
use targon_engine::models::pass::{Batch, Pass, RowAsk, blocks_of};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

/// Root-mean-square error of the median row of logits, relative to all rows. Measured over 48
/// configurations of each family: at most 2.3e-3, 3.1e-3 in mixtures, 4.5e-3 in Gemma 2.
const ERROR_MAX: f64 = 6e-3;
/// Configurations of a family.
const CASES: u32 = 48;

/// A configuration with the seed of its weights and the tokens that are computed.
#[derive(Clone, Debug)]
struct Case {
    config: Value,
    is_f16: bool,
    seed: u32,
    tokens: usize,
}

fn shapes(family: &'static str) -> impl Strategy<Value = Case> {
    let sizes = (1..=3_u64, 1..=3_u64, 1..=3_u64, 1..=3_u64, 8..=40_u64, 8..=48_u64, 20..=150_u64);
    let options = (any::<[bool; 4]>(), 2..=24_u64, 3..=6_u32, 0..3_u8, any::<bool>());
    (sizes, options, any::<u32>(), 3..=70_usize).prop_map(move |(sizes, options, seed, tokens)| {
        let (layers, kv_heads, group, width, hidden, inter, vocab) = sizes;
        let (flags, window, theta, scaling, is_f16) = options;
        let mut config = json!({
            "model_type": family, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
            "num_attention_heads": kv_heads * group, "head_dim": 16 * width,
            "hidden_size": 2 * hidden, "intermediate_size": 2 * inter, "vocab_size": vocab,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": flags[0], "rope_theta": 10_f64.powi(theta as i32),
        });
        match scaling {
            0 => {}
            1 => config["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.5}),
            _ => {
                config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 4.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32});
            }
        }
        own_keys(&mut config, family, flags, window);
        Case { config, is_f16: is_f16 && family != "gemma2", seed, tokens }
    })
}

/// The keys that only this family has.
fn own_keys(config: &mut Value, family: &str, flags: [bool; 4], window: u64) {
    let own = match family {
        "llama" | "qwen3" => json!({"attention_bias": flags[1]}),
        "mistral" | "phi3" => json!({"sliding_window": flags[1].then_some(window)}),
        "gemma2" => json!({
            "sliding_window": window, "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16 + window,
            "attn_logit_softcapping": flags[1].then_some(5.0),
            "final_logit_softcapping": flags[2].then_some(3.0),
        }),
        "mixtral" => json!({
            "num_local_experts": 2 + window % 5, "num_experts_per_tok": 1 + window % 2,
            "sliding_window": flags[1].then_some(window),
        }),
        "qwen3_moe" => json!({
            "num_experts": 3 + window % 5, "num_experts_per_tok": 1 + window % 3,
            "moe_intermediate_size": config["intermediate_size"], "norm_topk_prob": flags[1],
            "attention_bias": flags[2],
        }),
        _ => json!({}),
    };
    config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
}

/// The shape of a tensor of the model, by its name.
fn shape(config: &Value, name: &str) -> Vec<usize> {
    let get = |key: &str| config[key].as_u64().unwrap() as usize;
    let (hidden, inter, head) = (get("hidden_size"), get("intermediate_size"), get("head_dim"));
    let (q, kv) = (get("num_attention_heads") * head, get("num_key_value_heads") * head);
    let (stem, kind) = name.rsplit_once('.').unwrap();
    let experts =
        || get(if config["num_experts"].is_u64() { "num_experts" } else { "num_local_experts" });
    let matrix = match stem.rsplit('.').next().unwrap() {
        "q_norm" | "k_norm" => return vec![head],
        part if part.contains("norm") => return vec![hidden],
        "embed_tokens" | "lm_head" => [get("vocab_size"), hidden],
        "q_proj" => [q, hidden],
        "k_proj" | "v_proj" => [kv, hidden],
        "qkv_proj" => [q + 2 * kv, hidden],
        "o_proj" => [hidden, q],
        "gate" => [experts(), hidden],
        "gate_proj" | "up_proj" | "w1" | "w3" => [inter, hidden],
        "gate_up_proj" => [2 * inter, hidden],
        "down_proj" | "w2" => [hidden, inter],
        part => panic!("no shape for {part}"),
    };
    if kind == "bias" { vec![matrix[0]] } else { matrix.to_vec() }
}

/// Writes a checkpoint of `case` with seeded weights.
fn write(dir: &Path, case: &Case) {
    std::fs::write(dir.join("config.json"), case.config.to_string()).unwrap();
    let spec = config::parse(&dir.join("config.json"), &case.config).unwrap();
    let mut noise = Noise(case.seed);
    let centre = if spec.family.name == "gemma2" { 0.0 } else { 1.0 };
    let names = spec.tensor_names().into_iter().filter(|name| name != "rope_freqs.weight");
    let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = names
        .map(|name| {
            let shape = shape(&case.config, &name);
            let fan_in = *shape.last().unwrap() as f32;
            let values = (0..shape.iter().product()).map(|_| match shape.len() {
                1 if name.ends_with("bias") => 0.4 * noise.next(),
                1 => centre + 0.5 * noise.next(),
                _ => 3.5 * noise.next() / fan_in.sqrt(),
            });
            let bits = |x: f32| match case.is_f16 {
                true => f16::from_f32(x).to_bits(),
                false => bf16::from_f32(x).to_bits(),
            };
            let bytes = values.flat_map(|x| bits(x).to_le_bytes()).collect();
            (name, (shape, bytes))
        })
        .collect();
    let dtype = if case.is_f16 { Dtype::F16 } else { Dtype::BF16 };
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Logits of all tokens by the engine.
fn computed(dir: &Path, ids: &[u32]) -> Vec<Vec<f32>> {
    let pool = Pool::new(2, Isa::best()).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let decoder = Arc::new(common::decoder(&checkpoint, None, &pool).unwrap());
    let mut pass = CpuPass::new(&decoder, &pool, blocks_of(ids.len())).unwrap();
    let ask = |row| RowAsk { logits: true, ..RowAsk::new(row, row) };
    let asks: Vec<RowAsk<'_>> = (0..ids.len()).map(ask).collect();
    let reports = pass.step(&Batch::of(ids, 0), &asks).unwrap();
    reports.into_iter().map(|report| report.unwrap().logits.unwrap()).collect()
}

/// The error of the median row: a near tie between experts may turn single rows.
fn error(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let square = |x: f64| x * x;
    let norm: f64 = want.iter().flatten().map(|x| square(f64::from(*x))).sum();
    let mut rows: Vec<f64> = got
        .iter()
        .zip(want)
        .map(|(got, want)| {
            assert_eq!(got.len(), want.len());
            let pairs = got.iter().zip(want);
            let diff: f64 = pairs.map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
            let error = (diff / norm * want.len() as f64).sqrt();
            if error.is_nan() { f64::INFINITY } else { error }
        })
        .collect();
    rows.sort_by(f64::total_cmp);
    rows[rows.len() / 2]
}

/// How far the engine is from a reference whose configuration was changed by `change`.
fn distance(case: &Case, change: impl FnOnce(&mut Value)) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), case);
    let vocab = case.config["vocab_size"].as_u64().unwrap() as usize;
    let mut noise = Noise(case.seed ^ 1);
    let ids: Vec<u32> = (0..case.tokens).map(|_| noise.below(vocab) as u32).collect();
    let rounding = if case.is_f16 { DType::F16 } else { DType::BF16 };
    let mut reference = Reference::load(dir.path(), rounding).unwrap();
    change(&mut reference.config);
    let want = reference.logits(&ids).unwrap().to_vec2().unwrap();
    error(&computed(dir.path(), &ids), &want)
}

fn check(family: &'static str) {
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(Default::default()),
    );
    let largest = std::cell::Cell::new(0.0_f64);
    let run = runner.run(&shapes(family), |case| {
        let error = distance(&case, |_| {});
        largest.set(largest.get().max(error));
        prop_assert!(error <= ERROR_MAX, "logits off by {error:.1e}");
        Ok(())
    });
    println!("{family:10} largest error of {CASES}: {:.1e}", largest.get());
    run.unwrap();
}

macro_rules! families {
    ($($name:ident)*) => { $(#[test] fn $name() { check(stringify!($name)); })* };
}

families! { llama mistral qwen2 qwen3 gemma2 phi3 mixtral qwen3_moe }

/// A case of `family` that has every option.
fn rich(family: &'static str) -> Case {
    let mut config = json!({
        "model_type": family, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "num_attention_heads": 4, "head_dim": 32, "hidden_size": 64, "intermediate_size": 48,
        "vocab_size": 90, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    });
    own_keys(&mut config, family, [true; 4], 6);
    Case { config, is_f16: false, seed: 5, tokens: 48 }
}

#[test]
fn a_configuration_that_is_read_wrongly_is_noticed() {
    let wrong: [(&'static str, &str, Value); 11] = [
        ("llama", "rope_theta", json!(1.2e4)),
        ("llama", "rms_norm_eps", json!(3e-2)),
        ("llama", "tie_word_embeddings", json!(true)),
        ("llama", "rope_scaling", json!({"rope_type": "linear", "factor": 4.0})),
        ("mistral", "sliding_window", json!(7)),
        ("gemma2", "sliding_window", json!(7)),
        ("gemma2", "attn_logit_softcapping", Value::Null),
        ("gemma2", "final_logit_softcapping", json!(4.0)),
        ("gemma2", "query_pre_attn_scalar", json!(24)),
        ("mixtral", "num_experts_per_tok", json!(2)),
        ("qwen3_moe", "norm_topk_prob", json!(false)),
    ];
    for (family, key, value) in wrong {
        let case = rich(family);
        assert_ne!(case.config[key], value, "{family} {key}");
        let right = distance(&case, |_| {});
        assert!(right <= ERROR_MAX, "{family}: off by {right:.1e}");
        let error = distance(&case, |config| config[key] = value.clone());
        assert!(error > 2.0 * ERROR_MAX, "{family} with {key} = {value}: only {error:.1e}");
    }
}
