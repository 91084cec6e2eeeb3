//! Asks a server for answers, one after the other, until the tests are certain or there are enough.
//!
//! Prompts, their order and seeds are drawn: a server cannot know what it will be asked.

use super::answer::{ServerAnswer, TokensByName, read};
use super::evidence::{AuditEvidence, Conclusion, Drawn};
use super::score::{TokenScore, score};
use super::seeds::{OtherSeed, SeedTest};
use crate::clock::Clock;
use crate::endpoint::shown;
use crate::entropy::Entropy;
use crate::validator::query::{DEPTH_MAX, QueryError, Target, is_deeper};
use crate::verify::Verifier;
use crate::verify::question::{self, QuestionError};
use serde_json::{Value, json};

/// Alternatives that are asked for: what every server gives.
const TOP: u32 = 5;
/// Every fourth answer is greedy.
const GREEDY_EVERY: u32 = 4;
/// Answers before the test may end.
const ANSWERS_MIN: u32 = 6;
/// Answers by which it is tried whether seeds are honoured.
const SEED_TRIES: u32 = 3;

/// Why an audit breaks off.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The server does not answer, or says no.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Its answer cannot be read.
    #[error("{url}: {what}")]
    Answer {
        /// Scheme, host and port of the server.
        url: String,
        /// What the answer is or lacks.
        what: String,
    },
    /// We would not accept the request ourselves.
    #[error(transparent)]
    Question(#[from] QuestionError),
    /// The answer could not be scored.
    #[error("{0}")]
    Score(anyhow::Error),
    /// The model's run gave no row for a token.
    #[error("token {0} has no row")]
    NoRow(u32),
    /// The request was read as one without a choice.
    #[error("no request")]
    NoChoice,
}

impl AuditError {
    /// Whether it is a failure of this program, and not of the server or of what was asked.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Score(_) | Self::NoRow(_) | Self::NoChoice)
    }
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct AuditRequests {
    /// The model's name at the server.
    pub model: String,
    /// Whether the chat endpoint is asked, and not completions.
    pub is_chat: bool,
    /// The most answers to ask for.
    pub answers_max: u32,
    /// Tokens of each answer, at most.
    pub tokens: u32,
}

impl AuditRequests {
    /// What every server understands.
    fn body(&self, prompt: &str, drawn: Drawn, seed: u32) -> Value {
        let temperature = if drawn == Drawn::Greedy { 0 } else { 1 };
        let mut body = json!({
            "model": self.model, "max_tokens": self.tokens, "temperature": temperature,
            "top_p": 1, "seed": seed, "stream": false,
        });
        match self.is_chat {
            true => {
                body["messages"] = json!([{"role": "user", "content": prompt}]);
                body["logprobs"] = true.into();
                body["top_logprobs"] = TOP.into();
            }
            false => {
                body["prompt"] = prompt.into();
                body["logprobs"] = TOP.into();
            }
        }
        body
    }

    fn path(&self) -> &'static str {
        if self.is_chat { "/v1/chat/completions" } else { "/v1/completions" }
    }
}

/// What an audit found.
#[derive(Debug, Default)]
pub struct Findings {
    /// What the answers show together.
    pub evidence: AuditEvidence,
    /// Whether the server honours seeds, where that was seen.
    pub honours_seeds: Option<bool>,
}

