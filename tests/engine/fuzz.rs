//! Fuzz targets for whatever parses the bytes of strangers, in bolero's harness: as tests, each
//! runs on random inputs for a second.

use crate::common;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::LazyLock;
use targon_engine::chain::error::ExtrinsicRefusal;
use targon_engine::chain::keys::Hotkey;
use targon_engine::chain::{epistula, keyfile};
use targon_engine::config::models_toml;
use targon_engine::models::Model;
use targon_engine::models::chat::ChatTemplate;
use targon_engine::models::checkpoint::{Checkpoint, Index};
use targon_engine::models::config::families;
use targon_engine::models::error::LoadError;
use targon_engine::models::gguf::{HEADER_BYTES_MAX, Header};
use targon_engine::models::{config, header};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;
use targon_engine::proof::commit::ResidueChunk;
use targon_engine::proof::toploc;
use targon_engine::server::door::models::WantedModels;
use targon_engine::verify::answer::Answer;
use targon_engine::wire::openai::{ChatRequest, CompletionRequest};

#[test]
fn request_bodies() {
    bolero::check!().for_each(|bytes: &[u8]| {
        // Parsing either fails or gives something that can be printed.
        if let Ok(request) = serde_json::from_slice::<ChatRequest>(bytes) {
            assert!(!format!("{request:?}").is_empty());
        }
        if let Ok(request) = serde_json::from_slice::<CompletionRequest>(bytes) {
            assert!(!format!("{request:?}").is_empty());
        }
    });
}

#[test]
fn chat_templates() {
    bolero::check!().with_type::<(String, String)>().for_each(|(source, content)| {
        let tokens = (String::new(), String::new());
        if let Ok(template) = ChatTemplate::compile(Path::new("t"), source, tokens) {
            let variables = json!({"messages": [{"role": "user", "content": content}]});
            let text = template.render(variables.as_object().unwrap().clone(), 0);
            assert!(text.is_err() || text.unwrap().len() <= 32 << 20);
        }
    });
}

/// A JSON value out of random numbers.
fn json_of(kind: u8, number: i64) -> Value {
    match kind % 12 {
        0 => Value::Null,
        1 => json!(number > 0),
        2 => json!(number % 300),
        3 => json!(number),
        4 => json!(number as u64),
        5 => json!(number as f64 / 1e3),
        6 => json!(number.to_string()),
        7 => json!([number, null]),
        8 => json!({"type": "linear", "factor": number}),
        9 => json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": number % 9,
            "high_freq_factor": 4, "original_max_position_embeddings": 64}),
        10 => json!(["LlamaForCausalLM"]),
        _ => json!(["sliding_attention", "full_attention"]),
    }
}

