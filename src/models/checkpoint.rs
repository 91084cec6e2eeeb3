//! Opens a checkpoint on disk: configuration, tensors by their Hugging Face names, and tokenizer
//! files.
//!
//! Two formats: a directory with `config.json` and safetensors (single or sharded), whose matrices
//! may be quantised (see [`super::quantised`]), and one GGUF file, whose metadata and tensor names
//! are translated (see [`super::gguf`]). Files stay open:
//! proofs of weights read single elements later. They are never mapped (see
//! [`super::weight_file`]).
//!
//! A tensor may have a type that the engine does not compute with, as long as nothing asks for it:
//! [`Checkpoint::tensor`] refuses it by name.

use super::config;
use super::error::{LoadError, read_json};
use super::gguf::Gguf;
use super::header::{self, TensorEntry};
use super::quantised::Quantisation;
use super::spec::Spec;
use super::tensor::{Runs, StoredType, Tensor};
use super::weight_file::WeightFile;
use crate::ops::dtype::Dtype;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The types that are computed with.
const SAFETENSORS_TYPES: &str = "F32, F16 and BF16";
const GGUF_TYPES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Ends of the names of tensors that no model is computed with: tables that follow from the
/// configuration, and masks of training.
const HARMLESS: [&str; 6] = [
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".position_ids",
    ".attn.masked_bias",
    ".self_attn.masked_bias",
];

/// The files of a model, opened: configuration, tokenizer and tensors.
pub struct Checkpoint {
    /// The directory or file.
    pub path: PathBuf,
    /// The file that configuration errors name.
    pub config_path: PathBuf,
    /// `config.json`, or its equivalent made from GGUF metadata.
    pub config: Value,
    /// `generation_config.json`, where present.
    pub generation_config: Option<Value>,
    /// The GGUF metadata, where that is the format.
    pub gguf: Option<Gguf>,
    tensors: BTreeMap<String, Tensor>,
    quantised: Option<Quantised>,
}

