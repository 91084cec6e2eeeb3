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
use crate::verify::scrutiny::Scrutiny;
use crate::verify::{Challenge, Claim, Depth, Limits, Profile, Report, Verifier, question};
use anyhow::Context;
use serde_json::json;
use std::sync::Arc;

/// Tokens of one of this engine's own answers: four chunks.
const OWN_TOKENS: usize = 4 * CHUNK_ROWS;
/// Own answers that run at once.
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
        let verifier = Verifier {
            model,
            identity: Arc::new(identity),
            pool: pool.separate(),
            limits: Limits { exact: true, ..Limits::default() },
            scrutiny: Scrutiny::NONE,
            context_max: options.context_max,
        };
        Ok(Self { engine, verifier, prompts: prompts::all() })
    }

    /// How many answers may be asked for at once.
    pub fn batch(&self) -> usize {
        self.engine.options().sequences_max.clamp(1, OWN_BATCH)
    }

    /// What a client would ask for the answers of these numbers.
    ///
    /// # Errors
    /// When a server would refuse it.
    pub async fn requests(&self, indices: &[u32]) -> anyhow::Result<Vec<Request>> {
        let mut asked = Vec::new();
        for index in indices {
            asked.push(self.request(*index).await?);
        }
        Ok(asked)
    }

    /// Answer `index` as a client would ask for it.
    async fn request(&self, index: u32) -> anyhow::Result<Request> {
        let prompt = &self.prompts[index as usize % self.prompts.len()];
        let mut body = json!({"temperature": 0.8, "max_tokens": OWN_TOKENS});
        match self.verifier.model.text.chat {
            Some(_) => body["messages"] = json!([{"role": "user", "content": prompt}]),
            None => body["prompt"] = json!(prompt),
        }
        let requests = question::understand(&self.verifier, &body).await?.requests;
        requests.into_iter().next().context("the request has no choice")
    }

    /// Generates answers side by side, then recomputes each.
    ///
    /// # Errors
    /// When a request is not accepted, or the engine fails.
    pub fn reports(&self, indices: &[u32], asked: Vec<Request>) -> Result<Vec<Report>, OwnError> {
        let mut running = Vec::new();
        for (index, mut request) in indices.iter().zip(asked) {
            let prover = Prover { scheme: Scheme::Residue, nonce: nonce(*index), signer: None };
            let head = prover.bind(&mut request, &self.verifier.identity, None, 0);
            let generation = self
                .engine
                .submit(request.clone())
                .map_err(|e| OwnError::Refused(e.to_string()))?;
            running.push((*index, head, request, generation));
        }
        let mut reports = Vec::new();
        for (index, head, request, generation) in running {
            let Ended { steps, finish, .. } =
                generation.collect_blocking().map_err(|e| OwnError::Engine(e.to_string()))?;
            let end = head.end(finish.digest, finish.completion_tokens, &finish.reason);
            let answer = Answer::of_steps(&steps, Some(end));
            let (scheme, nonce) = (Scheme::Residue, Some(nonce(index)));
            let claim = Claim {
                request: &request,
                seed: None,
                choice: 0,
                proof: Some(Challenge { scheme, nonce, hotkey: None }),
                answer: &answer,
                end_is_implied: false,
            };
            reports.push(self.verifier.verify(Profile::Proof, 0).depth(Depth::Slow).answer(&claim));
        }
        Ok(reports)
    }
}

fn nonce(index: u32) -> Hash {
    nonce_of(&format!("calibrate {index}"))
}
