//! Runs one API request from submission to a whole response, for either endpoint; [`stream`] writes
//! the same in chunks.
//!
//! Dropping the response (a client that went away) drops the generations, which cancels them.

use super::error::ApiError;
use super::registry::Routed;
use super::state::ServerState;
use super::stream::{Streaming, stream};
use crate::engine::output::Generation;
use crate::engine::request::Request;
use crate::intake::Endpoint;
use crate::intake::proof::ProofHead;
use crate::intake::tools::ToolParser;
use crate::intake::translate::ResponseOptions;
use crate::reply::format::Formatter;
use crate::reply::frames::Frames;
use crate::reply::head::{Prompts, ResponseHead};
use crate::reply::whole::whole;
use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;

/// A request that is ready to run.
pub struct Job {
    /// The endpoint that was called.
    pub endpoint: Endpoint,
    /// The model that runs it.
    pub routed: Routed,
    /// One sequence for each choice.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// How the response is written.
    pub report: ResponseOptions,
    /// What the proof of each choice is bound to; none where no proof was asked for.
    pub proofs: Vec<ProofHead>,
    /// What finds calls of tools in each choice.
    pub tools: Option<ToolParser>,
    /// Whether chunks are sent as they come.
    pub stream: bool,
    /// The client's own name for the request.
    pub request_id: Option<String>,
}

impl Job {
    /// What writes each choice.
    fn formatters(&mut self) -> Vec<Formatter> {
        let model = self.routed.served.engine.text();
        let mut proofs = std::mem::take(&mut self.proofs).into_iter();
        let mut formatter = |index: usize| {
            let (model, tools) = (model.clone(), self.tools.clone());
            Formatter::new(model, self.report, proofs.next(), tools, index)
        };
        (0..self.requests.len()).map(&mut formatter).collect()
    }

    fn head(&self, state: &ServerState) -> ResponseHead {
        let id = match &self.request_id {
            Some(id) => id.clone(),
            None => state.entropy().uuid().simple().to_string(),
        };
        let prompts = self.requests.iter().step_by(self.n).map(|r| r.prompt.clone()).collect();
        ResponseHead {
            endpoint: self.endpoint,
            id,
            created: state.clock().unix_ms() / 1000,
            model: self.routed.name.clone(),
            fingerprint: self.routed.served.fingerprint.clone(),
            report: self.report,
            prompts: Prompts { prompts, n: self.n },
        }
    }
}

/// Submits a job and answers it.
///
/// # Errors
/// When a sequence is not accepted (then none of them runs), or one fails.
pub async fn run(state: &ServerState, mut job: Job) -> Result<Response, ApiError> {
    let in_flight = state.begin()?;
    let engine = job.routed.served.engine.clone();
    let head = job.head(state);
    let formatters = job.formatters();
    let generations = job
        .requests
        .into_iter()
        .map(|request| engine.submit(request))
        .collect::<Result<Vec<_>, _>>()?;
    let abort = state.abort_token();
    if job.stream {
        let frames = Frames::new(head, formatters);
        return Ok(stream(Streaming { frames, in_flight, abort }, generations));
    }
    let ended = join_all(generations.into_iter().map(Generation::collect));
    tokio::select! {
        outcomes = ended => {
            let outcomes = outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
            Ok(Json(whole(&head, formatters, engine.text(), &outcomes)).into_response())
        }
        () = abort.cancelled() => Err(ApiError::unavailable("the server is shutting down")),
    }
}
