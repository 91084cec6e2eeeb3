//! A tokenizer from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).
//!
//! GGUF names the pre-tokenizer by a word; only words whose rules are known here are accepted,
//! because a near miss splits text differently and nobody would notice.

use super::error::LoadError;
use super::gguf::Gguf;
use candle_core::quantized::gguf_file::Value as Meta;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::{AddedToken, Tokenizer};

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KNOWN_PRE: &str = "default, gpt-2, smollm, llama-bpe, llama3, smaug-bpe and qwen2 are";

/// Token types of the metadata.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// Builds the tokenizer.
///
/// # Errors
/// When the metadata lacks a part or names a scheme that is refused.
pub(super) fn build(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let key = "tokenizer.ggml.model";
    let parts = Parts::read(gguf)?;
    let json = match gguf.string(key) {
        Some("gpt2") => byte_level(gguf, &parts)?,
        Some("llama") => sentence_piece(gguf, &parts)?,
        Some(other) => {
            let what = format!("= {other} is not supported; gpt2 and llama are");
            return Err(gguf.error(key, what));
        }
        None => return Err(gguf.error(key, "is missing or not a string")),
    };
    let bytes = json.to_string();
    let mut tokenizer = Tokenizer::from_bytes(bytes.as_bytes())
        .map_err(|e| gguf.error("tokenizer.ggml", format!("makes no tokenizer: {e}")))?;
    add_special_tokens(&mut tokenizer, &parts);
    Ok(tokenizer)
}

struct Parts {
    tokens: Vec<String>,
    types: Vec<u64>,
    scores: Vec<f32>,
}

impl Parts {
    fn read(gguf: &Gguf) -> Result<Self, LoadError> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let types = gguf.array("tokenizer.ggml.token_type").unwrap_or_default();
        let scores = gguf.array("tokenizer.ggml.scores").unwrap_or_default();
        Ok(Self {
            types: types.iter().map(integer).collect(),
            scores: scores.iter().map(|v| v.to_f32().unwrap_or(0.0)).collect(),
            tokens,
        })
    }

    fn kind(&self, id: usize) -> u64 {
        self.types.get(id).copied().unwrap_or(1)
    }

    fn vocab(&self) -> Value {
        self.tokens.iter().enumerate().map(|(id, t)| (t.clone(), Value::from(id))).collect()
    }
}

fn integer(value: &Meta) -> u64 {
    match value {
        Meta::U32(v) => u64::from(*v),
        Meta::I32(v) => u64::try_from(*v).unwrap_or(0),
        _ => 0,
    }
}

fn strings(gguf: &Gguf, key: &str) -> Result<Vec<String>, LoadError> {
    let array = gguf.array(key).ok_or_else(|| gguf.error(key, "is missing or not an array"))?;
    array
        .iter()
        .map(|v| v.to_string().cloned().map_err(|_| gguf.error(key, "must hold strings")))
        .collect()
}

fn byte_level(gguf: &Gguf, parts: &Parts) -> Result<Value, LoadError> {
    let merges = strings(gguf, "tokenizer.ggml.merges")?;
    let pre = gguf.string("tokenizer.ggml.pre").unwrap_or("default");
    let byte_level = |use_regex: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
               "use_regex": use_regex})
    };
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": false},
            byte_level(false),
        ]})
    };
    let (pre_tokenizer, normalizer, ignore_merges) = match pre {
        "default" | "gpt-2" => (byte_level(true), Value::Null, false),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            let both = json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]});
            (both, Value::Null, false)
        }
        "llama-bpe" | "llama3" => (split(LLAMA3_SPLIT), Value::Null, true),
        "smaug-bpe" => (split(LLAMA3_SPLIT), Value::Null, false),
        "qwen2" => (split(QWEN2_SPLIT), json!({"type": "NFC"}), false),
        other => {
            let what = format!("= {other} is not supported; {KNOWN_PRE}");
            return Err(gguf.error("tokenizer.ggml.pre", what));
        }
    };
    let mut post: Vec<Value> = vec![byte_level(false)];
    post.extend(template(gguf, parts, false)?);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "Sequence", "processors": post},
        "decoder": byte_level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": ignore_merges, "vocab": parts.vocab(),
            "merges": merges},
    }))
}

