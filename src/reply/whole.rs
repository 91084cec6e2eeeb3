//! Writes a response at once, after its last token.

use super::format::{Echo, Formatter, prompt_logprobs};
use super::head::ResponseHead;
use crate::engine::output::Ended;
use crate::intake::Endpoint;
use crate::models::text::Text;
use crate::wire::openai::Usage;
use crate::wire::openai::response::{ChatChoice, CompletionChoice, Response};
use serde::Serialize;

/// The body of either endpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Whole {
    /// Of `/v1/chat/completions`.
    Chat(Response<ChatChoice>),
    /// Of `/v1/completions`.
    Completion(Response<CompletionChoice>),
}

/// The response whose choices `formatters` write from `outcomes`, in order.
pub fn whole(
    head: &ResponseHead,
    formatters: Vec<Formatter>,
    model: &Text,
    outcomes: &[Ended],
) -> Whole {
    let prompts = &head.prompts;
    let cached = |(i, o): (usize, &Ended)| match prompts.first(i) == i {
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
            Whole::Chat(body)
        }
        Endpoint::Completion => {
            let choice = |(index, (mut formatter, outcome)): (usize, (Formatter, &Ended))| {
                let echo = Echo { prompt: prompts.of(index), rows: rows(index) };
                let echo = head.report.echo.then_some(&echo);
                CompletionChoice {
                    prompt_logprobs: scores(index),
                    prompt_token_ids: head.prompt_ids(index),
                    ..formatter.completion(echo, &outcome.steps, Some(&outcome.finish))
                }
            };
            let choices: Vec<CompletionChoice> = choices.enumerate().map(choice).collect();
            Whole::Completion(head.body(head.endpoint.whole(), choices, Some(usage)))
        }
    }
}
