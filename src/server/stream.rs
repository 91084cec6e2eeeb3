//! A response as server-sent events: one chunk for each token, with its id, powv and proof.

use super::error::ApiError;
use super::format::{Echo, Formatter};
use super::generate::{Endpoint, Head};
use super::state::InFlight;
use crate::engine::output::{Event, Fault, Finish, Generation, PromptRow, Step};
use crate::wire::openai::Usage;
use crate::wire::openai::response::CompletionChoice;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event as Frame, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SelectAll, Stream, StreamExt, select_all, unfold};
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use tokio_util::sync::CancellationToken;

/// Turns events into frames.
pub struct Writer {
    /// What all chunks share.
    pub head: Head,
    /// What writes each choice.
    pub formatters: Vec<Formatter>,
    /// Counts the request until its last frame.
    pub in_flight: InFlight,
    /// Ends the stream with an error.
    pub abort: CancellationToken,
}

type Events = Pin<Box<dyn Stream<Item = (usize, Event)> + Send>>;

struct Streaming {
    writer: Writer,
    events: SelectAll<Events>,
    frames: VecDeque<String>,
    has_begun: Vec<bool>, // by choice: its prompt's ids are sent
    open: usize,          // choices that have not ended
    cached_tokens: usize,
    completion_tokens: usize,
    is_done: bool,
}

/// The response that streams `generations`.
pub fn stream(writer: Writer, generations: Vec<Generation>) -> Response {
    let count = generations.len();
    let events = generations.into_iter().enumerate().map(|(index, generation)| {
        let next = move |mut g: Generation| async move { g.next().await.map(|e| ((index, e), g)) };
        Box::pin(unfold(generation, next)) as Events
    });
    let mut streaming = Streaming {
        events: select_all(events),
        frames: VecDeque::new(),
        has_begun: vec![false; count],
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
    /// What is sent before the first token is computed: in chat the role of every choice, in
    /// completions the prompts, unless they wait for their log-probabilities.
    fn open_choices(&mut self) {
        let report = self.writer.head.report;
        for index in 0..self.has_begun.len() {
            match self.writer.head.endpoint {
                Endpoint::Chat => {
                    let choice = self.writer.formatters[index].role_chunk();
                    let mut body = self.writer.head.body(self.object(), vec![choice], None);
                    body.prompt_token_ids = self.begin(index);
                    self.frames.push_back(json(&body));
                }
                Endpoint::Completion if report.echo && report.logprobs.is_none() => {
                    self.echo(index, None);
                }
                Endpoint::Completion => {}
            }
        }
    }

    fn object(&self) -> &'static str {
        self.writer.head.endpoint.chunk()
    }

    /// The prompt's ids, for the first chunk of choice `index`.
    fn begin(&mut self, index: usize) -> Option<Vec<u32>> {
        let has_begun = std::mem::replace(&mut self.has_begun[index], true);
        (!has_begun).then(|| self.writer.head.prompt_ids(index)).flatten()
    }

    fn echo(&mut self, index: usize, rows: Option<&[PromptRow]>) {
        let echo = Echo { prompt: self.writer.head.prompts.of(index), rows };
        let choice = self.writer.formatters[index].echo_chunk(&echo);
        self.push_completion(index, choice, None);
    }

    fn push_completion(&mut self, index: usize, choice: CompletionChoice, usage: Option<Usage>) {
        let choice = CompletionChoice { prompt_token_ids: self.begin(index), ..choice };
        self.push(vec![choice], usage);
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
                    None => self.fail(Fault::Stopped.into()),
                },
                () = self.writer.abort.cancelled() => {
                    self.fail(ApiError::unavailable("the server is shutting down"));
                }
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        let report = self.writer.head.report;
        match event {
            Event::Prompt(rows) if report.echo && report.logprobs.is_some() => {
                self.echo(index, Some(&rows));
            }
            Event::Prompt(_) => {}
            Event::Step(step) => {
                self.completion_tokens += 1;
                self.write(index, &step);
                if let Some(finish) = &step.finish {
                    self.end_choice(index, finish);
                }
            }
            Event::Finish(finish) => {
                let choice = self.writer.formatters[index].end_chunk(&finish);
                self.push_completion(index, choice, None);
                self.end_choice(index, &finish);
            }
            Event::Fault(fault) => self.fail(fault.into()),
        }
    }

    fn write(&mut self, index: usize, step: &Step) {
        let usage = self.writer.head.report.continuous_usage.then(|| self.usage());
        let formatter = &mut self.writer.formatters[index];
        match self.writer.head.endpoint {
            Endpoint::Chat => {
                let choice = formatter.chat_chunk(step);
                self.push(vec![choice], usage);
            }
            Endpoint::Completion => {
                let choice = formatter.completion_chunk(step);
                self.push_completion(index, choice, usage);
            }
        }
    }

    fn end_choice(&mut self, index: usize, finish: &Finish) {
        if self.writer.head.prompts.first(index) == index {
            self.cached_tokens += finish.cached_tokens;
        }
        self.open -= 1;
        if self.open > 0 {
            return;
        }
        if self.writer.head.report.include_usage {
            let usage = self.usage();
            self.push::<()>(Vec::new(), Some(usage));
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
        let prompt_tokens = self.writer.head.prompts.tokens();
        Usage::new(prompt_tokens, self.cached_tokens, self.completion_tokens)
    }

    fn push<C: Serialize>(&mut self, choices: Vec<C>, usage: Option<Usage>) {
        let frame = json(&self.writer.head.body(self.object(), choices, usage));
        self.frames.push_back(frame);
    }
}

fn json(body: &impl Serialize) -> String {
    // Only maps with non-string keys or failing serializers can fail, and there are none here.
    serde_json::to_string(body).unwrap_or_else(|e| unreachable!("response is not JSON: {e}"))
}
