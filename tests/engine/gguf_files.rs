//! GGUF files that lie, contradict themselves or come in parts, and weight files that change under
//! a model that is being loaded or served.

use crate::common::gguf::{GgufFile, Meta, tiny, tokens, write_parts};
use crate::common::{self, Noise};
use serde_json::json;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use targon_engine::clock::Clock;
use targon_engine::engine::Engine;
use targon_engine::engine::output::{Event, Fault};
use targon_engine::engine::request::Request;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::{Identity, Model, root};
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

fn pool() -> Pool {
    Pool::new(2, Isa::best()).unwrap()
}

fn load(path: &Path) -> Result<Model, String> {
    Model::load(path, None, &pool(), |_, _| {}).map_err(|e| e.to_string())
}

/// What loading a file of these bytes says.
fn outcome(bytes: &[u8]) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    load(&path)
}

fn refused(bytes: &[u8]) -> String {
    outcome(bytes).err().expect("a bad file was loaded")
}

/// What loading says after `change` to a good file.
fn changed(change: impl FnOnce(&mut GgufFile)) -> Result<Model, String> {
    let mut file = tiny(3, true);
    change(&mut file);
    outcome(&file.bytes())
}

fn expect_refusals(cases: Vec<(&str, Result<Model, String>, &str)>) {
    for (what, got, want) in cases {
        let got = got.err().unwrap_or_else(|| panic!("{what}: the file was loaded"));
        assert!(got.contains(want), "{what}: expected `{want}` in `{got}`");
    }
}

#[test]
fn lengths_are_checked_before_memory_is_taken() {
    let bytes = tiny(3, true).bytes();
    let with = |at: usize, value: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        Err(refused(&bytes))
    };
    let list = |kind: u32, count: u64| {
        let mut raw = kind.to_le_bytes().to_vec();
        raw.extend(count.to_le_bytes());
        changed(|f| f.metadata.insert(0, ("x".into(), Meta::Raw(9, raw))))
    };
    let text = Meta::Raw(8, (1_u64 << 62).to_le_bytes().to_vec());
    let shape = |dims: &[u64]| changed(|f| f.tensors[0].shape = dims.to_vec());
    let whole = "not a whole GGUF file";
    // Lists in lists, 100,000 deep.
    let deep = [9_u32.to_le_bytes().to_vec(), 1_u64.to_le_bytes().to_vec()].concat();
    let deep = Meta::Raw(9, deep.repeat(100_000));
    expect_refusals(vec![
        ("2^60 tensors", with(8, 1 << 60), whole),
        ("2^64 - 1 tensors", with(8, u64::MAX), whole),
        ("2^60 keys", with(16, 1 << 60), whole),
        ("a key of 2^62", with(24, 1 << 62), whole),
        ("a text of 2^62", changed(|f| f.metadata.insert(0, ("x".into(), text))), whole),
        ("2^61 texts", list(8, 1 << 61), whole),
        ("2^61 numbers of 8 bytes", list(10, 1 << 61), whole),
        ("2^63 bytes", list(0, 1 << 63), whole),
        ("lists in lists", changed(|f| f.metadata.insert(0, ("x".into(), deep))), "list of lists"),
        ("2^64 elements", shape(&[1 << 32, 1 << 32]), "impossible shape"),
        ("2^63 elements", shape(&[1 << 62, 2]), "truncated?"),
        ("no elements", shape(&[64, 0]), "impossible shape"),
        ("no dimensions", shape(&[]), "0 dimensions; 1 to 4 are supported"),
        ("five dimensions", shape(&[64, 261, 1, 1, 1]), "5 dimensions"),
        ("2^60 layers", changed(|f| f.set("llama.block_count", Meta::U64(1 << 60))), "most"),
    ]);
}

