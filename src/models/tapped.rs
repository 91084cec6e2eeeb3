//! Derives a checkpoint from another one; the derived head also gives the final-norm row.
//!
//! The head has as many more rows as the model has channels, and they are the identity: what an
//! engine takes for logits then ends in the row that the head was multiplied by. So an engine that
//! only shows logits can prove its hidden rows. A tied embedding is the head, and one that is not
//! gets the same rows, because `vocab_size` counts the rows of both; nothing looks them up.
//!
//! It is built once into the cache: the files that hold head and embedding are written anew, all
//! others are links. What is quantised becomes one file of 16-bit safetensors, as the native engine
//! rounds it. It appears under its name only when it is whole, and what was written is held against
//! its hashes before every use.

mod write;

use super::checkpoint::Checkpoint;
use super::config::families;
use super::error::LoadError;
use super::family::{Family, listed};
use super::spec::{ExpertSpec, Spec};
use super::tensor::Tensor;
use crate::files;
use crate::ops::dtype::Dtype;
use crate::ops::rope::RopeScaling;
use crate::proof::codec::{Encoder, Hash, to_hex};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use write::{HashedFile, copied, hash_file, identity, io_error, rounded, width};

/// Version of what is derived: a change of its contents is a new one.
const VERSION: u32 = 3;
/// Its list of files.
const LIST: &str = "tapped.json";
const LIST_BYTES_MAX: u64 = 1 << 20;
const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A derived checkpoint that is whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tapped {
    /// The directory of the derived checkpoint.
    pub directory: PathBuf,
    /// Logits of the model itself, which come first.
    pub vocab: usize,
    /// Channels of the final-norm row, which come after them.
    pub channels: usize,
}

/// The list of a derived checkpoint's files.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    version: u32,
    /// The weights root of the checkpoint that it was derived from.
    weights_root: String,
    /// BLAKE3 of each file that was written.
    written: BTreeMap<String, String>,
    /// What each link leads to.
    links: BTreeMap<String, PathBuf>,
}

/// Where derived checkpoints lie within a cache directory.
pub fn directory(cache: &Path) -> PathBuf {
    cache.join("tapped")
}

/// The derived checkpoint of `checkpoint`, whose weights root is `root`: the one in the cache where
/// it is whole, else built now. `dtype` is what quantised values are rounded to.
///
/// # Errors
/// When the checkpoint has a head that cannot be extended, a file cannot be read or written, or
/// the disk is full.
pub fn derive(
    cache: &Path,
    checkpoint: &Checkpoint,
    (spec, dtype): (&Spec, Dtype),
    root: &Hash,
) -> Result<Tapped, LoadError> {
    refuse(checkpoint, spec)?;
    let mut key = Encoder::new("targon-engine/tapped/1");
    key.u32(VERSION).raw(root).bytes(dtype.to_string().as_bytes());
    key.bytes(checkpoint.config.to_string().as_bytes());
    let parent = directory(cache);
    let place = parent.join(format!("weights-{}", to_hex(&key.finish()[..16])));
    let tapped = Tapped { directory: place.clone(), vocab: spec.vocab, channels: spec.hidden };
    match check(&place, root) {
        Ok(()) => return Ok(tapped),
        Err(Damage::Absent) => {}
        Err(Damage::Other(why)) => {
            tracing::warn!(path = %place.display(), "a derived checkpoint is built anew: {why}");
            remove(&place)?;
        }
    }
    tracing::info!(path = %place.display(), "deriving a checkpoint whose head gives hidden rows");
    let building = parent.join(format!(".{}.building", uuid::Uuid::new_v4().simple()));
    let built = Builder { checkpoint, spec, dtype, directory: &building, listed: empty(root) };
    let outcome = built.build().and_then(|()| {
        std::fs::rename(&building, &place).map_err(|source| io_error(&place, source))
    });
    if let Err(why) = outcome {
        // Half of it would only take space; that it failed is reported either way.
        let _ = std::fs::remove_dir_all(&building);
        // Another process may have been faster.
        return if check(&place, root).is_ok() { Ok(tapped) } else { Err(why) };
    }
    Ok(tapped)
}

