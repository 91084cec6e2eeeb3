//! Writes a response as a stream: one chunk for each token, with its id, powv and proof.

use super::format::{Echo, Formatter};
use super::head::ResponseHead;
use crate::engine::output::{Event, Fault, Finish, PromptRow, Step};
use crate::intake::Endpoint;
use crate::wire::openai::response::CompletionChoice;
use crate::wire::openai::{ErrorBody, Usage};
use serde::Serialize;
use std::collections::VecDeque;

/// Turns the events of all choices into frames.
pub struct Frames {
    head: ResponseHead,
    formatters: Vec<Formatter>,
    frames: VecDeque<String>,
    has_begun: Vec<bool>, // by choice: its prompt's ids are sent
    open: usize,          // choices that have not ended
    cached_tokens: usize,
    completion_tokens: usize,
    is_done: bool,
}

impl Frames {
    /// For the response `head`, whose choices `formatters` write. What is sent before the first
    /// token is computed is there at once.
    pub fn new(head: ResponseHead, formatters: Vec<Formatter>) -> Self {
        let count = formatters.len();
        let mut frames = Self {
            head,
            formatters,
            frames: VecDeque::new(),
            has_begun: vec![false; count],
            open: count,
            cached_tokens: 0,
            completion_tokens: 0,
            is_done: false,
        };
        frames.open_choices();
        frames
    }

    /// The next frame that is ready: the data of one server-sent event.
    pub fn pop(&mut self) -> Option<String> {
        self.frames.pop_front()
    }

    /// Whether all frames were made.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// What is sent before the first token is computed: in chat the role of every choice, in
    /// completions the prompts, unless they wait for their log-probabilities.
    fn open_choices(&mut self) {
        let report = self.head.report;
        for index in 0..self.has_begun.len() {
            match self.head.endpoint {
                Endpoint::Chat => {
                    let choice = self.formatters[index].role_chunk();
                    let mut body = self.head.body(self.object(), vec![choice], None);
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
        self.head.endpoint.chunk()
    }

    /// The prompt's ids, for the first chunk of choice `index`.
    fn begin(&mut self, index: usize) -> Option<Vec<u32>> {
        let has_begun = std::mem::replace(&mut self.has_begun[index], true);
        (!has_begun).then(|| self.head.prompt_ids(index)).flatten()
    }

    fn echo(&mut self, index: usize, rows: Option<&[PromptRow]>) {
        let echo = Echo { prompt: self.head.prompts.of(index), rows };
        let choice = self.formatters[index].echo_chunk(&echo);
        self.push_completion(index, choice, None);
    }

    fn push_completion(&mut self, index: usize, choice: CompletionChoice, usage: Option<Usage>) {
        let choice = CompletionChoice { prompt_token_ids: self.begin(index), ..choice };
        self.push(vec![choice], usage);
    }

    /// Writes what happened to choice `index`.
    ///
    /// # Errors
    /// The choice failed; what is to be said of it is for [`fail`](Self::fail).
    pub fn take(&mut self, index: usize, event: Event) -> Result<(), Fault> {
        let report = self.head.report;
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
                let choice = self.formatters[index].end_chunk(&finish);
                self.push_completion(index, choice, None);
                self.end_choice(index, &finish);
            }
            Event::Fault(fault) => return Err(fault),
        }
        Ok(())
    }

    fn write(&mut self, index: usize, step: &Step) {
        let usage = self.head.report.continuous_usage.then(|| self.usage());
        let formatter = &mut self.formatters[index];
        match self.head.endpoint {
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
        if self.head.prompts.first(index) == index {
            self.cached_tokens += finish.cached_tokens;
        }
        self.open -= 1;
        if self.open > 0 {
            return;
        }
        if self.head.report.include_usage {
            let usage = self.usage();
            self.push::<()>(Vec::new(), Some(usage));
        }
        self.done();
    }

    /// Ends the stream with an error.
    pub fn fail(&mut self, error: &ErrorBody) {
        self.frames.push_back(json(error));
        self.done();
    }

    fn done(&mut self) {
        self.frames.push_back("[DONE]".into());
        self.is_done = true;
    }

    fn usage(&self) -> Usage {
        let prompt_tokens = self.head.prompts.tokens();
        Usage::new(prompt_tokens, self.cached_tokens, self.completion_tokens)
    }

    fn push<C: Serialize>(&mut self, choices: Vec<C>, usage: Option<Usage>) {
        let frame = json(&self.head.body(self.object(), choices, usage));
        self.frames.push_back(frame);
    }
}

fn json(body: &impl Serialize) -> String {
    // Only maps with non-string keys or failing serializers can fail, and there are none here.
    serde_json::to_string(body).unwrap_or_else(|e| unreachable!("response is not JSON: {e}"))
}