#[test]
fn what_is_not_a_gguf_file_is_named() {
    let bytes = tiny(3, true).bytes();
    let version = |version: u32| {
        let mut bytes = bytes.clone();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        Err(refused(&bytes))
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n";
    expect_refusals(vec![
        ("nothing", outcome(b""), "not a whole GGUF file"),
        ("other bytes", outcome(b"nonsense"), "not a GGUF file: it begins with \"nons\""),
        ("a cut header", outcome(&bytes[..40]), "not a whole GGUF file"),
        ("cut data", outcome(&bytes[..bytes.len() - 100]), "truncated?"),
        ("v1", version(1), "GGUF version 1 is not supported; 2 and 3 are"),
        ("v3 of the other byte order", version(3 << 24), "big-endian"),
        ("a Git LFS pointer", outcome(pointer), "is a Git LFS pointer"),
    ]);
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    std::fs::write(dir.path().join("model.safetensors"), pointer).unwrap();
    let error = load(dir.path()).err().unwrap();
    assert!(error.contains("model.safetensors: is a Git LFS pointer"), "{error}");
}

#[test]
fn a_whole_file_is_loaded_and_every_cut_of_it_is_refused() {
    let bytes = tiny(3, true).bytes();
    let model = outcome(&bytes).unwrap();
    assert_eq!(model.text.stop_ids, [260]);
    assert_eq!(model.text.tokenizer.encode("a the", false).unwrap().len(), 5);
    let mut noise = Noise(7);
    for _ in 0..200 {
        let _ = refused(&bytes[..noise.below(bytes.len())]);
    }
}

#[test]
fn names_offsets_and_alignment_are_checked() {
    let set = |key: &'static str, value: Meta| changed(|f| f.set(key, value));
    let twice = |f: &mut GgufFile| f.metadata.push(("llama.block_count".into(), Meta::U32(1)));
    let offset = |index: usize, offset: u64| {
        changed(|f| {
            f.tensors[index].offset = Some(offset);
        })
    };
    let same = |f: &mut GgufFile| {
        let copy = f.tensors[1].clone();
        f.tensors.push(copy);
    };
    let alias = |f: &mut GgufFile| {
        let (shape, data) = (f.tensors[1].shape.clone(), f.tensors[1].data.clone());
        f.add("model.norm.weight", &shape, 0, data);
    };
    expect_refusals(vec![
        ("a key twice", changed(twice), "the key `llama.block_count` is there twice"),
        ("a tensor twice", changed(same), "tensor `output_norm.weight`"),
        ("two names of one", changed(alias), "means the same as `model.norm.weight`"),
        ("offset 33", offset(2, 33), "its offset must be a multiple of 32, got 33"),
        ("overlap", offset(2, 32), "before `token_embd.weight` ends"),
        ("beyond 2^64", offset(2, u64::MAX - 31), "ends beyond the file"),
        ("alignment 0", set("general.alignment", Meta::U32(0)), "must be a power of two"),
        ("alignment 24", set("general.alignment", Meta::U32(24)), "must be a power of two"),
        ("alignment 2^31", set("general.alignment", Meta::U32(1 << 31)), "must be a power of two"),
        ("alignment \"\"", set("general.alignment", Meta::text("32")), "got \"32\""),
    ]);
    let mut file = tiny(3, true);
    file.set("general.alignment", Meta::U32(4096));
    file.alignment = 4096;
    assert!(outcome(&file.bytes()).is_ok());
}

#[test]
fn tensors_are_refused_that_the_model_does_not_use_or_whose_type_is_not_known() {
    for (name, kind, bytes) in [("unused.weight", 39, 51), ("also.unused", 1234, 18)] {
        let mut file = tiny(3, true);
        file.add(name, &[32], kind, vec![0; bytes]);
        let error = outcome(&file.bytes()).err().unwrap();
        assert!(error.contains(&format!("tensor `{name}`")), "{error}");
        assert!(error.contains("is no part of a llama model of 2 layers"), "{error}");
    }
    let kind = |kind: u32| changed(|f| f.tensors[3].kind = kind);
    let name = "tensor `blk.0.attn_k.weight`";
    let known = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are";
    for (id, what) in [(20, "IQ4_NL"), (24, "I8"), (39, "MXFP4"), (10, "Q2_K"), (77, "number 77")] {
        let error = kind(id).err().unwrap();
        let want = format!("type {what} is not supported; {known}");
        assert!(error.contains(name) && error.contains(&want), "{error}");
    }
    let blocks = changed(|f| f.tensors[3].kind = 12).err().unwrap();
    assert!(blocks.contains("rows of 64 do not fill blocks of Q4K"), "{blocks}");
}

#[test]
fn a_known_key_of_another_type_is_refused() {
    let set = |key: &'static str, value: Meta| changed(|f| f.set(key, value));
    let ids = |values: Vec<i32>| set("tokenizer.ggml.token_type", Meta::I32s(values));
    let many = Meta::Texts((0..262).map(|i| format!("t{i}")).collect());
    let same = Meta::Texts(vec!["a".into(), "b".into(), "a".into()]);
    expect_refusals(vec![
        ("theta NaN", set("llama.rope.freq_base", Meta::F32(f32::NAN)), "positive number, got NaN"),
        ("theta 0", set("llama.rope.freq_base", Meta::F32(0.0)), "must be a positive number"),
        ("scaling type", set("llama.rope.scaling.type", Meta::U32(1)), "must be UTF-8 text, got 1"),
        ("yarn", set("llama.rope.scaling.type", Meta::text("yarn")), "none and linear are"),
        ("add_bos 1", set("tokenizer.ggml.add_bos_token", Meta::U32(1)), "true or false, got 1"),
        ("add_bos", set("tokenizer.ggml.add_bos_token", Meta::text("true")), "got \"true\""),
        ("eos 9999", set("tokenizer.ggml.eos_token_id", Meta::U32(9999)), "one of 261 tokens, got"),
        ("eos -1", set("tokenizer.ggml.eos_token_id", Meta::I32(-1)), "at least 0, got -1"),
        ("few types", ids(vec![1; 260]), "needs 261 entries, got 260"),
        (
            "float types",
            set("tokenizer.ggml.token_type", Meta::F32s(vec![1.0])),
            "list of integers",
        ),
        ("many tokens", set("tokenizer.ggml.tokens", many), "262 tokens, the embedding has 261"),
        (
            "same tokens",
            changed(|f| {
                f.remove("tokenizer.ggml.token_type");
                f.set("tokenizer.ggml.tokens", same);
                f.set("tokenizer.ggml.eos_token_id", Meta::U32(1));
            }),
            "lists \"a\" as 0 and as 2",
        ),
        ("heads", set("llama.attention.head_count", Meta::F32(4.0)), "must be a whole number"),
        ("rotation", set("llama.rope.dimension_count", Meta::U32(8)), "16, the size of a head"),
        ("values", set("llama.attention.value_length", Meta::U32(32)), "16, the size of a head"),
    ]);
    // Any integer type will do.
    let types: Vec<u8> = (0..261).map(|id| if id == 260 { 3 } else { 1 }).collect();
    let model = set("tokenizer.ggml.token_type", Meta::Bytes(types)).unwrap();
    assert!(model.text.tokenizer.is_special(260));
}

#[test]
fn scaling_of_the_rotation_is_honoured_or_refused() {
    let theta = |change: &dyn Fn(&mut GgufFile)| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut file = tiny(3, true);
        change(&mut file);
        file.write(&path);
        Checkpoint::open(&path).map(|c| c.config["rope_scaling"].clone()).map_err(|e| e.to_string())
    };
    let linear = json!({"type": "linear", "factor": 4.0});
    let set = |key: &'static str, value: Meta| theta(&|f| f.set(key, value.clone()));
    // As in llama.cpp, a factor without a type is linear; the second key is its old name.
    assert_eq!(set("llama.rope.scaling.factor", Meta::F32(4.0)).unwrap(), linear);
    assert_eq!(set("llama.rope.scale_linear", Meta::F32(4.0)).unwrap(), linear);
    let none = theta(&|f| {
        f.set("llama.rope.scaling.type", Meta::text("none"));
        f.set("llama.rope.scaling.factor", Meta::F32(4.0));
    });
    assert_eq!(none.unwrap(), json!(null));
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        let error = theta(&|f| f.add(name, &[8], 0, vec![0; 32])).unwrap_err();
        assert!(error.contains(name) && error.contains("longrope is not supported"), "{error}");
    }
}