/// Refuses models whose logits are more than the head's product: rows would not come through. It
/// reads the configuration and the names of tensors alone.
///
/// # Errors
/// What the head, the shape or the norms have that cannot be derived.
pub fn refuse(checkpoint: &Checkpoint, spec: &Spec) -> Result<(), LoadError> {
    refuse_keys(checkpoint, spec)?;
    refuse_shape(checkpoint, spec)?;
    if checkpoint.has("lm_head.bias") {
        return Err(checkpoint
            .tensor("lm_head.bias")?
            .error("a head with a bias is not supported"));
    }
    if checkpoint.has("rope_freqs.weight") {
        return Err(checkpoint
            .tensor("rope_freqs.weight")?
            .error("a table of divisors for rotations is not supported by the other engine"));
    }
    if spec.norm.offset != spec.norm.published_offset {
        let what =
            "its norms hold the sum of weight and offset, which only the native engine reads";
        return Err(LoadError::invalid(&checkpoint.path, what));
    }
    Ok(())
}

fn unsupported(checkpoint: &Checkpoint, key: &str, value: String, supported: &str) -> LoadError {
    LoadError::Unsupported {
        path: checkpoint.config_path.clone(),
        key: key.into(),
        value,
        supported: supported.into(),
    }
}

/// Keys that change logits behind the head, or how weights are stored.
fn refuse_keys(checkpoint: &Checkpoint, spec: &Spec) -> Result<(), LoadError> {
    let unsupported = |key: &str, value: String, supported: &str| {
        Err(unsupported(checkpoint, key, value, supported))
    };
    if let Some(cap) = spec.logit_softcap {
        let supported = "hidden rows do not come through a cap: run this model with the native \
            engine";
        return unsupported("final_logit_softcapping", cap.to_string(), supported);
    }
    for key in ["logit_scale", "logits_scaling"] {
        if let Some(value) = checkpoint.config.get(key).filter(|v| v.as_f64() != Some(1.0)) {
            return unsupported(key, value.to_string(), "only 1 is");
        }
    }
    Ok(())
}

/// What the other engine's class of the family does not compute.
fn refuse_shape(checkpoint: &Checkpoint, spec: &Spec) -> Result<(), LoadError> {
    let unsupported = |key: &str, value: String, supported: &str| {
        Err(unsupported(checkpoint, key, value, supported))
    };
    let Family { name, class, hosted, .. } = spec.family;
    let Some(hosted) = hosted else {
        let supported = listed(families().filter(|f| f.hosted.is_some()).map(|f| f.name));
        return unsupported("model_type", (*name).to_owned(), &supported);
    };
    let a = &spec.attention;
    if (a.qkv_bias && !hosted.has_qkv_bias) || a.out_bias {
        let supported = format!("{class} of the other engine leaves biases out");
        return unsupported("attention_bias", "true".into(), &supported);
    }
    if !hosted.has_head_dim && a.heads * a.head_dim != spec.hidden {
        let supported = format!("only hidden_size / num_attention_heads is, for {class}");
        return unsupported("head_dim", a.head_dim.to_string(), &supported);
    }
    if spec.rope.scaling != RopeScaling::None && !hosted.has_rope_scaling {
        let supported = format!("{class} of the other engine does not stretch frequencies");
        let scaling = rope_scaling(spec.rope.scaling).to_string();
        return unsupported("rope_scaling", scaling, &supported);
    }
    let window = window(spec);
    if a.windows.iter().any(|w| *w != window) {
        let supported = "one for all layers is, in the other engine";
        return unsupported("sliding_window", "of some layers".into(), supported);
    }
    if let Some(window) = window.filter(|_| !hosted.has_window) {
        let supported = format!("{class} of the other engine has none");
        return unsupported("sliding_window", window.to_string(), &supported);
    }
    Ok(())
}

/// The window of the first layer, which is that of all where nothing was refused.
fn window(spec: &Spec) -> Option<usize> {
    spec.attention.windows.first().copied().flatten()
}

fn remove(path: &Path) -> Result<(), LoadError> {
    std::fs::remove_dir_all(path).map_err(|source| io_error(path, source))
}

fn empty(root: &Hash) -> Listed {
    Listed {
        version: VERSION,
        weights_root: to_hex(root),
        written: BTreeMap::new(),
        links: BTreeMap::new(),
    }
}

/// Why a directory is not a whole derived checkpoint.
enum Damage {
    Absent,
    Other(String),
}

