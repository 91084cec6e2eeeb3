//! Builds a tokenizer from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).
//!
//! GGUF names the pre-tokenizer by a word; only words whose rules are known here are accepted,
//! because a near miss splits text differently and nobody would notice.

use super::error::LoadError;
use super::gguf::{Gguf, List, Meta, is_end_text};
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::{AddedToken, Tokenizer};

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KNOWN_PRE: &str =
    "default, gpt-2, smollm, llama-bpe, llama3, llama-v3, smaug-bpe and qwen2 are";
/// Bytes of a piece of a SentencePiece vocabulary: every cut of one is looked at.
const PIECE_BYTES_MAX: usize = 256;

/// Names of Llama 3's pre-tokenizer.
const LLAMA3_PRE: [&str; 3] = ["llama-bpe", "llama3", "llama-v3"];

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
        None => return Err(gguf.error(key, "is missing")),
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
        let types =
            numbers(gguf, "tokenizer.ggml.token_type", tokens.len(), |value| match value {
                Meta::Integer(v) => u64::try_from(v).unwrap_or(0),
                _ => 0,
            })?;
        let scores = numbers(gguf, "tokenizer.ggml.scores", tokens.len(), |value| match value {
            Meta::Float(v) => v as f32,
            _ => 0.0,
        })?;
        let parts = Self { tokens, types, scores };
        parts.check_distinct(gguf)?;
        Ok(parts)
    }

    /// The type of a token; without a list of types all are normal.
    fn kind(&self, id: usize) -> u64 {
        if is_end_text(&self.tokens[id]) {
            return CONTROL;
        }
        self.types.get(id).copied().unwrap_or(1)
    }

    fn vocab(&self) -> Value {
        self.tokens.iter().enumerate().map(|(id, t)| (t.clone(), Value::from(id))).collect()
    }

    fn check_distinct(&self, gguf: &Gguf) -> Result<(), LoadError> {
        let mut ids = HashMap::new();
        for (id, token) in self.tokens.iter().enumerate() {
            // Empty ones are padding, which no text becomes.
            if let Some(other) = ids.insert(token, id).filter(|_| !token.is_empty()) {
                let what = format!("lists {token:?} as {other} and as {id}");
                return Err(gguf.error("tokenizer.ggml.tokens", what));
            }
        }
        Ok(())
    }
}

/// The list of `key` with one number for each token; empty where there is none.
fn numbers<T>(
    gguf: &Gguf,
    key: &str,
    tokens: usize,
    read: impl Fn(Meta) -> T,
) -> Result<Vec<T>, LoadError> {
    let Some(list) = gguf.list(key) else { return Ok(Vec::new()) };
    if list.len() != tokens {
        return Err(gguf.error(key, format!("needs {tokens} entries, got {}", list.len())));
    }
    Ok(list.scalars().map(read).collect())
}

fn strings(gguf: &Gguf, key: &str) -> Result<Vec<String>, LoadError> {
    let Some(List::Texts(texts)) = gguf.list(key) else {
        return Err(gguf.error(key, "is missing"));
    };
    let text = |(index, text): (usize, &[u8])| {
        let text = std::str::from_utf8(text).map(str::to_owned);
        text.map_err(|_| gguf.error(key, format!("entry {index} is not UTF-8")))
    };
    texts.iter().map(AsRef::as_ref).enumerate().map(text).collect()
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
        pre if LLAMA3_PRE.contains(&pre) => (split(LLAMA3_SPLIT), Value::Null, true),
        "smaug-bpe" => (split(LLAMA3_SPLIT), Value::Null, false),
        "qwen2" => (split(QWEN2_SPLIT), json!({"type": "NFC"}), false),
        other => {
            let what = format!("= {other} is not supported; {KNOWN_PRE}");
            return Err(gguf.error("tokenizer.ggml.pre", what));
        }
    };
    let mut post: Vec<Value> = vec![byte_level(false)];
    // What llama.cpp adds where the metadata does not say.
    let bos = LLAMA3_PRE.contains(&pre);
    post.extend(template(gguf, parts, bos)?);
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
            "merges": merges_from_scores(gguf, parts)?},
    }))
}

/// SentencePiece keeps scores instead of merges; every pair of pieces that makes a third becomes a
/// merge, best score first, then by the parts' ids.
fn merges_from_scores(gguf: &Gguf, parts: &Parts) -> Result<Vec<Value>, LoadError> {
    let ids: HashMap<&str, usize> =
        parts.tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    let mut merges: Vec<(usize, usize, usize)> = Vec::new();
    for (whole, token) in parts.tokens.iter().enumerate() {
        if matches!(parts.kind(whole), CONTROL | UNKNOWN | BYTE) {
            continue;
        }
        if token.len() > PIECE_BYTES_MAX {
            let (key, len) = ("tokenizer.ggml.tokens", token.len());
            let what =
                format!("entry {whole} must have at most {PIECE_BYTES_MAX} bytes, has {len}");
            return Err(gguf.error(key, what));
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
    Ok(merges.into_iter().map(|(_, l, r)| json!([token(l), token(r)])).collect())
}

/// The post-processor that adds beginning and end tokens, where the metadata asks for them.
fn template(gguf: &Gguf, parts: &Parts, bos: bool) -> Result<Option<Value>, LoadError> {
    let special = |flag: &str, id_key: &str, default: bool| {
        if !gguf.boolean(&format!("tokenizer.ggml.{flag}")).unwrap_or(default) {
            return Ok::<_, LoadError>(None);
        }
        let key = format!("tokenizer.ggml.{id_key}");
        let id = gguf.token_id(id_key)?.ok_or_else(|| gguf.error(&key, "is missing"))?;
        Ok(Some((parts.tokens[id as usize].clone(), id)))
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
