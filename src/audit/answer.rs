//! Reads an answer in OpenAI's shapes and finds its tokens: by ids where the server gives them, by
//! the bytes of its tokens, or by tokenising its text again. Nothing that a server sends is
//! trusted.

use crate::models::tokenizer::TextTokenizer;
use crate::verify::answer::id_of_name;
use anyhow::{Context, anyhow, bail};
use serde_json::Value;
use std::collections::HashMap;

/// Tokens of one answer that are read.
pub const TOKENS_MAX: usize = 4096;
/// Alternatives of one token that are read.
const TOP_MAX: usize = 20;
/// The sign for bytes that are not UTF-8, U+FFFD.
const REPLACED: &[u8] = "\u{fffd}".as_bytes();

/// Where the tokens of an answer are known from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenSource {
    /// The server gives ids.
    Ids,
    /// Each token's bytes belong to one token of ours.
    Names,
    /// The text was tokenised again: other tokens may have the same text.
    Text,
}

/// A token as a server reports it.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ServerToken {
    /// Its natural log-probability as the server reports it, where it does.
    pub logprob: Option<f64>,
    /// Alternatives that are known here, with theirs.
    pub top: Vec<(u32, f64)>,
}

/// An answer of a server, with its tokens and what was reported of them.
#[derive(Clone, PartialEq, Debug)]
pub struct ServerAnswer {
    /// The ids of its tokens; those before the first that is not certain, where they are known by
    /// names.
    pub ids: Vec<u32>,
    /// Where they are known from.
    pub source: TokenSource,
    /// What is reported of each; empty where log-probabilities are missing.
    pub reported: Vec<ServerToken>,
    /// The text that the server sent.
    pub text: String,
    /// Tokens of the prompt, as the server counts them.
    pub prompt_tokens: Option<u64>,
}

/// Finds tokens by their bytes.
pub struct TokensByName<'a> {
    tokenizer: &'a TextTokenizer,
    ids: usize, // that have a logit
    by_bytes: HashMap<Vec<u8>, Known>,
}

/// What a server's name of a token says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    /// It is this token.
    Token(u32),
    /// Several tokens are written so.
    Several,
    /// No token of ours is written so.
    Not,
}

impl Known {
    fn id(self) -> Option<u32> {
        if let Self::Token(id) = self { Some(id) } else { None }
    }
}

/// A token as a server writes it.
struct Written<'a> {
    name: &'a str,
    bytes: Option<Vec<u8>>,
    id: Option<u32>,
}

impl<'a> TokensByName<'a> {
    /// Of this tokenizer beside a model with `vocab` logits.
    pub fn new(tokenizer: &'a TextTokenizer, vocab: usize) -> Self {
        let (mut by_bytes, ids) = (HashMap::new(), tokenizer.len().min(vocab));
        let all = 0..u32::try_from(ids).unwrap_or(u32::MAX);
        // A model writes by byte tokens only what no other token spells.
        let (of_a_byte, others): (Vec<u32>, Vec<u32>) = all
            .filter(|id| !tokenizer.bytes_of(*id).is_empty())
            .partition(|id| tokenizer.is_byte(*id));
        for id in others {
            let known = by_bytes.entry(tokenizer.bytes_of(id).to_vec());
            known.and_modify(|known| *known = Known::Several).or_insert(Known::Token(id));
        }
        for id in of_a_byte {
            by_bytes.entry(tokenizer.bytes_of(id).to_vec()).or_insert(Known::Token(id));
        }
        Self { tokenizer, ids, by_bytes }
    }

    fn of(&self, written: &Written<'_>) -> Known {
        let Written { name, bytes, id } = written;
        let named = id_of_name(name).filter(|id| self.has(*id));
        if let Some(id) = named.or(id.filter(|id| self.is_written(*id, written))) {
            return Known::Token(id);
        }
        for spelling in bytes.iter().map(Vec::as_slice).chain([name.as_bytes()]) {
            // Halves of characters are all shown by the same sign.
            if spelling.windows(REPLACED.len()).any(|part| part == REPLACED) {
                return Known::Several;
            }
            if let Some(known) = self.by_bytes.get(spelling) {
                return *known;
            }
        }
        let id = self.tokenizer.id_of(name).filter(|id| self.has(*id));
        id.map_or(Known::Not, Known::Token)
    }

