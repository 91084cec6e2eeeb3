//! Reads a request as the verifier does: what the engine was asked, and how the answer is written.

use super::Verifier;
use super::answer::{RawResponse, id_of_name};
use super::claim::Challenge;
use crate::chain::keys::{AddressError, Hotkey};
use crate::engine::request::Request;
use crate::entropy::Entropy;
use crate::intake::error::RequestError;
use crate::intake::translate::Defaults;
use crate::intake::understand::{Reader, Understood};
use crate::models::pass::LogprobMode;
use crate::proof::codec::{HexError, from_hex};
use crate::proof::{Scheme, UnknownScheme};
use crate::reply::head::Prompts;
use crate::wire::openai::{ChatRequest, CompletionRequest};
use serde_json::Value;

/// Why a request is not one that can have been answered.
#[derive(Debug, thiserror::Error)]
pub enum QuestionError {
    /// It asks for no proof that is known.
    #[error("proof.scheme {0}")]
    Scheme(UnknownScheme),
    /// The proof's nonce cannot be read as a hash in hexadecimal.
    #[error("proof.nonce {0}")]
    Nonce(HexError),
    /// Who was asked.
    #[error("`hotkey`: {0}")]
    Hotkey(AddressError),
    /// A proof is bound to a limit that it does not name.
    #[error(
        "`request` must name `max_tokens`: without it the limit is the context, which differs \
         between machines, and proofs are bound to it"
    )]
    NoLimit,
    /// Its fields are not those of a body.
    #[error("`request` is not a body: {0}")]
    Body(#[from] serde_json::Error),
    /// A server would refuse it, in these words.
    #[error("`request`: {0}")]
    Refused(#[from] RequestError),
}

/// A request body, understood.
pub struct Question {
    /// What the engine was asked, and how the answer is written.
    pub understood: Understood,
    /// The model's name.
    pub model: String,
    /// The `seed` of the request.
    pub seed: Option<i64>,
    /// The proof that was asked for.
    pub proof: Option<Challenge>,
    /// The prompts by ids, and how many choices each has.
    pub prompts: Prompts,
    /// The server chooses how long an answer may be: by its context.
    pub(super) limit_is_free: bool,
    /// The server chooses how tokens are named.
    names_are_free: bool,
    /// The server chooses which distribution log-probabilities describe.
    mode_is_free: bool,
}

impl Question {
    /// Reads `body`, asked at `now_ms`, as a server does whose model is `model`; `hotkey` must have
    /// signed proofs.
    ///
    /// # Errors
    /// The field, and rule and fact.
    pub async fn read(
        verifier: &Verifier,
        model: &str,
        body: &Value,
        hotkey: Option<&str>,
        now_ms: u64,
    ) -> Result<Self, QuestionError> {
        let understood = understand(verifier, body, now_ms).await?;
        let prompts = understood.requests.iter().step_by(understood.n);
        let prompts = prompts.map(|request| request.prompt.clone()).collect();
        Ok(Self {
            model: body["model"].as_str().unwrap_or(model).to_owned(),
            seed: body["seed"].as_i64(),
            proof: asked(body, hotkey)?,
            prompts: Prompts { prompts, n: understood.n },
            limit_is_free: has_free_limit(body),
            names_are_free: body["return_tokens_as_token_ids"].is_null(),
            mode_is_free: body["logprobs_mode"].is_null(),
            understood,
        })
    }

    /// The request of each choice.
    pub fn requests(&self) -> &[Request] {
        &self.understood.requests
    }

    /// Tokens of the prompt with which the log-probabilities of choice `index` begin.
    pub fn echoed(&self, index: usize) -> usize {
        if self.understood.report.echo { self.prompts.of(index).len() } else { 0 }
    }

    /// Whether an honest answer says which tokens it has, however it is sent.
    pub fn asks_ids(&self) -> bool {
        let report = &self.understood.report;
        report.token_ids || (report.logprobs.is_some() && report.tokens_as_ids)
    }

    /// Takes from an answer what the request leaves to the server, and its flags decide.
    pub(super) fn adapt(&mut self, sent: RawResponse<'_>) {
        let bodies = sent.bodies();
        if self.names_are_free {
            let name = bodies.iter().find_map(first_name);
            self.understood.report.tokens_as_ids = name.is_some_and(|n| id_of_name(n).is_some());
        }
        if self.mode_is_free && named_mode(bodies) == Some(LogprobMode::Scaled.name()) {
            self.scale();
        }
    }

    /// Whether neither the request nor the answer says which distribution its log-probabilities
    /// describe.
    pub(super) fn has_unnamed_mode(&self, sent: RawResponse<'_>) -> bool {
        self.mode_is_free && named_mode(sent.bodies()).is_none()
    }

    /// Takes log-probabilities for those at the temperature.
    pub(super) fn scale(&mut self) {
        self.understood.report.mode = LogprobMode::Scaled;
        for request in &mut self.understood.requests {
            request.logprob_mode = LogprobMode::Scaled;
        }
    }
}

fn named_mode(bodies: &[Value]) -> Option<&str> {
    bodies.iter().find_map(|body| body["logprobs_mode"].as_str())
}

/// The first token that a body names.
fn first_name(body: &Value) -> Option<&str> {
    body["choices"].as_array()?.iter().find_map(|choice| {
        let logprobs = &choice["logprobs"];
        let name = match logprobs["content"].get(0) {
            Some(entry) => &entry["token"],
            None => logprobs["tokens"].get(0)?,
        };
        name.as_str()
    })
}

/// Whether a body names no limit, and none is implied: completions have one of 16 tokens.
fn has_free_limit(body: &Value) -> bool {
    let is_limited = ["max_tokens", "max_completion_tokens"].iter().any(|k| !body[*k].is_null());
    body.get("messages").is_some() && !is_limited
}

fn asked(body: &Value, hotkey: Option<&str>) -> Result<Option<Challenge>, QuestionError> {
    let Some(scheme) = body["proof"]["scheme"].as_str() else { return Ok(None) };
    let scheme: Scheme = scheme.parse().map_err(QuestionError::Scheme)?;
    let nonce = body["proof"]["nonce"].as_str().map(from_hex).transpose();
    let nonce = nonce.map_err(QuestionError::Nonce)?;
    let hotkey = hotkey.map(str::parse::<Hotkey>).transpose();
    let hotkey = hotkey.map_err(QuestionError::Hotkey)?;
    Ok(Some(Challenge { scheme, nonce, hotkey }))
}

/// Reads a body as a server does that is asked at `now_ms`. The noise of a request without a seed
/// is not random: who runs the request gives it a seed, or binds it to a proof.
///
/// # Errors
/// The field, and rule and fact.
pub async fn understand(
    verifier: &Verifier,
    body: &Value,
    now_ms: u64,
) -> Result<Understood, QuestionError> {
    if body["proof"].is_object() && has_free_limit(body) {
        return Err(QuestionError::NoLimit);
    }
    let entropy = Entropy::seeded(0);
    let reader = Reader {
        model: &verifier.model.text,
        context_max: verifier.context_max,
        defaults: Defaults::default(),
        entropy: &entropy,
        now_ms,
    };
    let understood = if body.get("messages").is_some() {
        let request: ChatRequest = serde_json::from_value(body.clone())?;
        reader.chat(&request).await
    } else {
        let request: CompletionRequest = serde_json::from_value(body.clone())?;
        reader.completion(&request).await
    };
    Ok(understood?)
}
