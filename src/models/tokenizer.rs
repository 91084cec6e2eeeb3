//! Turns text into ids and ids into bytes.
//!
//! Encoding is the `tokenizers` crate's. Decoding is our own table of each token's raw bytes,
//! because log-probability entries need them and streaming must be exact: [`Detokenizer`] emits a
//! character once all its bytes have come, and the concatenation of what it emits equals
//! [`TextTokenizer::decode`] of all ids, which equals the crate's decoding wherever the bytes are
//! valid UTF-8.
//!
//! The text of an output is what the text of prompt and output has beyond the whole characters of
//! the prompt ([`Detokenizer::after`]). So an output keeps the blank that a decoder takes off the
//! start of a text, and a character whose bytes begin in the prompt belongs to the output.

mod scheme;

use super::checkpoint::Checkpoint;
use super::error::{LoadError, read};
use super::gguf_tokenizer;
use super::tokenizer_config::TokenizerConfig;
use scheme::{Strip, TokenDecoder, unicode_to_byte};
use serde::Deserialize;
use std::collections::HashSet;
use std::path::Path;
use tokenizers::Tokenizer;

/// Ids lie below this: the table of bytes is as long as the largest id.
pub const TOKENS_MAX: usize = 1 << 22;
/// Bytes that a character is incomplete with, at most.
const INCOMPLETE_MAX: usize = 3;

/// A tokenizer with its byte table.
pub struct TextTokenizer {
    inner: Tokenizer,
    scheme: TokenDecoder,
    strip: Strip,
    bytes: Vec<Option<Box<[u8]>>>, // by id; None where the vocabulary has a hole
    special: HashSet<u32>,
}

/// The part of `tokenizer.json` that the crate reads without checking.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    added_tokens: Vec<ListedToken>,
}

#[derive(Deserialize)]
struct ListedToken {
    id: u32,
    content: String,
}

impl TextTokenizer {
    /// The tokenizer of a checkpoint.
    ///
    /// # Errors
    /// When `tokenizer.json` (or the GGUF metadata) is missing, malformed, or of an unknown kind.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        if let Some(gguf) = &checkpoint.gguf {
            return Self::new(&checkpoint.path, gguf_tokenizer::build(gguf)?);
        }
        let path = checkpoint.path.join("tokenizer.json");
        let mut tokenizer = from_bytes(&path, &read(&path)?)?;
        TokenizerConfig::read(&checkpoint.path)?.apply(&path, &mut tokenizer)?;
        Self::new(&path, tokenizer)
    }

    /// Wraps a tokenizer; `path` is named in errors.
    ///
    /// # Errors
    /// When its decoder is of an unknown kind, or an id is too large.
    pub fn new(path: &Path, mut inner: Tokenizer) -> Result<Self, LoadError> {
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
        let (scheme, strip) = TokenDecoder::of(path, &inner)?;
        let last = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        if let Some((token, id)) = last.as_ref().filter(|(_, id)| *id as usize >= TOKENS_MAX) {
            let what = format!("ids must lie below {TOKENS_MAX}, token `{token}` has {id}");
            return Err(LoadError::invalid(path, what));
        }
        let size = last.map_or(0, |(_, id)| id + 1);
        let unicode = unicode_to_byte();
        let bytes = |id| inner.id_to_token(id).map(|t| scheme.bytes(&unicode, &t, false));
        let bytes = (0..size).map(bytes).collect();
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, t)| t.special).map(|(id, _)| *id).collect();
        Ok(Self { inner, scheme, strip, bytes, special })
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

    /// A token as the vocabulary spells it.
    pub fn content_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
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

    /// Whether the token stands for a byte that no other token spells (`<0x2C>`).
    pub fn is_byte(&self, id: u32) -> bool {
        self.content_of(id).is_some_and(|token| self.scheme.is_byte(&token))
    }

    /// The bytes of a token that starts a text.
    fn first_bytes(&self, id: u32) -> Box<[u8]> {
        let token = self.inner.id_to_token(id).unwrap_or_default();
        self.scheme.bytes(&unicode_to_byte(), &token, true)
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = Detokenizer::new(self, true);
        let mut text: String = ids.iter().map(|id| decoder.push(self, *id)).collect();
        text.push_str(&decoder.finish());
        text
    }
}

/// Reads `tokenizer.json`.
fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Tokenizer, LoadError> {
    // The crate indexes by numbers of the file in places; a panic is a fault of the file.
    let tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
        .map_err(|_| LoadError::invalid(path, "not a tokenizer: its parts contradict each other"))?
        .map_err(|e| LoadError::invalid(path, format!("not a tokenizer: {e}")))?;
    let listed: Listed = serde_json::from_slice(bytes)
        .map_err(|e| LoadError::invalid(path, format!("not a tokenizer: {e}")))?;
    for token in listed.added_tokens {
        let id = tokenizer.token_to_id(&token.content);
        if id != Some(token.id) {
            let what = format!(
                "`added_tokens`: ids must follow the vocabulary without a gap, `{}` has {}",
                token.content, token.id
            );
            return Err(LoadError::invalid(path, what));
        }
    }
    Ok(tokenizer)
}

