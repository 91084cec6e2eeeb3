//! Text to ids and ids to bytes.
//!
//! Encoding is the `tokenizers` crate's. Decoding is our own table of each token's raw bytes,
//! because log-probability entries need them and streaming must be exact: [`Detokenizer`] emits a
//! character once all its bytes have come, and the concatenation of what it emits equals
//! [`TextTokenizer::decode`] of all ids, which equals the crate's decoding wherever the bytes are
//! valid UTF-8.

use super::checkpoint::Checkpoint;
use super::error::{LoadError, read_json};
use super::gguf_tokenizer;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;
use tokenizers::Tokenizer;

/// A tokenizer with its byte table.
pub struct TextTokenizer {
    inner: Tokenizer,
    bytes: Vec<Option<Box<[u8]>>>, // by id; None where the vocabulary has a hole
    special: HashSet<u32>,
    strip_leading_space: bool,
}

/// How the tokenizer file says that tokens become text.
enum Scheme {
    ByteLevel,
    SentencePiece { strip: bool },
}

impl TextTokenizer {
    /// The tokenizer of a checkpoint.
    ///
    /// # Errors
    /// When `tokenizer.json` (or the GGUF metadata) is missing, malformed, or of an unknown kind.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        match &checkpoint.gguf {
            Some(gguf) => Self::new(&checkpoint.path, gguf_tokenizer::build(gguf)?),
            None => {
                let path = checkpoint.path.join("tokenizer.json");
                let bytes = super::error::read(&path)?;
                let tokenizer = Tokenizer::from_bytes(&bytes)
                    .map_err(|e| LoadError::invalid(&path, format!("not a tokenizer: {e}")))?;
                Self::new(&path, tokenizer)
            }
        }
    }

    /// Wraps a tokenizer; `path` is named in errors.
    ///
    /// # Errors
    /// When its decoder is of an unknown kind.
    pub fn new(path: &Path, mut inner: Tokenizer) -> Result<Self, LoadError> {
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let scheme = scheme(path, &inner)?;
        let added = inner.get_added_tokens_decoder();
        let size = inner.get_vocab(true).values().max().map_or(0, |max| *max as usize + 1);
        let unicode = unicode_to_byte();
        let bytes = (0..size as u32)
            .map(|id| match added.get(&id) {
                Some(token) => Some(token.content.as_bytes().into()),
                None => inner.id_to_token(id).map(|t| token_bytes(&scheme, &unicode, &t)),
            })
            .collect();
        let special = added.iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect();
        let strip_leading_space = matches!(scheme, Scheme::SentencePiece { strip: true });
        Ok(Self { inner, bytes, special, strip_leading_space })
    }

    /// Token ids of `text`, with the beginning token if `add_special` and the model has one.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, tokenizers::Error> {
        Ok(self.inner.encode_fast(text, add_special)?.get_ids().to_vec())
    }

    /// Number of ids, holes included.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The id of a token given by its content.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The raw bytes of a token; empty for an id without one.
    pub fn bytes_of(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).and_then(Option::as_deref).unwrap_or_default()
    }

    /// A token's bytes as text, halves of characters replaced.
    pub fn text_of(&self, id: u32) -> String {
        String::from_utf8_lossy(self.bytes_of(id)).into_owned()
    }

    /// Whether the token is special (left out of text).
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = Detokenizer::new(self, true);
        let mut text: String = ids.iter().map(|id| decoder.push(self, *id)).collect();
        text.push_str(&decoder.finish());
        text
    }
}

fn scheme(path: &Path, tokenizer: &Tokenizer) -> Result<Scheme, LoadError> {
    let json = serde_json::to_value(tokenizer.get_decoder())
        .map_err(|e| LoadError::invalid(path, format!("decoder: {e}")))?;
    let kinds: Vec<&Value> = match json["decoders"].as_array() {
        Some(list) => list.iter().collect(),
        None => vec![&json],
    };
    let kind = |name: &str| kinds.iter().find(|d| d["type"] == name);
    if kind("ByteLevel").is_some() {
        return Ok(Scheme::ByteLevel);
    }
    if kind("ByteFallback").is_some() || kind("Metaspace").is_some() {
        let strips = kind("Strip").is_some_and(|d| d["content"] == " " && d["start"] != 0);
        let metaspace = kind("Metaspace")
            .is_some_and(|d| d["prepend_scheme"] != "never" && d["add_prefix_space"] != false);
        return Ok(Scheme::SentencePiece { strip: strips || metaspace });
    }
    let what = format!("decoder {json} is not supported; ByteLevel and SentencePiece ones are");
    Err(LoadError::invalid(path, what))
}

fn token_bytes(scheme: &Scheme, unicode: &dyn Fn(char) -> Option<u8>, token: &str) -> Box<[u8]> {
    match scheme {
        Scheme::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(unicode).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec()).into()
        }
        Scheme::SentencePiece { .. } => {
            let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
            match hex.filter(|h| h.len() == 2).and_then(|h| u8::from_str_radix(h, 16).ok()) {
                Some(byte) => Box::new([byte]),
                None => token.replace('▁', " ").into_bytes().into(),
            }
        }
    }
}

/// The reverse of GPT-2's table that gives every byte a printable character.
fn unicode_to_byte() -> impl Fn(char) -> Option<u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut table = vec![None; 512];
    let mut next = 256;
    for byte in 0..=255_u8 {
        if printable(byte) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    move |c| table.get(c as usize).copied().flatten()
}

