//! GGUF v3 seen as a Hugging Face checkpoint: metadata becomes `config.json`, tensors get the names
//! and the row order that the Hugging Face files have. Headers are read by candle.

use super::checkpoint::map;
use super::error::LoadError;
use super::tensor::{Stored, Tensor};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value as Meta, VersionedMagic};
use memmap2::Mmap;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Block types that are dequantised at load.
const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are";

/// An opened GGUF file.
pub struct Gguf {
    path: PathBuf,
    content: Content,
    map: Arc<Mmap>,
}

impl Gguf {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// When it is not a whole GGUF v3 file.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let map = map(path)?;
        // A length field can ask for more memory than exists; that panics inside the reader.
        let read = || Content::read(&mut Cursor::new(&map[..]));
        let content = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
            .map_err(|_| LoadError::invalid(path, "GGUF header with impossible lengths"))?
            .map_err(|e| LoadError::invalid(path, format!("not a whole GGUF file: {e}")))?;
        if !matches!(content.magic, VersionedMagic::GgufV2 | VersionedMagic::GgufV3) {
            return Err(LoadError::invalid(path, "GGUF v1 is not supported; v2 and v3 are"));
        }
        Ok(Self { path: path.to_owned(), content, map })
    }

    /// Frees the metadata's lists (the vocabulary), once a tokenizer was built from them.
    pub fn forget_lists(&mut self) {
        self.content.metadata.retain(|_, value| !matches!(value, Meta::Array(_)));
    }

    /// The metadata value of `key`.
    pub fn get(&self, key: &str) -> Option<&Meta> {
        self.content.metadata.get(key)
    }

    /// The string of `key`.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    /// The integer of `key`.
    pub fn integer(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Meta::U8(v) => Some(u64::from(*v)),
            Meta::U16(v) => Some(u64::from(*v)),
            Meta::U32(v) => Some(u64::from(*v)),
            Meta::U64(v) => Some(*v),
            Meta::I8(v) => u64::try_from(*v).ok(),
            Meta::I16(v) => u64::try_from(*v).ok(),
            Meta::I32(v) => u64::try_from(*v).ok(),
            Meta::I64(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The boolean of `key`.
    pub fn boolean(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(|v| v.to_bool().ok())
    }

    /// The array of `key`.
    pub fn array(&self, key: &str) -> Option<&[Meta]> {
        self.get(key).and_then(|v| v.to_vec().ok()).map(Vec::as_slice)
    }

    /// Fails with the metadata key as the name of the fault.
    pub fn error(&self, key: &str, what: impl ToString) -> LoadError {
        LoadError::Key { path: self.path.clone(), key: key.to_owned(), what: what.to_string() }
    }

    fn architecture(&self) -> Result<&str, LoadError> {
        let key = "general.architecture";
        self.string(key).ok_or_else(|| self.error(key, "is missing or not a string"))
    }

    /// The metadata as a Hugging Face configuration.
    ///
    /// # Errors
    /// When the architecture is unknown or a required key is missing.
    pub fn config(&self) -> Result<Value, LoadError> {
        let architecture = self.architecture()?;
        let experts = self.integer(&format!("{architecture}.expert_count")).unwrap_or(0);
        let model_type = match (architecture, experts) {
            ("llama", 0) => "llama",
            ("llama", _) => "mixtral",
            ("qwen2", 0) => "qwen2",
            ("qwen3", 0) => "qwen3",
            ("qwen3moe", _) => "qwen3_moe",
            ("gemma2", 0) => "gemma2",
            ("phi3", 0) => "phi3",
            _ => {
                return Err(LoadError::Unsupported {
                    path: self.path.clone(),
                    key: "general.architecture".into(),
                    value: architecture.to_owned(),
                    supported: "llama, qwen2, qwen3, qwen3moe, gemma2 and phi3 are".into(),
                });
            }
        };
        let mut config = Map::new();
        config.insert("model_type".into(), model_type.into());
        for (from, to) in CONFIG_KEYS {
            if let Some(value) = self.get(&format!("{architecture}.{from}")) {
                config.insert((*to).into(), self.number(from, value)?);
            }
        }
        self.complete(architecture, &mut config)?;
        Ok(Value::Object(config))
    }

    /// What the plain key table cannot say.
    fn complete(&self, arch: &str, config: &mut Map<String, Value>) -> Result<(), LoadError> {
        let tokens = self.array("tokenizer.ggml.tokens").map_or(0, <[Meta]>::len);
        config.insert("vocab_size".into(), self.vocab_rows(tokens).into());
        config.insert("tie_word_embeddings".into(), (!self.has("output.weight")).into());
        if arch == "gemma2" {
            // The converter stores 1 + w.
            config.insert("norm_includes_one".into(), true.into());
            config.insert("hidden_activation".into(), "gelu_pytorch_tanh".into());
            // The 27B model (46 layers) scales queries by hidden size over heads; the metadata
            // does not say so.
            if self.integer("gemma2.block_count") == Some(46) {
                let whole = |key| self.integer(key).unwrap_or(0);
                let heads = whole("gemma2.attention.head_count").max(1);
                let scalar = whole("gemma2.embedding_length") / heads;
                config.insert("query_pre_attn_scalar".into(), scalar.into());
            }
        }
        match self.string(&format!("{arch}.rope.scaling.type")) {
            None | Some("none") => {}
            Some("linear") => {
                let key = format!("{arch}.rope.scaling.factor");
                let factor = self.get(&key).ok_or_else(|| self.error(&key, "is missing"))?;
                let factor = self.number(&key, factor)?;
                config.insert("rope_scaling".into(), json!({"type": "linear", "factor": factor}));
            }
            Some(other) => {
                return Err(LoadError::Unsupported {
                    path: self.path.clone(),
                    key: format!("{arch}.rope.scaling.type"),
                    value: other.to_owned(),
                    supported: "none and linear are".into(),
                });
            }
        }
        Ok(())
    }

    /// Rows of the embedding, which may be padded beyond the token list.
    fn vocab_rows(&self, tokens: usize) -> usize {
        let info = self.content.tensor_infos.get("token_embd.weight");
        info.and_then(|i| i.shape.dims().first().copied()).unwrap_or(tokens)
    }

    fn has(&self, tensor: &str) -> bool {
        self.content.tensor_infos.contains_key(tensor)
    }

    fn number(&self, key: &str, value: &Meta) -> Result<Value, LoadError> {
        match value {
            Meta::F32(v) => Ok(json!(v)),
            Meta::F64(v) => Ok(json!(v)),
            Meta::Bool(v) => Ok(json!(v)),
            Meta::U32(v) => Ok(json!(v)),
            Meta::U64(v) => Ok(json!(v)),
            Meta::I32(v) => Ok(json!(v)),
            Meta::I64(v) => Ok(json!(v)),
            other => Err(self.error(key, format!("must be a number, got {other:?}"))),
        }
    }

    /// All tensors under their Hugging Face names.
    ///
    /// # Errors
    /// When one lies outside the file or has an unsupported type.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>, LoadError> {
        let arch = self.architecture()?;
        let heads = |key: &str| self.integer(&format!("{arch}.attention.{key}")).unwrap_or(1);
        let (q_heads, kv_heads) = (heads("head_count"), heads("head_count_kv"));
        let mut tensors = BTreeMap::new();
        for (name, info) in &self.content.tensor_infos {
            let mut tensor = self.tensor(name, info)?;
            if arch == "llama" {
                if name.contains("attn_q.") {
                    unpermute(&mut tensor, q_heads as usize);
                } else if name.contains("attn_k.") {
                    unpermute(&mut tensor, kv_heads as usize);
                }
            }
            match expert_stack(arch, name) {
                Some(expert_name) => split_experts(&tensor, &expert_name, &mut tensors)?,
                None => {
                    tensors.insert(translate(arch, name), tensor);
                }
            }
        }
        Ok(tensors)
    }

    fn tensor(&self, name: &str, info: &TensorInfo) -> Result<Tensor, LoadError> {
        let error = |what: String| LoadError::Tensor {
            name: name.to_owned(),
            path: self.path.clone(),
            what,
        };
        let stored = match info.ggml_dtype {
            GgmlDType::F32 => Stored::F32,
            GgmlDType::F16 => Stored::F16,
            GgmlDType::BF16 => Stored::Bf16,
            GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q8_1 | GgmlDType::Q8K => {
                let what = format!("type {:?} is not supported; {SUPPORTED}", info.ggml_dtype);
                return Err(error(what));
            }
            quantised => Stored::Quantised(quantised),
        };
        let shape = info.shape.dims().to_vec();
        let count = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
        let start = usize::try_from(self.content.tensor_data_offset + info.offset).ok();
        let range = count
            .and_then(|n| stored.bytes(n))
            .and_then(|len| start.and_then(|s| Some(s..s.checked_add(len)?)))
            .filter(|range| range.end <= self.map.len())
            .ok_or_else(|| {
                error(format!("ends beyond the file ({} bytes): truncated?", self.map.len()))
            })?;
        Ok(Tensor {
            name: name.to_owned(),
            path: self.path.clone(),
            stored,
            shape,
            map: Arc::clone(&self.map),
            range,
            order: None,
        })
    }
}