    /// Whether an id that came beside a name is of our vocabulary: special tokens may be without
    /// text.
    fn is_written(&self, id: u32, Written { name, bytes, .. }: &Written<'_>) -> bool {
        let spelling = bytes.as_deref().unwrap_or(name.as_bytes());
        let is_silent = spelling.is_empty() && self.tokenizer.is_special(id);
        self.has(id) && (is_silent || spelling == self.tokenizer.bytes_of(id))
    }

    /// Whether a row has a logit for it.
    fn has(&self, id: u32) -> bool {
        (id as usize) < self.ids
    }
}

/// A token's name and bytes, with its report.
struct Named {
    id: Known,
    reported: ServerToken,
}

/// Reads the first choice of a whole answer, which may have no token.
///
/// # Errors
/// What it lacks.
pub fn read(body: &Value, names: &TokensByName<'_>) -> anyhow::Result<ServerAnswer> {
    if let Some(message) = body["error"]["message"].as_str() {
        bail!("{}", message.chars().take(200).collect::<String>());
    }
    let choice = &body["choices"][0];
    let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
    // A message may be without content.
    let text = text.or_else(|| choice["message"].is_object().then_some(""));
    let text = text.context("the answer has no text")?.to_owned();
    let mut named: Vec<Named> = match choice["logprobs"]["content"].as_array() {
        Some(list) => list.iter().take(TOKENS_MAX).map(|t| of_chat(t, names)).collect(),
        None => of_completion(&choice["logprobs"], names),
    };
    let ids = |list: &Value| -> Option<Vec<u32>> {
        let ids = list.as_array()?.iter().take(TOKENS_MAX);
        ids.map(|id| u32::try_from(id.as_u64()?).ok().filter(|id| names.has(*id))).collect()
    };
    let by_id = ids(&choice["token_ids"]).filter(|ids| !ids.is_empty());
    // Rows after a token that is not certain are rows of another text.
    let certain = named.iter().map(|n| n.id).take_while(|id| *id != Known::Several);
    let by_name: Option<Vec<u32>> = certain.map(Known::id).collect();
    let by_name = by_name.filter(|_| !named.is_empty());
    let (ids, source) = match (by_id, by_name) {
        (Some(ids), _) => (ids, TokenSource::Ids),
        (None, Some(ids)) => {
            named.truncate(ids.len());
            (ids, TokenSource::Names)
        }
        (None, None) => {
            let ids = names.tokenizer.encode(&text, false);
            (ids.map_err(|e| anyhow!("its text cannot be tokenised: {e}"))?, TokenSource::Text)
        }
    };
    if let Some(id) = ids.iter().find(|id| !names.has(**id)) {
        bail!("token {id} of the answer is beyond the model's vocabulary of {}", names.ids);
    }
    // Reports belong to tokens by their place, which other tokens would not share.
    let is_aligned = source != TokenSource::Text && named.len() == ids.len();
    let reported = named.into_iter().map(|n| n.reported).filter(|_| is_aligned).collect();
    let prompt_tokens = body["usage"]["prompt_tokens"].as_u64();
    Ok(ServerAnswer { ids, source, reported, text, prompt_tokens })
}

