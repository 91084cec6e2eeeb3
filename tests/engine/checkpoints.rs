//! Checkpoints as users have them: GGUF against safetensors, every quantised type, broken files.

use crate::common;
use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};
use std::path::Path;
use targon_engine::engine::output::{Event, Fault};
use targon_engine::engine::request::Request;
use targon_engine::models::Model;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::decoder::{Decoder, Scratch};
use targon_engine::ops::attention::{KvCache, Segment};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

fn pool() -> Pool {
    Pool::new(2, Isa::best()).unwrap()
}

fn logits(dir: &Path, dtype: Option<Dtype>) -> Result<Vec<u32>, String> {
    let pool = pool();
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    let decoder = Decoder::load(&checkpoint, dtype, &pool, |_, _| {}).map_err(|e| e.to_string())?;
    let turn = pool.turn();
    let mut cache = KvCache::new(decoder.spec.kv_dims(), decoder.dtype, 1).unwrap();
    let segment = Segment { rows: 0..5, start: 0, blocks: vec![0] };
    let mut scratch = Scratch::new(&decoder);
    decoder.forward(&turn, &mut cache, &[7, 200, 3, 259, 8], &[segment], &mut scratch).unwrap();
    let rows = decoder.final_rows(&turn, &[4], &scratch);
    let mut out = Vec::new();
    decoder.logits(&turn, &rows, &mut out);
    Ok(out.into_iter().map(f32::to_bits).collect())
}

fn write_gguf(dir: &Path, config: &Value, path: &Path, dtype: GgmlDType) {
    common::gguf::of_checkpoint(dir, config, dtype).write(path);
}

fn wide_config(tied: bool) -> Value {
    let mut config = common::tiny_config();
    // Rows of 256 fill whole blocks of the K types.
    config["hidden_size"] = json!(256);
    config["intermediate_size"] = json!(256);
    config["num_attention_heads"] = json!(16);
    config["tie_word_embeddings"] = json!(tied);
    config
}

#[test]
fn gguf_gives_the_same_bits_as_safetensors_and_every_type_loads() {
    for tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let config = wide_config(tied);
        common::write_checkpoint(dir.path(), &config, 1);
        let truth = logits(dir.path(), None).unwrap();
        let path = dir.path().join("m.gguf");
        for dtype in [GgmlDType::F32, GgmlDType::BF16] {
            write_gguf(dir.path(), &config, &path, dtype);
            assert_eq!(logits(&path, None).unwrap(), truth, "{dtype:?} tied {tied}");
        }
        for dtype in [
            GgmlDType::F16,
            GgmlDType::Q8_0,
            GgmlDType::Q6K,
            GgmlDType::Q5K,
            GgmlDType::Q5_1,
            GgmlDType::Q5_0,
            GgmlDType::Q4K,
            GgmlDType::Q4_1,
            GgmlDType::Q4_0,
        ] {
            write_gguf(dir.path(), &config, &path, dtype);
            let likeness = cosine(&logits(&path, None).unwrap(), &truth);
            assert!(likeness > 0.9, "{dtype:?} tied {tied}: cosine {likeness}");
        }
        write_gguf(dir.path(), &config, &path, GgmlDType::Q2K);
        let error = logits(&path, None).unwrap_err();
        assert!(error.contains("type Q2_K is not supported; F32, F16, BF16, Q4_0"), "{error}");
    }
}