/// GGUF key (after the architecture) to Hugging Face key.
const CONFIG_KEYS: &[(&str, &str)] = &[
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("rope.freq_base", "rope_theta"),
    ("expert_count", "num_local_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
];

/// The Hugging Face name of a GGUF tensor; unknown names stay as they are.
fn translate(arch: &str, name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".into(),
        "output_norm.weight" => return "model.norm.weight".into(),
        "output.weight" => return "lm_head.weight".into(),
        _ => {}
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = layer else { return name.to_owned() };
    let (part, suffix) = part.rsplit_once('.').unwrap_or((part, "weight"));
    let part = match (part, arch) {
        ("attn_q", _) => "self_attn.q_proj",
        ("attn_k", _) => "self_attn.k_proj",
        ("attn_v", _) => "self_attn.v_proj",
        ("attn_qkv", _) => "self_attn.qkv_proj",
        ("attn_output", _) => "self_attn.o_proj",
        ("attn_q_norm", _) => "self_attn.q_norm",
        ("attn_k_norm", _) => "self_attn.k_norm",
        ("attn_norm", _) => "input_layernorm",
        ("ffn_norm", "gemma2") => "pre_feedforward_layernorm",
        ("ffn_norm", _) | ("post_attention_norm", _) => "post_attention_layernorm",
        ("post_ffw_norm", _) => "post_feedforward_layernorm",
        ("ffn_up", "phi3") => "mlp.gate_up_proj",
        ("ffn_gate", _) => "mlp.gate_proj",
        ("ffn_up", _) => "mlp.up_proj",
        ("ffn_down", _) => "mlp.down_proj",
        ("ffn_gate_inp", "llama") => "block_sparse_moe.gate",
        ("ffn_gate_inp", _) => "mlp.gate",
        (other, _) => other,
    };
    format!("model.layers.{layer}.{part}.{suffix}")
}

/// For a stack of all experts' matrices: the name of one expert's, with `{}` for its number.
fn expert_stack(arch: &str, name: &str) -> Option<String> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let (mixtral, qwen) = match part {
        "ffn_gate_exps.weight" => ("w1", "gate_proj"),
        "ffn_up_exps.weight" => ("w3", "up_proj"),
        "ffn_down_exps.weight" => ("w2", "down_proj"),
        _ => return None,
    };
    Some(match arch {
        "llama" => format!("model.layers.{layer}.block_sparse_moe.experts.{{}}.{mixtral}.weight"),
        _ => format!("model.layers.{layer}.mlp.experts.{{}}.{qwen}.weight"),
    })
}

