//! Writes the response that an honest server would have sent for these tokens, with the server's
//! own code, for comparison with the received one.
//!
//! Log-probabilities and proofs are taken from the received response: here only their form is
//! checked, and rows show whether they are true. A stream in this engine's own form (one token in
//! each chunk, with its id and powv) is compared chunk by chunk. Other honest servers divide their
//! text in other ways, so their whole text is compared.

mod tops;

use super::answer::{Answer, RawResponse, Reported, Top};
use super::compare::{Compare, is_empty, is_name, merge, short};
use super::question::Question;
use super::structure::{End, Walk};
use super::{Reason, Rejection};
use crate::engine::output::{Finish, FinishReason, PromptRow, Step};
use crate::intake::Endpoint;
use crate::intake::proof::chunk;
use crate::models::text::Text;
use crate::proof::CHUNK_ROWS;
use crate::proof::commit::ChunkProof;
use crate::reply::format::{Echo, Formatter};
use crate::wire::openai::Usage;
use crate::wire::openai::response::{ProofEnd, Proofs};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Words of `service_tier`, which say nothing of the answer.
const SERVICE_TIERS: [&str; 5] = ["auto", "default", "flex", "priority", "scale"];

/// Parts of a choice without a token that may follow its opening: an honest server may send its
/// finish reason or the end of its proof by itself. More of them only look like tokens to whoever
/// counts chunks.
const SILENT_PARTS_MAX: usize = 4;

/// One choice as the writer takes it.
pub struct Told {
    steps: Vec<Step>,
    finish: Finish,
    chunks: Vec<ChunkProof>,
    end: Option<ProofEnd>,
    tops: Vec<Vec<Top>>,
    prompt: Vec<Reported>,
}

impl Told {
    /// The tokens of `answer`, whose text and end `walk` found.
    pub fn new(answer: &Answer, walk: &Walk, prompt_tokens: usize) -> Self {
        let reason = match &walk.end {
            End::Sent(reason) => reason.clone(),
            // What comes after an end that was not sent is nothing that is written.
            End::Implied => FinishReason::Length,
        };
        let count = answer.ids.len();
        let finish = Finish {
            reason,
            prompt_tokens,
            cached_tokens: 0,
            completion_tokens: count,
            digest: None,
        };
        let step = |(place, id): (usize, &u32)| {
            let is_last = place + 1 == count;
            let closes = is_last || (place + 1).is_multiple_of(CHUNK_ROWS);
            let chunk = answer.chunks.get(place / CHUNK_ROWS).filter(|_| closes);
            Step {
                token: *id,
                text: walk.pieces.get(place).cloned().unwrap_or_default(),
                logprob: answer.logprobs.get(place).copied().flatten().unwrap_or_default(),
                rank: 1,
                top: Vec::new(),
                powv: answer.powv.get(place).copied().flatten().unwrap_or_default(),
                proof: chunk.cloned(),
                finish: is_last.then(|| finish.clone()),
            }
        };
        Self {
            steps: answer.ids.iter().enumerate().map(step).collect(),
            chunks: answer.chunks.clone(),
            end: answer.end.clone(),
            tops: answer.tops.clone(),
            prompt: answer.prompt.clone(),
            finish,
        }
    }
}

fn bad(what: impl Into<String>) -> Rejection {
    Rejection::new(Reason::BadStream, what)
}

/// Writes the answer to a question again.
pub struct Mirror<'a> {
    /// Tokenizer, template and grammars of the model.
    pub model: &'a Arc<Text>,
    /// The request that was captured.
    pub question: &'a Question,
    /// Its choices; `None` where one cannot be read, and is rejected already.
    pub told: &'a [Option<Told>],
}

