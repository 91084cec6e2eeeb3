//! What an operator watches of a running validator, as numbers for Prometheus.

use crate::store::record::{Outcome, Round, Weights, WeightsState};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Outcomes in the order in which they are counted.
const OUTCOMES: [(Outcome, &str); 5] = [
    (Outcome::Verified, "verified"),
    (Outcome::Rejected, "rejected"),
    (Outcome::Failed, "failed"),
    (Outcome::NotServed, "not_served"),
    (Outcome::Unscored, "unscored"),
];

/// Counters and states since the program started.
#[derive(Default, Debug)]
pub struct Progress {
    beat_ms: AtomicU64,
    block: AtomicU64,
    rounds: AtomicU64,
    unsaved: AtomicU64,
    outcomes: [AtomicU64; OUTCOMES.len()],
    weights_epoch: AtomicU64,
    weights_confirmed: AtomicU64,
}

impl Progress {
    pub(super) fn beat(&self, now_ms: u64) {
        self.beat_ms.store(now_ms, Relaxed);
    }

    pub(super) fn see_block(&self, block: u64) {
        self.block.store(block, Relaxed);
    }

    pub(super) fn end_round(&self, round: &Round) {
        self.rounds.fetch_add(1, Relaxed);
        for response in &round.responses {
            let place = OUTCOMES.iter().position(|(outcome, _)| *outcome == response.outcome);
            if let Some(place) = place {
                self.outcomes[place].fetch_add(1, Relaxed);
            }
        }
    }

    pub(super) fn set_unsaved(&self, count: usize) {
        self.unsaved.store(count as u64, Relaxed);
    }

    pub(super) fn set_weights(&self, weights: &Weights) {
        self.weights_epoch.store(weights.epoch, Relaxed);
        let is_confirmed = weights.state == WeightsState::Confirmed;
        self.weights_confirmed.store(u64::from(is_confirmed), Relaxed);
    }

    /// Rounds that have ended.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Relaxed)
    }

    /// When the owner of the state last went round its loop, in Unix milliseconds: one that hangs
    /// stands still.
    pub fn beat_ms(&self) -> u64 {
        self.beat_ms.load(Relaxed)
    }

    /// All of it, as Prometheus reads it.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let mut add = |name: &str, kind: &str, help: &str, lines: &[(String, u64)]| {
            // Writing into a string does not fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in lines {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let plain = |value: &AtomicU64| [(String::new(), value.load(Relaxed))];
        let beat = [(String::new(), self.beat_ms() / 1000)];
        let help = "Unix time at which the validator last went round its loop";
        add("targon_validator_heartbeat_seconds", "gauge", help, &beat);
        add("targon_validator_block", "gauge", "Newest block", &plain(&self.block));
        add("targon_validator_rounds_total", "counter", "Rounds that ended", &plain(&self.rounds));
        let help = "Rounds that are over and not remembered yet";
        add("targon_validator_rounds_unsaved", "gauge", help, &plain(&self.unsaved));
        let outcomes = OUTCOMES.iter().zip(&self.outcomes);
        let labelled: Vec<(String, u64)> = outcomes
            .map(|((_, word), count)| (format!("{{outcome=\"{word}\"}}"), count.load(Relaxed)))
            .collect();
        add("targon_validator_answers_total", "counter", "Answers by outcome", &labelled);
        let help = "Epoch of the last weights";
        add("targon_validator_weights_epoch", "gauge", help, &plain(&self.weights_epoch));
        let help = "Whether the last weights were read back from the chain";
        add("targon_validator_weights_confirmed", "gauge", help, &plain(&self.weights_confirmed));
        text
    }
}
