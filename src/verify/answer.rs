//! Parses responses as they were received, streamed or whole. Nothing in them is trusted.

use super::{Reason, Rejection};
use crate::engine::output::Step;
use crate::intake::proof::read_chunk;
use crate::proof::commit::ChunkProof;
use crate::wire::openai::response::{ProofChunk, ProofEnd};
use serde_json::Value;

/// Tokens of an answer.
const TOKENS_MAX: usize = 1 << 18;
/// Bytes of an answer's text.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Alternatives of one token: more than any request can ask for.
const TOP_MAX: usize = 256;

/// One choice of a response.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Ids of the output.
    pub ids: Vec<u32>,
    /// Its text; `None` where it came as calls of tools.
    pub text: Option<String>,
    /// Reported log-probabilities, by token.
    pub logprobs: Vec<Option<f64>>,
    /// Reported alternatives, by token; empty where none came.
    pub tops: Vec<Vec<Top>>,
    /// What was reported of the prompt's tokens.
    pub prompt: Vec<Reported>,
    /// Reported weight values, by token.
    pub powv: Vec<Option<i64>>,
    /// The finish reason that was reported.
    pub finish_reason: Option<String>,
    /// The proof's chunks as they were sent, in order; empty without a proof.
    pub chunks: Vec<ChunkProof>,
    /// What closes the proof, where it was sent.
    pub end: Option<ProofEnd>,
}

/// A reported alternative to a token.
#[derive(Clone, PartialEq, Debug)]
pub struct Top {
    /// The token as it was named: its text, or `token_id:<n>`.
    pub name: String,
    /// Its bytes, where they came.
    pub bytes: Option<Vec<u8>>,
    /// Its natural log-probability, as it was reported.
    pub logprob: f64,
}

/// What was reported of a token of the prompt.
#[derive(Clone, PartialEq, Debug)]
pub struct Reported {
    /// Number of the token before it, whose row says how probable it is.
    pub place: usize,
    /// Its log-probability, where it does not stand among the others.
    pub logprob: Option<f64>,
    /// The alternatives that were reported, most probable first.
    pub top: Vec<Top>,
    /// Their ranks, where they came.
    pub ranks: Vec<u64>,
}

/// A response in the form that it came in.
#[derive(Clone, Copy, Debug)]
pub enum RawResponse<'a> {
    /// At once.
    Whole(&'a Value),
    /// In chunks.
    Stream(&'a [Value]),
}

impl<'a> RawResponse<'a> {
    /// Its bodies: the one, or all chunks.
    pub(super) fn bodies(self) -> &'a [Value] {
        match self {
            Self::Whole(body) => std::slice::from_ref(body),
            Self::Stream(chunks) => chunks,
        }
    }
}

fn bad(what: impl Into<String>) -> Rejection {
    Rejection::new(Reason::BadStream, what)
}

impl Answer {
    /// What an engine drew, and the end of its proof, as an honest client would hold them.
    pub fn of_steps(steps: &[Step], end: Option<ProofEnd>) -> Self {
        Self {
            ids: steps.iter().map(|s| s.token).collect(),
            text: Some(steps.iter().map(|s| s.text.as_str()).collect()),
            logprobs: steps.iter().map(|s| Some(s.logprob)).collect(),
            powv: steps.iter().map(|s| Some(s.powv)).collect(),
            chunks: steps.iter().filter_map(|s| s.proof.clone()).collect(),
            end,
            ..Self::default()
        }
    }

    /// The canon of its proof.
    pub fn canon(&self) -> Option<&str> {
        self.end.as_ref().map(|end| end.canon.as_str())
    }

    /// Choice `choice` of a whole response.
    ///
    /// # Errors
    /// When it is not a response.
    pub fn of_response(body: &Value, choice: u32) -> Result<Self, Rejection> {
        Self::read(RawResponse::Whole(body), choice, 0)?.with_tokens()
    }

