//! Reads the peer's part of a body, `output_sequence`, without trusting anything. Whatever is wrong
//! with it is a rejection.

use super::scan::Elements;
use crate::verify::answer::Answer;
use crate::verify::{Reason, Rejection, Stop};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Bytes of JSON for one byte of text: `\u0000` at worst, for a control character, half of a
/// two-byte character, or a byte that is not a character.
const ESCAPED_BYTES: usize = 6;
/// Bytes of a token besides its text. `{"text": "", "logprob": -1.2345678901234567e-05,
/// "token_id": 4294967295, "powv": -9223372036854775808}, ` are 106; the rest is for indentation
/// and other keys.
const TOKEN_BYTES: usize = 256;

/// The most bytes that a sequence of `tokens` can need whose longest token has `longest` bytes.
pub(super) fn bytes_max(tokens: usize, longest: usize) -> usize {
    let token = longest.saturating_mul(ESCAPED_BYTES).saturating_add(TOKEN_BYTES);
    tokens.saturating_mul(token).saturating_add(TOKEN_BYTES)
}

/// What an answer can have at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Tokens that were asked for and that the model can give.
    pub(super) asked: usize,
    /// Tokens that can be verified here.
    pub(super) context: usize,
    /// Bytes of the longest token.
    pub(super) longest: usize,
}

/// An answer as it was sent.
#[derive(Debug)]
pub(super) struct Sent {
    /// Ids, log-probabilities and the whole text.
    pub(super) answer: Answer,
    /// The text of the first token alone.
    pub(super) first: String,
}

/// One token. Values are read one by one, so that an error names the one at fault.
#[derive(Deserialize)]
struct Token<'a> {
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    logprob: Option<&'a RawValue>,
    #[serde(borrow)]
    token_id: Option<&'a RawValue>,
}

fn bad(what: impl Into<String>) -> Stop {
    Rejection::new(Reason::BadStream, what).into()
}

impl Sent {
    /// Reads a sequence within its bounds.
    pub(super) fn read(text: &[u8], bounds: Bounds) -> Result<Self, Stop> {
        let elements =
            || Elements::new(text).ok_or_else(|| bad("`output_sequence` must be a list"));
        let Bounds { asked, context, longest } = bounds;
        let begin: Result<Vec<_>, _> = elements()?.take(asked.min(context) + 1).collect();
        let count = begin.map_err(|e| bad(e.to_string()))?.len();
        if count > asked {
            let what = format!("at most {asked} tokens were asked for and fit, got more");
            return Err(Rejection::new(Reason::TooLong, what).into());
        }
        if count > context {
            // The bound is ours, not the peer's.
            let what = format!("at most {context} tokens are verified here, the answer has more");
            return Err(Stop::Fault(what));
        }
        let (most, got) = (bytes_max(count, longest), text.len());
        if got > most {
            let what = format!("{count} tokens of this model need at most {most} bytes, got {got}");
            return Err(bad(what));
        }
        let mut sent = Self { answer: Answer::default(), first: String::new() };
        let mut all = String::new();
        for (place, element) in elements()?.enumerate() {
            let text = sent.push(place, element.map_err(|e| bad(e.to_string()))?)?;
            all.push_str(&text);
            if place == 0 {
                sent.first = text;
            }
        }
        sent.answer.text = Some(all);
        Ok(sent)
    }

    /// Takes a token in; returns its text.
    fn push(&mut self, place: usize, element: &[u8]) -> Result<String, Stop> {
        let wrong = |what: String| bad(format!("token {place}: {what}"));
        if element.first() != Some(&b'{') {
            return Err(wrong("must be an object".into()));
        }
        let token: Token<'_> = serde_json::from_slice(element).map_err(|e| wrong(e.to_string()))?;
        let raw = token.token_id.map_or("nothing", RawValue::get);
        let id: u32 = raw.parse().map_err(|_| {
            let what = format!("token {place}: {raw:.40} is not a token id");
            Stop::from(Rejection::new(Reason::BadIds, what))
        })?;
        let logprob = token.logprob.map(|raw| {
            let raw = raw.get();
            raw.parse::<f64>().map_err(|_| wrong(format!("{raw:.40} is not a log-probability")))
        });
        let raw = token.text.map_or("nothing", RawValue::get);
        let text = serde_json::from_str(raw)
            .map_err(|_| wrong(format!("{raw:.40} is not a text of whole characters")))?;
        self.answer.ids.push(id);
        self.answer.logprobs.push(logprob.transpose()?);
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_list_is_broken_and_a_whole_one_can_be_too_long() {
        let bounds = Bounds { asked: 1, context: 9, longest: 9 };
        for (text, reason) in [
            ("[1 2]", Reason::BadStream),
            ("[1,", Reason::BadStream),
            ("[1,]", Reason::BadStream),
            ("[1, 2]", Reason::TooLong),
        ] {
            match Sent::read(text.as_bytes(), bounds) {
                Err(Stop::Rejected(rejection)) => assert_eq!(rejection.reason, reason, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
