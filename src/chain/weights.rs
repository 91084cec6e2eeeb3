//! Computes what is sent to the chain from a validator's raw numbers, and whether it may be sent.
//!
//! [`VectorRule::vector`] makes a [`Vector`] of raw weights, by the original's arithmetic
//! (`targon`) or by that of the current SDK (`sdk`). [`standing`] holds the chain's own rules, so
//! that nothing is sent that it would refuse; [`outcome`] says what became of what was sent. All of
//! it is pure.

pub mod outcome;
pub mod reveal;
mod sdk;
pub mod standing;
mod targon;
mod vector;

pub use sdk::clipped;
use std::fmt;
use std::str::FromStr;
pub use vector::{Vector, VectorError, WEIGHT_MAX, WeightLimits};
use vector::{check_order, is_own};

/// Subnets that there can be: mechanisms beyond the first have their storage behind all of them.
const SUBNETS_MAX: u16 = 4096;

/// Where the weights of a subnet's mechanism are stored: for the first one, the netuid itself.
///
/// # Errors
/// When there can be no such mechanism.
pub fn storage_index(netuid: u16, mechanism: u8) -> Result<u16, VectorError> {
    u16::from(mechanism)
        .checked_mul(SUBNETS_MAX)
        .and_then(|first| first.checked_add(netuid))
        .filter(|_| netuid < SUBNETS_MAX)
        .ok_or(VectorError::NoIndex { netuid, mechanism })
}

/// How raw weights become a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VectorRule {
    /// `process_weights_for_netuid` of bittensor 8.5, which Targon 4.4 calls, to the bit.
    Targon44,
    /// `set_weights` of the current SDK (bittensor 11.3).
    Sdk,
}

/// A name that no rule has.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("must be targon-4.4 or sdk, got {0}")]
pub struct UnknownRule(pub String);

impl FromStr for VectorRule {
    type Err = UnknownRule;

    fn from_str(text: &str) -> Result<Self, UnknownRule> {
        match text {
            "targon-4.4" => Ok(Self::Targon44),
            "sdk" => Ok(Self::Sdk),
            other => Err(UnknownRule(other.to_owned())),
        }
    }
}

impl fmt::Display for VectorRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Targon44 => "targon-4.4",
            Self::Sdk => "sdk",
        })
    }
}

impl VectorRule {
    /// What is sent for these raw weights: pairs of uid and weight, by ascending uid.
    ///
    /// # Errors
    /// When a raw weight is negative or not a number, or the rule has no vector for them.
    pub fn vector(self, raw: &[(u16, f64)], limits: &WeightLimits) -> Result<Vector, VectorError> {
        check_order(raw.iter().map(|(uid, _)| *uid))?;
        // The original's arithmetic is in f32; a larger number would become infinite there.
        let is_weight = |value: f64| (0.0..f64::from(f32::MAX)).contains(&value);
        if let Some((uid, value)) = raw.iter().find(|(_, value)| !is_weight(*value)) {
            return Err(VectorError::Value { uid: *uid, value: *value });
        }
        if raw.is_empty() {
            return Err(VectorError::Empty);
        }
        if limits.neurons == 0 {
            return Err(VectorError::NoNeurons);
        }
        let shares = match self {
            Self::Targon44 => targon::shares(raw, limits)?,
            Self::Sdk => sdk::shares(raw, limits)?,
        };
        let vector = scale(&shares)?;
        let given = vector.values().len();
        let is_short = given < usize::from(limits.min_allowed) && !is_own(raw, limits);
        if self == Self::Sdk && is_short {
            return Err(VectorError::TooFew { given, wanted: limits.min_allowed });
        }
        Ok(vector)
    }
}

/// Shares as the chain has them: the largest becomes 65,535, halves go to the even neighbour, and
/// those that become 0 are left out.
fn scale(shares: &[(u16, f64)]) -> Result<Vector, VectorError> {
    let largest = shares.iter().map(|(_, share)| *share).fold(0.0, f64::max);
    if largest == 0.0 {
        return Err(VectorError::AllZero);
    }
    let scaled = shares.iter().map(|(uid, share)| {
        let value = (share / largest * f64::from(WEIGHT_MAX)).round_ties_even();
        (*uid, value as u16)
    });
    Vector::new(scaled.filter(|(_, value)| *value != 0).collect())
}

#[cfg(test)]
mod tests;
