//! Tokens to the JSON of either endpoint: strings, bytes, offsets, reasons.

use super::proof::{ProofHead, chunk};
use super::translate::Report;
use crate::engine::output::{FinishReason, Step, TopLogprob};
use crate::models::tokenizer::TextTokenizer;
use crate::wire::openai::json_logprob;
use crate::wire::openai::response::{
    ChatChoice, ChatChunkChoice, ChatLogprob, ChatLogprobs, ChatMessage, CompletionChoice,
    CompletionLogprobs, Delta, Extras, Proofs, TokenLogprob,
};
use serde_json::{Map, Value};

/// Writes the steps of one choice.
pub struct Formatter<'a> {
    tokenizer: &'a TextTokenizer,
    report: Report,
    proof: Option<&'a ProofHead>,
    index: usize,
    text_offset: usize,
}

impl<'a> Formatter<'a> {
    /// For choice `index`, proved as `proof` says.
    pub fn new(
        tokenizer: &'a TextTokenizer,
        report: Report,
        proof: Option<&'a ProofHead>,
        index: usize,
    ) -> Self {
        Self { tokenizer, report, proof, index, text_offset: 0 }
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
            extras: self.stream_extras(step),
        }
    }

    /// A whole chat choice.
    pub fn chat_choice(&self, steps: &[Step], reason: &FinishReason) -> ChatChoice {
        let content = || steps.iter().map(|s| self.chat_logprob(s)).collect();
        ChatChoice {
            index: self.index,
            message: ChatMessage {
                role: "assistant",
                content: steps.iter().map(|s| s.text.as_str()).collect(),
            },
            logprobs: self.report.logprobs.map(|_| ChatLogprobs { content: content() }),
            finish_reason: finish_word(reason),
            stop_reason: stop_reason(reason),
            extras: self.whole_extras(steps),
        }
    }

    /// One token's powv, id and proof.
    fn stream_extras(&self, step: &Step) -> Extras {
        Extras {
            powv: Some(step.powv),
            token_ids: Some(vec![step.token]),
            proof: step.proof.as_ref().map(|p| Proofs::One(chunk(p))),
            proof_end: step.finish.as_ref().zip(self.proof).map(|(f, head)| head.end(f)),
        }
    }

    /// Ids where asked for, and all proofs.
    fn whole_extras(&self, steps: &[Step]) -> Extras {
        let chunks = || steps.iter().filter_map(|s| s.proof.as_ref().map(chunk)).collect();
        let finish = steps.last().and_then(|s| s.finish.as_ref());
        Extras {
            powv: None,
            token_ids: self.report.token_ids.then(|| steps.iter().map(|s| s.token).collect()),
            proof: self.proof.map(|_| Proofs::All(chunks())),
            proof_end: finish.zip(self.proof).map(|(f, head)| head.end(f)),
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
            extras: Extras::default(),
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

    /// One chunk of a completion stream.
    pub fn completion_chunk(&mut self, step: &Step) -> CompletionChoice {
        let extras = self.stream_extras(step);
        CompletionChoice { extras, ..self.completion(std::slice::from_ref(step)) }
    }

    /// A whole completion.
    pub fn completion(&mut self, steps: &[Step]) -> CompletionChoice {
        let reason = steps.last().and_then(|s| s.finish.as_ref()).map(|f| &f.reason);
        let logprobs = self.report.logprobs.map(|_| self.completion_logprobs(steps));
        if logprobs.is_none() {
            self.text_offset += steps.iter().map(|s| s.text.chars().count()).sum::<usize>();
        }
        CompletionChoice {
            index: self.index,
            text: steps.iter().map(|s| s.text.as_str()).collect(),
            logprobs,
            finish_reason: reason.map(finish_word),
            stop_reason: reason.and_then(stop_reason),
            extras: self.whole_extras(steps),
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