    /// Choice `choice` of a stream's chunks.
    ///
    /// # Errors
    /// When a chunk is not one, or an error.
    pub fn of_stream(chunks: &[Value], choice: u32) -> Result<Self, Rejection> {
        Self::read(RawResponse::Stream(chunks), choice, 0)?.with_tokens()
    }

    /// Choice `choice`, whose lists of log-probabilities begin with `echoed` tokens of the prompt.
    ///
    /// # Errors
    /// When it is not a response. One without tokens is fine.
    pub fn read(sent: RawResponse<'_>, choice: u32, echoed: usize) -> Result<Self, Rejection> {
        let answer = Self { text: Some(String::new()), ..Self::default() };
        let mut reading = Reading { answer, echoed, place: 0 };
        match sent {
            RawResponse::Whole(body) => reading.whole(body, choice)?,
            RawResponse::Stream(chunks) => reading.stream(chunks, choice)?,
        }
        Ok(reading.answer)
    }

    /// The answer, which must have tokens.
    ///
    /// # Errors
    /// When it has none.
    pub fn with_tokens(self) -> Result<Self, Rejection> {
        match self.ids.is_empty() {
            true => Err(Rejection::new(
                Reason::BadIds,
                "an answer needs token_ids, or log-probabilities with tokens named token_id:<n>",
            )),
            false => Ok(self),
        }
    }
}

/// An answer that is being read.
struct Reading {
    answer: Answer,
    echoed: usize, // tokens of the prompt that are still to come
    place: usize,  // tokens of the prompt that have come
}

impl Reading {
    fn whole(&mut self, body: &Value, choice: u32) -> Result<(), Rejection> {
        let mut found = choices(body)?.iter().filter(|c| c["index"] == choice);
        let one =
            found.next().ok_or_else(|| bad(format!("the response has no choice {choice}")))?;
        match found.next() {
            Some(_) => Err(bad(format!("the response has choice {choice} twice"))),
            None => {
                // Chats have one prompt, so theirs stand beside the choices.
                self.take_prompt(&body["prompt_logprobs"])?;
                self.take_prompt(&one["prompt_logprobs"])?;
                self.take(one, true)
            }
        }
    }

    fn stream(&mut self, chunks: &[Value], choice: u32) -> Result<(), Rejection> {
        let mut is_there = false;
        for (place, chunk) in chunks.iter().enumerate() {
            if let Some(message) = chunk["error"]["message"].as_str() {
                let message: String = message.chars().take(200).collect();
                return Err(bad(format!("the stream ended with an error: {message}")));
            }
            let found = choices(chunk).map_err(|e| bad(format!("chunk {place}: {}", e.what)))?;
            for found in found.iter().filter(|c| c["index"] == choice) {
                is_there = true;
                self.take(found, false)?;
            }
        }
        match is_there {
            true => Ok(()),
            false => Err(bad(format!("the stream has no choice {choice}"))),
        }
    }