/// Whether a directory is the whole checkpoint that was derived from `root`.
fn check(place: &Path, root: &Hash) -> Result<(), Damage> {
    let other = |what: String| Err(Damage::Other(what));
    let bytes = match files::read(&place.join(LIST), LIST_BYTES_MAX) {
        Err(_) if !place.exists() => return Err(Damage::Absent),
        Err(e) => return other(format!("{LIST}: {e}")),
        Ok(bytes) => bytes,
    };
    let listed: Listed = match serde_json::from_slice(&bytes) {
        Ok(listed) => listed,
        Err(e) => return other(format!("{LIST}: {e}")),
    };
    if (listed.version, &listed.weights_root) != (VERSION, &to_hex(root)) {
        return other(format!("{LIST} is of another version or of other weights"));
    }
    for (name, target) in &listed.links {
        let path = place.join(name);
        if std::fs::read_link(&path).ok().as_ref() != Some(target) || !path.exists() {
            return other(format!("{name} does not lead to {}", target.display()));
        }
    }
    for (name, hash) in &listed.written {
        match hash_file(&place.join(name)) {
            Ok(found) if found == *hash => {}
            Ok(_) => return other(format!("{name} has another hash than when it was written")),
            Err(e) => return other(format!("{name}: {e}")),
        }
    }
    Ok(())
}

/// What the other engine reads of stretched frequencies.
fn rope_scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original_context as usize,
        }),
    }
}

/// Writes one derived checkpoint into a directory of its own.
struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a Spec,
    dtype: Dtype,
    directory: &'a Path,
    listed: Listed,
}