#[test]
fn llama_3_files_begin_with_their_first_token_unless_they_say_no() {
    let ids = |change: &dyn Fn(&mut GgufFile)| {
        let model = changed(|f| {
            f.set("tokenizer.ggml.bos_token_id", Meta::U32(260));
            change(f);
        });
        model.unwrap().text.tokenizer.encode("a", true).unwrap()
    };
    let pre = |f: &mut GgufFile, name: &str| f.set("tokenizer.ggml.pre", Meta::text(name));
    let add = |f: &mut GgufFile, add| f.set("tokenizer.ggml.add_bos_token", Meta::Bool(add));
    let a = u32::from(b'a');
    for name in ["llama-bpe", "llama3", "llama-v3"] {
        assert_eq!(ids(&|f| pre(f, name)), [260, a], "{name}");
    }
    assert_eq!(ids(&|f| pre(f, "gpt-2")), [a]);
    assert_eq!(
        ids(&|f| {
            pre(f, "llama-bpe");
            add(f, false);
        }),
        [a]
    );
    assert_eq!(ids(&|f| add(f, true)), [260, a]);
    let error = changed(|f| pre(f, "llama-bpe")).err().unwrap();
    assert!(error.contains("`tokenizer.ggml.bos_token_id` is missing"), "{error}");
}

