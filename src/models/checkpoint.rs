//! A checkpoint on disk: configuration, tensors by their Hugging Face names, tokenizer files.
//!
//! Two formats: a directory with `config.json` and safetensors (single or sharded), and one GGUF
//! file, whose metadata and tensor names are translated (see [`super::gguf`]). Files stay open:
//! proofs of weights read single elements later. They are never mapped (see
//! [`super::weight_file`]).
//!
//! A tensor may have a type that the engine does not compute with, as long as nothing asks for it:
//! [`Checkpoint::tensor`] refuses it by name.

use super::error::{LoadError, read_json};
use super::gguf::Gguf;
use super::tensor::{Stored, Tensor};
use super::weight_file::WeightFile;
use safetensors::tensor::{Dtype as SafeDtype, Metadata};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a safetensors header, as the format has it.
const SAFETENSORS_HEADER_MAX: u64 = 100_000_000;

/// The types that are computed with.
const SAFETENSORS_TYPES: &str = "F32, F16 and BF16";
const GGUF_TYPES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

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
    /// When there is none, or the engine does not compute with its type.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        let tensor = self.tensors.get(name).ok_or_else(|| LoadError::Tensor {
            name: name.to_owned(),
            path: self.path.clone(),
            what: format!("missing; the checkpoint has {} tensors", self.tensors.len()),
        })?;
        if let Stored::Unread(kind) = &tensor.stored {
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

fn read_shard(path: &Path, tensors: &mut BTreeMap<String, Tensor>) -> Result<(), LoadError> {
    let file = Arc::new(WeightFile::open(path)?);
    let (metadata, data) = safetensors_header(&file)?;
    for (name, info) in metadata.tensors() {
        let stored = match info.dtype {
            SafeDtype::F32 => Stored::F32,
            SafeDtype::F16 => Stored::F16,
            SafeDtype::BF16 => Stored::Bf16,
            other => Stored::Unread(format!("{other:?}")),
        };
        let (start, end) = info.data_offsets;
        let tensor = Tensor {
            name: name.clone(),
            stored,
            shape: info.shape.clone(),
            file: Arc::clone(&file),
            range: data + start as u64..data + end as u64,
            order: None,
        };
        if let Some(other) = tensors.get(&name) {
            let other = other.file.path().display();
            return Err(tensor.error(format!("is also in {other}")));
        }
        tensors.insert(name, tensor);
    }
    Ok(())
}

/// The header of a safetensors file, and where its data begins.
fn safetensors_header(file: &WeightFile) -> Result<(Metadata, u64), LoadError> {
    let whole = |what: String| {
        let what = format!("not a whole safetensors file ({} bytes): {what}", file.len());
        LoadError::invalid(file.path(), what)
    };
    let rest = file.len().checked_sub(8).ok_or_else(|| whole("it has no header".into()))?;
    let mut len = [0; 8];
    file.read_at(&mut len, 0)?;
    let len = u64::from_le_bytes(len);
    if len > rest || len > SAFETENSORS_HEADER_MAX {
        let what = format!("a header of {len} bytes, at most {SAFETENSORS_HEADER_MAX} are read");
        return Err(whole(what));
    }
    let mut header = vec![0; len as usize];
    file.read_at(&mut header, 8)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| whole(e.to_string()))?;
    let (wanted, there) = (metadata.data_len() as u64, rest - len);
    if wanted != there {
        return Err(whole(format!("its tensors take {wanted} bytes, {there} are there")));
    }
    Ok((metadata, 8 + len))
}