impl Mirror<'_> {
    /// What is wrong with each choice; what is wrong with the response is wrong with all.
    pub fn compare(&self, sent: RawResponse<'_>) -> Vec<Result<(), Rejection>> {
        let each = match sent {
            RawResponse::Whole(body) => self.compare_whole(body),
            RawResponse::Stream(chunks) => self.compare_stream(chunks),
        };
        each.unwrap_or_else(|rejection| vec![Err(rejection); self.told.len()])
    }

    /// All choices as chunks, one after the other.
    pub fn chunks(&self) -> Vec<Value> {
        let told = self.told.iter().enumerate();
        let parts = told.filter_map(|(index, told)| Some(self.parts(index, told.as_ref()?)));
        let chunk = |part: Value| {
            let object = self.endpoint().chunk();
            json!({"object": object, "model": self.question.model, "choices": [part]})
        };
        parts.flatten().map(chunk).collect()
    }

    fn endpoint(&self) -> Endpoint {
        self.question.understood.endpoint
    }

    fn compare_whole(&self, body: &Value) -> Result<Vec<Result<(), Rejection>>, Rejection> {
        let is_chat = self.endpoint() == Endpoint::Chat;
        self.check_head("the response", body, self.endpoint().whole(), is_chat)?;
        if self.told.iter().all(Option::is_some) {
            let tokens = self.told.iter().flatten().map(|t| t.steps.len()).sum();
            self.check_usage("the response", &body["usage"], tokens)?;
        }
        let choices = body["choices"].as_array().ok_or_else(|| bad("there are no choices"))?;
        let count = self.told.len();
        let is_in_place = |(place, choice): (usize, &Value)| choice["index"] == place;
        if choices.len() != count || !choices.iter().enumerate().all(is_in_place) {
            return Err(bad(format!("the choices must be 0 to {}, in order", count - 1)));
        }
        let each = choices.iter().enumerate().map(|(index, sent)| {
            let Some(told) = &self.told[index] else { return Ok(()) };
            let compare = Compare { has_prompt_rows: !is_chat, ..self.comparing(index, false) };
            compare.choice(&place(index), &self.whole(index, told), sent)?;
            self.check_tops(index, told)?;
            let scores = if is_chat { &body["prompt_logprobs"] } else { &sent["prompt_logprobs"] };
            self.check_prompt_logprobs(index, scores)
        });
        Ok(each.collect())
    }

    fn compare_stream(&self, chunks: &[Value]) -> Result<Vec<Result<(), Rejection>>, Rejection> {
        let count = self.told.len();
        let mut parts: Vec<Vec<&Value>> = vec![Vec::new(); count];
        let mut echoed: Vec<usize> = (0..count).map(|i| self.question.echoed(i)).collect();
        let (mut tokens, mut has_usage) = (0, false);
        for (number, chunk) in chunks.iter().enumerate() {
            let name = format!("chunk {number}");
            self.check_head(&name, chunk, self.endpoint().chunk(), false)?;
            let choices = chunk["choices"].as_array().map(Vec::as_slice).unwrap_or_default();
            for (place, choice) in choices.iter().enumerate() {
                let index = choice["index"].as_u64().and_then(|i| usize::try_from(i).ok());
                let index = index.filter(|i| *i < count).ok_or_else(|| {
                    let got = short(&choice["index"]);
                    bad(format!("{name}: indices of choices lie below {count}, got {got}"))
                })?;
                if choices[..place].iter().any(|other| other["index"] == index) {
                    return Err(bad(format!("{name} has choice {index} twice")));
                }
                tokens += tokens_of(choice, &mut echoed[index]);
                parts[index].push(choice);
            }
            self.check_usage(&name, &chunk["usage"], tokens)?;
            has_usage = !is_empty(&chunk["usage"]);
        }
        if self.question.understood.report.include_usage && !has_usage {
            return Err(bad("the usage was asked for, and the stream does not end with it"));
        }
        let each = parts.iter().enumerate().map(|(index, parts)| match &self.told[index] {
            Some(told) => self.compare_parts(index, told, parts),
            None => Ok(()),
        });
        Ok(each.collect())
    }

    fn compare_parts(&self, index: usize, told: &Told, parts: &[&Value]) -> Result<(), Rejection> {
        let want = self.parts(index, told);
        if is_own(parts, self.question.echoed(index)) {
            self.compare_chunks(index, told, &want, parts)?;
        } else {
            let (want, sent) = (merge(want.iter())?, merge(parts.iter().copied())?);
            self.comparing(index, false).choice(&place(index), &want, &sent)?;
        }
        self.check_tops(index, told)
    }

    /// One chunk a token, with what is sent before the first.
    fn compare_chunks(
        &self,
        index: usize,
        told: &Told,
        want: &[Value],
        parts: &[&Value],
    ) -> Result<(), Rejection> {
        let opening = want.len() - told.steps.len();
        let (mut next, may_miss) = (0, self.endpoint() == Endpoint::Chat);
        let mut silent = 0;
        let nothing = Value::Object(Map::from_iter([("index".to_owned(), index.into())]));
        for sent in parts {
            let has_token = is_token(sent);
            if has_token && next < opening && may_miss {
                next = opening;
            }
            let is_next = has_token || next < opening;
            let (want, is_own) = match want.get(next).filter(|_| is_next) {
                Some(want) => (want, has_token),
                None => (&nothing, false),
            };
            let name = match is_next && next >= opening {
                true => format!("{}, token {}", place(index), next - opening),
                false => place(index),
            };
            self.comparing(index, is_own).choice(&name, want, sent)?;
            next += usize::from(is_next);
            silent += usize::from(!is_next);
            if silent > SILENT_PARTS_MAX {
                let most = SILENT_PARTS_MAX;
                return Err(bad(format!("{name} has more than {most} chunks without a token")));
            }
        }
        Ok(())
    }

    fn comparing(&self, index: usize, is_own: bool) -> Compare<'_> {
        let prompt = self.question.prompts.of(index);
        // The own form of an answer names no end token.
        let end = if is_own { None } else { self.end(index) };
        Compare { is_own, has_prompt_rows: false, prompt, end }
    }

    /// The end token that a choice ends with.
    fn end(&self, index: usize) -> Option<u32> {
        let token = self.told.get(index)?.as_ref()?.steps.last()?.token;
        let request = self.question.understood.requests.get(index)?;
        request.end_ids(self.model).contains(&token).then_some(token)
    }

    /// The fields beside the choices; `has_prompt_rows` says that the prompt's log-probabilities
    /// may be among them.
    fn check_head(
        &self,
        name: &str,
        body: &Value,
        object: &str,
        has_prompt_rows: bool,
    ) -> Result<(), Rejection> {
        let body = body.as_object().ok_or_else(|| bad(format!("{name} is not an object")))?;
        let report = &self.question.understood.report;
        for (key, value) in body.iter().filter(|(_, value)| !is_empty(value)) {
            let is_fine = match key.as_str() {
                "id" | "system_fingerprint" => is_name(value),
                "created" => value.is_number(),
                "object" => value == object,
                "model" => *value == self.question.model,
                "service_tier" => value.as_str().is_some_and(|t| SERVICE_TIERS.contains(&t)),
                "logprobs_mode" => report.logprobs.is_some() && value == report.mode.name(),
                "prompt_token_ids" => *value == Value::from(self.question.prompts.of(0)),
                // These are checked elsewhere.
                "choices" | "usage" => true,
                "prompt_logprobs" => has_prompt_rows,
                _ => false,
            };
            if !is_fine {
                let key: String = key.chars().take(40).collect();
                let reason =
                    if key == "prompt_token_ids" { Reason::BadIds } else { Reason::BadStream };
                let what = format!("{name}: no honest answer has {} in {key:?}", short(value));
                return Err(Rejection::new(reason, what));
            }
        }
        Ok(())
    }

    /// Counts, where they came, are those of the tokens so far. How many were found in a cache is
    /// the server's own affair.
    fn check_usage(&self, name: &str, usage: &Value, tokens: usize) -> Result<(), Rejection> {
        if is_empty(usage) {
            return Ok(());
        }
        let prompt = self.question.prompts.tokens();
        let want = Usage::new(prompt, 0, tokens);
        let details = &usage["prompt_tokens_details"];
        let is_detail = |(key, value): (&String, &Value)| {
            let is_cached = key == "cached_tokens";
            let most = if is_cached { prompt as u64 } else { 0 };
            is_empty(value) || value.as_u64().is_some_and(|n| n <= most)
        };
        let are_details = |v: &Value| match v {
            Value::Object(map) => map.iter().all(is_detail),
            other => is_empty(other),
        };
        let counts = [
            ("prompt_tokens", want.prompt_tokens),
            ("completion_tokens", want.completion_tokens),
            ("total_tokens", want.total_tokens),
        ];
        let is_known = |key: &String| counts.iter().any(|(name, _)| name == key);
        let others = usage.as_object().into_iter().flatten().filter(|(key, _)| !is_known(key));
        let is_right = counts.iter().all(|(key, count)| usage[*key] == *count);
        match is_right && are_details(details) && others.into_iter().all(|(_, v)| are_details(v)) {
            true => Ok(()),
            false => {
                let counts = format!("{prompt} prompt and {tokens} completion tokens");
                let usage = usage.to_string().chars().take(200).collect::<String>();
                Err(bad(format!("{name}: the usage is {counts}, got {usage}")))
            }
        }
    }

    fn formatter(&self, index: usize) -> Formatter {
        let understood = &self.question.understood;
        let tools = understood.tools.clone();
        Formatter::new(Arc::clone(self.model), understood.report, None, tools, index)
    }

    /// What repeats the prompt, its log-probabilities left open.
    fn with_echo<T>(&self, index: usize, write: impl FnOnce(Option<&Echo<'_>>) -> T) -> T {
        let report = &self.question.understood.report;
        let prompt = self.question.prompts.of(index);
        let row = |token: &u32| PromptRow { token: *token, logprob: 0.0, rank: 1, top: Vec::new() };
        let rows: Vec<PromptRow> = prompt.iter().skip(1).map(row).collect();
        let echo = Echo { prompt, rows: report.logprobs.map(|_| rows.as_slice()) };
        write(report.echo.then_some(&echo))
    }

    /// Choice `index` of a whole response.
    fn whole(&self, index: usize, told: &Told) -> Value {
        let mut formatter = self.formatter(index);
        let mut choice = match self.endpoint() {
            Endpoint::Chat => value(&formatter.chat_choice(&told.steps, &told.finish.reason)),
            Endpoint::Completion => self.with_echo(index, |echo| {
                value(&formatter.completion(echo, &told.steps, Some(&told.finish)))
            }),
        };
        if self.question.proof.is_some() {
            choice["proof"] = value(&Proofs::All(told.chunks.iter().map(chunk).collect()));
            choice["proof_end"] = value(&told.end);
        }
        choice["token_ids"] = told.steps.iter().map(|s| s.token).collect();
        choice
    }

    /// Choice `index` of a stream, chunk by chunk.
    fn parts(&self, index: usize, told: &Told) -> Vec<Value> {
        let mut formatter = self.formatter(index);
        let mut parts = match self.endpoint() {
            Endpoint::Chat => vec![value(&formatter.role_chunk())],
            Endpoint::Completion => self.with_echo(index, |echo| {
                echo.map(|echo| value(&formatter.echo_chunk(echo))).into_iter().collect()
            }),
        };
        let step = |step: &Step| match self.endpoint() {
            Endpoint::Chat => value(&formatter.chat_chunk(step)),
            Endpoint::Completion => value(&formatter.completion_chunk(step)),
        };
        parts.extend(told.steps.iter().map(step));
        if told.steps.is_empty() {
            parts.push(value(&self.formatter(index).end_chunk(&told.finish)));
        }
        if self.question.proof.is_none() {
            for part in parts.iter_mut().filter_map(Value::as_object_mut) {
                part.remove("proof");
            }
        } else if let Some(last) = parts.last_mut() {
            last["proof_end"] = value(&told.end);
        }
        parts
    }
}