/// Asks `target` for answers to `prompts`, which must not be empty, and scores each by `verifier`,
/// which blocks the thread. `shown` is given the number of answers and what they show, after each.
///
/// # Errors
/// The first request that fails, or answer that cannot be read or scored.
pub async fn audit(
    (target, requests): (Target, AuditRequests),
    verifier: &Verifier,
    prompts: &[String],
    shown: &dyn Fn(u32, &AuditEvidence),
) -> Result<Findings, AuditError> {
    let text = &verifier.model.text;
    let names = TokensByName::new(&text.tokenizer, text.vocab);
    let (clock, entropy) = (Clock::system(), Entropy::system());
    let mut server = Server { target, requests, names, clock, has_extras: true };
    let mut found = Findings::default();
    for index in 0..server.requests.answers_max {
        let drawn = if index % GREEDY_EVERY == 3 { Drawn::Greedy } else { Drawn::Sampled };
        let prompt = &prompts[entropy.word() as usize % prompts.len()];
        let body = server.requests.body(prompt, drawn, entropy.word() as u32 >> 1);
        let answer = server.ask(&body).await?;
        let requests = question::understand(verifier, &body).await?.requests;
        let request = requests.first().ok_or(AuditError::NoChoice)?;
        let rows = score(verifier, request, &answer).map_err(AuditError::Score)?;
        if let Some(id) = answer.ids.first().filter(|_| rows.is_empty()) {
            return Err(AuditError::NoRow(*id));
        }
        found.evidence.add(&answer, drawn, &rows, request.prompt.len());
        if found.honours_seeds.is_none() && index < SEED_TRIES {
            found.honours_seeds = server.honours_seed(&body, (&answer, &rows)).await?;
        }
        shown(index + 1, &found.evidence);
        let is_certain = found.evidence.verdict().0 != Conclusion::CannotTell;
        if index + 1 >= ANSWERS_MIN && is_certain {
            break;
        }
    }
    Ok(found)
}

/// The server, and what is known of it.
struct Server<'a> {
    target: Target,
    requests: AuditRequests,
    names: TokensByName<'a>,
    clock: Clock,
    /// The server takes fields that not all have.
    has_extras: bool,
}

impl Server<'_> {
    /// Asks for an answer again, with its own seed and with another one.
    async fn honours_seed(
        &mut self,
        body: &Value,
        (answer, rows): (&ServerAnswer, &[TokenScore]),
    ) -> Result<Option<bool>, AuditError> {
        let Some(test) = SeedTest::new(answer, rows) else { return Ok(None) };
        if !test.is_repeated(&self.ask(body).await?) {
            return Ok(Some(false));
        }
        let mut other = body.clone();
        other["seed"] = (body["seed"].as_u64().unwrap_or(0) ^ 1).into();
        match test.conclude(&self.ask(&other).await?) {
            OtherSeed::Differs => Ok(Some(true)),
            OtherSeed::Same => Ok(None),
        }
    }

    /// One answer; a server that refuses token ids is asked without them from then on.
    async fn ask(&mut self, body: &Value) -> Result<ServerAnswer, AuditError> {
        if self.has_extras {
            let mut more = body.clone();
            more["return_token_ids"] = true.into();
            match self.call(&more).await {
                Err(QueryError::Status { status, .. }) if matches!(status.as_u16(), 400 | 422) => {
                    self.has_extras = false;
                }
                answered => return self.read(&answered?),
            }
        }
        self.read(&self.call(body).await?)
    }

    async fn call(&self, body: &Value) -> Result<Vec<u8>, QueryError> {
        let bytes = body.to_string().into_bytes();
        self.target.call(self.requests.path(), Some(bytes), &self.clock).await
    }

    fn read(&self, bytes: &[u8]) -> Result<ServerAnswer, AuditError> {
        let refuse = |what: String| AuditError::Answer { url: shown(&self.target.url), what };
        let body: Value = serde_json::from_slice(bytes)
            .map_err(|e| refuse(format!("the answer is not JSON: {e}")))?;
        if is_deeper(&body, DEPTH_MAX) {
            return Err(refuse(format!("the answer nests more than {DEPTH_MAX} deep")));
        }
        read(&body, &self.names).map_err(|what| refuse(what.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_endpoints_are_asked_for_what_every_server_gives() {
        let requests =
            |is_chat| AuditRequests { model: "m".into(), is_chat, answers_max: 9, tokens: 48 };
        let plain = requests(false);
        assert_eq!(plain.path(), "/v1/completions");
        let want = json!({
            "model": "m", "max_tokens": 48, "temperature": 1, "top_p": 1, "seed": 7,
            "stream": false, "prompt": "hi", "logprobs": 5,
        });
        assert_eq!(plain.body("hi", Drawn::Sampled, 7), want);
        let chat = requests(true);
        assert_eq!(chat.path(), "/v1/chat/completions");
        let body = chat.body("hi", Drawn::Greedy, 7);
        assert_eq!(body["messages"], json!([{"role": "user", "content": "hi"}]));
        assert_eq!((&body["logprobs"], &body["top_logprobs"]), (&json!(true), &json!(5)));
        assert_eq!((&body["temperature"], &body["prompt"]), (&json!(0), &Value::Null));
    }
}
