//! Defines the input and output of a round, as plain data.

use super::ask::{Endpoint, QueryPrompt};
use crate::proof::Scheme;
use crate::store::record;
use crate::validator::query::Arrival;
use serde_json::Value;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

/// How rounds are held.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundSettings {
    /// The number of the subnet.
    pub netuid: u16,
    /// Name of the scoring profile, for the record.
    pub profile: String,
    /// Miners that are asked at most; 37 in the protocol.
    pub asked_max: usize,
    /// From which the most tokens of an answer are drawn.
    pub lengths: RangeInclusive<u32>,
    /// The proof that is asked for.
    pub proof: Option<Scheme>,
    /// Share of the answers that are verified at every row.
    pub slow_share: f64,
    /// Which captures the record keeps.
    pub keep: Keep,
    /// How long each phase may take.
    pub times: Times,
}

/// Which requests and answers a record keeps in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// No capture is kept.
    Nothing,
    /// Those that were not verified, as far as anything came.
    Faults,
    /// Every capture is kept.
    All,
}

/// How long each phase may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Times {
    /// Until there is a prompt.
    pub prompt: Duration,
    /// Until all answers have ended: more than a query may take.
    pub answers: Duration,
    /// From the last answer until the last verdict.
    pub verdicts: Duration,
}

/// A model that can be verified.
#[derive(Clone, PartialEq, Debug)]
pub struct Offer {
    /// The name that requests have in their field `model`.
    pub name: String,
    /// Where it can be asked; at least one.
    pub endpoints: Vec<Endpoint>,
    /// Tokens of prompt and answer together.
    pub context_max: usize,
}

/// A miner that can be asked.
#[derive(Clone, PartialEq, Debug)]
pub struct Candidate {
    /// The uid it holds on the subnet.
    pub uid: u16,
    /// Its hotkey, as SS58.
    pub hotkey: String,
    /// Its coldkey, as SS58.
    pub coldkey: String,
    /// The models that it says it serves.
    pub models: BTreeSet<String>,
}

/// What a round starts from.
#[derive(Clone, PartialEq, Debug)]
pub struct Scene {
    /// The newest block of the chain when the round begins.
    pub block: u64,
    /// When that block came, on the round's clock.
    pub heard: Duration,
    /// Models that can be verified.
    pub models: Vec<Offer>,
    /// Miners that can be asked.
    pub miners: Vec<Candidate>,
}

/// What a round is told.
#[derive(Debug)]
pub enum RoundEvent {
    /// The prompt is there, or there is none for this reason.
    Prompted(anyhow::Result<QueryPrompt>),
    /// A miner's answer has ended.
    Answered {
        /// The uid of the miner.
        uid: u16,
        /// What came of its answer, and how it ended.
        answer: Answered,
    },
    /// An answer was checked.
    Checked {
        /// The uid of the miner.
        uid: u16,
        /// What verification found of the answer.
        checked_answer: AnswerReport,
    },
    /// A block of the chain has come.
    Block,
    /// Time has passed: deadlines are looked at.
    Tick,
    /// The program ends: what is open stays unscored.
    Stop,
}

/// An action to be executed.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Make a prompt; answered by [`RoundEvent::Prompted`].
    Prompt {
        /// The model that the prompt is for.
        model: String,
        /// The endpoint that the prompt is for.
        endpoint: Endpoint,
    },
    /// Ask a miner; answered by [`RoundEvent::Answered`].
    Ask {
        /// The uid of the miner.
        uid: u16,
        /// The path of the request.
        path: &'static str,
        /// The body of the request.
        body: Value,
        /// Tokens that it may answer.
        max_tokens: u32,
    },
    /// Check an answer; answered by [`RoundEvent::Checked`].
    Check {
        /// The uid of the miner.
        uid: u16,
        /// The request with the answer, as `verify` reads it.
        capture: Arc<Value>,
        /// Whether every row is looked at.
        is_slow: bool,
    },
    /// The round is over.
    End(Box<record::Round>),
}

/// An answer as far as it was received.
#[derive(Debug)]
pub struct Answered {
    /// Its events, each with the time of the read.
    pub arrivals: Vec<Arrival>,
    /// When it ended, since the request was sent.
    pub ended: Duration,
    /// How it ended.
    pub ending: Ending,
}

/// How an answer ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// It is complete.
    Whole,
    /// By the miner's fault.
    Fault {
        /// Name of the fault, as records and metrics have it.
        cause: &'static str,
        /// What happened, in one sentence.
        what: String,
    },
    /// By a failure of the validator itself.
    Ours(String),
}

/// What verification found.
#[derive(Clone, PartialEq, Debug)]
pub struct AnswerReport {
    /// Whether the answer passes, fails, or nothing is known.
    pub verdict: AnswerVerdict,
    /// The evidence, for the record.
    pub report: Option<Value>,
    /// What was measured of the answer's rows.
    pub statistics: record::Statistics,
    /// Output tokens with ids that were verified; the speed counts no more of them.
    pub tokens: u32,
}

impl AnswerReport {
    /// A verdict alone, of an answer without a token that was verified.
    pub fn bare(verdict: AnswerVerdict) -> Self {
        Self { verdict, report: None, statistics: record::Statistics::default(), tokens: 0 }
    }
}

/// Whether an answer comes from the model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AnswerVerdict {
    /// It comes from the model.
    Pass,
    /// It does not come from the model.
    Reject {
        /// The rule that is broken.
        cause: String,
        /// What the rule demands, and what the answer has.
        what: String,
    },
    /// Nothing can be concluded.
    Unscored(String),
}