fn place(index: usize) -> String {
    format!("choice {index}")
}

fn value(part: &impl Serialize) -> Value {
    // Only maps with non-string keys or failing serializers can fail, and there are none here.
    serde_json::to_value(part).unwrap_or_else(|e| unreachable!("a response is not JSON: {e}"))
}

/// Whether chunks, of which the first may repeat `echoed` tokens, have the form of this engine's
/// own.
fn is_own(parts: &[&Value], mut echoed: usize) -> bool {
    let mut parts = parts.iter().filter(|part| tokens_of(part, &mut echoed) > 0).peekable();
    parts.peek().is_some() && parts.all(|part| is_token(part) && part["powv"].is_number())
}

/// Whether a part is one token with its id.
fn is_token(part: &Value) -> bool {
    part["token_ids"].as_array().is_some_and(|ids| ids.len() == 1)
}

/// Tokens of the output in a part, of which the first `echoed` that have no ids are the prompt's.
fn tokens_of(part: &Value, echoed: &mut usize) -> usize {
    let length = |list: &Value| list.as_array().map_or(0, Vec::len);
    if let Some(ids) = part["token_ids"].as_array() {
        return ids.len();
    }
    let logprobs = &part["logprobs"];
    let names = length(&logprobs["content"]).max(length(&logprobs["tokens"]));
    let own = names.min(*echoed);
    *echoed -= own;
    names - own
}