/// What is known of safetensors whose matrices are quantised.
struct Quantised {
    /// Method, bits and group in one word.
    scheme: String,
    /// The tensors as the files have them.
    stored: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens a directory or a `.gguf` file.
    ///
    /// # Errors
    /// When a file is missing, truncated or malformed.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let meta = std::fs::metadata(path)
            .map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
        if meta.is_dir() { Self::open_directory(path) } else { Self::open_gguf(path) }
    }

    fn open_directory(dir: &Path) -> Result<Self, LoadError> {
        let config_path = dir.join("config.json");
        let generation = dir.join("generation_config.json");
        let generation_config =
            if generation.exists() { Some(read_object(&generation)?) } else { None };
        let config = read_object(&config_path)?;
        let stored = match read_index(dir)? {
            Some(index) => index.tensors()?,
            None => read_shard(&dir.join(SINGLE))?,
        };
        let (tensors, quantised) = match Quantisation::of(&config_path, &config)? {
            None => (stored, None),
            Some(how) => {
                let tensors = how.applied(&config_path, &stored)?;
                (tensors, Some(Quantised { scheme: how.scheme, stored }))
            }
        };
        Ok(Self {
            path: dir.to_owned(),
            config,
            config_path,
            generation_config,
            gguf: None,
            tensors,
            quantised,
        })
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let gguf = Gguf::open(path)?;
        Ok(Self {
            path: path.to_owned(),
            config_path: path.to_owned(),
            config: gguf.config()?,
            generation_config: None,
            tensors: gguf.tensors()?,
            gguf: Some(gguf),
            quantised: None,
        })
    }

    /// The shape that its configuration describes.
    ///
    /// # Errors
    /// When a value cannot be honoured, or there are weights that this shape has no use for.
    pub fn spec(&self) -> Result<Spec, LoadError> {
        let spec = config::parse(&self.config_path, &self.config)?;
        self.refuse_unused(&spec)?;
        Ok(spec)
    }

    /// The type that it is computed in: bf16 stays bf16, f16 stays f16, f32 becomes f16 unless the
    /// family asks for bf16 or a value overflows; GGUF becomes bf16.
    ///
    /// # Errors
    /// When weights cannot be read.
    pub fn dtype(&self, spec: &Spec) -> Result<Dtype, LoadError> {
        if self.gguf.is_some() || spec.prefers_bf16 {
            return Ok(Dtype::Bf16);
        }
        match self.tensor("model.embed_tokens.weight")?.stored {
            StoredType::F16 => Ok(Dtype::F16),
            StoredType::F32 => {
                for tensor in self.tensors().filter(|t| !matches!(t.stored, StoredType::Unread(_)))
                {
                    let runs = Runs::new(tensor, 1)?;
                    for row in 0..tensor.rows() {
                        if runs.row_max(row)? > half::f16::MAX.to_f32() {
                            return Ok(Dtype::Bf16);
                        }
                    }
                }
                Ok(Dtype::F16)
            }
            _ => Ok(Dtype::Bf16),
        }
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none, or the engine does not compute with its type.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        let tensor = self.tensors.get(name).ok_or_else(|| LoadError::Tensor {
            name: name.to_owned(),
            path: self.path.clone(),
            what: format!("missing; the checkpoint has {} tensors", self.tensors.len()),
        })?;
        if let StoredType::Unread(kind) = &tensor.stored {
            let supported = if self.gguf.is_some() { GGUF_TYPES } else { SAFETENSORS_TYPES };
            return Err(tensor.error(format!("type {kind} is not supported; {supported} are")));
        }
        Ok(tensor.clone())
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.values()
    }

    /// All tensors as they are stored, by name: of quantised matrices the parts.
    pub fn stored(&self) -> impl Iterator<Item = &Tensor> {
        self.quantised.as_ref().map_or(&self.tensors, |q| &q.stored).values()
    }

    /// How the matrices of safetensors are quantised, in one word, where they are.
    pub fn scheme(&self) -> Option<&str> {
        Some(&self.quantised.as_ref()?.scheme)
    }

    /// Whether reading it gives other values than its files hold.
    pub fn is_quantised(&self) -> bool {
        self.gguf.is_some() || self.quantised.is_some()
    }

    /// Fails where a tensor is not one that `spec` computes with: the model would be another one
    /// without it.
    ///
    /// # Errors
    /// The first such tensor.
    pub fn refuse_unused(&self, spec: &Spec) -> Result<(), LoadError> {
        let experts = spec.feed_forward.experts.map_or(1, |e| e.count);
        if spec.layers.saturating_mul(experts) > self.tensors.len() {
            return Ok(()); // tensors are missing, and loading says which
        }
        let used = spec.tensor_names();
        for (name, tensor) in &self.tensors {
            if used.contains(name) || is_harmless(name) {
                continue;
            }
            if spec.tied && name == "lm_head.weight" {
                self.check_tied(tensor)?;
                continue;
            }
            let what = format!(
                "is no part of a {} model of {} layers as its configuration describes it; without \
                    it the model would be another one",
                spec.family.name, spec.layers
            );
            return Err(tensor.error(what));
        }
        Ok(())
    }

    /// A stored head beside `tie_word_embeddings` must be the embedding.
    fn check_tied(&self, head: &Tensor) -> Result<(), LoadError> {
        let embedding = self.tensor("model.embed_tokens.weight")?;
        let differs =
            || head.error("differs from the embedding, though tie_word_embeddings is true");
        if (&head.stored, &head.shape) != (&embedding.stored, &embedding.shape) {
            return Err(differs());
        }
        let (mut ours, mut other) = (vec![0; head.cols()], vec![0; head.cols()]);
        let dtype = if head.stored == StoredType::F16 { Dtype::F16 } else { Dtype::Bf16 };
        for row in 0..head.rows() {
            head.read_row(row, dtype, &mut ours)?;
            embedding.read_row(row, dtype, &mut other)?;
            if ours != other {
                return Err(differs());
            }
        }
        Ok(())
    }
}

fn is_harmless(name: &str) -> bool {
    HARMLESS.iter().any(|end| name.ends_with(end))
}