    fn take(&mut self, choice: &Value, is_whole: bool) -> Result<(), Rejection> {
        self.take_text(choice, is_whole)?;
        self.take_tokens(choice)?;
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.answer.finish_reason = Some(reason.chars().take(40).collect());
        }
        match &choice["proof"] {
            Value::Null => {}
            Value::Array(all) => all.iter().try_for_each(|c| self.take_chunk(c))?,
            one => self.take_chunk(one)?,
        }
        if !choice["proof_end"].is_null() {
            let end = serde_json::from_value(choice["proof_end"].clone())
                .map_err(|e| Rejection::new(Reason::BadProof, format!("proof_end: {e}")))?;
            self.answer.end = Some(end);
        }
        Ok(())
    }

    /// The prompt's log-probabilities by id, null for the first token.
    fn take_prompt(&mut self, list: &Value) -> Result<(), Rejection> {
        let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
        for (place, map) in list.iter().skip(1).enumerate().take(TOKENS_MAX) {
            let Some(map) = map.as_object() else { return Err(not_alternatives()) };
            check_top(map.len())?;
            let one = |(id, entry): (&String, &Value)| {
                let (name, logprob) = (format!("token_id:{id}"), entry["logprob"].as_f64()?);
                Some((Top { name, bytes: None, logprob }, entry["rank"].as_u64()?))
            };
            let all: Option<Vec<(Top, u64)>> = map.iter().map(one).collect();
            let (top, ranks) = all.ok_or_else(not_alternatives)?.into_iter().unzip();
            self.answer.prompt.push(Reported { place, logprob: None, top, ranks });
        }
        Ok(())
    }

    /// An entry that repeats a token of the prompt; the first follows nothing.
    fn take_echo(&mut self, entry: Entry<'_>) {
        if let Some(place) = self.place.checked_sub(1) {
            let Entry { logprob, top, .. } = entry;
            self.answer.prompt.push(Reported { place, logprob, top, ranks: Vec::new() });
        }
        self.place += 1;
    }

    fn take_text(&mut self, choice: &Value, is_whole: bool) -> Result<(), Rejection> {
        let message = if is_whole { &choice["message"] } else { &choice["delta"] };
        // A client reads one of them; the other must not be what is verified.
        if !message["content"].is_null() && !choice["text"].is_null() {
            return Err(bad("a choice has either content or text"));
        }
        let text = message["content"].as_str().or_else(|| choice["text"].as_str());
        if message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()) {
            self.answer.text = None;
        }
        if let Some(all) = &mut self.answer.text {
            all.push_str(text.unwrap_or_default());
            if all.len() > TEXT_BYTES_MAX {
                return Err(bad(format!("the text has more than {TEXT_BYTES_MAX} bytes")));
            }
        }
        Ok(())
    }

    /// Ids from `token_ids`, or from the names in log-probabilities; then what belongs to them.
    fn take_tokens(&mut self, choice: &Value) -> Result<(), Rejection> {
        let mut entries = entries(&choice["logprobs"])?;
        let echoed = self.echoed.min(entries.len());
        self.echoed -= echoed;
        entries.drain(..echoed).for_each(|entry| self.take_echo(entry));
        let ids: Vec<u32> = match choice["token_ids"].as_array() {
            Some(ids) => ids.iter().map(id).collect::<Result<_, _>>()?,
            None => entries.iter().map(|e| named_id(e.name)).collect::<Result<_, _>>()?,
        };
        if !entries.is_empty() && entries.len() != ids.len() {
            let (v, i) = (entries.len(), ids.len());
            return Err(bad(format!("{i} tokens came with {v} log-probabilities")));
        }
        let answer = &mut self.answer;
        if answer.ids.len() + ids.len() > TOKENS_MAX {
            return Err(bad(format!("the answer has more than {TOKENS_MAX} tokens")));
        }
        let powv = choice["powv"].as_i64().filter(|_| ids.len() == 1);
        answer.powv.extend(ids.iter().map(|_| powv));
        let mut entries = entries.into_iter();
        for id in ids {
            let (logprob, top) = entries.next().map(|e| (e.logprob, e.top)).unwrap_or_default();
            answer.ids.push(id);
            answer.logprobs.push(logprob);
            answer.tops.push(top);
        }
        Ok(())
    }

    fn take_chunk(&mut self, chunk: &Value) -> Result<(), Rejection> {
        let chunks = &mut self.answer.chunks;
        let place = chunks.len();
        let wrong =
            |what: String| Rejection::new(Reason::BadProof, format!("chunk {place} {what}"));
        let chunk: ProofChunk =
            serde_json::from_value(chunk.clone()).map_err(|e| wrong(e.to_string()))?;
        chunks.push(read_chunk(&chunk).map_err(|e| wrong(e.to_string()))?);
        Ok(())
    }
}

/// One token in a list of log-probabilities.
struct Entry<'a> {
    name: &'a Value,
    logprob: Option<f64>,
    top: Vec<Top>,
}

impl<'a> Entry<'a> {
    fn of_chat(entry: &'a Value) -> Result<Self, Rejection> {
        let (name, logprob) = (&entry["token"], entry["logprob"].as_f64());
        Ok(Self { name, logprob, top: top(entry)? })
    }
}

