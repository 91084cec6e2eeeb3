//! Derived checkpoints: the rows they add, the files they write, and when they are built anew.

use crate::common::{self, golden, tiny_config, write_checkpoint};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::config::families;
use targon_engine::models::tapped::{self, Tapped};
use targon_engine::ops::dtype::Dtype;
use targon_engine::proof::codec::Hash;

const ROOT: Hash = [5; 32];

fn derive(cache: &Path, path: &Path) -> Result<Tapped, String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    let spec = checkpoint.spec().map_err(|e| e.to_string())?;
    let dtype = checkpoint.dtype(&spec).map_err(|e| e.to_string())?;
    tapped::derive(cache, &checkpoint, (&spec, dtype), &ROOT).map_err(|e| e.to_string())
}

/// Rows of a matrix as bf16 values.
fn rows(checkpoint: &Checkpoint, name: &str) -> Vec<Vec<f32>> {
    let tensor = checkpoint.tensor(name).unwrap();
    let mut bits = vec![0; tensor.cols()];
    let row = |row: usize| {
        tensor.read_row(row, Dtype::Bf16, &mut bits).unwrap();
        bits.iter().map(|b| Dtype::Bf16.widen(*b)).collect()
    };
    (0..tensor.rows()).map(row).collect()
}

fn files(directory: &Path) -> Vec<(String, bool)> {
    let entry = |e: std::io::Result<fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), e.file_type().unwrap().is_symlink())
    };
    let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(entry).collect();
    files.sort();
    files
}

/// Every matrix of `derived` is that of `source`, and head and embedding end in the identity.
fn check(source: &Path, derived: &Tapped, heads: &[&str]) {
    let (source, other) =
        (Checkpoint::open(source).unwrap(), Checkpoint::open(&derived.directory).unwrap());
    let names = |c: &Checkpoint| c.tensors().map(|t| t.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&source), names(&other));
    assert_eq!(other.config["vocab_size"], derived.vocab + derived.channels);
    for name in names(&source) {
        let (want, mut got) = (rows(&source, &name), rows(&other, &name));
        if heads.contains(&name.as_str()) {
            let tap = got.split_off(derived.vocab);
            assert_eq!(tap.len(), derived.channels, "{name}");
            for (i, row) in tap.iter().enumerate() {
                let is_unit = |(j, x): (usize, &f32)| *x == f32::from(u8::from(i == j));
                assert!(row.iter().enumerate().all(is_unit), "{name}: row {i}");
            }
        }
        assert_eq!(want, got, "{name}");
    }
}

#[test]
fn a_tied_head_ends_in_the_identity_and_nothing_else_changes() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_checkpoint(source.path(), &tiny_config(), 3);
    let derived = derive(cache.path(), source.path()).unwrap();
    assert_eq!((derived.vocab, derived.channels), (261, 64));
    check(source.path(), &derived, &["model.embed_tokens.weight"]);
}

