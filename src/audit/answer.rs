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

/// Where the tokens of an answer are known from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenSource {
    /// The server gives ids.
    Ids,
    /// Each token's bytes belong to a token of ours.
    Names,
    /// The text was tokenised again: other tokens may have the same text.
    Text,
}

/// A token as a server reports it.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct ServerToken {
    /// Its natural log-probability.
    pub logprob: Option<f64>,
    /// Alternatives that are known here, with theirs.
    pub top: Vec<(u32, f64)>,
}

/// An answer of a server, with its tokens and what was reported of them.
#[derive(Clone, PartialEq, Debug)]
pub struct ServerAnswer {
    /// The ids of its tokens.
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
    by_bytes: HashMap<Vec<u8>, u32>,
}

impl<'a> TokensByName<'a> {
    /// Of this tokenizer beside a model with `vocab` logits; of several tokens with the same bytes
    /// the first counts.
    pub fn new(tokenizer: &'a TextTokenizer, vocab: usize) -> Self {
        let (mut by_bytes, ids) = (HashMap::new(), tokenizer.len().min(vocab));
        for id in 0..u32::try_from(ids).unwrap_or(u32::MAX) {
            let bytes = tokenizer.bytes_of(id);
            if !bytes.is_empty() {
                by_bytes.entry(bytes.to_vec()).or_insert(id);
            }
        }
        Self { tokenizer, ids, by_bytes }
    }

    fn of(&self, name: &str, bytes: Option<Vec<u8>>) -> Option<u32> {
        let known = id_of_name(name).filter(|id| self.has(*id));
        known
            .or_else(|| self.by_bytes.get(&bytes?).copied())
            .or_else(|| self.by_bytes.get(name.as_bytes()).copied())
            .or_else(|| self.tokenizer.id_of(name).filter(|id| self.has(*id)))
    }

    /// Whether a row has a logit for it.
    fn has(&self, id: u32) -> bool {
        (id as usize) < self.ids
    }
}

/// A token's name and bytes, with its report.
struct Named {
    id: Option<u32>,
    reported: ServerToken,
}

/// Reads the first choice of a whole answer.
///
/// # Errors
/// What it lacks.
pub fn read(body: &Value, names: &TokensByName<'_>) -> anyhow::Result<ServerAnswer> {
    if let Some(message) = body["error"]["message"].as_str() {
        bail!("{}", message.chars().take(200).collect::<String>());
    }
    let choice = &body["choices"][0];
    let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
    let text = text.context("the answer has no text")?.to_owned();
    let named = match choice["logprobs"]["content"].as_array() {
        Some(list) => list.iter().take(TOKENS_MAX).map(|t| of_chat(t, names)).collect(),
        None => of_completion(&choice["logprobs"], names),
    };
    let named: Vec<Named> = named;
    let ids = |list: &Value| -> Option<Vec<u32>> {
        let ids = list.as_array()?.iter().take(TOKENS_MAX);
        ids.map(|id| u32::try_from(id.as_u64()?).ok().filter(|id| names.has(*id))).collect()
    };
    let by_id = ids(&choice["token_ids"]).filter(|ids| !ids.is_empty());
    let by_name: Option<Vec<u32>> = named.iter().map(|n| n.id).collect();
    let by_name = by_name.filter(|ids| !ids.is_empty());
    let (ids, source) = match (by_id, by_name) {
        (Some(ids), _) => (ids, TokenSource::Ids),
        (None, Some(ids)) => (ids, TokenSource::Names),
        (None, None) => {
            let ids = names.tokenizer.encode(&text, false);
            (ids.map_err(|e| anyhow!("its text cannot be tokenised: {e}"))?, TokenSource::Text)
        }
    };
    if ids.is_empty() {
        bail!("the answer has no token");
    }
    if let Some(id) = ids.iter().find(|id| !names.has(**id)) {
        bail!("token {id} of the answer is beyond the model's vocabulary of {}", names.ids);
    }
    let has_ids = named.iter().all(|n| n.id.is_some()) || source == TokenSource::Ids;
    // Reports belong to tokens by their place, which other tokens would not share.
    let is_aligned = has_ids && named.len() == ids.len();
    let reported = named.into_iter().map(|n| n.reported).filter(|_| is_aligned).collect();
    let prompt_tokens = body["usage"]["prompt_tokens"].as_u64();
    Ok(ServerAnswer { ids, source, reported, text, prompt_tokens })
}

/// One entry of a conversation's `logprobs.content`.
fn of_chat(entry: &Value, names: &TokensByName<'_>) -> Named {
    let id = |entry: &Value| {
        let bytes = entry["bytes"].as_array().map(|bytes| {
            let byte = |b: &Value| b.as_u64().and_then(|b| u8::try_from(b).ok());
            bytes.iter().map_while(byte).collect::<Vec<u8>>()
        });
        names.of(entry["token"].as_str()?, bytes)
    };
    let top = entry["top_logprobs"].as_array();
    let top = top.into_iter().flatten().take(TOP_MAX);
    let top = top.filter_map(|t| Some((id(t)?, t["logprob"].as_f64()?))).collect();
    Named { id: id(entry), reported: ServerToken { logprob: entry["logprob"].as_f64(), top } }
}

/// The parallel lists of a completion.
fn of_completion(lists: &Value, names: &TokensByName<'_>) -> Vec<Named> {
    let tokens = lists["tokens"].as_array().into_iter().flatten().take(TOKENS_MAX);
    let one = |(place, token): (usize, &Value)| {
        let top = lists["top_logprobs"][place].as_object();
        let top = top.into_iter().flatten().take(TOP_MAX);
        Named {
            id: token.as_str().and_then(|name| names.of(name, None)),
            reported: ServerToken {
                logprob: lists["token_logprobs"][place].as_f64(),
                top: top.filter_map(|(n, l)| Some((names.of(n, None)?, l.as_f64()?))).collect(),
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
