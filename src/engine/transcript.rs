//! Turns tokens into visible text and finds the end of the output. The engine writes by it; a
//! verifier replays it.

use super::output::FinishReason;
use super::request::Request;
use super::stop::{Scan, StopStrings};
use crate::models::text::Text;
use crate::models::tokenizer::Detokenizer;

/// The text of one output so far.
pub struct Transcript {
    detokenizer: Detokenizer,
    stop: StopStrings,
    end_ids: Vec<u32>,
    tokens: usize,
}

impl Transcript {
    /// Before the first token of a request.
    pub fn new(request: &Request, model: &Text) -> Self {
        Self {
            detokenizer: Detokenizer::after(
                &model.tokenizer,
                request.skip_special_tokens,
                &request.prompt,
            ),
            stop: StopStrings::new(request.stop.strings.clone(), request.stop.include_in_output),
            end_ids: request.end_ids(model),
            tokens: 0,
        }
    }

    /// How many tokens were pushed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The text that is still held back, where the output ends here.
    pub fn finish(&mut self) -> String {
        self.stop.finish() + &self.detokenizer.finish()
    }

    /// The visible text that `token` adds, and the reason if it ends the output; `is_whole` says
    /// that its grammar ended with it.
    pub fn push(
        &mut self,
        request: &Request,
        model: &Text,
        token: u32,
        is_whole: bool,
    ) -> (String, Option<FinishReason>) {
        self.tokens += 1;
        let may_end = self.tokens >= request.min_tokens;
        let stop_id = match token {
            id if is_whole => Some(FinishReason::EndToken(id)),
            id if may_end && self.end_ids.contains(&id) => Some(FinishReason::EndToken(id)),
            id if may_end && request.stop.ids.contains(&id) => Some(FinishReason::StopId(id)),
            _ => None,
        };
        if let Some(reason) = stop_id {
            // The token that ends the output is not part of its text, unless that was asked for.
            let mut text = self.stop.finish();
            if request.stop.include_in_output {
                text.push_str(&self.detokenizer.push(&model.tokenizer, token));
            }
            text.push_str(&self.detokenizer.finish());
            return (text, Some(reason));
        }
        let piece = self.detokenizer.push(&model.tokenizer, token);
        let mut text = match if may_end { self.stop.push(&piece) } else { Scan::Show(piece) } {
            Scan::Show(text) => text,
            Scan::Stop { text, matched } => return (text, Some(FinishReason::StopString(matched))),
        };
        if self.tokens == request.max_tokens {
            text.push_str(&self.finish());
            return (text, Some(FinishReason::Length));
        }
        (text, None)
    }
}
