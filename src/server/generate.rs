//! One API request from submission to response, streamed or whole, for either endpoint.
//!
//! Dropping the response (a client that went away) drops the generations, which cancels them.

use super::error::ApiError;
use super::format::Formatter;
use super::proof::{ProofHead, Prover};
use super::registry::Routed;
use super::state::{InFlight, ServerState};
use super::translate::Report;
use crate::engine::Engine;
use crate::engine::output::{Event, Finish, Generation, Step};
use crate::engine::request::Request;
use crate::wire::openai::Usage;
use crate::wire::openai::response::Response as Body;
use axum::Json;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event as Frame, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use futures_util::stream::{SelectAll, Stream, StreamExt, select_all, unfold};
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use tokio_util::sync::CancellationToken;

/// Which endpoint's shapes are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
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
    /// Whether chunks are sent as they come.
    pub stream: bool,
}

/// Submits a job and answers it.
///
/// # Errors
/// When a sequence is not accepted (then none of them runs), or one fails.
pub async fn run(state: &ServerState, job: Job) -> Result<Response, ApiError> {
    let in_flight = state.begin()?;
    let engine = job.routed.served.engine.clone();
    let prompts = PromptUsage::of(&job);
    let proofs = job.requests.iter().map(|request| {
        let prover = job.prover.as_ref()?;
        Some(prover.head(request.proof.as_ref()?, &job.routed.served.identity))
    });
    let proofs = proofs.collect();
    let generations = job
        .requests
        .into_iter()
        .map(|request| engine.submit(request))
        .collect::<Result<Vec<_>, _>>()?;
    let head = Head {
        endpoint: job.endpoint,
        id: new_id(job.endpoint),
        created: state.clock().unix_ms() / 1000,
        model: job.routed.name,
        fingerprint: job.routed.served.fingerprint,
        report: job.report,
        proofs,
    };
    let abort = state.abort_token();
    if job.stream {
        return Ok(stream(Writer { head, engine, prompts, in_flight, abort }, generations));
    }
    let whole = join_all(generations.into_iter().map(collect));
    tokio::select! {
        results = whole => respond(&head, &engine, &prompts, results),
        () = abort.cancelled() => Err(ApiError::unavailable("the server is shutting down")),
    }
}

fn new_id(endpoint: Endpoint) -> String {
    let prefix = match endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completion => "cmpl",
    };
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// What all chunks of a response share.
struct Head {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    report: Report,
    proofs: Vec<Option<ProofHead>>, // by choice
}

impl Head {
    fn formatter<'a>(&'a self, engine: &'a Engine, index: usize) -> Formatter<'a> {
        let proof = self.proofs[index].as_ref();
        Formatter::new(&engine.model().tokenizer, self.report, proof, index)
    }

    fn body<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) -> Body<C> {
        Body {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: self.fingerprint.clone(),
            choices,
            logprobs_mode: self.report.logprobs.map(|_| self.report.mode.name()),
            usage,
        }
    }
}

/// Prompt tokens, counted once for each prompt however many choices it has.
struct PromptUsage {
    lengths: Vec<usize>,
    n: usize,
}

impl PromptUsage {
    fn of(job: &Job) -> Self {
        let lengths = job.requests.iter().step_by(job.n).map(|r| r.prompt.len()).collect();
        Self { lengths, n: job.n }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Whether choice `index` is the first of its prompt.
    fn counts(&self, index: usize) -> bool {
        index.is_multiple_of(self.n)
    }
}

async fn collect(mut generation: Generation) -> Result<(Vec<Step>, Finish), ApiError> {
    let mut steps = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Step(step) => {
                let finish = step.finish.clone();
                steps.push(step);
                if let Some(finish) = finish {
                    return Ok((steps, finish));
                }
            }
            Event::Finish(finish) => return Ok((steps, finish)),
            Event::Fault(fault) => return Err(fault.into()),
            Event::Prompt(_) => {}
        }
    }
    Err(crate::engine::output::Fault::Stopped.into())
}

fn respond(
    head: &Head,
    engine: &Engine,
    prompts: &PromptUsage,
    results: Vec<Result<(Vec<Step>, Finish), ApiError>>,
) -> Result<Response, ApiError> {
    let results = results.into_iter().collect::<Result<Vec<_>, _>>()?;
    let cached = |(i, (_, f)): (usize, &(Vec<Step>, Finish))| match prompts.counts(i) {
        true => f.cached_tokens,
        false => 0,
    };
    let usage = Usage::new(
        prompts.tokens(),
        results.iter().enumerate().map(cached).sum(),
        results.iter().map(|(_, f)| f.completion_tokens).sum(),
    );
    let formatter = |index| head.formatter(engine, index);
    let choices = results.iter().enumerate();
    Ok(match head.endpoint {
        Endpoint::Chat => {
            let choices =
                choices.map(|(i, (steps, end))| formatter(i).chat_choice(steps, &end.reason));
            Json(head.body("chat.completion", choices.collect(), Some(usage))).into_response()
        }
        Endpoint::Completion => {
            let choices = choices.map(|(i, (steps, _))| formatter(i).completion(steps));
            Json(head.body("text_completion", choices.collect(), Some(usage))).into_response()
        }
    })
}

