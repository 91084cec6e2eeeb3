//! Checkpoints as users have them: GGUF against safetensors, every quantised type, broken files.

use crate::common;
use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use targon_engine::engine::output::{Event, Fault};
use targon_engine::engine::request::Request;
use targon_engine::models::Model;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::config::families;
use targon_engine::models::cpu::CpuPass;
use targon_engine::models::cpu::decoder::Decoder;
use targon_engine::models::family::Family;
use targon_engine::models::pass::{Batch, Pass, RowAsk};
use targon_engine::models::tokenizer::TextTokenizer;
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

fn pool() -> Pool {
    Pool::new(2, Isa::best()).unwrap()
}

fn logits(dir: &Path, dtype: Option<Dtype>) -> Result<Vec<u32>, String> {
    let pool = pool();
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    let decoder = common::decoder(&checkpoint, dtype, &pool).map_err(|e| e.to_string())?;
    let mut pass = CpuPass::new(&Arc::new(decoder), &pool, 1).unwrap();
    let ask = RowAsk { logits: true, ..RowAsk::new(4, 4) };
    let reports = pass.step(&Batch::of(&[7, 200, 3, 259, 8], 0), &[ask]).unwrap();
    let report = reports.into_iter().next().unwrap().unwrap();
    Ok(report.logits.unwrap().into_iter().map(f32::to_bits).collect())
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
        common::decoder(checkpoint, wanted, &pool()).unwrap().dtype
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
        std::fs::remove_file(dir.join(weights)).unwrap();
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
            "tensor `model.layers.2.self_attn.q_proj.weight`",
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
fn files_that_lie_about_themselves_are_refused() {
    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
        oid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0002f74190d6caea8\nsize 12345\n";
    let write = |name: &'static str, text: String| {
        failure(move |dir: &Path| std::fs::write(dir.join(name), text).unwrap())
    };
    let index = "model.safetensors.index.json";
    for name in ["model.safetensors", "tokenizer.json", "config.json", index] {
        let error = write(name, POINTER.into());
        assert!(error.contains(&format!("{name}: is a Git LFS pointer")), "{error}");
    }
    let with_id = |id: u32| {
        let mut json = common::tokenizer_json();
        json["model"]["vocab"]["\u{100}\u{100}"] = json!(id);
        json["added_tokens"] = json!([]);
        json.to_string()
    };
    let mut gap = common::tokenizer_json();
    gap["added_tokens"][0]["id"] = json!(999);
    let mut deep = common::tokenizer_json().to_string();
    deep.truncate(deep.len() - 1);
    deep = format!("{deep},\"normalizer\":{}", "[".repeat(100_000));
    let long = |length: u64| {
        failure(move |dir: &Path| {
            let path = dir.join("model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            std::fs::write(path, bytes).unwrap();
        })
    };
    for (got, want) in [
        (long(1 << 62), "not a whole safetensors file"),
        (long(u64::MAX), "its header has 18446744073709551615 bytes"),
        (write("tokenizer.json", with_id(u32::MAX)), "ids must lie below 4194304, token `"),
        (write("tokenizer.json", gap.to_string()), "without a gap, `<|end|>` has 999"),
        (write("tokenizer.json", deep), "tokenizer.json: not a tokenizer: recursion limit"),
        (write("config.json", "[".repeat(100_000)), "config.json: not valid JSON: recursion"),
        (write("config.json", "[]".into()), "config.json: must be an object"),
        (
            write("config.json", r#"{"vocab_size": 1, "vocab_size": 2}"#.into()),
            "config.json: not valid JSON: the key `vocab_size` stands twice in an object",
        ),
        (
            write(index, r#"{"weight_map": {"a": "b", "a": "c"}}"#.into()),
            "index.json: not valid JSON: the key `a` stands twice",
        ),
    ] {
        assert!(got.contains(want), "expected `{want}` in `{got}`");
    }
}

#[test]
fn end_tokens_are_read_or_refused() {
    for value in [json!("4"), json!(4.0), json!(-1), json!(9999), json!(true), json!([4, "5"])] {
        let want = format!("`eos_token_id` must be an id below 261 or a list of such, got {value}");
        let error = failure(|dir| edit_config(dir, "eos_token_id", value.clone()));
        assert!(error.contains(&format!("config.json: {want}")), "{error}");
        let error = failure(|dir| {
            let json = json!({"eos_token_id": value}).to_string();
            std::fs::write(dir.join("generation_config.json"), json).unwrap();
        });
        assert!(error.contains(&format!("generation_config.json: {want}")), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    edit_config(dir.path(), "eos_token_id", json!(null));
    let generation = json!({"eos_token_id": [7, 260]}).to_string();
    std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
    let model = Model::load(dir.path(), None, &pool(), |_, _| {}).unwrap();
    assert_eq!(model.text.stop_ids, [7, 260]);
}

#[test]
fn llama_tokenizers_add_what_their_configuration_says() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    let encode = |config: Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tokenizer = TextTokenizer::load(&checkpoint).map_err(|e| e.to_string())?;
        Ok::<_, String>((tokenizer.encode("a", true).unwrap(), tokenizer.is_special(65)))
    };
    let class = "LlamaTokenizer";
    for (config, want) in [
        (json!({"bos_token": "<|end|>"}), (vec![97], false)),
        (json!({"tokenizer_class": class, "bos_token": "<|end|>"}), (vec![260, 97], false)),
        (
            json!({"tokenizer_class": class, "bos_token": "<|end|>", "add_bos_token": false,
                "eos_token": {"content": "<|end|>"}, "add_eos_token": true}),
            (vec![97, 260], false),
        ),
        // A token of the vocabulary becomes special by its name.
        (json!({"unk_token": "A"}), (vec![97], true)),
    ] {
        assert_eq!(encode(config.clone()), Ok(want), "{config}");
    }
    let error = encode(json!({"tokenizer_class": class, "bos_token": "<none>"})).unwrap_err();
    assert!(error.contains("tokenizer_config.json: `add_bos_token` is true, but"), "{error}");
}

/// The tensors of a checkpoint: type, shape and bytes by name.
type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

fn stored(dir: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
            tensors.insert(name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        }
    }
    tensors
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// What packing a checkpoint with these tensors says.
fn packed(config: &Path, tensors: &Tensors) -> Result<Decoder, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(config.join("config.json"), dir.path().join("config.json")).unwrap();
    write_tensors(&dir.path().join("model.safetensors"), tensors);
    let checkpoint = Checkpoint::open(dir.path()).map_err(|e| e.to_string())?;
    common::decoder(&checkpoint, None, &pool()).map_err(|e| e.to_string())
}

/// What has no golden checkpoint is not compared with a reference.
#[test]
fn every_family_has_a_golden_checkpoint_of_its_class() {
    for Family { name, class, .. } in families() {
        assert!(common::FAMILIES.contains(name), "{name}");
        let config = std::fs::read(common::golden(name).join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["architectures"], json!([class]), "{name}");
    }
}

#[test]
fn a_checkpoint_has_the_tensors_of_its_configuration_and_no_others() {
    for family in std::fs::read_dir(common::golden("")).unwrap().map(|e| e.unwrap().path()) {
        let tensors = stored(&family);
        let spec = packed(&family, &tensors).unwrap().spec;
        let mut names = spec.tensor_names();
        names.remove("rope_freqs.weight");
        assert!(names.iter().eq(tensors.keys()), "{family:?}");
        // Each listed name is one that loading takes.
        for name in names {
            let mut fewer = tensors.clone();
            fewer.remove(&name).unwrap();
            let error = packed(&family, &fewer).err().unwrap_or_else(|| panic!("{name}"));
            assert!(error.contains(&format!("tensor `{name}`")), "{error}");
        }
        let some = tensors["model.norm.weight"].clone();
        let layer = "model.layers.0";
        for (name, is_let_go) in [
            ("lm_head.bias".to_owned(), false),
            ("score.weight".to_owned(), false),
            (format!("{layer}.mlp.down_proj.bias"), false),
            (format!("{layer}.self_attn.q_proj.weight_scale"), false),
            (format!("{layer}.self_attn.sinks"), false),
            (format!("model.layers.{}.input_layernorm.weight", spec.layers), false),
            (format!("{layer}.self_attn.rotary_emb.inv_freq"), true),
            ("model.position_ids".to_owned(), true),
        ] {
            let mut more = tensors.clone();
            more.insert(name.clone(), some.clone());
            match packed(&family, &more) {
                Ok(_) => assert!(is_let_go, "{name} was ignored"),
                Err(e) => {
                    assert!(!is_let_go && e.contains(&format!("tensor `{name}`")), "{e}");
                    assert!(e.contains("is no part of a"), "{e}");
                }
            }
        }
        let mask = (safetensors::Dtype::BOOL, vec![1], vec![1]);
        let mut more = tensors.clone();
        more.insert("model.layers.0.self_attn.masked_bias".into(), mask);
        packed(&family, &more).unwrap();
    }
}

#[test]
fn a_stored_head_must_be_the_embedding_that_it_is_tied_to() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    let mut tensors = stored(dir.path());
    let head = tensors["model.embed_tokens.weight"].clone();
    tensors.insert("lm_head.weight".into(), head.clone());
    packed(dir.path(), &tensors).unwrap();
    let mut other = head;
    other.2[1001] ^= 1;
    tensors.insert("lm_head.weight".into(), other);
    let error = packed(dir.path(), &tensors).err().unwrap();
    assert!(
        error.contains("`lm_head.weight`") && error.contains("differs from the emb"),
        "{error}"
    );
}

#[test]
fn an_index_says_what_is_there() {
    let (norm, shard) = ("model.norm.weight", "model-00001-of-00002.safetensors");
    let single = "model.safetensors";
    // A checkpoint in two shards; `change` gets the index and the directory.
    let open = |change: &dyn Fn(&mut Value, &Path)| {
        let dir = tempfile::tempdir().unwrap();
        common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
        let mut tensors = stored(dir.path());
        let other = "model-00002-of-00002.safetensors";
        let mut map: serde_json::Map<String, Value> =
            tensors.keys().map(|name| (name.clone(), json!(other))).collect();
        map.insert(norm.into(), json!(shard));
        let first = Tensors::from([(norm.to_owned(), tensors.remove(norm).unwrap())]);
        write_tensors(&dir.path().join(shard), &first);
        write_tensors(&dir.path().join(other), &tensors);
        std::fs::rename(dir.path().join(single), dir.path().join("aside")).unwrap();
        let mut index = json!({"weight_map": map});
        change(&mut index, dir.path());
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        Checkpoint::open(dir.path()).map(|c| c.tensors().count()).map_err(|e| e.to_string())
    };
    assert_eq!(open(&|_, _| {}), Ok(20));
    let stale = |_: &mut Value, dir: &Path| {
        std::fs::rename(dir.join("aside"), dir.join(single)).unwrap();
    };
    let error = open(&stale).unwrap_err();
    assert!(error.contains("index.json: does not list `model.safetensors`, which"), "{error}");
    let agreeing = |index: &mut Value, dir: &Path| {
        stale(index, dir);
        for shard in index["weight_map"].as_object_mut().unwrap().values_mut() {
            *shard = json!(single);
        }
    };
    assert_eq!(open(&agreeing), Ok(20));
    let embed = "model.embed_tokens.weight";
    for (name, place, want) in [
        (norm, json!("model-00002-of-00002.safetensors"), "which has no such tensor"),
        (embed, json!(shard), "says that `model.embed_tokens.weight` is in `model-00001"),
        (embed, Value::Null, "`weight_map.model.embed_tokens.weight` must be a file name"),
        ("more", json!(shard), "says that `more` is in `model-00001-of-00002.safetensors`"),
    ] {
        let error = open(&|index, _| index["weight_map"][name] = place.clone()).unwrap_err();
        assert!(error.contains(want), "expected `{want}` in `{error}`");
    }
    let unlisted = |index: &mut Value, _: &Path| {
        index["weight_map"].as_object_mut().unwrap().remove(embed);
    };
    let error = open(&unlisted).unwrap_err();
    assert!(error.contains("does not list `model.embed_tokens.weight`, which"), "{error}");
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
    assert_eq!(good.collect_blocking().unwrap().steps.len(), 5);
}
