//! Counts how many of this engine's own answers are equal bit for bit when they are recomputed.

use super::prompts;
use crate::clock::Clock;
use crate::engine::output::Ended;
use crate::engine::request::Request;
use crate::engine::{Engine, Options};
use crate::intake::proof::Prover;
use crate::models::{Identity, Model};
use crate::ops::pool::Pool;
use crate::proof::codec::Hash;
use crate::proof::commit::nonce_of;
use crate::proof::{CHUNK_ROWS, Scheme};
use crate::verify::answer::Answer;
use crate::verify::{
    Challenge, Claim, Depth, Limits, Profile, Report, Verdict, Verifier, question,
};
use anyhow::Context;
use serde_json::json;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of one of this engine's own answers: four chunks.
const OWN_TOKENS: usize = 4 * CHUNK_ROWS;
/// Own answers that run at once, at most.
const OWN_BATCH: usize = 16;

/// Why answers are not compared.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OwnError {
    /// The model or a request of it is refused.
    #[error("{0}")]
    Refused(String),
    /// The engine does not start, or fails.
    #[error("{0}")]
    Engine(String),
}

/// What recomputing answers showed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OwnTally {
    /// Answers that are equal bit for bit, and drawn as replayed.
    pub equal: usize,
    /// Chunks of all answers.
    pub chunks: usize,
    /// Tokens of all answers.
    pub tokens: usize,
}

impl OwnTally {
    fn add(&mut self, report: &Report) {
        self.equal += usize::from(report.verdict == Verdict::Pass);
        self.chunks += report.chunks.len();
        self.tokens += report.rows.len();
    }
}

/// An engine beside a verifier of the same model that demands equal bits.
pub struct Own {
    engine: Engine,
    verifier: Verifier,
    prompts: Vec<String>,
}

impl Own {
    /// Over `model`, with an engine of these options.
    ///
    /// # Errors
    /// When its identity cannot be computed, or no engine starts.
    pub fn start(model: Model, options: Options, pool: &Pool) -> Result<Self, OwnError> {
        let identity = Identity::of(&model, pool).map_err(|e| OwnError::Refused(e.to_string()))?;
        let model = Arc::new(model);
        let engine = Engine::start(Arc::clone(&model), pool.clone(), options, Clock::system())
            .map_err(|e| OwnError::Engine(e.to_string()))?;
        let verifier =
            Verifier::new(model, Arc::new(identity), pool.separate(), options.context_max)
                .with_limits(Limits { exact: true, ..Limits::default() });
        Ok(Self { engine, verifier, prompts: prompts::all() })
    }

    /// How many answers may be asked for at once.
    fn batch(&self) -> u32 {
        self.engine.options().sequences_max.clamp(1, OWN_BATCH) as u32
    }

    /// Generates the first `count` answers and recomputes each, which blocks the thread; the log
    /// says how it goes, by the model's `name`.
    ///
    /// # Errors
    /// When a request is not accepted, or the engine fails.
    pub async fn check(&self, name: &str, count: u32) -> Result<OwnTally, OwnError> {
        let (mut tally, batch) = (OwnTally::default(), self.batch());
        for first in (0..count).step_by(batch as usize) {
            let indices = first..count.min(first + batch);
            for report in self.reports(indices).await? {
                if report.verdict != Verdict::Pass {
                    tracing::error!("{name}: {}", report.verdict);
                }
                tally.add(&report);
            }
            tracing::info!("{name}: {} answers are equal", tally.equal);
        }
        Ok(tally)
    }

    /// Answer `index` as a client would ask for it.
    async fn request(&self, index: u32) -> anyhow::Result<Request> {
        let prompt = &self.prompts[index as usize % self.prompts.len()];
        let mut body = json!({"temperature": 0.8, "max_tokens": OWN_TOKENS});
        match self.verifier.model.text.chat {
            Some(_) => body["messages"] = json!([{"role": "user", "content": prompt}]),
            None => body["prompt"] = json!(prompt),
        }
        let requests =
            question::understand(&self.verifier, &body, Clock::system().unix_ms()).await?.requests;
        requests.into_iter().next().context("the request has no choice")
    }

    /// Generates the answers of these numbers side by side, then recomputes each.
    async fn reports(&self, indices: Range<u32>) -> Result<Vec<Report>, OwnError> {
        let mut running = Vec::new();
        for index in indices {
            let request = self.request(index).await;
            let mut request = request.map_err(|e| OwnError::Refused(e.to_string()))?;
            let prover = Prover { scheme: Scheme::Residue, nonce: nonce(index), signer: None };
            let head = prover.bind(&mut request, &self.verifier.identity, None, 0);
            let generation = self
                .engine
                .submit(request.clone())
                .map_err(|e| OwnError::Refused(e.to_string()))?;
            running.push((index, head, request, generation));
        }
        let mut reports = Vec::new();
        for (index, head, request, generation) in running {
            let Ended { steps, finish, .. } =
                generation.collect().await.map_err(|e| OwnError::Engine(e.to_string()))?;
            let end = head.end(finish.digest, finish.completion_tokens, &finish.reason);
            let answer = Answer::of_steps(&steps, Some(end));
            let (scheme, nonce) = (Scheme::Residue, Some(nonce(index)));
            let claim = Claim {
                proof: Some(Challenge { scheme, nonce, hotkey: None }),
                ..Claim::new(&request, &answer)
            };
            reports.push(self.verifier.verify(Profile::Proof, 0).depth(Depth::Slow).answer(&claim));
        }
        Ok(reports)
    }
}

fn nonce(index: u32) -> Hash {
    nonce_of(&format!("calibrate {index}"))
}