/// Turns a stream of ids into a stream of whole characters.
pub struct Detokenizer {
    pending: Vec<u8>,
    skip_special: bool,
    strip_leading_space: bool,
}

impl Detokenizer {
    /// A fresh stream; `skip_special` leaves special tokens out.
    pub fn new(tokenizer: &TextTokenizer, skip_special: bool) -> Self {
        let strip_leading_space = tokenizer.strip_leading_space;
        Self { pending: Vec::new(), skip_special, strip_leading_space }
    }

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> String {
        if self.skip_special && tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = tokenizer.bytes_of(id);
        if self.strip_leading_space && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.strip_leading_space = false;
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// What is left at the end, an incomplete character replaced by U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = used + invalid.len() == self.pending.len();
            let incomplete = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if invalid.is_empty() || (at_end && incomplete) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            used += invalid.len();
        }
        self.pending.drain(..used);
        text
    }
}

/// Ids that end a generation: `eos_token_id` of the generation and model configurations, and the
/// end tokens of GGUF metadata.
pub fn stop_ids(checkpoint: &Checkpoint) -> Vec<u32> {
    let configs = [checkpoint.generation_config.as_ref(), Some(&checkpoint.config)];
    let mut ids: Vec<u32> = Vec::new();
    for value in configs.into_iter().flatten().filter_map(|c| c.get("eos_token_id")) {
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        ids.extend(list.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    if let Some(gguf) = &checkpoint.gguf {
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            let id = gguf.integer(&format!("tokenizer.ggml.{key}"));
            ids.extend(id.and_then(|id| u32::try_from(id).ok()));
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// A file of the checkpoint directory as JSON, where it exists.
pub(super) fn optional_json(dir: &Path, name: &str) -> Result<Option<Value>, LoadError> {
    let path = dir.join(name);
    if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every byte is a token, and a few longer ones.
    fn byte_level() -> TextTokenizer {
        let unicode = unicode_to_byte();
        let of_byte: Vec<char> = (0..=255_u8)
            .map(|b| (0..512).filter_map(char::from_u32).find(|c| unicode(*c) == Some(b)).unwrap())
            .collect();
        let mut vocab = serde_json::Map::new();
        for (id, c) in of_byte.iter().enumerate() {
            vocab.insert(c.to_string(), id.into());
        }
        for (i, text) in ["é", "日", " the", "\u{1f600}"].iter().enumerate() {
            let token: String = text.bytes().map(|b| of_byte[usize::from(b)]).collect();
            vocab.insert(token, (256 + i).into());
        }
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [
                {"id": 260, "content": "<|end|>", "single_word": false, "lstrip": false,
                 "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let inner = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        TextTokenizer::new(Path::new("tokenizer.json"), inner).unwrap()
    }

    fn sentence_piece() -> TextTokenizer {
        let mut vocab = serde_json::Map::new();
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), byte.into());
        }
        for (i, token) in ["▁", "▁the", "é", "日本", "a"].iter().enumerate() {
            vocab.insert((*token).into(), (256 + i).into());
        }
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        let inner = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        TextTokenizer::new(Path::new("tokenizer.json"), inner).unwrap()
    }

    fn streamed(tokenizer: &TextTokenizer, ids: &[u32]) -> Vec<String> {
        let mut decoder = Detokenizer::new(tokenizer, true);
        let mut pieces: Vec<String> = ids.iter().map(|id| decoder.push(tokenizer, *id)).collect();
        pieces.push(decoder.finish());
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let tokenizer = byte_level();
        let ids: Vec<u32> = "日é".bytes().map(u32::from).collect();
        assert_eq!(streamed(&tokenizer, &ids), ["", "", "日", "", "é", ""]);
        assert_eq!(streamed(&tokenizer, &[0xe6, 0x97]), ["", "", "\u{fffd}"]);
        assert_eq!(streamed(&tokenizer, &[0xe6, 65]), ["", "\u{fffd}A", ""]);
        assert_eq!(streamed(&tokenizer, &[65, 260, 66]), ["A", "", "B", ""]);
    }

    #[test]
    fn sentence_piece_strips_one_leading_space() {
        let tokenizer = sentence_piece();
        assert_eq!(tokenizer.decode(&[257, 257, 0xc3, 0xa9]), "the theé");
        assert_eq!(tokenizer.decode(&[256, 257]), " the");
    }

    proptest! {
        #[test]
        fn stream_equals_whole_equals_the_crate(
            ids in proptest::collection::vec(0..261_u32, 0..40),
        ) {
            let tokenizer = byte_level();
            let whole = tokenizer.decode(&ids);
            prop_assert_eq!(streamed(&tokenizer, &ids).concat(), whole.clone());
            prop_assert_eq!(whole, tokenizer.inner.decode(&ids, true).unwrap());
        }

        #[test]
        fn sentence_piece_equals_the_crate_on_valid_text(text in "[ a日é本the\u{1f600}]{0,12}") {
            let tokenizer = sentence_piece();
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(tokenizer.decode(&ids), tokenizer.inner.decode(&ids, true).unwrap());
        }

        #[test]
        fn encoding_round_trips(text in "\\PC{0,40}") {
            let tokenizer = byte_level();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}