#[test]
fn tokens_that_end_a_turn_are_known_by_their_text() {
    for text in ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>"] {
        let mut all = tokens();
        all[259] = text.to_owned();
        let model = changed(|f| f.set("tokenizer.ggml.tokens", Meta::Texts(all))).unwrap();
        assert_eq!(model.text.stop_ids, [259, 260], "{text}");
        // The file calls it a normal token.
        assert!(model.text.tokenizer.is_special(259));
        assert_eq!(model.text.tokenizer.encode(text, false).unwrap(), [259]);
    }
}

/// The log-probabilities of six greedy tokens.
fn answer(model: Model) -> Vec<(u32, u64)> {
    let engine = Engine::start(model, pool(), common::options(), Clock::system()).unwrap();
    let stream = engine.submit(Request::greedy(vec![7, 200, 3], 6)).unwrap();
    let steps = stream.collect_blocking().unwrap().steps;
    steps.iter().map(|s| (s.token, s.logprob.to_bits())).collect()
}

#[test]
fn parts_are_loaded_together() {
    let whole = tiny(5, false);
    let dir = tempfile::tempdir().unwrap();
    let truth = outcome(&whole.bytes()).unwrap();
    let root = |model: &Model| root::compute(&model.checkpoint, &pool()).unwrap();
    for count in [2, 3, 5] {
        let model = load(&write_parts(dir.path(), &whole.split(count))).unwrap();
        assert_eq!(root(&model), root(&truth), "{count} parts");
    }
    let model = load(&write_parts(dir.path(), &whole.split(2))).unwrap();
    assert_eq!(answer(model), answer(truth));
    // What merging leaves behind.
    let mut merged = whole;
    merged.set("split.count", Meta::U16(0));
    merged.set("split.no", Meta::U16(0));
    assert!(outcome(&merged.bytes()).is_ok());
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    type Change = fn(&mut Vec<GgufFile>);
    let cases: Vec<(Change, &str)> = vec![
        (|p| p[1].set("split.no", Meta::U16(2)), "00002-of-00003.gguf: `split.no` must be 1"),
        (|p| p.swap(1, 2), "`split.no` must be 1, got 2"),
        (|p| p.swap(0, 1), "must be 0, got 1; the first part is the one to name"),
        (|p| p[2].set("split.count", Meta::U16(4)), "`split.count` must be 3, got 4"),
        (|p| p[1].remove("split.count"), "00002-of-00003.gguf: `split.count` is missing"),
        (|p| p[0].remove("split.tensors.count"), "`split.tensors.count` is missing"),
        (|p| drop(p[2].tensors.pop()), "`split.tensors.count` = 20, the parts have 19"),
        (
            |p| {
                let copy = p[0].tensors[0].clone();
                p[2].tensors[0] = copy;
            },
            "00003-of-00003.gguf: is there twice",
        ),
        (|p| p[0].set("split.count", Meta::U16(2000)), "must be at most 1000, got 2000"),
        (|p| p[0].set("split.count", Meta::text("3")), "whole number of at least 0, got"),
    ];
    for (change, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut parts = tiny(5, true).split(3);
        change(&mut parts);
        let error = load(&write_parts(dir.path(), &parts)).err().unwrap_or_default();
        assert!(error.contains(want), "expected `{want}` in `{error}`");
    }
    let dir = tempfile::tempdir().unwrap();
    let first = write_parts(dir.path(), &tiny(5, true).split(3));
    let third = dir.path().join("m-00003-of-00003.gguf");
    std::fs::remove_file(&third).unwrap();
    let error = load(&first).err().unwrap();
    assert!(error.contains("part 3 of 3 is missing") && error.contains("m-00003-of"), "{error}");
    std::fs::rename(&first, dir.path().join("m.gguf")).unwrap();
    let error = load(&dir.path().join("m.gguf")).err().unwrap();
    assert!(error.contains("its name must end in -00001-of-00003.gguf"), "{error}");
}

/// An untied checkpoint in both formats: its rows are read from the file while it serves.
fn untied(dir: &Path) -> [(PathBuf, PathBuf); 2] {
    let gguf = dir.join("m.gguf");
    tiny(5, false).write(&gguf);
    let mut config = common::tiny_config();
    config["tie_word_embeddings"] = json!(false);
    common::write_checkpoint(&dir.join("st"), &config, 5);
    [(gguf.clone(), gguf), (dir.join("st"), dir.join("st/model.safetensors"))]
}

type Damage = fn(&Path);