fn sentence_piece(gguf: &Gguf, parts: &Parts) -> Result<Value, LoadError> {
    if parts.scores.len() != parts.tokens.len() {
        let what = format!("needs {} entries, got {}", parts.tokens.len(), parts.scores.len());
        return Err(gguf.error("tokenizer.ggml.scores", what));
    }
    let prefix = gguf.boolean("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = (0..parts.tokens.len()).find(|id| parts.kind(*id) == UNKNOWN);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": template(gguf, parts, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null,
            "unk_token": unknown.map(|id| parts.tokens[id].clone()),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "vocab": parts.vocab(),
            "merges": merges_from_scores(parts)},
    }))
}

/// SentencePiece keeps scores instead of merges; every pair of pieces that makes a third becomes a
/// merge, best score first, then by the parts' ids.
fn merges_from_scores(parts: &Parts) -> Vec<Value> {
    let ids: HashMap<&str, usize> =
        parts.tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    let mut merges: Vec<(usize, usize, usize)> = Vec::new();
    for (whole, token) in parts.tokens.iter().enumerate() {
        if matches!(parts.kind(whole), CONTROL | UNKNOWN | BYTE) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left), Some(right)) = (ids.get(left), ids.get(right)) {
                merges.push((whole, *left, *right));
            }
        }
    }
    merges.sort_by(|a, b| {
        let by_score = parts.scores[b.0].total_cmp(&parts.scores[a.0]);
        by_score.then(a.0.cmp(&b.0)).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let token = |id: usize| parts.tokens[id].clone();
    merges.into_iter().map(|(_, l, r)| json!([token(l), token(r)])).collect()
}

/// The post-processor that adds beginning and end tokens, where the metadata asks for them.
fn template(gguf: &Gguf, parts: &Parts, bos: bool) -> Result<Option<Value>, LoadError> {
    let special = |flag: &str, id_key: &str, default: bool| {
        if !gguf.boolean(&format!("tokenizer.ggml.{flag}")).unwrap_or(default) {
            return Ok::<_, LoadError>(None);
        }
        let key = format!("tokenizer.ggml.{id_key}");
        let id = gguf.integer(&key).ok_or_else(|| gguf.error(&key, "is missing"))?;
        let token = parts.tokens.get(id as usize);
        let token = token.ok_or_else(|| gguf.error(&key, format!("names no token: {id}")))?;
        Ok(Some((token.clone(), id)))
    };
    let bos = special("add_bos_token", "bos_token_id", bos)?;
    let eos = special("add_eos_token", "eos_token_id", false)?;
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let marker = |s: &Option<(String, u64)>| {
        s.as_ref().map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": 0}}))
    };
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<Value> =
        [marker(&bos), Some(text), marker(&eos)].into_iter().flatten().collect();
    let specials: serde_json::Map<String, Value> = [&bos, &eos]
        .into_iter()
        .flatten()
        .map(|(t, id)| (t.clone(), json!({"id": t, "ids": [id], "tokens": [t]})))
        .collect();
    Ok(Some(json!({"type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": specials})))
}

fn add_special_tokens(tokenizer: &mut Tokenizer, parts: &Parts) {
    let of_kind = |special: bool, kinds: &[u64]| -> Vec<AddedToken> {
        let ids = (0..parts.tokens.len()).filter(|id| kinds.contains(&parts.kind(*id)));
        ids.map(|id| AddedToken::from(parts.tokens[id].clone(), special).normalized(false))
            .collect()
    };
    tokenizer.add_special_tokens(&of_kind(true, &[CONTROL, UNKNOWN]));
    tokenizer.add_tokens(&of_kind(false, &[USER_DEFINED]));
}
