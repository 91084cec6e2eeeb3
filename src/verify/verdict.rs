//! Defines what verification ends in, and why.
//!
//! What the peer sent can at worst be rejected; trouble of ours leaves an answer unscored.

use std::fmt;

/// Why an answer is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// It is not an answer at all.
    BadStream,
    /// Fewer tokens than an answer can have.
    TooShort,
    /// More tokens than were asked for.
    TooLong,
    /// Ids outside the vocabulary, or none.
    BadIds,
    /// The text is not what the ids spell.
    TextMismatch,
    /// It goes on after its end.
    SkippedEosEot,
    /// It ends without a reason.
    EarlyEnd,
    /// A token that the request's grammar does not allow.
    Grammar,
    /// A weight value is wrong or missing.
    BadPowv,
    /// No proof, or one that cannot be read.
    BadProof,
    /// The proof is bound to something else.
    WrongRoot,
    /// The chain of digests is broken.
    ChainBreak,
    /// The signature is not the hotkey's.
    BadSignature,
    /// Hidden rows differ by more than honest ones do.
    SketchEnergy,
    /// A token that the sampler would not have drawn.
    SamplerMargin,
    /// Reported log-probabilities are not the model's.
    LogprobMismatch,
    /// Too many tokens that are not the most probable one.
    UnlikelyTokens,
    /// A token that is hardly possible.
    UnlikelyToken,
    /// Log-probabilities too good to be true.
    Overfit,
    /// At a place chosen at random, a token that is not among the most probable ones.
    LogprobRandom,
}

impl Reason {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Reason::BadStream => "BAD_STREAM",
            Reason::TooShort => "TOO_SHORT",
            Reason::TooLong => "TOO_LONG",
            Reason::BadIds => "BAD_IDS",
            Reason::TextMismatch => "TEXT_MISMATCH",
            Reason::SkippedEosEot => "SKIPPED_EOS_EOT",
            Reason::EarlyEnd => "EARLY_END",
            Reason::Grammar => "GRAMMAR",
            Reason::BadPowv => "BAD_POWV",
            Reason::BadProof => "BAD_PROOF",
            Reason::WrongRoot => "WRONG_ROOT",
            Reason::ChainBreak => "CHAIN_BREAK",
            Reason::BadSignature => "BAD_SIGNATURE",
            Reason::SketchEnergy => "SKETCH_ENERGY",
            Reason::SamplerMargin => "SAMPLER_MARGIN",
            Reason::LogprobMismatch => "LOGPROB_MISMATCH",
            Reason::UnlikelyTokens => "UNLIKELY_TOKENS",
            Reason::UnlikelyToken => "UNLIKELY_TOKEN",
            Reason::Overfit => "OVERFIT",
            Reason::LogprobRandom => "LOGPROB_RANDOM",
        }
    }
}

/// Bytes of what a rejection says: it may repeat a peer's words, and is kept with every round.
pub(super) const WHAT_BYTES_MAX: usize = 500;

/// A rejection: the rule that was broken and the fact that breaks it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {what}", reason.name())]
pub struct Rejection {
    /// The rule that is broken.
    pub reason: Reason,
    /// What the rule demands, and what the answer has.
    pub what: String,
}

impl Rejection {
    /// For `reason`, in words, of which at most `WHAT_BYTES_MAX` bytes are kept.
    pub fn new(reason: Reason, what: impl Into<String>) -> Self {
        let mut what = what.into();
        let end = (0..=WHAT_BYTES_MAX).rev().find(|at| what.is_char_boundary(*at)).unwrap_or(0);
        if what.len() > WHAT_BYTES_MAX {
            what.truncate(end);
        }
        Self { reason, what }
    }
}

/// What verification ends in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// No rule is broken.
    Pass,
    /// A rule is broken.
    Reject(Rejection),
    /// Nothing can be said, through no fault of the peer.
    Unscored(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Pass => f.write_str("pass"),
            Verdict::Reject(rejection) => write!(f, "reject: {rejection}"),
            Verdict::Unscored(why) => write!(f, "unscored: {why}"),
        }
    }
}

/// Why checking ends early.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The peer's fault.
    Rejected(Rejection),
    /// Ours.
    Fault(String),
}

impl From<Stop> for Verdict {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Rejected(rejection) => Verdict::Reject(rejection),
            Stop::Fault(why) => Verdict::Unscored(why),
        }
    }
}

impl From<Rejection> for Stop {
    fn from(rejection: Rejection) -> Self {
        Stop::Rejected(rejection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_keeps_a_limited_part_of_what_a_peer_says() {
        let of = |words: String| Rejection::new(Reason::BadProof, words).what;
        assert_eq!(of("x".repeat(1 << 20)), "x".repeat(WHAT_BYTES_MAX));
        // Characters of three bytes are not cut in two.
        assert_eq!(of("\u{20ac}".repeat(1000)), "\u{20ac}".repeat(WHAT_BYTES_MAX / 3));
        assert_eq!(of("short".into()), "short");
        assert_eq!(of("y".repeat(WHAT_BYTES_MAX)), "y".repeat(WHAT_BYTES_MAX));
    }
}
