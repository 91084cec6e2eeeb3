//! Holds every number behind a weight, as plain data: it is stored with the weights and read by
//! `explain`.

use super::gate::EvidenceGate;
use super::rules::ScoringProfile;
use super::series::{Point, Series};
use crate::store::record::{EpochWeights, MinerResponse, RoundResponse};
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

/// The weights of an epoch, or why there are none, and how they came about.
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
    /// For `EpochWeights.explanation`.
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
    /// From `EpochWeights.explanation`.
    ///
    /// # Errors
    /// When it cannot be read: another version may have written it.
    pub fn read(explanation: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(explanation)
    }
}

/// Why a miner's weight cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// What is stored with the weights is no explanation.
    #[error("the explanation stored with the weights of block {block} cannot be read: {why}")]
    Unreadable {
        /// When the weights were decided.
        block: u64,
        /// What is wrong with it.
        why: serde_json::Error,
    },
    /// Nobody had the uid.
    #[error("uid {uid} was not on the subnet when weights were decided at block {block}: {known}")]
    NoMember {
        /// The uid that was asked about.
        uid: u16,
        /// When the weights were decided.
        block: u64,
        /// Which uids there were.
        known: String,
    },
}

/// The explanation of one miner's weight, among those of all.
#[derive(Clone, PartialEq, Debug)]
pub struct Explained {
    /// The explanations of all miners.
    pub stored: StoredExplanation,
    /// This miner's. Its misses have the causes that are known by now.
    pub miner: Explanation,
}

impl Explained {
    /// Of the miner with this uid in `weights`. Misses get the causes that were not at hand when
    /// the weights were decided from `seen`, what is known by now of the miner's rounds.
    ///
    /// # Errors
    /// The explanation cannot be read, or has no such miner.
    pub fn new(
        weights: &EpochWeights,
        uid: u16,
        seen: &[RoundResponse],
    ) -> Result<Self, ExplainError> {
        let block = weights.block;
        let stored = StoredExplanation::read(&weights.explanation)
            .map_err(|why| ExplainError::Unreadable { block, why })?;
        let mut miner = stored.miners.get(&uid).cloned().ok_or_else(|| {
            let known = match (stored.miners.first_key_value(), stored.miners.last_key_value()) {
                (Some((first, _)), Some((last, _))) => {
                    format!("uids lie between {first} and {last}")
                }
                _ => "the subnet had no members".to_owned(),
            };
            ExplainError::NoMember { uid, block, known }
        })?;
        miner.complete(seen);
        Ok(Self { stored, miner })
    }

    /// The best score of all miners.
    pub fn best_score(&self) -> f64 {
        self.stored.miners.values().map(|miner| miner.score).fold(0.0, f64::max)
    }

    /// The miner's series: of models, then of users' requests.
    pub fn series(&self) -> impl Iterator<Item = &Series> {
        self.miner.models.iter().chain(&self.miner.organics)
    }

    /// The misses among the samples that count, newest first, each with its series' model.
    pub fn misses(&self) -> Vec<(&str, &Point)> {
        let points = self
            .series()
            .flat_map(|series| series.points.iter().map(|point| (series.model.as_str(), point)));
        let mut misses: Vec<(&str, &Point)> =
            points.filter(|(_, p)| p.tps.is_none() && !p.round.is_empty()).collect();
        misses.sort_by_key(|(_, point)| std::cmp::Reverse(point.block));
        misses
    }
}

impl Explanation {
    /// Gives misses without a cause the one of their round.
    fn complete(&mut self, seen: &[RoundResponse]) {
        let known: BTreeMap<&str, &MinerResponse> =
            seen.iter().map(|answered| (answered.round.id.as_str(), &answered.response)).collect();
        let points = self.models.iter_mut().flat_map(|series| &mut series.points);
        for point in points.filter(|point| point.cause.is_none() && point.error.is_none()) {
            if let Some(response) = known.get(point.round.as_str()) {
                point.cause.clone_from(&response.cause);
                point.error.clone_from(&response.error);
            }
        }
    }
}