/// The tokens of a choice's log-probabilities, in the form of either endpoint.
fn entries(logprobs: &Value) -> Result<Vec<Entry<'_>>, Rejection> {
    if let Some(content) = logprobs["content"].as_array() {
        return content.iter().map(Entry::of_chat).collect();
    }
    let empty = Vec::new();
    let list = |key: &str| logprobs[key].as_array().unwrap_or(&empty);
    let (names, values, maps) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    // Names may be missing where ids came; everything that is there must be as long.
    let count = names.len().max(values.len());
    let lengths = [("tokens", names), ("token_logprobs", values), ("top_logprobs", maps)];
    if let Some((key, list)) = lengths.iter().find(|(_, l)| !l.is_empty() && l.len() != count) {
        let what = format!("{count} tokens came with {} {key}", list.len());
        return Err(Rejection::new(Reason::LogprobMismatch, what));
    }
    let entry = |place: usize| {
        let name = &logprobs["tokens"][place];
        let logprob = logprobs["token_logprobs"][place].as_f64();
        Ok(Entry { name, logprob, top: top_map(&logprobs["top_logprobs"][place])? })
    };
    (0..count).map(entry).collect()
}

/// Alternatives in the chat form.
fn top(entry: &Value) -> Result<Vec<Top>, Rejection> {
    let Some(list) = entry["top_logprobs"].as_array() else { return Ok(Vec::new()) };
    check_top(list.len())?;
    let one = |e: &Value| {
        let byte = |b: &Value| b.as_u64().and_then(|b| u8::try_from(b).ok());
        let bytes = e["bytes"].as_array().map(|all| all.iter().map(byte).collect());
        let (name, logprob) = (e["token"].as_str()?.to_owned(), e["logprob"].as_f64()?);
        match bytes {
            Some(None) => None,
            bytes => Some(Top { name, bytes: bytes.flatten(), logprob }),
        }
    };
    let all: Option<Vec<Top>> = list.iter().map(one).collect();
    all.ok_or_else(not_alternatives)
}

/// Alternatives in the completions form.
fn top_map(map: &Value) -> Result<Vec<Top>, Rejection> {
    let Some(map) = map.as_object() else { return Ok(Vec::new()) };
    check_top(map.len())?;
    let one = |(name, value): (&String, &Value)| {
        Some(Top { name: name.clone(), bytes: None, logprob: value.as_f64()? })
    };
    let all: Option<Vec<Top>> = map.iter().map(one).collect();
    all.ok_or_else(not_alternatives)
}

fn check_top(count: usize) -> Result<(), Rejection> {
    match count > TOP_MAX {
        true => {
            let what = format!("a token has at most {TOP_MAX} alternatives, got {count}");
            Err(Rejection::new(Reason::LogprobMismatch, what))
        }
        false => Ok(()),
    }
}

fn not_alternatives() -> Rejection {
    let what = "an entry of top_logprobs is not a token with a log-probability";
    Rejection::new(Reason::LogprobMismatch, what)
}

fn choices(body: &Value) -> Result<&Vec<Value>, Rejection> {
    body["choices"].as_array().ok_or_else(|| bad("there is no list of choices"))
}

fn id(value: &Value) -> Result<u32, Rejection> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| {
        let shown: String = value.to_string().chars().take(40).collect();
        Rejection::new(Reason::BadIds, format!("{shown} is not a token id"))
    })
}

fn named_id(name: &Value) -> Result<u32, Rejection> {
    let id = name.as_str().and_then(id_of_name);
    id.ok_or_else(|| {
        let what = "tokens must be named token_id:<n>, or come with token_ids";
        Rejection::new(Reason::BadIds, what)
    })
}

/// The id in a name `token_id:<n>`.
pub fn id_of_name(name: &str) -> Option<u32> {
    name.strip_prefix("token_id:")?.parse().ok()
}
