//! Shows GGUF v2 and v3 as a Hugging Face checkpoint: metadata becomes `config.json`, and tensors
//! get the names and the row order that the Hugging Face files have.
//!
//! A known key has its known type or the file is refused (`keys`), so a missing value and one of
//! another type are never the same.

mod header;
mod keys;
mod names;
mod parts;

pub use header::{HEADER_BYTES_MAX, Header, List, ScalarType, Value as Meta};

use super::config::{families, of_gguf};
use super::error::LoadError;
use super::family::{Family, GgufFamily, listed};
use super::tensor::Tensor;
use keys::CONFIG_KEYS;
use names::HeadCounts;
use parts::Parts;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Experts of a layer.
const EXPERTS_MAX: u64 = 4096;

/// Texts of tokens that end a turn or a text. Files name one of them at most; as in llama.cpp, the
/// others end a generation too, and are control tokens whatever the file says.
const END_TEXTS: [&str; 12] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
];

/// Whether a token of this text ends a generation.
pub(super) fn is_end_text(token: &str) -> bool {
    END_TEXTS.contains(&token)
}

/// An opened GGUF checkpoint.
pub struct Gguf {
    path: PathBuf,
    metadata: BTreeMap<String, Meta>,
    stored: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Opens the file, or all parts that begin with it, and reads the headers.
    ///
    /// # Errors
    /// When a file is missing, damaged or contradicts itself.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let Parts { metadata, tensors } = Parts::open(path)?;
        keys::check(path, &metadata)?;
        Ok(Self { path: path.to_owned(), metadata, stored: tensors })
    }

    /// Frees the metadata's lists (the vocabulary), once a tokenizer was built from them.
    pub fn forget_lists(&mut self) {
        self.metadata.retain(|_, value| !matches!(value, Meta::List(_)));
    }

    /// The metadata value of `key`.
    pub fn get(&self, key: &str) -> Option<&Meta> {
        self.metadata.get(key)
    }

    /// The value of `key`, where it is text in UTF-8.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Meta::Text(text) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }

    /// The value of `key`, where it is an integer of at least 0.
    pub fn integer(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Meta::Integer(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The value of `key`, where it is a boolean.
    pub fn boolean(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Meta::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The value of `key`, where it is a list that was not [forgotten](Self::forget_lists).
    pub fn list(&self, key: &str) -> Option<&List> {
        match self.get(key)? {
            Meta::List(list) => Some(list),
            _ => None,
        }
    }

    /// Fails with the metadata key as the name of the fault.
    pub fn error(&self, key: &str, what: impl ToString) -> LoadError {
        keys::error(&self.path, key, what)
    }

    fn unsupported(&self, key: &str, value: impl ToString, supported: &str) -> LoadError {
        LoadError::Unsupported {
            path: self.path.clone(),
            key: key.to_owned(),
            value: value.to_string(),
            supported: supported.to_owned(),
        }
    }

    fn architecture(&self) -> Result<&str, LoadError> {
        keys::architecture(&self.path, &self.metadata)
    }

    /// The family, by architecture and number of experts.
    fn family(&self) -> Result<(&'static Family, &'static GgufFamily), LoadError> {
        let architecture = self.architecture()?;
        let experts = self.integer(&format!("{architecture}.expert_count")).unwrap_or(0);
        of_gguf(architecture, experts).ok_or_else(|| {
            let mut known: Vec<&str> = Vec::new();
            for gguf in families().filter_map(|family| family.gguf.as_ref()) {
                if !known.contains(&gguf.architecture) {
                    known.push(gguf.architecture);
                }
            }
            let supported = listed(known.into_iter());
            self.unsupported("general.architecture", architecture, &supported)
        })
    }

    /// The metadata as a Hugging Face configuration.
    ///
    /// # Errors
    /// When the architecture is unknown, a required key is missing, or a value cannot be honoured.
    pub fn config(&self) -> Result<Value, LoadError> {
        let (family, gguf) = self.family()?;
        let architecture = gguf.architecture;
        let mut config = Map::new();
        config.insert("model_type".into(), family.name.into());
        for (from, to, _) in CONFIG_KEYS {
            if let Some(value) = self.get(&format!("{architecture}.{from}")) {
                config.insert((*to).into(), number(value));
            }
        }
        self.check_counts(architecture)?;
        self.check_rotation(architecture)?;
        self.complete(gguf, &mut config)?;
        Ok(Value::Object(config))
    }

    /// Counts that something is made for, before it is made.
    fn check_counts(&self, arch: &str) -> Result<(), LoadError> {
        let tensors = self.stored.len() as u64;
        for (key, limit) in [("block_count", tensors), ("expert_count", EXPERTS_MAX)] {
            let key = format!("{arch}.{key}");
            if let Some(count) = self.integer(&key).filter(|count| *count > limit) {
                return Err(self.error(&key, format!("must be at most {limit}, got {count}")));
            }
        }
        let (key, rows) = ("tokenizer.ggml.tokens", self.vocab_rows());
        match self.list(key) {
            Some(list) if list.len() > rows => {
                let what = format!("lists {} tokens, the embedding has {rows} rows", list.len());
                Err(self.error(key, what))
            }
            _ => Ok(()),
        }
    }

    /// Only rotations of whole heads are built, and only one set of divisors.
    fn check_rotation(&self, arch: &str) -> Result<(), LoadError> {
        let whole = |key: &str| self.integer(&format!("{arch}.{key}"));
        let heads = whole("attention.head_count").unwrap_or(0).max(1);
        let even = whole("embedding_length").map(|hidden| hidden / heads);
        let head = whole("attention.key_length").or(even);
        for key in ["rope.dimension_count", "attention.value_length"] {
            if let (Some(got), Some(want)) = (whole(key), head.filter(|_| whole(key) != head)) {
                let supported = format!("{want}, the size of a head, is");
                return Err(self.unsupported(&format!("{arch}.{key}"), got, &supported));
            }
        }
        for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
            if let Some(tensor) = self.stored.get(name) {
                return Err(tensor.error("scaling of the rotation by longrope is not supported"));
            }
        }
        Ok(())
    }

    /// What the plain key table cannot say.
    fn complete(
        &self,
        family: &GgufFamily,
        config: &mut Map<String, Value>,
    ) -> Result<(), LoadError> {
        let arch = family.architecture;
        config.insert("vocab_size".into(), self.vocab_rows().into());
        let tied = !self.stored.contains_key("output.weight");
        config.insert("tie_word_embeddings".into(), tied.into());
        let end_tokens = self.end_tokens()?;
        if !end_tokens.is_empty() {
            config.insert("eos_token_id".into(), end_tokens.into());
        }
        if self.integer(&format!("{arch}.attention.sliding_window")) == Some(0) {
            config.insert("sliding_window".into(), Value::Null);
        }
        self.complete_by_family(family, config);
        if let Some(scaling) = self.rope_scaling(arch)? {
            config.insert("rope_scaling".into(), scaling);
        }
        Ok(())
    }

    /// What the family knows and its metadata leaves out.
    fn complete_by_family(&self, family: &GgufFamily, config: &mut Map<String, Value>) {
        let arch = family.architecture;
        let whole = |key: &str| self.integer(&format!("{arch}.{key}"));
        if family.norms_include_one {
            config.insert("norm_includes_one".into(), true.into());
        }
        if let Some(activation) = family.activation {
            config.insert("hidden_activation".into(), activation.into());
        }
        // The default of these files, whatever that of the family's library is.
        config.entry("rope_theta").or_insert(json!(10_000.0));
        if let Some(layers) = family.scaled_by_heads {
            let heads = whole("attention.head_count").unwrap_or(0).max(1);
            let of_head = whole("embedding_length").unwrap_or(0) / heads;
            let scalar = match whole("block_count") == Some(layers) {
                true => of_head,
                false => whole("attention.key_length").unwrap_or(of_head),
            };
            config.insert("query_pre_attn_scalar".into(), scalar.into());
        }
    }

    /// Linear scaling is what a factor means where no type is given. `rope.scale_linear` is the
    /// factor's old name.
    fn rope_scaling(&self, arch: &str) -> Result<Option<Value>, LoadError> {
        let factor = ["rope.scaling.factor", "rope.scale_linear"]
            .into_iter()
            .find_map(|key| self.get(&format!("{arch}.{key}")));
        let key = format!("{arch}.rope.scaling.type");
        match (self.string(&key), factor) {
            (Some("none"), _) | (None, None) => Ok(None),
            (None | Some("linear"), Some(factor)) => {
                Ok(Some(json!({"type": "linear", "factor": number(factor)})))
            }
            (Some("linear"), None) => {
                Err(self.error(&format!("{arch}.rope.scaling.factor"), "is missing"))
            }
            (Some(other), _) => Err(self.unsupported(&key, other, "none and linear are")),
        }
    }

    /// Ids of the tokens that end a generation: those that the metadata names, and those that are
    /// known by their text.
    fn end_tokens(&self) -> Result<Vec<u64>, LoadError> {
        let mut ids = Vec::new();
        for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ids.extend(self.token_id(name)?);
        }
        if let Some(List::Texts(tokens)) = self.list("tokenizer.ggml.tokens") {
            let known = |token: &[u8]| std::str::from_utf8(token).is_ok_and(is_end_text);
            ids.extend((0..).zip(tokens).filter(|(_, token)| known(token)).map(|(id, _)| id));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The id that `tokenizer.ggml.<name>` gives, which must be a token's.
    pub(super) fn token_id(&self, name: &str) -> Result<Option<u64>, LoadError> {
        let key = format!("tokenizer.ggml.{name}");
        let tokens = self.list("tokenizer.ggml.tokens").map_or(0, List::len);
        match self.integer(&key) {
            Some(id) if id >= tokens as u64 => {
                Err(self.error(&key, format!("must name one of {tokens} tokens, got {id}")))
            }
            id => Ok(id),
        }
    }

    /// Rows of the embedding, which may be padded beyond the token list.
    fn vocab_rows(&self) -> usize {
        let tokens = self.list("tokenizer.ggml.tokens").map_or(0, List::len);
        let embedding = self.stored.get("token_embd.weight");
        embedding.and_then(|tensor| tensor.shape.first().copied()).unwrap_or(tokens)
    }

    /// All tensors under their Hugging Face names.
    ///
    /// # Errors
    /// When the architecture is unknown, two mean the same, or a stack of experts has another
    /// number of them.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, LoadError> {
        let (family, gguf) = self.family()?;
        let count = |key: &str| self.integer(&format!("{}.{key}", gguf.architecture));
        let heads = |key: &str| count(key).unwrap_or(1) as usize;
        let counts = HeadCounts {
            heads: heads("attention.head_count"),
            kv_heads: heads("attention.head_count_kv"),
            experts: count("expert_count").unwrap_or(0) as usize,
        };
        names::translate_all((family, gguf), &counts, &self.stored)
    }
}

/// A number of the metadata in JSON.
fn number(value: &Meta) -> Value {
    match value {
        Meta::Integer(v) => u64::try_from(*v).map_or_else(|_| json!(*v as i64), |v| json!(v)),
        Meta::Float(v) => json!(v),
        _ => Value::Null,
    }
}
