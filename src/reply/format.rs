//! Formats tokens as the JSON of either endpoint: strings, bytes, offsets, calls and reasons.

use crate::engine::output::{Finish, FinishReason, PromptRow, Step};
use crate::intake::proof::{ProofHead, chunk};
use crate::intake::tools::{Parsed, ToolParser, merge};
use crate::intake::translate::ResponseOptions;
use crate::models::pass::Ranked;
use crate::models::text::Text;
use crate::models::tokenizer::{Detokenizer, TextTokenizer};
use crate::wire::openai::json_logprob;
use crate::wire::openai::response::{
    ChatChoice, ChatChunkChoice, ChatLogprob, ChatLogprobs, ChatMessage, CompletionChoice,
    CompletionLogprobs, Delta, Extras, PromptLogprobs, Proofs, TokenLogprob,
};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Writes the steps of one choice, in order.
pub struct Formatter {
    model: Arc<Text>,
    report: ResponseOptions,
    proof: Option<ProofHead>,
    tools: Option<ToolParser>,
    index: usize,
    text_offset: usize,
    /// The incomplete character that a repeated prompt ends in; an output completes it.
    cut: String,
}

/// The beginning of a completion that repeats its prompt.
pub struct Echo<'a> {
    /// The ids of the prompt.
    pub prompt: &'a [u32],
    /// Log-probabilities of its tokens from the second on, where asked for.
    pub rows: Option<&'a [PromptRow]>,
}

impl Formatter {
    /// For choice `index`, proved as `proof` says, its text split by `tools`.
    pub fn new(
        model: Arc<Text>,
        report: ResponseOptions,
        proof: Option<ProofHead>,
        tools: Option<ToolParser>,
        index: usize,
    ) -> Self {
        Self { model, report, proof, tools, index, text_offset: 0, cut: String::new() }
    }

    fn tokenizer(&self) -> &TextTokenizer {
        &self.model.tokenizer
    }

    /// One chunk of a chat stream.
    pub fn chat_chunk(&mut self, step: &Step) -> ChatChunkChoice {
        let Parsed { content, calls } = self.split(std::slice::from_ref(step));
        let reason = step.finish.as_ref().map(|f| &f.reason);
        let logprobs =
            self.report.logprobs.map(|_| ChatLogprobs { content: vec![self.chat_logprob(step)] });
        ChatChunkChoice {
            index: self.index,
            delta: Delta { role: None, content, tool_calls: calls },
            logprobs,
            finish_reason: reason.map(|r| self.finish_word(r)),
            stop_reason: reason.and_then(stop_reason),
            extras: self.stream_extras(step),
        }
    }

    /// A whole chat choice.
    pub fn chat_choice(&mut self, steps: &[Step], reason: &FinishReason) -> ChatChoice {
        let Parsed { content, calls } = self.split(steps);
        let entries = || steps.iter().map(|s| self.chat_logprob(s)).collect();
        let content = (!content.is_empty() || calls.is_empty()).then_some(content);
        ChatChoice {
            index: self.index,
            message: ChatMessage { role: "assistant", content, tool_calls: merge(calls) },
            logprobs: self.report.logprobs.map(|_| ChatLogprobs { content: entries() }),
            finish_reason: self.finish_word(reason),
            stop_reason: stop_reason(reason),
            extras: self.whole_extras(steps),
        }
    }

    /// Content and calls of the next steps.
    fn split(&mut self, steps: &[Step]) -> Parsed {
        let Some(parser) = &mut self.tools else {
            let content = steps.iter().map(|s| s.text.as_str()).collect();
            return Parsed { content, calls: Vec::new() };
        };
        let mut all = Parsed::default();
        for step in steps {
            // The token that ends the output is not part of its text.
            let is_end = step.finish.is_some() && step.text.is_empty();
            let mut parsed = match is_end {
                true => Parsed::default(),
                false => parser.push(&self.model.tokenizer, step.token, &step.text),
            };
            if step.finish.is_some() {
                let last = parser.finish();
                parsed.content.push_str(&last.content);
                parsed.calls.extend(last.calls);
            }
            all.content.push_str(&parsed.content);
            all.calls.extend(parsed.calls);
        }
        all
    }