/// A JSON file that holds an object.
fn read_object(path: &Path) -> Result<Value, LoadError> {
    let json = read_json(path)?;
    if json.is_object() { Ok(json) } else { Err(LoadError::invalid(path, "must be an object")) }
}

/// Which shard holds which tensor.
pub struct Index {
    path: PathBuf,
    shards: BTreeMap<String, String>, // by tensor
}

impl Index {
    /// Reads the map of an index file; `path` is named in errors.
    ///
    /// # Errors
    /// When there is no map, or a shard is not the name of a file beside it.
    pub fn parse(path: &Path, json: &Value) -> Result<Self, LoadError> {
        let map = json
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| LoadError::invalid(path, "expected an object `weight_map`"))?;
        let mut shards = BTreeMap::new();
        for (tensor, shard) in map {
            let name = shard.as_str().filter(|s| is_file_name(s)).ok_or_else(|| {
                LoadError::invalid(path, format!("`weight_map.{tensor}` must be a file name"))
            })?;
            shards.insert(tensor.clone(), name.to_owned());
        }
        Ok(Self { path: path.to_owned(), shards })
    }

    /// The shards, each once.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.shards.values().map(String::as_str).collect()
    }

    fn missing(&self, dir: &Path) -> Option<&str> {
        self.shards().into_iter().find(|shard| !dir.join(shard).exists())
    }

    /// The tensors of all shards, which hold what the index says and nothing else.
    fn tensors(&self) -> Result<BTreeMap<String, Tensor>, LoadError> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let error = |what: String| Err(LoadError::invalid(&self.path, what));
        let shards = self.shards();
        if dir.join(SINGLE).exists() && !shards.contains(SINGLE) {
            return error(format!(
                "does not list `{SINGLE}`, which stands beside it: remove the one that is stale"
            ));
        }
        if let Some(absent) = self.missing(dir) {
            return error(format!("lists shard `{absent}`, which is missing from the directory"));
        }
        let mut tensors = BTreeMap::new();
        for shard in shards {
            for (name, tensor) in read_shard(&dir.join(shard))? {
                match self.shards.get(&name) {
                    Some(listed) if listed != shard => {
                        return error(format!(
                            "says that `{name}` is in `{listed}`, but `{shard}` has it"
                        ));
                    }
                    None if !is_harmless(&name) => {
                        return error(format!("does not list `{name}`, which `{shard}` has"));
                    }
                    _ => tensors.insert(name, tensor),
                };
            }
        }
        match self.shards.iter().find(|(name, _)| !tensors.contains_key(*name)) {
            Some((name, shard)) if !is_harmless(name) => {
                error(format!("says that `{name}` is in `{shard}`, which has no such tensor"))
            }
            _ => Ok(tensors),
        }
    }
}

/// A name without a way out of the directory.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.')
}

/// The index of a directory, where it has one.
fn read_index(dir: &Path) -> Result<Option<Index>, LoadError> {
    let path = dir.join(INDEX);
    if path.exists() { Index::parse(&path, &read_json(&path)?).map(Some) } else { Ok(None) }
}

/// A file of weights that a checkpoint in `dir` needs and lacks.
pub(super) fn missing_weights(dir: &Path) -> Result<Option<String>, LoadError> {
    Ok(match read_index(dir)? {
        Some(index) => index.missing(dir).map(str::to_owned),
        None => (!dir.join(SINGLE).exists()).then(|| SINGLE.to_owned()),
    })
}

/// The tensors of one safetensors file.
fn read_shard(path: &Path) -> Result<BTreeMap<String, Tensor>, LoadError> {
    let file = Arc::new(WeightFile::open(path)?);
    let entries = header::read(path, file.len(), |bytes, at| file.read_at(bytes, at))?;
    let tensor = |TensorEntry { name, dtype, shape, range }| {
        let stored = match dtype.as_str() {
            "F32" => StoredType::F32,
            "F16" => StoredType::F16,
            "BF16" => StoredType::Bf16,
            other => StoredType::Unread(other.to_owned()),
        };
        let file = Arc::clone(&file);
        (name.clone(), Tensor { name, stored, shape, file, range, order: None })
    };
    Ok(entries.into_iter().map(tensor).collect())
}