/// Turns events into frames.
struct Writer {
    head: Head,
    engine: Engine,
    prompts: PromptUsage,
    in_flight: InFlight,
    abort: CancellationToken,
}

type Events = Pin<Box<dyn Stream<Item = (usize, Event)> + Send>>;

struct Streaming {
    writer: Writer,
    events: SelectAll<Events>,
    frames: VecDeque<String>,
    offsets: Vec<usize>, // characters written, by choice
    open: usize,         // choices that have not ended
    cached_tokens: usize,
    completion_tokens: usize,
    is_done: bool,
}

fn stream(writer: Writer, generations: Vec<Generation>) -> Response {
    let count = generations.len();
    let events = generations.into_iter().enumerate().map(|(index, generation)| {
        let next = move |mut g: Generation| async move { g.next().await.map(|e| ((index, e), g)) };
        Box::pin(unfold(generation, next)) as Events
    });
    let mut streaming = Streaming {
        events: select_all(events),
        frames: VecDeque::new(),
        offsets: vec![0; count],
        open: count,
        cached_tokens: 0,
        completion_tokens: 0,
        is_done: false,
        writer,
    };
    streaming.open_choices();
    let frames = unfold(streaming, |mut s| async move {
        let frame = s.next_frame().await?;
        Some((Ok::<_, Infallible>(Frame::default().data(frame)), s))
    });
    let mut response = Sse::new(frames).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    let no_buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(no_buffering, HeaderValue::from_static("no"));
    response
}

impl Streaming {
    /// A chat stream opens with the role of every choice, before the first token is computed.
    fn open_choices(&mut self) {
        if self.writer.head.endpoint == Endpoint::Chat {
            for index in 0..self.offsets.len() {
                let choice = self.formatter(index).role_chunk();
                self.push("chat.completion.chunk", vec![choice], None);
            }
        }
    }

    fn formatter(&self, index: usize) -> Formatter<'_> {
        self.writer.head.formatter(&self.writer.engine, index).at(self.offsets[index])
    }

    async fn next_frame(&mut self) -> Option<String> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(frame);
            }
            if self.is_done {
                return None;
            }
            tokio::select! {
                event = self.events.next() => match event {
                    Some((index, event)) => self.take(index, event),
                    None => self.fail(crate::engine::output::Fault::Stopped.into()),
                },
                () = self.writer.abort.cancelled() => {
                    self.fail(ApiError::unavailable("the server is shutting down"));
                }
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Step(step) => {
                self.completion_tokens += 1;
                self.write(index, &step);
                if let Some(finish) = &step.finish {
                    self.end_choice(index, finish);
                }
            }
            Event::Finish(finish) => self.end_choice(index, &finish),
            Event::Fault(fault) => self.fail(fault.into()),
            Event::Prompt(_) => {}
        }
    }

    fn write(&mut self, index: usize, step: &Step) {
        let usage = self.writer.head.report.continuous_usage.then(|| self.usage());
        match self.writer.head.endpoint {
            Endpoint::Chat => {
                let choice = self.formatter(index).chat_chunk(step);
                self.push("chat.completion.chunk", vec![choice], usage);
            }
            Endpoint::Completion => {
                let mut formatter = self.formatter(index);
                let choice = formatter.completion_chunk(step);
                self.offsets[index] = formatter.text_offset();
                self.push("text_completion", vec![choice], usage);
            }
        }
    }

    fn end_choice(&mut self, index: usize, finish: &Finish) {
        if self.writer.prompts.counts(index) {
            self.cached_tokens += finish.cached_tokens;
        }
        self.open -= 1;
        if self.open > 0 {
            return;
        }
        if self.writer.head.report.include_usage {
            let usage = Some(self.usage());
            match self.writer.head.endpoint {
                Endpoint::Chat => self.push::<()>("chat.completion.chunk", Vec::new(), usage),
                Endpoint::Completion => self.push::<()>("text_completion", Vec::new(), usage),
            }
        }
        self.done();
    }

    fn fail(&mut self, error: ApiError) {
        self.frames.push_back(json(&error.body()));
        self.done();
    }

    fn done(&mut self) {
        self.frames.push_back("[DONE]".into());
        self.is_done = true;
        self.writer.in_flight.end();
    }

    fn usage(&self) -> Usage {
        Usage::new(self.writer.prompts.tokens(), self.cached_tokens, self.completion_tokens)
    }

    fn push<C: Serialize>(&mut self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) {
        let frame = json(&self.writer.head.body(object, choices, usage));
        self.frames.push_back(frame);
    }
}

fn json(body: &impl Serialize) -> String {
    // Only maps with non-string keys or failing serializers can fail, and there are none here.
    serde_json::to_string(body).unwrap_or_else(|e| unreachable!("response is not JSON: {e}"))
}