    /// The word for `finish_reason`.
    fn finish_word(&self, reason: &FinishReason) -> &'static str {
        let calls = self.tools.as_ref().filter(|t| t.calls() > 0 && !t.is_named());
        match reason {
            FinishReason::Length => "length",
            _ if calls.is_some() => "tool_calls",
            FinishReason::EndToken(_) | FinishReason::StopId(_) | FinishReason::StopString(_) => {
                "stop"
            }
        }
    }

    /// One token's powv, id and proof.
    fn stream_extras(&self, step: &Step) -> Extras {
        Extras {
            powv: Some(step.powv),
            token_ids: Some(vec![step.token]),
            proof: step.proof.as_ref().map(|p| Proofs::One(chunk(p))),
            proof_end: step
                .finish
                .as_ref()
                .zip(self.proof.as_ref())
                .map(|(f, p)| p.end(f.digest, f.completion_tokens, &f.reason)),
        }
    }

    /// Ids where asked for, and all proofs.
    fn whole_extras(&self, steps: &[Step]) -> Extras {
        let chunks = || steps.iter().filter_map(|s| s.proof.as_ref().map(chunk)).collect();
        let finish = steps.last().and_then(|s| s.finish.as_ref());
        Extras {
            powv: None,
            token_ids: self.report.token_ids.then(|| steps.iter().map(|s| s.token).collect()),
            proof: self.proof.as_ref().map(|_| Proofs::All(chunks())),
            proof_end: finish
                .zip(self.proof.as_ref())
                .map(|(f, p)| p.end(f.digest, f.completion_tokens, &f.reason)),
        }
    }

    /// The chunk that opens a chat stream.
    pub fn role_chunk(&self) -> ChatChunkChoice {
        ChatChunkChoice {
            index: self.index,
            delta: Delta { role: Some("assistant"), ..Delta::default() },
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
            bytes: self.tokenizer().bytes_of(token).to_vec(),
        };
        let top = step.top.iter().map(|t| entry(t.token, t.logprob)).collect();
        ChatLogprob { token: entry(step.token, step.logprob), top_logprobs: top }
    }

    /// One chunk of a completion stream.
    pub fn completion_chunk(&mut self, step: &Step) -> CompletionChoice {
        let (steps, finish) = (std::slice::from_ref(step), step.finish.as_ref());
        self.lists(None, steps, finish, self.stream_extras(step))
    }

    /// The chunk of a completion stream that repeats the prompt.
    pub fn echo_chunk(&mut self, echo: &Echo<'_>) -> CompletionChoice {
        self.lists(Some(echo), &[], None, Extras::default())
    }

    /// The last chunk of a completion without tokens.
    pub fn end_chunk(&mut self, finish: &Finish) -> CompletionChoice {
        self.lists(None, &[], Some(finish), Extras::default())
    }

    /// A whole completion.
    pub fn completion(
        &mut self,
        echo: Option<&Echo<'_>>,
        steps: &[Step],
        finish: Option<&Finish>,
    ) -> CompletionChoice {
        self.lists(echo, steps, finish, self.whole_extras(steps))
    }

    fn lists(
        &mut self,
        echo: Option<&Echo<'_>>,
        steps: &[Step],
        finish: Option<&Finish>,
        extras: Extras,
    ) -> CompletionChoice {
        let reason = finish.map(|f| &f.reason);
        let mut lists = CompletionLogprobs::default();
        let mut text = echo.map(|e| self.echo(e, &mut lists)).unwrap_or_default();
        steps.iter().for_each(|step| self.list(step, &mut lists));
        text.extend(steps.iter().map(|s| s.text.as_str()));
        if steps.is_empty() && finish.is_some() {
            text.push_str(&std::mem::take(&mut self.cut));
        }
        CompletionChoice {
            index: self.index,
            text,
            logprobs: self.report.logprobs.map(|_| lists),
            finish_reason: reason.map(|r| self.finish_word(r)),
            stop_reason: reason.and_then(stop_reason),
            extras,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    /// The prompt's text, its tokens added to `lists`.
    fn echo(&mut self, echo: &Echo<'_>, lists: &mut CompletionLogprobs) -> String {
        let mut detokenizer = Detokenizer::new(self.tokenizer(), self.report.skip_special);
        let mut text = String::new();
        for (place, token) in echo.prompt.iter().enumerate() {
            let row = place.checked_sub(1).and_then(|i| echo.rows?.get(i));
            lists.text_offset.push(self.text_offset);
            lists.tokens.push(self.token_string(*token));
            lists.token_logprobs.push(row.map(|r| json_logprob(r.logprob)));
            lists.top_logprobs.push(row.map(|r| {
                let own = Ranked { token: *token, logprob: r.logprob, rank: r.rank };
                let count = self.report.logprobs.unwrap_or(0);
                self.alternatives(own, &r.top[..r.top.len().min(count)])
            }));
            let piece = detokenizer.push(&self.model.tokenizer, *token);
            self.text_offset += piece.chars().count();
            text.push_str(&piece);
        }
        self.cut = detokenizer.finish();
        text
    }

    fn list(&mut self, step: &Step, lists: &mut CompletionLogprobs) {
        let own = Ranked { token: step.token, logprob: step.logprob, rank: step.rank };
        lists.text_offset.push(self.text_offset);
        lists.token_logprobs.push(Some(json_logprob(step.logprob)));
        lists.tokens.push(self.token_string(step.token));
        lists.top_logprobs.push(Some(self.alternatives(own, &step.top)));
        self.text_offset += step.text.chars().count();
        self.cut.clear();
    }

    /// The token itself, then the most probable ones, by name.
    fn alternatives(&self, own: Ranked, top: &[Ranked]) -> Map<String, Value> {
        let mut map = Map::new();
        for Ranked { token, logprob, .. } in std::iter::once(&own).chain(top) {
            map.entry(self.token_string(*token)).or_insert(json_logprob(*logprob).into());
        }
        map
    }

    fn token_string(&self, token: u32) -> String {
        match self.report.tokens_as_ids {
            true => format!("token_id:{token}"),
            false => self.tokenizer().text_of(token),
        }
    }
}

/// The `prompt_logprobs` field: at each place the prompt's own token, then the `count` most
/// probable ones.
pub fn prompt_logprobs(
    tokenizer: &TextTokenizer,
    rows: &[PromptRow],
    count: usize,
) -> PromptLogprobs {
    let place = |row: &PromptRow| {
        let own = Ranked { token: row.token, logprob: row.logprob, rank: row.rank };
        let mut map = Map::new();
        for entry in std::iter::once(&own).chain(row.top.iter().take(count)) {
            map.entry(entry.token.to_string()).or_insert_with(|| {
                json!({
                    "logprob": json_logprob(entry.logprob),
                    "rank": entry.rank,
                    "decoded_token": tokenizer.text_of(entry.token),
                })
            });
        }
        map
    };
    std::iter::once(None).chain(rows.iter().map(|row| Some(place(row)))).collect()
}

/// What the request's own stop rule matched.
pub fn stop_reason(reason: &FinishReason) -> Option<Value> {
    match reason {
        FinishReason::StopId(id) => Some((*id).into()),
        FinishReason::StopString(text) => Some(text.as_str().into()),
        FinishReason::EndToken(_) | FinishReason::Length => None,
    }
}
