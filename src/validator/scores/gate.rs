//! Decides pay by evidence: a miner with an alarm of [`crate::verify::evidence`] is not paid.
//!
//! Mild cheats pass each single check, so their samples look like those of honest miners; only the
//! sum over many answers shows them. So an alarm stops all pay, and not only one sample. Pay starts
//! again when later answers have lowered every sum to [`REOPEN`]. A miner that has become honest is
//! paid again after some answers, and one whose sums stay near the alarm is not paid in between.
//! Evidence belongs to a hotkey, as samples do.

use super::rules::ScoringProfile;
use crate::verify::evidence::{ALARM, Evidence, Sums};
use serde::{Deserialize, Serialize};

/// Pay starts again once every sum is at most this: a thousand to one for the cheat, where an
/// alarm is a million to one.
pub const REOPEN: f64 = ALARM / 2.0;

/// The alarm that stopped the pay.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Alarm {
    /// The round whose answer raised it.
    pub round: String,
    /// Block of that round.
    pub block: u64,
    /// Which sum: `margin`, `energy` or `joint`.
    pub test: String,
    /// The sums of the evidence at that moment.
    pub sums: Sums,
}

/// What is known of one hotkey over all its answers, and whether it is paid.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct HotkeyState {
    /// The sums that all answers so far add up to.
    pub evidence: Evidence,
    /// The alarm that stops the pay, if there is one.
    pub shut_by: Option<Alarm>,
}

impl HotkeyState {
    /// After an answer of this round has been weighed.
    pub fn after(self, evidence: Evidence, round: &str, block: u64) -> Self {
        let Sums { margin, energy, joint } = evidence.sums;
        let is_low = [margin, energy, joint].into_iter().all(|sum| sum <= REOPEN);
        let shut_by = match (self.shut_by, evidence.alarm()) {
            (None, Some(test)) => Some(Alarm {
                round: round.to_owned(),
                block,
                test: test.to_string(),
                sums: evidence.sums,
            }),
            (shut, _) => shut.filter(|_| !is_low),
        };
        Self { evidence, shut_by }
    }

    /// What it means for pay. A state that was kept without its gate (an evidence file) is
    /// checked by its sums alone.
    pub fn explained(&self, profile: ScoringProfile) -> EvidenceGate {
        let is_shut = self.shut_by.is_some() || self.evidence.alarm().is_some();
        EvidenceGate {
            // Targon 4.4 looks at single answers only.
            pays: profile == ScoringProfile::Targon44 || !is_shut,
            answers: self.evidence.answers,
            alarms: self.evidence.alarms,
            sums: self.evidence.sums,
            alarm_at: ALARM,
            reopens_at: REOPEN,
            shut_by: self.shut_by.clone(),
        }
    }
}

/// The gate in numbers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct EvidenceGate {
    /// Whether the miner is paid.
    pub pays: bool,
    /// Answers that were weighed.
    pub answers: u64,
    /// Of them, those that ended in an alarm.
    pub alarms: u64,
    /// The sums of the evidence as they are now.
    pub sums: Sums,
    /// A sum that is an alarm.
    pub alarm_at: f64,
    /// The gate opens when no sum is above this.
    pub reopens_at: f64,
    /// The alarm that stopped it.
    pub shut_by: Option<Alarm>,
}
