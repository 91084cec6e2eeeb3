//! A checkpoint on disk: configuration, tensors by their Hugging Face names, tokenizer files.
//!
//! Two formats: a directory with `config.json` and safetensors (single or sharded), and one GGUF
//! file, whose metadata and tensor names are translated (see [`super::gguf`]). Files are memory
//! mapped and stay mapped: proofs of weights read single elements later.

use super::error::{LoadError, read_json};
use super::gguf::Gguf;
use super::tensor::{Stored, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as SafeDtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An opened checkpoint.
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
            if generation.exists() { Some(read_json(&generation)?) } else { None };
        let mut tensors = BTreeMap::new();
        for shard in shards(dir)? {
            read_shard(&shard, &mut tensors)?;
        }
        Ok(Self {
            path: dir.to_owned(),
            config: read_json(&config_path)?,
            config_path,
            generation_config,
            gguf: None,
            tensors,
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
        })
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        self.tensors.get(name).cloned().ok_or_else(|| LoadError::Tensor {
            name: name.to_owned(),
            path: self.path.clone(),
            what: format!("missing; the checkpoint has {} tensors", self.tensors.len()),
        })
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.values()
    }
}

/// The safetensors files of a directory, after checking that all exist.
fn shards(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![dir.join("model.safetensors")]);
    }
    let json = read_json(&index)?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| LoadError::invalid(&index, "expected an object `weight_map`"))?;
    let mut names: Vec<&str> = Vec::new();
    for (tensor, shard) in map {
        let shard =
            shard.as_str().filter(|s| !s.contains(['/', '\\']) && !s.starts_with('.')).ok_or_else(
                || LoadError::invalid(&index, format!("`weight_map.{tensor}` must be a file name")),
            )?;
        if !names.contains(&shard) {
            names.push(shard);
        }
    }
    for name in &names {
        if !dir.join(name).exists() {
            let what = format!("lists shard `{name}`, which is missing from the directory");
            return Err(LoadError::invalid(&index, what));
        }
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// Maps a whole file read-only.
pub(super) fn map(path: &Path) -> Result<Arc<Mmap>, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    // SAFETY: the map is read only and private; a checkpoint that another process rewrites while it
    // is served can change values, or end this process with SIGBUS if it shrinks, as with any
    // memory-mapped loader.
    Ok(Arc::new(unsafe { Mmap::map(&file) }.map_err(io)?))
}

fn read_shard(path: &Path, tensors: &mut BTreeMap<String, Tensor>) -> Result<(), LoadError> {
    let map = map(path)?;
    let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
        let what = format!("not a whole safetensors file ({} bytes): {e}", map.len());
        LoadError::invalid(path, what)
    })?;
    for (name, info) in metadata.tensors() {
        let stored = match info.dtype {
            SafeDtype::F32 => Stored::F32,
            SafeDtype::F16 => Stored::F16,
            SafeDtype::BF16 => Stored::Bf16,
            other => {
                return Err(LoadError::Tensor {
                    name,
                    path: path.to_owned(),
                    what: format!("dtype {other:?} is not supported; F32, F16 and BF16 are"),
                });
            }
        };
        let base = header + 8;
        let tensor = Tensor {
            name: name.clone(),
            path: path.to_owned(),
            stored,
            shape: info.shape.clone(),
            map: Arc::clone(&map),
            range: base + info.data_offsets.0..base + info.data_offsets.1,
            order: None,
        };
        tensors.insert(name, tensor);
    }
    Ok(())
}