fn split_experts(
    stack: &Tensor,
    name: &str,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<(), LoadError> {
    let [experts, rows, cols] = stack.shape[..] else {
        return Err(stack.error(format!("expected 3 dimensions, got {:?}", stack.shape)));
    };
    let bytes = stack
        .stored
        .bytes(rows * cols)
        .ok_or_else(|| stack.error("an expert does not fill whole quantisation blocks"))?;
    for expert in 0..experts {
        let start = stack.range.start + expert * bytes;
        let name = name.replace("{}", &expert.to_string());
        let shape = vec![rows, cols];
        let range = start..start + bytes;
        tensors.insert(name.clone(), Tensor { name, shape, range, ..stack.clone() });
    }
    Ok(())
}

/// llama.cpp interleaves the two rotary halves of each head; this reads them back half by half.
fn unpermute(tensor: &mut Tensor, heads: usize) {
    let rows = if tensor.shape.len() == 1 { 0 } else { tensor.rows() };
    if rows == 0 || !rows.is_multiple_of(heads * 2) {
        return;
    }
    let head_dim = rows / heads;
    tensor.order = Some(Arc::new(move |row| {
        let (head, r) = (row / head_dim, row % head_dim);
        head * head_dim + r % (head_dim / 2) * 2 + r / (head_dim / 2)
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_those_of_hugging_face() {
        for (arch, from, to) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight"),
            ("llama", "blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight"),
            ("qwen2", "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
            ("llama", "blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
            ("gemma2", "blk.1.ffn_norm.weight", "model.layers.1.pre_feedforward_layernorm.weight"),
            ("phi3", "blk.2.ffn_up.weight", "model.layers.2.mlp.gate_up_proj.weight"),
            ("llama", "rope_freqs.weight", "rope_freqs.weight"),
        ] {
            assert_eq!(translate(arch, from), to);
        }
        assert_eq!(
            expert_stack("qwen3moe", "blk.3.ffn_up_exps.weight").as_deref(),
            Some("model.layers.3.mlp.experts.{}.up_proj.weight")
        );
    }
}