#[test]
fn model_configurations() {
    let families: Vec<&str> = families().map(|family| family.name).collect();
    const KEYS: [&str; 28] = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "layer_types",
        "architectures",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "query_pre_attn_scalar",
        "norm_topk_prob",
        "quantization_config",
        "final_logit_softcapping",
    ];
    bolero::check!().with_type::<(u8, Vec<(u8, u8, i64)>, Vec<u8>)>().for_each(
        |(family, changes, bytes)| {
            let mut json = json!({
                "model_type": families[usize::from(*family) % families.len()], "vocab_size": 100,
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
                "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            });
            for (key, kind, number) in changes {
                json[KEYS[usize::from(*key) % KEYS.len()]] = json_of(*kind, *number);
            }
            let whole: Value = serde_json::from_slice(bytes).unwrap_or_default();
            for json in [&json, &whole] {
                match config::parse(Path::new("config.json"), json) {
                    Ok(spec) => {
                        assert_eq!(spec.attention.windows.len(), spec.layers);
                        assert!(spec.vocab > 0 && spec.qkv_rows() > 0);
                    }
                    Err(e) => assert!(e.to_string().starts_with("config.json: "), "{e}"),
                }
            }
        },
    );
}

#[test]
fn safetensors_headers() {
    const TYPES: [&str; 6] = ["F32", "BF16", "F16", "I64", "F4", "none"];
    type Tensor = (u8, u8, Vec<u16>, u16, u16);
    bolero::check!().with_type::<(Vec<Tensor>, Vec<u8>, Option<u64>)>().for_each(
        |(tensors, data, length)| {
            let entry = |(name, kind, shape, start, stop): &Tensor| {
                let dtype = TYPES[usize::from(*kind) % TYPES.len()];
                let offsets = [start, stop];
                let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
                format!("\"{name}\":{entry}")
            };
            // Random offsets hardly ever fit: the second header has those that do.
            let mut at = 0;
            let fitting: Vec<Tensor> = tensors
                .iter()
                .enumerate()
                .map(|(i, (_, kind, shape, ..))| {
                    let kind = kind % 2;
                    let shape: Vec<u16> = shape.iter().take(2).map(|d| d % 9).collect();
                    let count = shape.iter().product::<u16>() * if kind == 0 { 4 } else { 2 };
                    at += count;
                    (i as u8, kind, shape, at - count, at)
                })
                .take(50)
                .collect();
            for tensors in [tensors, &fitting] {
                let list: Vec<String> = tensors.iter().map(entry).collect();
                let header = format!("{{{}}}", list.join(","));
                let length = length.unwrap_or(header.len() as u64);
                let mut file = length.to_le_bytes().to_vec();
                file.extend(header.as_bytes());
                file.extend(data);
                let fits = tensors.len() == fitting.len() && tensors == &fitting;
                if fits && length == header.len() as u64 {
                    file.resize(8 + header.len() + usize::from(at), 0);
                }
                match read_header(&file) {
                    Ok(entries) => {
                        assert!(entries.iter().all(|e| e.range.end <= file.len() as u64));
                        let bytes: u64 = entries.iter().map(|e| e.range.end - e.range.start).sum();
                        assert!(bytes <= file.len() as u64 - 8);
                    }
                    Err(e) => assert!(!e.to_string().is_empty()),
                }
            }
            if let Ok(entries) = read_header(data) {
                assert!(entries.iter().all(|e| e.range.end <= data.len() as u64));
            }
        },
    );
}

fn read_header(file: &[u8]) -> Result<Vec<header::TensorEntry>, LoadError> {
    header::read(Path::new("m"), file.len() as u64, |bytes, at| {
        bytes.copy_from_slice(&file[at as usize..][..bytes.len()]);
        Ok(())
    })
}

#[test]
fn safetensors_indexes() {
    bolero::check!().with_type::<(Vec<(String, String)>, Vec<u8>)>().for_each(|(map, bytes)| {
        let map: serde_json::Map<String, Value> =
            map.iter().map(|(tensor, shard)| (tensor.clone(), json!(shard))).collect();
        let whole: Value = serde_json::from_slice(bytes).unwrap_or_default();
        for json in [json!({"weight_map": map}), json!({"weight_map": whole}), whole] {
            if let Ok(index) = Index::parse(Path::new("i"), &json) {
                for shard in index.shards() {
                    let inside = Path::new("d").join(shard);
                    assert_eq!(inside.parent(), Some(Path::new("d")), "{shard:?}");
                }
            }
        }
    });
}

#[test]
fn proofs() {
    bolero::check!().with_type::<(Vec<u8>, u8)>().for_each(|(bytes, rows)| {
        if let Ok(chunk) = ResidueChunk::from_bytes(bytes, usize::from(*rows)) {
            assert_eq!(chunk.sketches.len(), usize::from(*rows));
        }
        if let Ok(proof) = toploc::Proof::from_bytes(bytes, toploc::TOP_K) {
            assert_eq!(proof.to_bytes(), *bytes);
        }
    });
}

#[test]
fn answers() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return };
        // Whatever it is, it is an answer with tokens or it is refused.
        for answer in [
            Answer::of_response(&value, 0),
            Answer::of_stream(std::slice::from_ref(&value), 0),
            Answer::of_response(&json!({"choices": [{"index": 0, "token_ids": value}]}), 0),
        ] {
            assert!(answer.is_err() || !answer.unwrap().ids.is_empty());
        }
    });
}

#[test]
fn model_files() {
    bolero::check!().with_type::<String>().for_each(|text| {
        if let Err(e) = models_toml::parse(Path::new("models.toml"), text, &[]) {
            assert!(e.to_string().starts_with("models.toml: "));
        }
    });
}

#[test]
fn signed_headers() {
    bolero::check!().with_type::<(String, String, String, Vec<u8>)>().for_each(
        |(time, name, signature, body)| {
            let (time, name) = (epistula::timestamp(time), epistula::uuid(name));
            let signature = epistula::signature(signature);
            if let (Some(timestamp_ms), Some(uuid)) = (time, name) {
                let envelope = epistula::Envelope { timestamp_ms, uuid, signed_for: None };
                let message = envelope.message(body);
                assert_eq!(message.iter().filter(|b| **b == b'.').count(), 3);
                // Nobody's key has signed this.
                let zeros = signature.unwrap_or([0; 64]);
                assert!(!envelope.verify(&Hotkey([3; 32]), body, &zeros));
            }
        },
    );
}

#[test]
fn lists_of_models() {
    bolero::check!().for_each(|bytes: &[u8]| {
        if let Ok(asked) = WantedModels::read(&Default::default(), bytes, 0) {
            assert!(asked.models.len() <= 256);
        }
    });
}

#[test]
fn key_files() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let _ = keyfile::is_encrypted(bytes);
        if let Ok(key) = keyfile::public_key(bytes) {
            assert_eq!(key.to_string().parse(), Ok(key));
        }
        assert!(keyfile::keypair(bytes).is_err(), "no random bytes hold a matching key");
    });
}

#[test]
fn refusals_of_nodes() {
    bolero::check!().with_type::<String>().for_each(|text| {
        let refusal = ExtrinsicRefusal::of_pool(text);
        assert!(!refusal.to_string().is_empty());
        let _ = (refusal.custom_code(), refusal.is_passing());
    });
}

