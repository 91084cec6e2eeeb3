//! Weights: from a validator's raw numbers to what is sent to the chain, and what may be sent.
//!
//! [`Rule::vector`] makes a [`Vector`] of raw weights, by the original's arithmetic (`targon`) or
//! by that of the current SDK (`sdk`). [`standing`] holds the chain's own rules, so that nothing is
//! sent that it would refuse; [`outcome`] says what became of what was sent. All of it is pure.

pub mod outcome;
pub mod reveal;
mod sdk;
pub mod standing;
mod targon;

pub use sdk::clipped;
use std::fmt;
use std::str::FromStr;

/// The largest value of a weight on the chain: the largest of a vector has it.
pub const WEIGHT_MAX: u16 = u16::MAX;
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
pub enum Rule {
    /// `process_weights_for_netuid` of bittensor 8.5, which Targon 4.4 calls, to the bit.
    Targon44,
    /// `set_weights` of the current SDK (bittensor 11.3).
    Sdk,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "targon-4.4" => Ok(Self::Targon44),
            "sdk" => Ok(Self::Sdk),
            other => Err(format!("must be targon-4.4 or sdk, got {other}")),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Targon44 => "targon-4.4",
            Self::Sdk => "sdk",
        })
    }
}

/// What a subnet asks of a vector of weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Members of the subnet.
    pub neurons: u16,
    /// Weights that a vector must at least have.
    pub min_allowed: u16,
    /// Largest share of one weight, of 65,535.
    pub max_limit: u16,
    /// The place of whoever sets the weights: one weight for oneself is exempt from both limits.
    pub own: Option<u16>,
}

/// Why raw weights do not become a vector.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum VectorError {
    /// Nothing to convert.
    #[error("there are no weights")]
    Empty,
    /// The subnet has no members.
    #[error("the subnet has no members")]
    NoNeurons,
    /// Out of order, or twice.
    #[error("uids must ascend, each once: {uid} comes after {before}")]
    Order {
        /// The one before.
        before: u16,
        /// The one that is too small.
        uid: u16,
    },
    /// A raw weight that is none.
    #[error("a raw weight must be at least 0 and below 3.4e38, got {value} for uid {uid}")]
    Value {
        /// Whose.
        uid: u16,
        /// The number.
        value: f64,
    },
    /// The sum is beyond the arithmetic of the rule.
    #[error("the raw weights are too large to be added up")]
    Sum,
    /// Nobody gets anything.
    #[error("all weights are zero")]
    AllZero,
    /// Too few.
    #[error("the subnet wants at least {wanted} weights above zero, got {given}")]
    TooFew {
        /// Those above zero.
        given: usize,
        /// Those that must be.
        wanted: u16,
    },
    /// The original counts positions as uids, and there are more than members.
    #[error("weight number {place} (uid {uid}) is beyond the subnet's {neurons} members")]
    Place {
        /// Counted from 0.
        place: usize,
        /// Whose.
        uid: u16,
        /// Members.
        neurons: u16,
    },
    /// Values as the chain would not store them.
    #[error("the largest weight must be 65535 and none 0, got {value} for uid {uid}")]
    NotScaled {
        /// Whose.
        uid: u16,
        /// The value.
        value: u16,
    },
    /// A mechanism that there cannot be.
    #[error("there is no mechanism {mechanism} of subnet {netuid}")]
    NoIndex {
        /// The subnet.
        netuid: u16,
        /// The mechanism.
        mechanism: u8,
    },
}

/// Who gets what: uids ascend, each once; no value is 0 and the largest is 65,535. The chain stores
/// it as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vector(Vec<(u16, u16)>);

impl Vector {
    /// Of pairs of uid and value.
    ///
    /// # Errors
    /// When they are not as a vector must be.
    pub fn new(values: Vec<(u16, u16)>) -> Result<Self, VectorError> {
        check_order(values.iter().map(|(uid, _)| *uid))?;
        if let Some((uid, value)) = values.iter().find(|(_, value)| *value == 0) {
            return Err(VectorError::NotScaled { uid: *uid, value: *value });
        }
        let largest = values.iter().max_by_key(|(_, value)| *value).ok_or(VectorError::Empty)?;
        if largest.1 != WEIGHT_MAX {
            return Err(VectorError::NotScaled { uid: largest.0, value: largest.1 });
        }
        Ok(Self(values))
    }

    /// Pairs of uid and value, by ascending uid.
    pub fn values(&self) -> &[(u16, u16)] {
        &self.0
    }

    /// The uids, ascending.
    pub fn uids(&self) -> Vec<u16> {
        self.0.iter().map(|(uid, _)| *uid).collect()
    }

    /// The values, in the order of the uids.
    pub fn weights(&self) -> Vec<u16> {
        self.0.iter().map(|(_, value)| *value).collect()
    }
}

impl Rule {
    /// What is sent for these raw weights: pairs of uid and weight, by ascending uid.
    ///
    /// # Errors
    /// When a raw weight is no number from 0 on, or the rule has no vector for them.
    pub fn vector(self, raw: &[(u16, f64)], limits: &Limits) -> Result<Vector, VectorError> {
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
        let given = vector.0.len();
        let is_short = given < usize::from(limits.min_allowed) && !is_own(raw, limits);
        if self == Self::Sdk && is_short {
            return Err(VectorError::TooFew { given, wanted: limits.min_allowed });
        }
        Ok(vector)
    }
}

/// Whether the only weight is for whoever sets it.
fn is_own(raw: &[(u16, f64)], limits: &Limits) -> bool {
    matches!((raw, limits.own), ([(uid, _)], Some(own)) if *uid == own)
}

fn check_order(uids: impl Iterator<Item = u16>) -> Result<(), VectorError> {
    let mut last = None;
    for uid in uids {
        match last {
            Some(before) if uid <= before => return Err(VectorError::Order { before, uid }),
            _ => last = Some(uid),
        }
    }
    Ok(())
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