/// What may happen to a file under a running program.
const DAMAGES: [(&str, Damage); 3] = [
    ("cut to nothing", |path| {
        OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
    }),
    ("cut by half", |path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    }),
    ("rewritten in place", |path| {
        let bytes = vec![0x11; std::fs::metadata(path).unwrap().len() as usize];
        std::fs::write(path, bytes).unwrap();
        // The clock of a file system may be too coarse to tell.
        let later = SystemTime::now() + Duration::from_secs(2);
        OpenOptions::new().write(true).open(path).unwrap().set_modified(later).unwrap();
    }),
];

#[test]
fn a_file_that_changes_while_it_serves_is_a_fault_of_the_request() {
    for (name, damage) in DAMAGES {
        let dir = tempfile::tempdir().unwrap();
        for (path, weights) in untied(dir.path()) {
            let model = load(&path).unwrap();
            let engine = Engine::start(model, pool(), common::options(), Clock::system()).unwrap();
            let ask = || engine.submit(Request::greedy(vec![7, 200, 3], 4)).unwrap();
            assert_eq!(ask().collect_blocking().unwrap().steps.len(), 4);
            damage(&weights);
            let Some(Event::Fault(Fault::Weights(why))) = ask().next_blocking() else {
                panic!("{name}: expected a fault of the weights");
            };
            assert!(why.contains("was changed"), "{name}: {why}");
            assert!(!engine.is_dead());
        }
    }
}

#[test]
fn a_file_that_is_replaced_by_renaming_serves_on() {
    let dir = tempfile::tempdir().unwrap();
    for (path, weights) in untied(dir.path()) {
        let model = load(&path).unwrap();
        let truth = answer(load(&path).unwrap());
        std::fs::write(dir.path().join("new"), b"other").unwrap();
        std::fs::rename(dir.path().join("new"), &weights).unwrap();
        assert_eq!(answer(model), truth);
    }
}

#[test]
fn a_file_that_changes_while_it_loads_fails_that_model() {
    for (name, damage) in DAMAGES {
        let dir = tempfile::tempdir().unwrap();
        for (path, weights) in untied(dir.path()) {
            let after_the_first_layer = |done, _| {
                if done == 1 {
                    damage(&weights);
                }
            };
            let error = Model::load(&path, None, &pool(), after_the_first_layer).err();
            let error = error.unwrap_or_else(|| panic!("{name}: loaded")).to_string();
            assert!(error.contains("was changed after it was opened"), "{name}: {error}");
        }
        // After the last read of a load, before the root is computed.
        for (path, weights) in untied(dir.path()) {
            let model = load(&path).unwrap();
            damage(&weights);
            let error = Identity::compute(&model, &pool()).err().unwrap().to_string();
            assert!(error.contains("was changed"), "{name}: {error}");
        }
    }
}

#[test]
fn pipes_and_directories_are_not_weights() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    let weights = dir.path().join("model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&weights).status().unwrap();
    assert!(made.success());
    let error = load(dir.path()).err().unwrap();
    assert!(error.contains("model.safetensors: is not a regular file"), "{error}");
    std::fs::remove_file(&weights).unwrap();
    std::fs::create_dir(&weights).unwrap();
    assert!(load(dir.path()).err().unwrap().contains("is not a regular file"));
}

#[test]
fn safetensors_headers_are_checked_against_the_file() {
    let dir = tempfile::tempdir().unwrap();
    common::write_checkpoint(dir.path(), &common::tiny_config(), 3);
    let weights = dir.path().join("model.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let with = |bytes: Vec<u8>| {
        std::fs::write(&weights, bytes).unwrap();
        load(dir.path())
    };
    let length = |value: u64| {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        with(bytes)
    };
    let header = |json: &str, data: usize| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        with(bytes)
    };
    let overflow = r#"{"x": {"dtype": "F32", "shape": [4611686018427387904, 4],
        "data_offsets": [0, 18446744073709551615]}}"#;
    let whole = "not a whole safetensors file";
    expect_refusals(vec![
        ("nothing", with(Vec::new()), whole),
        ("a header of 2^64 - 1", length(u64::MAX), whole),
        ("a header of 2^62", length(1 << 62), whole),
        ("a header to the end", length(good.len() as u64 - 8), "safetensors header: "),
        ("too many elements", header(overflow, 16), "does not fill whole bytes"),
        ("text", header("x", 0), "safetensors header: "),
        ("lists in lists", header(&"[".repeat(100_000), 0), "safetensors header: "),
        ("a longer file", with([&good[..], &[0]].concat()), "its tensors end at byte"),
    ]);
}
