//! Responses as they were received, streamed or whole, taken apart without trusting anything.

use super::{Reason, Rejection};
use crate::proof::codec::{Hash, from_hex};
use crate::wire::openai::response::{ProofChunk, ProofEnd};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

/// Tokens of an answer.
const TOKENS_MAX: usize = 1 << 18;
/// Bytes of an answer's text.
const TEXT_BYTES_MAX: usize = 16 << 20;

/// One choice of a response.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Ids of the output.
    pub ids: Vec<u32>,
    /// Its text; `None` where it came as calls of tools.
    pub text: Option<String>,
    /// Reported log-probabilities, by token.
    pub logprobs: Vec<Option<f64>>,
    /// Reported weight values, by token.
    pub powv: Vec<Option<i64>>,
    /// Why it ended.
    pub finish_reason: Option<String>,
    /// Chunks of its proof.
    pub chunks: Vec<Chunk>,
    /// End of its proof.
    pub end: Option<ProofEnd>,
}

/// A chunk of a proof, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Its number.
    pub index: u32,
    /// Sketches and hash.
    pub data: Vec<u8>,
    /// The chain up to and including it.
    pub digest: Hash,
}

fn bad(what: impl Into<String>) -> Rejection {
    Rejection::new(Reason::BadStream, what)
}

impl Answer {
    /// Choice `choice` of a whole response.
    ///
    /// # Errors
    /// When it is not a response.
    pub fn of_response(body: &Value, choice: u32) -> Result<Self, Rejection> {
        let found = choices(body)?.iter().find(|c| c["index"] == choice);
        let found = found.ok_or_else(|| bad(format!("the response has no choice {choice}")))?;
        let mut answer = Self { text: Some(String::new()), ..Self::default() };
        answer.take(found, true)?;
        answer.finish()
    }

    /// Choice `choice` of a stream's chunks.
    ///
    /// # Errors
    /// When a chunk is not one, or an error.
    pub fn of_stream(chunks: &[Value], choice: u32) -> Result<Self, Rejection> {
        let mut answer = Self { text: Some(String::new()), ..Self::default() };
        let mut is_there = false;
        for (place, chunk) in chunks.iter().enumerate() {
            if let Some(message) = chunk["error"]["message"].as_str() {
                let message: String = message.chars().take(200).collect();
                return Err(bad(format!("the stream ended with an error: {message}")));
            }
            let found = choices(chunk).map_err(|e| bad(format!("chunk {place}: {}", e.what)))?;
            for found in found.iter().filter(|c| c["index"] == choice) {
                is_there = true;
                answer.take(found, false)?;
            }
        }
        match is_there {
            true => answer.finish(),
            false => Err(bad(format!("the stream has no choice {choice}"))),
        }
    }

    fn take(&mut self, choice: &Value, is_whole: bool) -> Result<(), Rejection> {
        let message = if is_whole { &choice["message"] } else { &choice["delta"] };
        // A client reads one of them; the other must not be what is verified.
        if !message["content"].is_null() && !choice["text"].is_null() {
            return Err(bad("a choice has either content or text"));
        }
        let text = message["content"].as_str().or_else(|| choice["text"].as_str());
        if message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()) {
            self.text = None;
        }
        if let Some(all) = &mut self.text {
            all.push_str(text.unwrap_or_default());
            if all.len() > TEXT_BYTES_MAX {
                return Err(bad(format!("the text has more than {TEXT_BYTES_MAX} bytes")));
            }
        }
        self.take_tokens(choice)?;
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = Some(reason.chars().take(40).collect());
        }
        match &choice["proof"] {
            Value::Null => {}
            Value::Array(all) => all.iter().try_for_each(|c| self.take_chunk(c))?,
            one => self.take_chunk(one)?,
        }
        if !choice["proof_end"].is_null() {
            let end = serde_json::from_value(choice["proof_end"].clone())
                .map_err(|e| Rejection::new(Reason::BadProof, format!("proof_end: {e}")))?;
            self.end = Some(end);
        }
        Ok(())
    }

    /// Ids from `token_ids`, or from the names in log-probabilities; then what belongs to them.
    fn take_tokens(&mut self, choice: &Value) -> Result<(), Rejection> {
        let logprobs = &choice["logprobs"];
        let entries = logprobs["content"].as_array();
        let names: Vec<&Value> = match (entries, logprobs["tokens"].as_array()) {
            (Some(entries), _) => entries.iter().map(|e| &e["token"]).collect(),
            (None, Some(tokens)) => tokens.iter().collect(),
            (None, None) => Vec::new(),
        };
        let values: Vec<Option<f64>> = match (entries, logprobs["token_logprobs"].as_array()) {
            (Some(entries), _) => entries.iter().map(|e| e["logprob"].as_f64()).collect(),
            (None, Some(all)) => all.iter().map(Value::as_f64).collect(),
            (None, None) => Vec::new(),
        };
        let ids: Vec<u32> = match choice["token_ids"].as_array() {
            Some(ids) => ids.iter().map(id).collect::<Result<_, _>>()?,
            None => names.iter().map(|name| named_id(name)).collect::<Result<_, _>>()?,
        };
        if !values.is_empty() && values.len() != ids.len() {
            let (v, i) = (values.len(), ids.len());
            return Err(bad(format!("{i} tokens came with {v} log-probabilities")));
        }
        if self.ids.len() + ids.len() > TOKENS_MAX {
            return Err(bad(format!("the answer has more than {TOKENS_MAX} tokens")));
        }
        let powv = choice["powv"].as_i64().filter(|_| ids.len() == 1);
        self.powv.extend(ids.iter().map(|_| powv));
        let count = ids.len();
        self.logprobs.extend((0..count).map(|i| values.get(i).copied().flatten()));
        self.ids.extend(ids);
        Ok(())
    }

    fn take_chunk(&mut self, chunk: &Value) -> Result<(), Rejection> {
        let wrong = |what: String| {
            Rejection::new(Reason::BadProof, format!("chunk {} {what}", self.chunks.len()))
        };
        let chunk: ProofChunk =
            serde_json::from_value(chunk.clone()).map_err(|e| wrong(e.to_string()))?;
        let data = STANDARD.decode(&chunk.data).map_err(|e| wrong(e.to_string()))?;
        let digest = from_hex(&chunk.digest).map_err(wrong)?;
        self.chunks.push(Chunk { index: chunk.index, data, digest });
        Ok(())
    }

    fn finish(self) -> Result<Self, Rejection> {
        match self.ids.is_empty() {
            true => Err(Rejection::new(
                Reason::BadIds,
                "an answer needs token_ids, or log-probabilities with tokens named token_id:<n>",
            )),
            false => Ok(self),
        }
    }
}

fn choices(body: &Value) -> Result<&Vec<Value>, Rejection> {
    body["choices"].as_array().ok_or_else(|| bad("there is no list of choices"))
}

fn id(value: &Value) -> Result<u32, Rejection> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| Rejection::new(Reason::BadIds, format!("{value:.40} is not a token id")))
}

fn named_id(name: &Value) -> Result<u32, Rejection> {
    let id = name.as_str().and_then(|n| n.strip_prefix("token_id:")?.parse().ok());
    id.ok_or_else(|| {
        let what = "tokens must be named token_id:<n>, or come with token_ids";
        Rejection::new(Reason::BadIds, what)
    })
}
