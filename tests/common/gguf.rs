//! Tiny GGUF files, good and bad: every byte of a header is the test's to choose.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as Candle};
use serde_json::Value;
use std::path::{Path, PathBuf};
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::ops::dtype::Dtype;

/// A metadata value with the type that it is stored in.
#[derive(Clone, Debug)]
pub enum Meta {
    U8(u8),
    U16(u16),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Bytes(Vec<u8>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type number, and whatever follows it.
    Raw(u32, Vec<u8>),
}

impl Meta {
    pub fn text(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// The type number and the bytes after it.
    fn encode(&self) -> (u32, Vec<u8>) {
        let list = |kind: u32, count: usize, bytes: Vec<u8>| {
            let mut all = kind.to_le_bytes().to_vec();
            all.extend((count as u64).to_le_bytes());
            all.extend(bytes);
            (9, all)
        };
        match self {
            Self::U8(v) => (0, vec![*v]),
            Self::U16(v) => (2, v.to_le_bytes().to_vec()),
            Self::U32(v) => (4, v.to_le_bytes().to_vec()),
            Self::I32(v) => (5, v.to_le_bytes().to_vec()),
            Self::F32(v) => (6, v.to_le_bytes().to_vec()),
            Self::Bool(v) => (7, vec![u8::from(*v)]),
            Self::Text(v) => (8, text(v)),
            Self::U64(v) => (10, v.to_le_bytes().to_vec()),
            Self::Texts(v) => list(8, v.len(), v.iter().flat_map(|t| text(t)).collect()),
            Self::Bytes(v) => list(0, v.len(), v.clone()),
            Self::I32s(v) => list(5, v.len(), v.iter().flat_map(|n| n.to_le_bytes()).collect()),
            Self::F32s(v) => list(6, v.len(), v.iter().flat_map(|n| n.to_le_bytes()).collect()),
            Self::Raw(kind, bytes) => (*kind, bytes.clone()),
        }
    }
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// One tensor; `shape` is fastest dimension first, as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// In place of the offset that is right.
    pub offset: Option<u64>,
}

/// A file before it is written.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub alignment: usize,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Stored>,
}

impl GgufFile {
    /// Sets or adds a key.
    pub fn set(&mut self, key: &str, value: Meta) {
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(k, _)| k != key);
    }

    /// Adds a tensor.
    pub fn add(&mut self, name: &str, shape: &[u64], kind: u32, data: Vec<u8>) {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        self.tensors.push(Stored { name, shape, kind, data, offset: None });
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            let (kind, bytes) = value.encode();
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut at = 0;
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(at).to_le_bytes());
            at += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }

    /// The parts that a split into `count` makes: all metadata in the first, whose tensors come
    /// first.
    pub fn split(&self, count: usize) -> Vec<GgufFile> {
        let each = self.tensors.len().div_ceil(count);
        let part = |no: usize| {
            let metadata = if no == 0 { self.metadata.clone() } else { Vec::new() };
            let of = no * each..((no + 1) * each).min(self.tensors.len());
            let tensors = self.tensors[of].to_vec();
            let mut part = GgufFile { alignment: self.alignment, metadata, tensors };
            part.set("split.no", Meta::U16(no as u16));
            part.set("split.count", Meta::U16(count as u16));
            part.set("split.tensors.count", Meta::I32(self.tensors.len() as i32));
            part
        };
        (0..count).map(part).collect()
    }
}

/// Writes parts under the names that they must have; the path of the first.
pub fn write_parts(dir: &Path, parts: &[GgufFile]) -> PathBuf {
    let path = |no: usize| dir.join(format!("m-{no:05}-of-{:05}.gguf", parts.len()));
    for (no, part) in (1..).zip(parts) {
        part.write(&path(no));
    }
    path(1)
}

/// The tensors of a Hugging Face Llama checkpoint as llama.cpp's converter would write them, with a
/// tokenizer of every byte, four words, and an end token.
pub fn of_checkpoint(dir: &Path, config: &Value, dtype: GgmlDType) -> GgufFile {
    let mut file = GgufFile { alignment: 32, metadata: metadata(config), tensors: Vec::new() };
    let checkpoint = Checkpoint::open(dir).unwrap();
    let head_dim = config["head_dim"].as_u64().unwrap() as usize;
    for (name, shape) in super::llama_shapes(config) {
        let tensor = checkpoint.tensor(&name).unwrap();
        let mut row = vec![0; tensor.cols()];
        let mut values = Vec::new();
        for r in 0..tensor.rows() {
            let source = match name.contains("q_proj") || name.contains("k_proj") {
                // Row 2i + half of a head is row half * head_dim / 2 + i.
                true => {
                    let (head, at) = (r / head_dim, r % head_dim);
                    head * head_dim + at % 2 * head_dim / 2 + at / 2
                }
                false => r,
            };
            tensor.read_row(source, Dtype::Bf16, &mut row).unwrap();
            values.extend(row.iter().map(|b| Dtype::Bf16.widen(*b)));
        }
        let dtype = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
        let dimensions: Vec<u64> = shape.iter().rev().map(|d| *d as u64).collect();
        let candle = Candle::from_vec(values, shape, &Device::Cpu).unwrap();
        let data = QTensor::quantize(&candle, dtype).unwrap().data().unwrap().into_owned();
        file.add(&translate(&name), &dimensions, number(dtype), data);
    }
    file
}

/// A whole tiny checkpoint in one file.
pub fn tiny(seed: u32, tied: bool) -> GgufFile {
    let dir = tempfile::tempdir().unwrap();
    let mut config = super::tiny_config();
    config["tie_word_embeddings"] = tied.into();
    super::write_checkpoint(dir.path(), &config, seed);
    of_checkpoint(dir.path(), &config, GgmlDType::BF16)
}

fn metadata(config: &Value) -> Vec<(String, Meta)> {
    let get = |key: &str| config[key].as_u64().unwrap() as u32;
    let mut metadata: Vec<(String, Meta)> = vec![
        ("general.architecture".into(), Meta::text("llama")),
        ("llama.rope.freq_base".into(), Meta::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon".into(), Meta::F32(1e-5)),
    ];
    for (from, to) in [
        ("num_hidden_layers", "block_count"),
        ("max_position_embeddings", "context_length"),
        ("hidden_size", "embedding_length"),
        ("intermediate_size", "feed_forward_length"),
        ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"),
        ("head_dim", "attention.key_length"),
    ] {
        metadata.push((format!("llama.{to}"), Meta::U32(get(from))));
    }
    let tokens = tokens();
    let types = (0..tokens.len()).map(|id| if id == 260 { 3 } else { 1 }).collect();
    for (key, value) in [
        ("model", Meta::text("gpt2")),
        ("pre", Meta::text("gpt-2")),
        ("tokens", Meta::Texts(tokens)),
        ("token_type", Meta::I32s(types)),
        ("merges", Meta::Texts(Vec::new())),
        ("eos_token_id", Meta::U32(260)),
    ] {
        metadata.push((format!("tokenizer.ggml.{key}"), value));
    }
    metadata
}

/// The tokens of [`super::tokenizer_json`], by id.
pub fn tokens() -> Vec<String> {
    let json = super::tokenizer_json();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(u64, &String)> =
        vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), token)).collect();
    tokens.sort_unstable();
    let mut tokens: Vec<String> = tokens.into_iter().map(|(_, token)| token.clone()).collect();
    tokens.push("<|end|>".into());
    tokens
}

fn number(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}

fn translate(name: &str) -> String {
    let mut name = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    name
}
