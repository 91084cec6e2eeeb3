//! Holds every number behind a weight, as plain data: it is stored with the weights and read by
//! `explain`.

use super::gate::EvidenceGate;
use super::rules::ScoringProfile;
use super::series::Series;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// One miner's numbers, in the order in which they follow from each other.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The uid of the miner.
    pub uid: u16,
    /// Who holds it, as SS58.
    pub hotkey: String,
    /// Its samples by model, in the order of names; those that do not count say why.
    pub models: Vec<Series>,
    /// Its requests of users.
    pub organics: Option<Series>,
    /// The scores of all series together.
    pub sum: f64,
    /// What the evidence over many answers makes of it.
    pub gate: EvidenceGate,
    /// The sum, or 0 if an alarm stops the pay.
    pub score: f64,
    /// The score after normalisation: between 0 and 1.
    pub normalised: f64,
    /// What the chain gets; uids without a weight have 0.
    pub weight: u16,
}

/// Weights, or why there are none, and how they came about.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Decision {
    /// The arithmetic that the weights were decided by.
    pub profile: ScoringProfile,
    /// Its window of samples.
    pub window: usize,
    /// Who gets what, by ascending uid; empty where there are no weights.
    pub values: Vec<(u16, u16)>,
    /// Why there are none, as a sentence.
    pub none: Option<String>,
    /// Each uid's numbers, by ascending uid.
    pub miners: Vec<Explanation>,
}

/// What is stored with weights: a [`Decision`] whose miners can be found by uid, and whose values
/// stand beside it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StoredExplanation {
    /// The arithmetic that the weights were decided by.
    pub profile: ScoringProfile,
    /// Its window of samples.
    pub window: usize,
    /// Why there are no weights.
    pub none: Option<String>,
    /// One object for each uid.
    pub miners: BTreeMap<u16, Explanation>,
}

impl Decision {
    /// For `Weights.explanation`.
    ///
    /// # Errors
    /// When a number cannot be written, which is a fault of ours.
    pub fn explanation(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(StoredExplanation {
            profile: self.profile,
            window: self.window,
            none: self.none.clone(),
            miners: self.miners.iter().map(|miner| (miner.uid, miner.clone())).collect(),
        })
    }
}

impl StoredExplanation {
    /// From `Weights.explanation`.
    ///
    /// # Errors
    /// When it cannot be read: another version may have written it.
    pub fn read(explanation: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(explanation)
    }
}