impl Builder<'_> {
    fn build(mut self) -> Result<(), LoadError> {
        std::fs::create_dir_all(self.directory).map_err(|e| io_error(self.directory, e))?;
        self.weights()?;
        let config = self.config().to_string();
        self.small("config.json", config.as_bytes())?;
        self.small("tokenizer.json", tokenizer().to_string().as_bytes())?;
        let list = serde_json::to_vec(&self.listed).map_err(|e| {
            LoadError::invalid(&self.directory.join(LIST), format!("cannot be written: {e}"))
        })?;
        let path = self.directory.join(LIST);
        // Last, and down to the disk: what it lists is there.
        files::replace(&path, &list).map_err(|source| io_error(&path, source))
    }

    /// The configuration with as many more rows. What the native engine computes by is said in the
    /// other engine's keys: a file may have it under others, or leave it to a default.
    fn config(&self) -> Value {
        let (spec, mut config) = (self.spec, self.checkpoint.config.clone());
        // What is written is not quantised.
        config["quantization_config"] = Value::Null;
        let window = window(spec);
        for (key, value) in [
            ("vocab_size", json!(spec.vocab + spec.hidden)),
            ("architectures", json!([spec.family.class])),
            ("tie_word_embeddings", json!(spec.tied)),
            ("rope_theta", json!(spec.rope.theta)),
            ("rope_scaling", rope_scaling(spec.rope.scaling)),
            ("sliding_window", json!(window)),
            ("use_sliding_window", json!(window.is_some())),
            // Its window begins at this layer.
            ("max_window_layers", json!(if window.is_some() { 0 } else { spec.layers })),
        ] {
            config[key] = value;
        }
        if let Some(ExpertSpec { count, used, .. }) = spec.feed_forward.experts {
            config["num_local_experts"] = json!(count);
            config["num_experts_per_tok"] = json!(used);
        }
        for (key, value) in [
            ("hidden_act", json!("silu")),
            ("rms_norm_eps", json!(spec.norm.eps)),
            ("max_position_embeddings", json!(spec.context)),
            ("original_max_position_embeddings", json!(spec.context)),
            ("num_key_value_heads", json!(spec.attention.kv_heads)),
        ] {
            if config.get(key).is_none_or(Value::is_null) {
                config[key] = value;
            }
        }
        config
    }

    fn small(&mut self, name: &str, bytes: &[u8]) -> Result<(), LoadError> {
        let path = self.directory.join(name);
        std::fs::write(&path, bytes).map_err(|source| io_error(&path, source))?;
        self.listed.written.insert(name.to_owned(), blake3::hash(bytes).to_hex().to_string());
        Ok(())
    }

    /// One file for each of the checkpoint's: a link, or written anew.
    fn weights(&mut self) -> Result<(), LoadError> {
        let mut of_files: BTreeMap<&Path, Vec<Named>> = BTreeMap::new();
        if self.checkpoint.is_quantised() {
            // A GGUF file calls its tensors otherwise, and others may hold unused ones.
            let names = self.spec.tensor_names().into_iter().filter(|n| self.checkpoint.has(n));
            let named = |name: String| self.checkpoint.tensor(&name).map(|t| (name, t));
            let tensors = names.filter(|n| n != "rope_freqs.weight").map(named);
            of_files.insert(&self.checkpoint.path, tensors.collect::<Result<_, _>>()?);
        } else {
            for tensor in self.checkpoint.tensors() {
                let named = (tensor.name.clone(), tensor.clone());
                of_files.entry(tensor.file.path()).or_default().push(named);
            }
        }
        let (count, mut places) = (of_files.len(), Map::new());
        for (number, (path, tensors)) in of_files.into_iter().enumerate() {
            let name = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
            places.extend(tensors.iter().map(|(t, _)| (t.clone(), name.clone().into())));
            let changes = tensors.iter().any(|(name, _)| is_extended(name));
            match changes || self.checkpoint.is_quantised() {
                true => self.shard(&name, &tensors)?,
                false => self.link(name, path)?,
            }
        }
        self.small(INDEX, json!({"weight_map": places}).to_string().as_bytes())
    }

    fn link(&mut self, name: String, path: &Path) -> Result<(), LoadError> {
        let target = std::fs::canonicalize(path).map_err(|source| io_error(path, source))?;
        let link = self.directory.join(&name);
        std::os::unix::fs::symlink(&target, &link).map_err(|source| io_error(&link, source))?;
        self.listed.links.insert(name, target);
        Ok(())
    }

    fn shard(&mut self, name: &str, tensors: &[Named]) -> Result<(), LoadError> {
        let mut out = HashedFile::create(self.directory.join(name))?;
        let plan: Vec<Written<'_>> = tensors.iter().map(|t| self.written(t)).collect();
        let (mut header, mut at) = (Map::new(), 0);
        for w in &plan {
            let end = at + w.bytes();
            let shape = &w.shape;
            let entry = json!({"dtype": w.dtype, "shape": shape, "data_offsets": [at, end]});
            header.insert(w.name.to_owned(), entry);
            at = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        out.write(&(header.len() as u64).to_le_bytes())?;
        out.write(&header)?;
        for w in &plan {
            match w.rounded {
                Some(dtype) => rounded(w.tensor, dtype, &mut out)?,
                None => copied(w.tensor, &mut out)?,
            }
            if is_extended(w.name) {
                identity(self.spec.hidden, &w.dtype, &mut out)?;
            }
        }
        let hash = out.finish()?;
        self.listed.written.insert(name.to_owned(), hash);
        Ok(())
    }

    /// How a tensor is written: as it is stored, or rounded where that is quantised.
    fn written<'t>(&self, (name, tensor): &'t Named) -> Written<'t> {
        let rounded = self.checkpoint.is_quantised().then_some(self.dtype);
        let dtype = match (rounded, &tensor.stored) {
            (Some(Dtype::Bf16), _) => "BF16".to_owned(),
            (Some(Dtype::F16), _) => "F16".to_owned(),
            (None, stored) => stored.name(),
        };
        let mut shape = tensor.shape.clone();
        if is_extended(name) {
            shape[0] += self.spec.hidden;
        }
        Written { name, tensor, dtype, shape, rounded }
    }
}

fn is_extended(name: &str) -> bool {
    name == EMBEDDING || name == HEAD
}

/// A tensor, and what the derived checkpoint calls it.
type Named = (String, Tensor);

/// A tensor as it is written.
struct Written<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    dtype: String,
    shape: Vec<usize>,
    rounded: Option<Dtype>,
}

impl Written<'_> {
    fn bytes(&self) -> u64 {
        let extended = is_extended(self.name);
        let stored = match self.rounded {
            Some(_) => self.tensor.shape.iter().product::<usize>() as u64 * 2,
            None => self.tensor.range.end - self.tensor.range.start,
        };
        let channels = self.tensor.cols() as u64;
        let more = if extended { channels * channels * width(&self.dtype) as u64 } else { 0 };
        stored + more
    }
}

/// A tokenizer of single bytes. Text is not the other engine's business: ids go in, rows come out.
fn tokenizer() -> Value {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut vocab = Map::new();
    for byte in 0..256 {
        let code = if printable(byte) { byte } else { next };
        next += u32::from(!printable(byte));
        if let Some(c) = char::from_u32(code) {
            vocab.insert(c.to_string(), byte.into());
        }
    }
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}
