//! Holds what a round knows of each miner, and makes its part of the record.

use super::terms::{Candidate, Keep};
use crate::intake::work::weight;
use crate::store::record::{MinerResponse, Outcome, Sampled, Statistics, Timing};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// Where the chain is silent for so long around a miner's fault on the network, three blocks of
/// finney, the fault is the validator's own: no miner can keep blocks from it.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(36);
/// Bytes of captures that a round keeps of faulty answers, and of one of them. An honest answer of
/// 1,920 tokens with its proofs has about a MiB; whoever sends junk up to a query's limit must not
/// fill the disk with it.
pub(super) const CAPTURES_MAX: usize = 8 << 20;
pub(super) const CAPTURE_MAX: usize = 2 << 20;

/// A miner in this round.
pub(super) struct Slot {
    pub(super) miner: Candidate,
    pub(super) body: Value,
    pub(super) state: State,
}

/// Where a miner is.
pub(super) enum State {
    /// It does not serve the model.
    NotServed,
    /// It is to be asked, or was.
    Open,
    /// Its answer is being checked.
    Checking(Timing, Arc<Value>),
    /// It failed by the network at this time; whose network is told by the chain's next block.
    Doubted(Box<Found>, Duration),
    /// It is done with.
    Closed(Box<Found>),
}

/// What came of a miner.
pub(super) struct Found {
    pub(super) timing: Timing,
    pub(super) outcome: Outcome,
    pub(super) cause: Option<String>,
    pub(super) error: Option<String>,
    pub(super) capture: Option<Arc<Value>>,
    pub(super) report: Option<Value>,
    pub(super) statistics: Statistics,
}

impl Found {
    pub(super) fn failed(timing: Timing, cause: &str, error: String) -> Self {
        let (cause, error) = (Some(cause.to_owned()), Some(error));
        let outcome = Outcome::Failed;
        let statistics = Statistics::default();
        Self { timing, outcome, cause, error, capture: None, report: None, statistics }
    }

    pub(super) fn unscored(timing: Timing, why: &str) -> Self {
        Self { outcome: Outcome::Unscored, ..Self::failed(timing, "UNSCORED", why.to_owned()) }
    }

    /// The same where it failed by the network while the chain was silent too.
    pub(super) fn excused(&self) -> Self {
        let cause = self.cause.as_deref().unwrap_or_default();
        let why = format!(
            "{cause}, while no block of the chain came for {} s: this machine's network is in \
             doubt",
            SILENCE_MAX.as_secs()
        );
        Self::unscored(self.timing, &why)
    }
}

/// Leaves out what is too much of the captures, the largest first.
pub(super) fn limit_captures(responses: &mut [MinerResponse]) {
    let bytes = |capture: &Value| weight(capture, CAPTURE_MAX);
    let mut kept: Vec<(usize, &mut MinerResponse)> = responses
        .iter_mut()
        .filter_map(|response| Some((bytes(response.capture.as_ref()?), response)))
        .collect();
    kept.sort_by_key(|(bytes, _)| *bytes);
    let mut sum = 0;
    for (bytes, response) in kept {
        sum += bytes;
        let whose = match bytes > CAPTURE_MAX {
            true => format!("it has more than {CAPTURE_MAX} bytes"),
            false if sum > CAPTURES_MAX => {
                format!("those of the round have more than {CAPTURES_MAX} bytes")
            }
            false => continue,
        };
        response.capture = None;
        let note = format!("; the answer is not kept: {whose}");
        response.error.get_or_insert_default().push_str(&note);
    }
}

/// The record of a miner in a round that has ended.
pub(super) fn response(slot: Slot, keep: Keep, was_asked: bool) -> MinerResponse {
    let Slot { miner, state, .. } = slot;
    let found = match state {
        State::Closed(found) => *found,
        State::NotServed => {
            let error = "the miner does not list the model".to_owned();
            let found = Found::failed(Timing::default(), "NOT_SERVED", error);
            Found { outcome: Outcome::NotServed, ..found }
        }
        // No round ends with these.
        State::Open | State::Checking(..) | State::Doubted(..) => {
            Found::unscored(Timing::default(), "it was left open")
        }
    };
    let Found { timing, outcome, cause, error, capture, report, statistics } = found;
    let sample = match outcome {
        Outcome::Verified if timing.tps > 0.0 => Sampled::Tps(timing.tps),
        // An honest answer may end before its first text: there is no speed to measure, and it is
        // not a miss.
        Outcome::Verified | Outcome::Unscored => Sampled::Nothing,
        // A round that asked nobody says nothing about anybody.
        _ if !was_asked => Sampled::Nothing,
        _ => Sampled::Miss,
    };
    let is_kept = match keep {
        Keep::Nothing => false,
        Keep::Faults => outcome != Outcome::Verified,
        Keep::All => true,
    };
    let capture = capture.filter(|_| is_kept).map(Arc::unwrap_or_clone);
    let Candidate { uid, hotkey, coldkey, .. } = miner;
    MinerResponse {
        uid,
        hotkey,
        coldkey,
        timing,
        outcome,
        cause,
        error,
        sample,
        capture,
        report,
        statistics,
    }
}
