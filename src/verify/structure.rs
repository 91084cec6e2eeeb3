//! Checks what needs no forward pass: counts, ids, text, stop rules, weight values.

use super::answer::Answer;
use super::{Claim, Reason, Rejection, Stop};
use crate::engine::draw::Draw;
use crate::engine::output::FinishReason;
use crate::engine::transcript::Transcript;
use crate::models::Model;
use crate::models::text::Text;

/// Log-probabilities above this cannot be zero that was rounded.
pub(super) const LOGPROB_MAX: f64 = 1e-3;

/// Whether the last token of an output ends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// It does, for this reason.
    Sent(FinishReason),
    /// It does not: an end token must have followed that was not sent.
    Implied,
}

/// An output as the request's rules read it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Walk {
    /// The text that each token adds.
    pub pieces: Vec<String>,
    /// Whether the last token ends it.
    pub end: End,
}

/// Checks that the answer is one that the request's own rules can lead to.
///
/// # Errors
/// The first rule that it breaks.
pub fn check(claim: &Claim<'_>, text: &Text, context_max: usize) -> Result<Walk, Stop> {
    let (request, answer) = (claim.request, claim.answer);
    let count = answer.ids.len();
    let reject = |reason, what: String| Err(Stop::Rejected(Rejection::new(reason, what)));
    if count == 0 {
        return reject(
            Reason::TooShort,
            "an answer has at least one token; this one has none".into(),
        );
    }
    if count > request.max_tokens && claim.limit_is_free {
        return Err(unknown_limit());
    }
    if count > request.max_tokens {
        let what = format!("at most {} tokens were asked for, got {count}", request.max_tokens);
        return reject(Reason::TooLong, what);
    }
    let length = request.prompt.len() + count;
    if length > context_max + 1 {
        let what = format!("the model's context is {context_max} tokens, this needs {length}");
        // The bound is ours, not the miner's.
        return Err(Stop::Fault(what));
    }
    let vocab = text.vocab;
    if let Some(place) = answer.ids.iter().position(|id| *id as usize >= vocab) {
        let id = answer.ids[place];
        let what = format!("ids lie below {vocab}, token {place} has {id}");
        return reject(Reason::BadIds, what);
    }
    for (place, logprob) in answer.logprobs.iter().enumerate() {
        if logprob.is_some_and(|l| !l.is_finite() || l > LOGPROB_MAX) {
            let what = format!("log-probabilities are at most 0, token {place} has {logprob:?}");
            return reject(Reason::LogprobMismatch, what);
        }
    }
    replay(claim, text)
}

/// Walks the output by the request's rules: text, and where it must or must not end.
fn replay(claim: &Claim<'_>, text: &Text) -> Result<Walk, Stop> {
    let (request, answer) = (claim.request, claim.answer);
    let reject = |reason, what: String| Err(Stop::Rejected(Rejection::new(reason, what)));
    let mut draw = Draw::new(request, text);
    let mut transcript = Transcript::new(request, text);
    let mut pieces = Vec::with_capacity(answer.ids.len());
    let last = answer.ids.len() - 1;
    let mut end = End::Implied;
    for (place, id) in answer.ids.iter().enumerate() {
        let is_whole = match draw.push(&request.sampling, *id) {
            Ok(is_whole) => is_whole,
            Err(e) => return reject(Reason::Grammar, format!("token {place}: {e}")),
        };
        let (mut piece, reason) = transcript.push(request, text, *id, is_whole);
        match reason {
            Some(reason) if place < last => {
                let what = format!("the output ends at token {place} by {}", describe(&reason));
                return reject(Reason::SkippedEosEot, format!("{what}, but goes on"));
            }
            None if place == last && may_end_unsent(claim, text) => {
                piece.push_str(&transcript.finish());
            }
            None if place == last && claim.limit_is_free && may_be_cut(answer) => {
                return Err(unknown_limit());
            }
            None if place == last => {
                let what = "an output ends by an end token, a stop rule or its limit, this by none";
                return reject(Reason::EarlyEnd, what.into());
            }
            Some(reason) => {
                check_reason(claim, &reason)?;
                end = End::Sent(reason);
            }
            None => {}
        }
        pieces.push(piece);
    }
    check_text(answer.text.as_deref(), &pieces)?;
    Ok(Walk { pieces, end })
}

/// The text that was sent, if any, is the one that the ids spell.
fn check_text(sent: Option<&str>, pieces: &[String]) -> Result<(), Stop> {
    let Some(sent) = sent else { return Ok(()) };
    let text = pieces.concat();
    if sent == text {
        return Ok(());
    }
    let at = sent.chars().zip(text.chars()).take_while(|(a, b)| a == b).count();
    let what = format!("the ids spell another text, from character {at} on");
    Err(Rejection::new(Reason::TextMismatch, what).into())
}

/// Whether an end token that was not sent may follow the last one.
fn may_end_unsent(claim: &Claim<'_>, text: &Text) -> bool {
    let (request, count) = (claim.request, claim.answer.ids.len());
    let has_ends = !request.end_ids(text).is_empty() || !request.stop.ids.is_empty();
    claim.end_is_implied && has_ends && count + 1 >= request.min_tokens
}

/// Whether an answer does not say that it ended by itself.
fn may_be_cut(answer: &Answer) -> bool {
    answer.finish_reason.as_deref().is_none_or(|reason| reason == "length")
}

fn unknown_limit() -> Stop {
    let what = "the request names no `max_tokens`, so where the server's context ends an answer is \
                not known";
    Stop::Fault(what.into())
}

fn describe(reason: &FinishReason) -> String {
    match reason {
        FinishReason::EndToken(id) => format!("the end token {id}"),
        FinishReason::StopId(id) => format!("the stop id {id}"),
        FinishReason::StopString(text) => format!("the stop string {text:?}"),
        FinishReason::Length => "its limit".into(),
    }
}

/// The finish reason that was sent is the one that the rules give.
fn check_reason(claim: &Claim<'_>, reason: &FinishReason) -> Result<(), Stop> {
    let Some(sent) = claim.answer.finish_reason.as_deref() else { return Ok(()) };
    let is_length = *reason == FinishReason::Length;
    if is_length != (sent == "length") {
        let what = format!("the output ends by {}, its finish_reason is {sent}", describe(reason));
        return Err(Rejection::new(Reason::EarlyEnd, what).into());
    }
    Ok(())
}

/// Checks the weight values that were sent; all of them must be there where they are `required`.
///
/// # Errors
/// The first that is wrong.
pub fn check_powv(claim: &Claim<'_>, model: &Model, required: bool) -> Result<(), Stop> {
    let input: u64 = claim.request.prompt.iter().map(|id| u64::from(*id)).sum();
    let mut output = 0;
    for (place, id) in claim.answer.ids.iter().enumerate() {
        match claim.answer.powv.get(place).copied().flatten() {
            Some(sent) => {
                let value = model.parameters.powv(input, output);
                let value = value.map_err(|e| Stop::Fault(e.to_string()))?;
                if sent != value {
                    let what = format!("the powv of token {place} is {value}, got {sent}");
                    return Err(Rejection::new(Reason::BadPowv, what).into());
                }
            }
            None if required => {
                let what = format!("every token has a powv, token {place} has none");
                return Err(Rejection::new(Reason::BadPowv, what).into());
            }
            None => {}
        }
        // A token's value is chosen by those before it.
        output += u64::from(*id);
    }
    Ok(())
}