/// One entry of a conversation's `logprobs.content`.
fn of_chat(entry: &Value, names: &TokensByName<'_>) -> Named {
    let known = |entry: &Value| {
        let bytes = entry["bytes"].as_array().map(|bytes| {
            let byte = |b: &Value| b.as_u64().and_then(|b| u8::try_from(b).ok());
            bytes.iter().map_while(byte).collect::<Vec<u8>>()
        });
        let id = entry["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let name = entry["token"].as_str();
        name.map_or(Known::Not, |name| names.of(&Written { name, bytes, id }))
    };
    let top = entry["top_logprobs"].as_array();
    let top = top.into_iter().flatten().take(TOP_MAX);
    let top = top.filter_map(|t| Some((known(t).id()?, t["logprob"].as_f64()?))).collect();
    Named { id: known(entry), reported: ServerToken { logprob: entry["logprob"].as_f64(), top } }
}

/// The parallel lists of a completion.
fn of_completion(lists: &Value, names: &TokensByName<'_>) -> Vec<Named> {
    let tokens = lists["tokens"].as_array().into_iter().flatten().take(TOKENS_MAX);
    let known = |name: &str| names.of(&Written { name, bytes: None, id: None });
    let one = |(place, token): (usize, &Value)| {
        let top = lists["top_logprobs"][place].as_object();
        let top = top.into_iter().flatten().take(TOP_MAX);
        Named {
            id: token.as_str().map_or(Known::Not, known),
            reported: ServerToken {
                logprob: lists["token_logprobs"][place].as_f64(),
                top: top.filter_map(|(n, l)| Some((known(n).id()?, l.as_f64()?))).collect(),
            },
        }
    };
    tokens.enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;
    use tokenizers::Tokenizer;

    /// A token for each letter.
    fn letters() -> TextTokenizer {
        let vocab: HashMap<&str, u32> = ["a", "b", "c"].into_iter().zip(0..).collect();
        let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true});
        let json = json!({
            "version": "1.0", "added_tokens": [], "model": model, "decoder": decoder,
        });
        let inner = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        TextTokenizer::new(Path::new("tokenizer.json"), inner).unwrap()
    }

    /// As Llama 2 has it: byte tokens first, then tokens that spell the same; ids 259 and 260 are
    /// written alike.
    fn with_bytes() -> TextTokenizer {
        let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
        for byte in 0..256 {
            vocab.insert(format!("<0x{byte:02X}>"), byte.into());
        }
        for (i, token) in [",", "\u{2581}a", ".", "  ", "\u{2581}\u{2581}"].iter().enumerate() {
            vocab.insert((*token).into(), (256 + i).into());
        }
        let json = json!({
            "version": "1.0", "added_tokens": [
                {"id": 261, "content": "</s>", "single_word": false, "lstrip": false,
                 "rstrip": false, "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        let inner = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        TextTokenizer::new(Path::new("tokenizer.json"), inner).unwrap()
    }

    /// What is read of a conversation's answer with these tokens.
    fn chat(text: &str, content: &Value, names: &TokensByName<'_>) -> ServerAnswer {
        let message = json!({"content": text});
        let choice = json!({"message": message, "logprobs": {"content": content}});
        read(&json!({"choices": [choice]}), names).unwrap()
    }

    #[test]
    fn a_byte_token_never_stands_for_a_token_that_spells_the_same() {
        let tokenizer = with_bytes();
        let names = TokensByName::new(&tokenizer, tokenizer.len());
        // 0x0A and the second half of a character are spelled by nothing else.
        let by_bytes = json!([
            {"token": " a", "bytes": [32, 97], "logprob": -0.5, "top_logprobs": [
                {"token": ".", "bytes": [46], "logprob": -1.5}]},
            {"token": ",", "bytes": [44], "logprob": -0.5},
            {"token": "\n", "bytes": [10], "logprob": -0.5},
            {"token": "\u{fffd}", "bytes": [0xA9], "logprob": -0.5}]);
        let answer = chat(" a,\n", &by_bytes, &names);
        assert_eq!((answer.ids, answer.source), (vec![257, 256, 10, 0xA9], TokenSource::Names));
        assert_eq!(answer.reported[0].top, [(258, -1.5)]);
        let lists = json!({"tokens": [" a", ",", "."], "token_logprobs": [-1.0, -1.0, -1.0]});
        let answer = read(&json!({"choices": [{"text": " a,.", "logprobs": lists}]}), &names);
        assert_eq!(answer.unwrap().ids, [257, 256, 258]);
    }

    #[test]
    fn an_answer_is_known_up_to_the_first_token_that_is_not_certain() {
        let tokenizer = with_bytes();
        let names = TokensByName::new(&tokenizer, tokenizer.len());
        let comma = json!({"token": ",", "logprob": -0.5, "top_logprobs": [
            {"token": "  ", "logprob": -1.5}, {"token": ".", "logprob": -2.0}]});
        // Two tokens are written so, and all halves of characters that are no bytes.
        for unsure in ["  ", "\u{fffd}"] {
            let unsure = json!({"token": unsure, "logprob": -0.5});
            let answer = chat(",?,", &json!([comma, unsure, comma]), &names);
            assert_eq!((answer.ids, answer.source), (vec![256], TokenSource::Names));
            assert_eq!(answer.reported.len(), 1);
            assert_eq!(answer.reported[0].top, [(258, -2.0)]);
            let answer = chat(",?,", &json!([unsure, comma]), &names);
            assert_eq!((answer.ids, answer.source), (vec![], TokenSource::Names));
        }
        // A name of no token makes the text a guess, as before.
        let foreign = json!([comma, {"token": "xyz", "logprob": -0.5}]);
        assert_eq!(chat(",,", &foreign, &names).source, TokenSource::Text);
    }

    #[test]
    fn an_id_beside_a_name_counts_where_they_agree() {
        let tokenizer = with_bytes();
        let names = TokensByName::new(&tokenizer, tokenizer.len());
        let content = json!([
            {"id": 260, "token": "  ", "bytes": [32, 32], "logprob": -0.5, "top_logprobs": [
                {"id": 259, "token": "  ", "bytes": [32, 32], "logprob": -1.5}]},
            {"id": 44, "token": ",", "bytes": [44], "logprob": -0.5},
            {"id": 258, "token": ",", "bytes": [44], "logprob": -0.5},
            {"id": 261, "token": "", "bytes": [], "logprob": -0.5}]);
        let answer = chat("  ,,", &content, &names);
        assert_eq!((answer.ids, answer.source), (vec![260, 44, 256, 261], TokenSource::Names));
        assert_eq!(answer.reported[0].top, [(259, -1.5)]);
    }

    #[test]
    fn an_empty_answer_is_an_answer() {
        let tokenizer = letters();
        let names = TokensByName::new(&tokenizer, 3);
        for choice in [json!({"text": ""}), json!({"message": {"content": null}})] {
            let answer = read(&json!({"choices": [choice]}), &names).unwrap();
            assert_eq!((answer.ids.len(), answer.text.as_str()), (0, ""));
        }
        for body in [json!({"choices": []}), json!({"choices": [{}]})] {
            assert_eq!(read(&body, &names).unwrap_err().to_string(), "the answer has no text");
        }
    }

    #[test]
    fn tokens_without_a_logit_are_never_read() {
        let tokenizer = letters();
        let (all, two) = (TokensByName::new(&tokenizer, 3), TokensByName::new(&tokenizer, 2));
        let by_ids = json!({"choices": [{"text": "ab", "token_ids": [0, 2]}]});
        assert_eq!(read(&by_ids, &all).unwrap().ids, [0, 2]);
        let answer = read(&by_ids, &two).unwrap();
        assert_eq!((answer.ids, answer.source), (vec![0, 1], TokenSource::Text));
        let top = json!([{"token": "a", "logprob": -1.0, "top_logprobs": [
            {"token": "c", "logprob": -2.0}, {"token": "token_id:2", "logprob": -3.0}]}]);
        let named = json!({"choices": [{"text": "a", "logprobs": {"content": top}}]});
        assert_eq!(read(&named, &all).unwrap().reported[0].top, [(2, -2.0), (2, -3.0)]);
        assert_eq!(read(&named, &two).unwrap().reported[0].top, []);
        let said = read(&json!({"choices": [{"text": "c"}]}), &two).unwrap_err().to_string();
        assert!(said.contains("token 2") && said.contains("vocabulary of 2"), "{said}");
    }
}
