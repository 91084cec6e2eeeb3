//! Asks a server for answers, one after the other, until the tests are certain or there are enough.
//!
//! Prompts, their order and seeds are drawn: a server cannot know what it will be asked.

use super::answer::{ServerAnswer, TokensByName, read};
use super::evidence::{AuditEvidence, Conclusion, Drawn};
use super::score::{TokenScore, score};
use super::seeds::{OtherSeed, SeedTest};
use crate::chance::Chance;
use crate::clock::Clock;
use crate::endpoint::shown;
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
    /// Whether the server is at fault, or the way to it: what it answered before still counts.
    fn is_servers(&self) -> bool {
        matches!(self, Self::Query(_) | Self::Answer { .. })
    }

    /// Whether it is a failure of this program, and not of the server or of what was asked.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Score(_) | Self::NoRow(_) | Self::NoChoice)
    }
}

/// What an audit asks a server for.
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
            "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "seed": seed,
            "stream": false,
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
    /// Why the server was asked no further, where it failed after an answer. The test had not
    /// ended: what was found is less than it needs.
    pub broken_off: Option<AuditError>,
}

/// Asks `target` for answers to `prompts`, which must not be empty, and scores each by `verifier`,
/// which blocks the thread. `shown` is given the number of answers and what they show, after each.
/// A request that fails, or an answer that cannot be read, ends the asking.
///
/// # Errors
/// Where the server fails before it has answered once; an answer that could not be scored.
pub async fn audit(
    (target, requests): (Target, AuditRequests),
    verifier: &Verifier,
    (prompts, chance, clock): (&[String], &mut Chance, Clock),
    shown: &dyn Fn(u32, &AuditEvidence),
) -> Result<Findings, AuditError> {
    let text = &verifier.model.text;
    let names = TokensByName::new(&text.tokenizer, text.vocab);
    let mut server = Server { target, requests, names, clock, verifier, has_extras: true };
    let mut found = Findings::default();
    for index in 0..server.requests.answers_max {
        let drawn = if index % GREEDY_EVERY == 3 { Drawn::Greedy } else { Drawn::Sampled };
        let Some(prompt) = chance.pick(prompts) else { break };
        let body = server.requests.body(prompt, drawn, chance.bits() as u32 >> 1);
        match server.answer((&body, drawn), index < SEED_TRIES, &mut found).await {
            Ok(()) => shown(index + 1, &found.evidence),
            Err(why) if why.is_servers() && found.evidence.answers > 0 => {
                found.broken_off = Some(why);
                break;
            }
            Err(why) => return Err(why),
        }
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
    verifier: &'a Verifier,
    /// The server takes fields that not all have.
    has_extras: bool,
}

impl Server<'_> {
    /// Asks for an answer and adds what it shows; `tries_seed` where it may show whether seeds are
    /// honoured.
    async fn answer(
        &mut self,
        (body, drawn): (&Value, Drawn),
        tries_seed: bool,
        found: &mut Findings,
    ) -> Result<(), AuditError> {
        let understood =
            question::understand(self.verifier, body, Clock::system().unix_ms()).await?;
        let request = understood.requests.first().ok_or(AuditError::NoChoice)?;
        let answer = self.ask(body).await?;
        self.check_length(request.prompt.len(), answer.ids.len())?;
        let rows = match answer.ids.is_empty() {
            true => Vec::new(),
            false => score(self.verifier, request, &answer).map_err(AuditError::Score)?,
        };
        if let Some(id) = answer.ids.first().filter(|_| rows.is_empty()) {
            return Err(AuditError::NoRow(*id));
        }
        found.evidence.add(&answer, drawn, &rows, request.prompt.len());
        if found.honours_seeds.is_none() && tries_seed {
            found.honours_seeds = self.honours_seed(body, (&answer, &rows)).await?;
        }
        Ok(())
    }

    /// What was asked for fits into the context; what came may be longer.
    fn check_length(&self, prompt: usize, answer: usize) -> Result<(), AuditError> {
        let (asked, most) = (self.requests.tokens, self.verifier.context_max);
        match prompt + answer > most {
            true => Err(self.refuse(format!(
                "the answer has {answer} tokens, {asked} were asked for; after a prompt of \
                 {prompt} they are more than the {most} of our context"
            ))),
            false => Ok(()),
        }
    }

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

    /// One answer; a server that refuses the fields that not all have is asked without them from
    /// then on.
    async fn ask(&mut self, body: &Value) -> Result<ServerAnswer, AuditError> {
        if self.has_extras {
            match self.call(&with_extras(body)).await {
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
        let body: Value = serde_json::from_slice(bytes)
            .map_err(|e| self.refuse(format!("the answer is not JSON: {e}")))?;
        if is_deeper(&body, DEPTH_MAX) {
            return Err(self.refuse(format!("the answer nests more than {DEPTH_MAX} deep")));
        }
        read(&body, &self.names).map_err(|what| self.refuse(what.to_string()))
    }

    fn refuse(&self, what: String) -> AuditError {
        AuditError::Answer { url: shown(&self.target.url), what }
    }
}

/// The request with fields that not every server knows: tokens by their ids, alternatives too, and
/// nothing of a server's own defaults in how they are drawn.
fn with_extras(body: &Value) -> Value {
    let mut more = body.clone();
    more["return_token_ids"] = true.into();
    more["return_tokens_as_token_ids"] = true.into();
    more["repetition_penalty"] = 1.into();
    more["top_k"] = (-1).into();
    more["min_p"] = 0.into();
    more
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
            "model": "m", "max_tokens": 48, "temperature": 1, "top_p": 1, "presence_penalty": 0,
            "frequency_penalty": 0, "seed": 7, "stream": false, "prompt": "hi", "logprobs": 5,
        });
        assert_eq!(plain.body("hi", Drawn::Sampled, 7), want);
        let more = with_extras(&want);
        let of = |key: &str| more[key].clone();
        let off = [of("repetition_penalty"), of("top_k"), of("min_p"), of("return_token_ids")];
        assert_eq!(off, [json!(1), json!(-1), json!(0), json!(true)]);
        assert_eq!(more.as_object().unwrap().len(), want.as_object().unwrap().len() + 5);
        let chat = requests(true);
        assert_eq!(chat.path(), "/v1/chat/completions");
        let body = chat.body("hi", Drawn::Greedy, 7);
        assert_eq!(body["messages"], json!([{"role": "user", "content": "hi"}]));
        assert_eq!((&body["logprobs"], &body["top_logprobs"]), (&json!(true), &json!(5)));
        assert_eq!((&body["temperature"], &body["prompt"]), (&json!(0), &Value::Null));
    }
}