#[test]
fn only_the_shards_with_head_and_embedding_are_written_and_others_are_links() {
    let (cache, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    common::narrow::narrowed("qwen2", source.path());
    let source = source.path();
    let derived = derive(cache.path(), source).unwrap();
    let checkpoint = Checkpoint::open(source).unwrap();
    let heads = ["model.embed_tokens.weight", "lm_head.weight"];
    let mut holders: Vec<PathBuf> = checkpoint
        .tensors()
        .filter(|t| heads.contains(&t.name.as_str()))
        .map(|t| t.file.path().to_owned())
        .collect();
    holders.dedup();
    let shards: Vec<_> = files(&derived.directory)
        .into_iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .collect();
    let written = shards.iter().filter(|(_, is_link)| !is_link).count();
    assert_eq!(written, holders.len());
    assert!(shards.len() > written, "{shards:?}");
    let present: Vec<&str> = heads.into_iter().filter(|name| checkpoint.has(name)).collect();
    check(source, &derived, &present);
}

#[test]
fn a_gguf_file_becomes_what_the_native_engine_rounds_it_to() {
    let cache = tempfile::tempdir().unwrap();
    let source = common::smollm2();
    let derived = derive(cache.path(), &source).unwrap();
    let (gguf, other) =
        (Checkpoint::open(&source).unwrap(), Checkpoint::open(&derived.directory).unwrap());
    assert_eq!(other.config["architectures"][0], "LlamaForCausalLM");
    let spec = gguf.spec().unwrap();
    for name in spec.tensor_names().iter().filter(|n| gguf.has(n)) {
        let (want, mut got) = (gguf.tensor(name).unwrap(), rows(&other, name));
        if name == "model.embed_tokens.weight" {
            got.truncate(derived.vocab);
        }
        assert_eq!(got.len(), want.rows(), "{name}");
        for row in [0, want.rows() / 2, want.rows() - 1] {
            let mut bits = vec![0; want.cols()];
            want.read_row(row, Dtype::Bf16, &mut bits).unwrap();
            let want: Vec<f32> = bits.iter().map(|b| Dtype::Bf16.widen(*b)).collect();
            assert_eq!(got[row], want, "{name}: row {row}");
        }
    }
}

#[test]
fn what_is_whole_is_used_again_and_what_is_damaged_is_built_anew() {
    let (source, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_checkpoint(source.path(), &tiny_config(), 3);
    let derived = derive(cache.path(), source.path()).unwrap();
    let file = derived.directory.join("model-00001-of-00001.safetensors");
    let inode = || fs::metadata(&file).unwrap().ino();
    let (first, whole) = (inode(), fs::read(&file).unwrap());
    assert_eq!(derive(cache.path(), source.path()).unwrap(), derived);
    assert_eq!(inode(), first, "it was used again");
    type Damage<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let damages: [Damage<'_>; 4] = [
        (
            "a flipped bit",
            Box::new(|| {
                let mut bytes = whole.clone();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(&file, bytes).unwrap();
            }),
        ),
        ("a file cut short", Box::new(|| fs::write(&file, &whole[..whole.len() / 2]).unwrap())),
        ("a missing file", Box::new(|| fs::remove_file(&file).unwrap())),
        (
            "a build that did not end",
            Box::new(|| {
                fs::remove_file(derived.directory.join("tapped.json")).unwrap();
            }),
        ),
    ];
    for (name, damage) in damages {
        damage();
        assert_eq!(derive(cache.path(), source.path()).unwrap(), derived, "{name}");
        assert_eq!(fs::read(&file).unwrap(), whole, "{name}");
        check(source.path(), &derived, &["model.embed_tokens.weight"]);
    }
    let left: Vec<_> = files(&tapped::directory(cache.path()));
    assert_eq!(left.len(), 1, "no half of one: {left:?}");
}

#[test]
fn families_that_the_other_engine_computes_are_derived_and_others_are_not() {
    for family in families() {
        let cache = tempfile::tempdir().unwrap();
        let derived = derive(cache.path(), &golden(family.name));
        // Other golden checkpoints have heads of another size than hidden size over heads.
        let is_computed = ["mistral", "qwen3", "phi3"].contains(&family.name);
        assert_eq!(derived.is_ok(), is_computed, "{}: {derived:?}", family.name);
    }
}

/// No configuration of today leads here; a new family may.
#[test]
fn windows_that_the_other_class_does_not_have_are_refused() {
    let refused = |path: &Path, windows: [Option<usize>; 2]| {
        let checkpoint = Checkpoint::open(path).unwrap();
        let mut spec = checkpoint.spec().unwrap();
        spec.attention.windows = windows.to_vec();
        tapped::refuse(&checkpoint, &spec).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let (mistral, llama) = (golden("mistral"), tempfile::tempdir().unwrap());
    write_checkpoint(llama.path(), &tiny_config(), 3);
    assert_eq!(refused(&mistral, [Some(13); 2]), "");
    let error = refused(&mistral, [None, Some(13)]);
    assert!(error.contains("`sliding_window` = of some layers is not supported"), "{error}");
    assert_eq!(refused(llama.path(), [None; 2]), "");
    let error = refused(llama.path(), [Some(13); 2]);
    assert!(error.contains("`sliding_window` = 13 is not supported"), "{error}");
}

#[test]
fn heads_that_rows_do_not_come_through_are_refused_by_name() {
    let cache = tempfile::tempdir().unwrap();
    let error = derive(cache.path(), &golden("gemma2")).unwrap_err();
    assert!(error.contains("final_logit_softcapping"), "{error}");
    let error = derive(cache.path(), &golden("llama-linear")).unwrap_err();
    assert!(error.contains("`attention_bias` = true is not supported"), "{error}");
    let error = derive(cache.path(), &golden("qwen2")).unwrap_err();
    assert!(error.contains("`head_dim` = 16 is not supported"), "{error}");
    let source = tempfile::tempdir().unwrap();
    let mut file = common::gguf::tiny(3, true);
    let divisors = [1.0_f32, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0];
    file.add("rope_freqs.weight", &[8], 0, divisors.iter().flat_map(|d| d.to_le_bytes()).collect());
    let path = source.path().join("stretched.gguf");
    file.write(&path);
    let error = derive(cache.path(), &path).unwrap_err();
    assert!(error.contains("rope_freqs.weight") && error.contains("divisors"), "{error}");
    let mut config = tiny_config();
    config["model_type"] = "mistral".into();
    config["rope_scaling"] = serde_json::json!({"rope_type": "linear", "factor": 2.0});
    write_checkpoint(source.path(), &config, 3);
    let error = derive(cache.path(), source.path()).unwrap_err();
    let want = r#"`rope_scaling` = {"rope_type":"linear","factor":2.0} is not supported"#;
    assert!(error.contains(want), "{error}");
    for (key, value, want) in [
        ("logit_scale", serde_json::json!(0.0625), "`logit_scale` = 0.0625 is not supported"),
        (
            "quantization_config",
            serde_json::json!({"quant_method": "gptq", "bits": 4}),
            "`quantization_config` says that matrices are gptq-int4, and none is",
        ),
    ] {
        let mut config = tiny_config();
        config[key] = value;
        write_checkpoint(source.path(), &config, 3);
        let error = derive(cache.path(), source.path()).unwrap_err();
        // The native engine may refuse the key first; either way it has its name.
        assert!(error.contains(want) || error.contains(key), "{error}");
    }
    assert!(!tapped::directory(cache.path()).exists(), "nothing was built");
}