/// Turns a stream of ids into a stream of whole characters.
pub struct Detokenizer {
    pending: Vec<u8>,
    skip_special: bool,
    is_first: bool, // no token of the text has come
    strip: usize,   // characters that may still be taken off the start
}

impl Detokenizer {
    /// A fresh stream; `skip_special` leaves special tokens out.
    pub fn new(tokenizer: &TextTokenizer, skip_special: bool) -> Self {
        let strip = tokenizer.strip.count;
        Self { pending: Vec::new(), skip_special, is_first: true, strip }
    }

    /// The stream of what follows `prompt`.
    pub fn after(tokenizer: &TextTokenizer, skip_special: bool, prompt: &[u32]) -> Self {
        let mut stream = Self::new(tokenizer, skip_special);
        let mut rest = prompt;
        while let Some((id, others)) = rest.split_first().filter(|_| stream.is_at_start(tokenizer))
        {
            stream.push(tokenizer, *id);
            rest = others;
        }
        // Beyond the start only an incomplete character at the end counts.
        let mut bytes = 0;
        let tail = rest.iter().rposition(|id| {
            bytes += stream.bytes_of(tokenizer, *id).map_or(0, <[u8]>::len);
            bytes >= INCOMPLETE_MAX
        });
        if let Some(tail) = tail {
            stream.pending.clear();
            rest = &rest[tail..];
        }
        rest.iter().for_each(|id| drop(stream.push(tokenizer, *id)));
        stream
    }

    /// Whether the next token may lose something because it starts the text.
    fn is_at_start(&self, tokenizer: &TextTokenizer) -> bool {
        self.strip > 0 || (self.is_first && tokenizer.scheme.strips_first())
    }

    /// The bytes of a token that is part of the text.
    fn bytes_of<'a>(&self, tokenizer: &'a TextTokenizer, id: u32) -> Option<&'a [u8]> {
        if self.skip_special && tokenizer.is_special(id) {
            return None;
        }
        tokenizer.bytes.get(id as usize)?.as_deref()
    }

    /// The text that `id` completes; empty while a character is incomplete.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> String {
        let Some(bytes) = self.bytes_of(tokenizer, id) else { return String::new() };
        if std::mem::take(&mut self.is_first) && tokenizer.scheme.strips_first() {
            self.pending.extend_from_slice(&tokenizer.first_bytes(id));
        } else {
            self.pending.extend_from_slice(bytes);
        }
        let text = self.take_complete();
        self.strip_start(tokenizer, text)
    }

    /// What is left at the end, an incomplete character replaced by U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn strip_start(&mut self, tokenizer: &TextTokenizer, text: String) -> String {
        let mut rest = text.as_str();
        while self.strip > 0 && !rest.is_empty() {
            match rest.strip_prefix(tokenizer.strip.character) {
                Some(others) => (rest, self.strip) = (others, self.strip - 1),
                None => self.strip = 0,
            }
        }
        if rest.len() == text.len() { text } else { rest.to_owned() }
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
/// end tokens of GGUF metadata. `vocab` is the number of ids that can be drawn.
///
/// # Errors
/// When one is not an id of the vocabulary: the model would never end by it.
pub fn stop_ids(checkpoint: &Checkpoint, vocab: usize) -> Result<Vec<u32>, LoadError> {
    let generation = checkpoint.path.join("generation_config.json");
    let configs = [
        (generation.as_path(), checkpoint.generation_config.as_ref()),
        (checkpoint.config_path.as_path(), Some(&checkpoint.config)),
    ];
    let mut ids: Vec<u32> = Vec::new();
    for (path, config) in configs {
        let Some(value) = config.and_then(|c| c.get("eos_token_id")) else { continue };
        if value.is_null() {
            continue;
        }
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        for id in list {
            let found = id.as_u64().filter(|id| *id < vocab as u64);
            let wrong = || LoadError::Key {
                path: path.to_owned(),
                key: "eos_token_id".into(),
                what: format!("must be an id below {vocab} or a list of such, got {value}"),
            };
            ids.push(found.and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong)?);
        }
    }
    if let Some(gguf) = &checkpoint.gguf {
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            let id = gguf.integer(&format!("tokenizer.ggml.{key}"));
            ids.extend(id.and_then(|id| u32::try_from(id).ok()));
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
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