fn cosine(a: &[u32], b: &[u32]) -> f64 {
    let value = |x: &u32| f64::from(f32::from_bits(*x));
    let dot = |a: &[u32], b: &[u32]| a.iter().zip(b).map(|(a, b)| value(a) * value(b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn f16_and_f32_checkpoints_keep_or_choose_their_type() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 2);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let dtype = |checkpoint: &Checkpoint, wanted| {
        Decoder::load(checkpoint, wanted, &pool(), |_, _| {}).unwrap().dtype
    };
    assert_eq!(dtype(&checkpoint, None), Dtype::Bf16);
    assert_eq!(dtype(&checkpoint, Some(Dtype::F16)), Dtype::F16);
    for (largest, want) in [(1.0, Dtype::F16), (70_000.0, Dtype::Bf16)] {
        let dir = tempfile::tempdir().unwrap();
        common::write_checkpoint(dir.path(), &common::tiny_config(), 2);
        rewrite(dir.path(), |name, values| {
            if name == "model.norm.weight" {
                values[0] = largest;
            }
        });
        assert_eq!(dtype(&Checkpoint::open(dir.path()).unwrap(), None), want);
    }
}

/// Rewrites the checkpoint's tensors as f32 after `change`.
fn rewrite(dir: &Path, change: impl Fn(&str, &mut Vec<f32>)) {
    use safetensors::tensor::{Dtype as Safe, TensorView};
    let checkpoint = Checkpoint::open(dir).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = checkpoint
        .tensors()
        .map(|t| {
            let mut values: Vec<f32> = Vec::new();
            let mut row = vec![0; t.cols()];
            for r in 0..t.rows() {
                t.read_row(r, Dtype::Bf16, &mut row).unwrap();
                values.extend(row.iter().map(|b| Dtype::Bf16.widen(*b)));
            }
            change(&t.name, &mut values);
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (t.name.clone(), t.shape.clone(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Safe::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// What loading says after `break_it` changed a good checkpoint.
fn failure(break_it: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    break_it(dir.path());
    match Model::load(dir.path(), None, &pool(), |_, _| {}) {
        Ok(_) => panic!("a broken checkpoint was loaded"),
        Err(e) => e.to_string(),
    }
}

fn edit_config(dir: &Path, key: &str, value: Value) {
    let mut config = common::tiny_config();
    config[key] = value;
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn broken_checkpoints_are_refused_by_file_and_name() {
    let weights = "model.safetensors";
    let truncate = |dir: &Path| {
        let bytes = std::fs::read(dir.join(weights)).unwrap();
        std::fs::write(dir.join(weights), &bytes[..bytes.len() - 10]).unwrap();
    };
    let write = |name: &'static str, text: &'static str| {
        move |dir: &Path| std::fs::write(dir.join(name), text).unwrap()
    };
    let index = |dir: &Path| {
        let map = json!({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}});
        std::fs::write(dir.join("model.safetensors.index.json"), map.to_string()).unwrap();
    };
    let escape = |dir: &Path| {
        let map = json!({"weight_map": {"model.norm.weight": "../../etc/passwd"}});
        std::fs::write(dir.join("model.safetensors.index.json"), map.to_string()).unwrap();
    };
    let nan = |dir: &Path| {
        rewrite(dir, |name, values| {
            if name.contains("layers.1.mlp.up_proj") {
                values[70] = f32::NAN;
            }
        });
    };
    let cases: Vec<(String, &str)> = vec![
        (failure(truncate), "model.safetensors: not a whole safetensors file"),
        (failure(|d| std::fs::remove_file(d.join(weights)).unwrap()), "cannot read"),
        (failure(index), "lists shard `model-00002-of-00002.safetensors`, which is missing"),
        (failure(escape), "`weight_map.model.norm.weight` must be a file name"),
        (failure(write("config.json", "{")), "config.json: not valid JSON"),
        (failure(write("tokenizer.json", "{}")), "tokenizer.json: not a tokenizer"),
        (failure(|d| edit_config(d, "model_type", json!("mamba"))), "`model_type` = mamba is not"),
        (
            failure(|d| edit_config(d, "num_hidden_layers", json!(3))),
            "tensor `model.layers.2.input_layernorm.weight`",
        ),
        (
            failure(|d| edit_config(d, "intermediate_size", json!(128))),
            "expected shape [128, 64], got [96, 64]",
        ),
        (failure(|d| edit_config(d, "tie_word_embeddings", json!(false))), "`lm_head.weight` in"),
        (failure(nan), "tensor `model.layers.1.mlp.up_proj.weight` in"),
        (
            failure(write("tokenizer_config.json", "{\"chat_template\": \"{% if %}\"}")),
            "tokenizer_config.json: chat template:",
        ),
    ];
    for (got, want) in cases {
        assert!(got.contains(want), "expected `{want}` in `{got}`");
    }
}

#[test]
fn a_logit_that_is_not_finite_fails_that_request_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = common::tiny_config();
    config["tie_word_embeddings"] = json!(false);
    common::write_checkpoint(dir.path(), &config, 3);
    // After token 65 the final row points along dimension 5, where one logit then overflows.
    rewrite(dir.path(), |name, values| match name {
        "model.embed_tokens.weight" => values[65 * 64 + 5] = 1e4,
        "lm_head.weight" => values[9 * 64 + 5] = 1e38,
        _ => {}
    });
    let pool = pool();
    let model = Model::load(dir.path(), Some(Dtype::Bf16), &pool, |_, _| {}).unwrap();
    let clock = targon_engine::clock::Clock::system();
    let engine =
        targon_engine::engine::Engine::start(model, pool, common::options(), clock).unwrap();
    let mut bad = engine.submit(Request::greedy(vec![1, 65], 5)).unwrap();
    let good = engine.submit(Request::greedy(vec![1, 2], 5)).unwrap();
    assert_eq!(bad.next_blocking(), Some(Event::Fault(Fault::NotFinite { position: 1 })));
    assert_eq!(good.collect_blocking().unwrap().0.len(), 5);
}
