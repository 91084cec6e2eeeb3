//! One API request from submission to a whole response, for either endpoint; [`stream`] writes the
//! same in chunks.
//!
//! Dropping the response (a client that went away) drops the generations, which cancels them.

use super::error::ApiError;
use super::format::{Echo, Formatter, prompt_logprobs};
use super::proof::Prover;
use super::registry::{Routed, Served};
use super::state::ServerState;
use super::stream::{Writer, stream};
use super::tools::ToolParser;
use super::translate::Report;
use crate::engine::output::{Event, Fault, Finish, Generation, PromptRow, Step};
use crate::engine::request::Request;
use crate::models::Model;
use crate::wire::openai::Usage;
use crate::wire::openai::response::{ChatChoice, CompletionChoice, Response as Body};
use axum::Json;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;

/// Which endpoint's shapes are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

impl Endpoint {
    /// The `object` of a whole response.
    fn whole(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completion => "text_completion",
        }
    }

    /// The `object` of a chunk.
    pub fn chunk(self) -> &'static str {
        match self {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn id_prefix(self) -> &'static str {
        match self {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completion => "cmpl",
        }
    }
}

/// A request that is ready to run.
pub struct Job {
    /// Which endpoint.
    pub endpoint: Endpoint,
    /// Whose model.
    pub routed: Routed,
    /// One sequence for each choice.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// How the response is written.
    pub report: Report,
    /// How its choices are proved.
    pub prover: Option<Prover>,
    /// What finds calls of tools in each choice.
    pub tools: Option<ToolParser>,
    /// Whether chunks are sent as they come.
    pub stream: bool,
    /// The client's own name for the request.
    pub request_id: Option<String>,
}

impl Job {
    /// What writes each choice.
    fn formatters(&self) -> Vec<Formatter> {
        let Served { engine, identity, .. } = &self.routed.served;
        let head = |request: &Request| {
            let prover = self.prover.as_ref()?;
            Some(prover.head(request.proof.as_ref()?, identity))
        };
        let formatter = |(index, request): (usize, &Request)| {
            let model = engine.model().clone();
            Formatter::new(model, self.report, head(request), self.tools.clone(), index)
        };
        self.requests.iter().enumerate().map(formatter).collect()
    }

    fn head(&self, created: u64) -> Head {
        let id = match &self.request_id {
            Some(id) => id.clone(),
            None => uuid::Uuid::new_v4().simple().to_string(),
        };
        let prompts = self.requests.iter().step_by(self.n).map(|r| r.prompt.clone()).collect();
        Head {
            endpoint: self.endpoint,
            id: format!("{}-{id}", self.endpoint.id_prefix()),
            created,
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
pub async fn run(state: &ServerState, job: Job) -> Result<Response, ApiError> {
    let in_flight = state.begin()?;
    let engine = job.routed.served.engine.clone();
    let head = job.head(state.clock().unix_ms() / 1000);
    let formatters = job.formatters();
    let generations = job
        .requests
        .into_iter()
        .map(|request| engine.submit(request))
        .collect::<Result<Vec<_>, _>>()?;
    let abort = state.abort_token();
    if job.stream {
        return Ok(stream(Writer { head, formatters, in_flight, abort }, generations));
    }
    let whole = join_all(generations.into_iter().map(collect));
    tokio::select! {
        outcomes = whole => {
            let outcomes = outcomes.into_iter().collect::<Result<Vec<_>, _>>()?;
            Ok(respond(&head, formatters, engine.model(), &outcomes))
        }
        () = abort.cancelled() => Err(ApiError::unavailable("the server is shutting down")),
    }
}

/// The prompts of a request; each has `n` choices, side by side.
pub struct Prompts {
    prompts: Vec<Vec<u32>>,
    n: usize,
}

impl Prompts {
    /// The prompt of choice `index`.
    pub fn of(&self, index: usize) -> &[u32] {
        &self.prompts[index / self.n]
    }

    /// Tokens, counted once for each prompt however many choices it has.
    pub fn tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// The first choice of the same prompt.
    pub fn first(&self, index: usize) -> usize {
        index - index % self.n
    }
}

/// What all chunks of a response share.
pub struct Head {
    /// Which endpoint.
    pub endpoint: Endpoint,
    /// How it is written.
    pub report: Report,
    /// What it answers.
    pub prompts: Prompts,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    /// A body with these choices.
    pub fn body<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) -> Body<C> {
        Body {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            prompt_logprobs: None,
            prompt_token_ids: None,
            logprobs_mode: self.report.logprobs.map(|_| self.report.mode.name()),
            usage,
        }
    }

    /// The ids of choice `index`'s prompt, where asked for.
    pub fn prompt_ids(&self, index: usize) -> Option<Vec<u32>> {
        self.report.token_ids.then(|| self.prompts.of(index).to_vec())
    }
}

/// A choice that has ended.
struct Outcome {
    rows: Option<Vec<PromptRow>>,
    steps: Vec<Step>,
    finish: Finish,
}

async fn collect(mut generation: Generation) -> Result<Outcome, ApiError> {
    let (mut rows, mut steps) = (None, Vec::new());
    while let Some(event) = generation.next().await {
        match event {
            Event::Prompt(all) => rows = Some(all),
            Event::Step(step) => {
                let finish = step.finish.clone();
                steps.push(step);
                if let Some(finish) = finish {
                    return Ok(Outcome { rows, steps, finish });
                }
            }
            Event::Finish(finish) => return Ok(Outcome { rows, steps, finish }),
            Event::Fault(fault) => return Err(fault.into()),
        }
    }
    Err(Fault::Stopped.into())
}

fn respond(
    head: &Head,
    formatters: Vec<Formatter>,
    model: &Model,
    outcomes: &[Outcome],
) -> Response {
    let prompts = &head.prompts;
    let cached = |(i, o): (usize, &Outcome)| match prompts.first(i) == i {
        true => o.finish.cached_tokens,
        false => 0,
    };
    let usage = Usage::new(
        prompts.tokens(),
        outcomes.iter().enumerate().map(cached).sum(),
        outcomes.iter().map(|o| o.finish.completion_tokens).sum(),
    );
    let rows = |index: usize| outcomes[prompts.first(index)].rows.as_deref();
    let scores = |index: usize| {
        let count = head.report.prompt_logprobs?;
        Some(prompt_logprobs(&model.tokenizer, rows(index)?, count))
    };
    let choices = formatters.into_iter().zip(outcomes);
    match head.endpoint {
        Endpoint::Chat => {
            let choices: Vec<ChatChoice> =
                choices.map(|(mut f, o)| f.chat_choice(&o.steps, &o.finish.reason)).collect();
            let mut body = head.body(head.endpoint.whole(), choices, Some(usage));
            body.prompt_logprobs = scores(0);
            body.prompt_token_ids = head.prompt_ids(0);
            Json(body).into_response()
        }
        Endpoint::Completion => {
            let choice = |(index, (mut formatter, outcome)): (usize, (Formatter, &Outcome))| {
                let echo = Echo { prompt: prompts.of(index), rows: rows(index) };
                let echo = head.report.echo.then_some(&echo);
                CompletionChoice {
                    prompt_logprobs: scores(index),
                    prompt_token_ids: head.prompt_ids(index),
                    ..formatter.completion(echo, &outcome.steps, Some(&outcome.finish))
                }
            };
            let choices: Vec<CompletionChoice> = choices.enumerate().map(choice).collect();
            Json(head.body(head.endpoint.whole(), choices, Some(usage))).into_response()
        }
    }
}