#[test]
fn gguf_headers() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let file = [b"GGUF\x03\0\0\0", bytes].concat();
        if let Ok(header) = Header::read(&file[..], file.len() as u64) {
            assert!(header.data <= HEADER_BYTES_MAX + header.alignment);
            assert!(header.tensors.iter().all(|t| !t.shape.contains(&0)));
        }
    });
}

/// A tiny GGUF file, where its tensors begin, a place for changed ones, and threads to load them.
static GGUF: LazyLock<(Vec<u8>, usize, tempfile::TempDir, Pool)> = LazyLock::new(|| {
    let bytes = common::gguf::tiny(1, true).bytes();
    let data = Header::read(&bytes[..], bytes.len() as u64).unwrap().data as usize;
    (bytes, data, tempfile::tempdir().unwrap(), Pool::new(2, Isa::best()).unwrap())
});

/// Changes `bytes` at `at` in one of four ways.
fn damage(bytes: &mut Vec<u8>, at: usize, way: u8, value: u8) {
    const NUMBERS: [u64; 10] =
        [0, 1, 2, 33, 1 << 16, 1 << 31, 1 << 32, 1 << 62, u64::MAX - 31, u64::MAX];
    let number = NUMBERS[usize::from(value) % NUMBERS.len()].to_le_bytes();
    let mut put = |new: &[u8]| {
        let end = (at + new.len()).min(bytes.len());
        bytes[at.min(end)..end].copy_from_slice(&new[..end - at.min(end)]);
    };
    match way % 16 {
        0..9 => put(&[value]),
        9..12 => put(&number[..4]),
        12..15 => put(&number),
        _ => bytes.truncate(at),
    }
}

#[test]
fn gguf_files() {
    bolero::check!().with_type::<Vec<(u16, u8, u8)>>().for_each(|changes| {
        let (good, data, dir, pool) = &*GGUF;
        let mut bytes = good.clone();
        for (at, way, value) in changes.iter().take(4) {
            damage(&mut bytes, usize::from(*at) % data, *way, *value);
        }
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, bytes).unwrap();
        // Whatever it is, it is a model or it is refused with the file's name.
        match Model::load(&path, None, pool, |_, _| {}) {
            Ok(model) => assert_eq!(model.spec.hidden, 64),
            Err(e) => assert!(e.to_string().contains("m.gguf"), "{e}"),
        }
    });
}

/// Configuration and weights.
type Quantised = (Value, Vec<u8>);

/// The checkpoints of quantised matrices, and a place for changed ones.
static QUANTISED: LazyLock<(Vec<Quantised>, tempfile::TempDir)> = LazyLock::new(|| {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/quantised");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        let config = std::fs::read(path.join("config.json")).unwrap();
        let weights = std::fs::read(path.join("model.safetensors")).unwrap();
        (serde_json::from_slice(&config).unwrap(), weights)
    };
    let all = std::fs::read_dir(data).unwrap().map(read).collect();
    (all, tempfile::tempdir().unwrap())
});

/// Swaps the sizes of a tensor of two dimensions, or puts `value` at `at` of the data.
fn reshape(weights: &mut [u8], (at, way, value): (u16, u8, u8)) {
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let (text, data) = weights[8..].split_at_mut(header - 8);
    let opening = b"\"shape\":[";
    let shapes: Vec<usize> = (0..text.len()).filter(|i| text[*i..].starts_with(opening)).collect();
    let start = shapes[usize::from(at) % shapes.len()] + opening.len();
    let len = text[start..].iter().position(|b| *b == b']').unwrap();
    match way % 4 {
        0 => text[start..start + len].rotate_left(usize::from(value) % len.max(1)),
        1 => {
            let sizes = std::str::from_utf8(&text[start..start + len]).unwrap();
            let other: Vec<&str> = sizes.split(',').rev().collect();
            let other = other.join(",");
            text[start..start + len].copy_from_slice(other.as_bytes());
        }
        _ => data[usize::from(at) % data.len()] = value,
    }
}

#[test]
fn quantised_safetensors() {
    type Change = (u8, u8, i64, Vec<(u16, u8, u8)>);
    bolero::check!().with_type::<Change>().for_each(|(which, kind, number, changes)| {
        let (all, dir) = &*QUANTISED;
        let (mut config, mut weights) = all[usize::from(*which) % all.len()].clone();
        let said = config["quantization_config"].as_object_mut().unwrap();
        let key = said.keys().nth(usize::from(*kind) % said.len()).unwrap().clone();
        if number % 3 == 0 {
            said.insert(key, json_of(*kind, *number));
        }
        changes.iter().take(3).for_each(|change| reshape(&mut weights, *change));
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), &weights).unwrap();
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return };
        let Ok(matrix) = checkpoint.tensor("m.weight") else { return };
        let mut row = vec![0; matrix.cols()];
        for number in 0..matrix.rows().min(40) {
            let whole = matrix.read_row(number, Dtype::F16, &mut row);
            let col = number % matrix.cols().max(1);
            let element = matrix.element(number, col);
            assert!(element.is_ok() || whole.is_err(), "{number}: {element:?}");
            if let (Ok(element), Ok(())) = (element, whole) {
                assert_eq!(Dtype::F16.round(element), row[col], "{number}, {col}");
            }
        }
    });
}
