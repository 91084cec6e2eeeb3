//! Tokens to the JSON of either endpoint: strings, bytes, offsets, reasons.

use super::translate::Report;
use crate::engine::output::{FinishReason, Step, TopLogprob};
use crate::models::tokenizer::TextTokenizer;
use crate::wire::openai::json_logprob;
use crate::wire::openai::response::{
    ChatChunkChoice, ChatLogprob, ChatLogprobs, CompletionChoice, CompletionLogprobs, Delta,
    TokenLogprob,
};
use serde_json::{Map, Value};

/// Writes the steps of one choice.
pub struct Formatter<'a> {
    tokenizer: &'a TextTokenizer,
    report: Report,
    index: usize,
    text_offset: usize,
}

impl<'a> Formatter<'a> {
    /// For choice `index`.
    pub fn new(tokenizer: &'a TextTokenizer, report: Report, index: usize) -> Self {
        Self { tokenizer, report, index, text_offset: 0 }
    }

    /// Continues at `text_offset` (a formatter is rebuilt for every chunk of a stream).
    pub fn at(self, text_offset: usize) -> Self {
        Self { text_offset, ..self }
    }

    /// Characters written so far.
    pub fn text_offset(&self) -> usize {
        self.text_offset
    }

    /// One chunk of a chat stream.
    pub fn chat_chunk(&self, step: &Step) -> ChatChunkChoice {
        let reason = step.finish.as_ref().map(|f| &f.reason);
        let logprobs =
            self.report.logprobs.map(|_| ChatLogprobs { content: vec![self.chat_logprob(step)] });
        ChatChunkChoice {
            index: self.index,
            delta: Delta { role: None, content: step.text.clone() },
            logprobs,
            finish_reason: reason.map(finish_word),
            stop_reason: reason.and_then(stop_reason),
            token_ids: self.report.token_ids.then(|| vec![step.token]),
        }
    }

    /// The chunk that opens a chat stream.
    pub fn role_chunk(&self) -> ChatChunkChoice {
        ChatChunkChoice {
            index: self.index,
            delta: Delta { role: Some("assistant"), content: String::new() },
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        }
    }

    /// One token's entry in the chat form.
    pub fn chat_logprob(&self, step: &Step) -> ChatLogprob {
        let entry = |token: u32, logprob: f64| TokenLogprob {
            token: self.token_string(token),
            logprob: json_logprob(logprob),
            bytes: self.tokenizer.bytes_of(token).to_vec(),
        };
        let top = step.top.iter().map(|t| entry(t.token, t.logprob)).collect();
        ChatLogprob { token: entry(step.token, step.logprob), top_logprobs: top }
    }

    /// A completion: one chunk of a stream, or all of it.
    pub fn completion(&mut self, steps: &[Step]) -> CompletionChoice {
        let reason = steps.last().and_then(|s| s.finish.as_ref()).map(|f| &f.reason);
        let logprobs = self.report.logprobs.map(|_| self.completion_logprobs(steps));
        if logprobs.is_none() {
            self.text_offset += steps.iter().map(|s| s.text.chars().count()).sum::<usize>();
        }
        let ids = || steps.iter().map(|s| s.token).collect();
        CompletionChoice {
            index: self.index,
            text: steps.iter().map(|s| s.text.as_str()).collect(),
            logprobs,
            finish_reason: reason.map(finish_word),
            stop_reason: reason.and_then(stop_reason),
            token_ids: self.report.token_ids.then(ids),
            prompt_token_ids: None,
        }
    }

    fn completion_logprobs(&mut self, steps: &[Step]) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for step in steps {
            lists.text_offset.push(self.text_offset);
            lists.token_logprobs.push(Some(json_logprob(step.logprob)));
            lists.tokens.push(self.token_string(step.token));
            lists.top_logprobs.push(Some(self.alternatives(step)));
            self.text_offset += step.text.chars().count();
        }
        lists
    }

    /// The token itself, then the most probable ones, by name.
    fn alternatives(&self, step: &Step) -> Map<String, Value> {
        let own = TopLogprob { token: step.token, logprob: step.logprob, rank: step.rank };
        let mut map = Map::new();
        for TopLogprob { token, logprob, .. } in std::iter::once(&own).chain(&step.top) {
            map.entry(self.token_string(*token)).or_insert(json_logprob(*logprob).into());
        }
        map
    }

    fn token_string(&self, token: u32) -> String {
        match self.report.tokens_as_ids {
            true => format!("token_id:{token}"),
            false => self.tokenizer.text_of(token),
        }
    }
}

/// The word for `finish_reason`.
pub fn finish_word(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::EndToken(_) | FinishReason::StopId(_) | FinishReason::StopString(_) => "stop",
        FinishReason::Length => "length",
    }
}

/// What the request's own stop rule matched.
pub fn stop_reason(reason: &FinishReason) -> Option<Value> {
    match reason {
        FinishReason::StopId(id) => Some((*id).into()),
        FinishReason::StopString(text) => Some(text.as_str().into()),
        FinishReason::EndToken(_) | FinishReason::Length => None,
    }
}
