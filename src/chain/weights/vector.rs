//! Defines a vector of weights as the chain stores it, and what a subnet asks of one.

/// The largest value of a weight on the chain: the largest of a vector has it.
pub const WEIGHT_MAX: u16 = u16::MAX;

/// What a subnet asks of a vector of weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WeightLimits {
    /// Members of the subnet.
    pub neurons: u16,
    /// Weights that a vector must at least have.
    pub min_allowed: u16,
    /// Largest share of one weight, of 65,535.
    pub max_limit: u16,
    /// The uid that sets the weights: one weight for itself is exempt from both limits.
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
        /// The uid that stands before it in the vector.
        before: u16,
        /// The one that is too small.
        uid: u16,
    },
    /// A raw weight is negative, too large or not a number.
    #[error("a raw weight must be at least 0 and below 3.4e38, got {value} for uid {uid}")]
    Value {
        /// The uid that the weight is for.
        uid: u16,
        /// The raw weight as it was given.
        value: f64,
    },
    /// The sum is beyond the arithmetic of the rule.
    #[error("the raw weights are too large to be added up")]
    Sum,
    /// Nobody gets anything.
    #[error("all weights are zero")]
    AllZero,
    /// It has fewer weights than the subnet demands.
    #[error("the subnet wants at least {wanted} weights above zero, got {given}")]
    TooFew {
        /// Weights above zero in the vector.
        given: usize,
        /// Those that must be.
        wanted: u16,
    },
    /// The original counts positions as uids, and there are more than members.
    #[error("weight number {place} (uid {uid}) is beyond the subnet's {neurons} members")]
    Place {
        /// Counted from 0.
        place: usize,
        /// The uid that has no member.
        uid: u16,
        /// How many members the subnet has: uids lie below.
        neurons: u16,
    },
    /// Values as the chain would not store them.
    #[error("the largest weight must be 65535 and none 0, got {value} for uid {uid}")]
    NotScaled {
        /// The uid whose weight is too large a share.
        uid: u16,
        /// A weight of 0, or the largest where that is not 65535.
        value: u16,
    },
    /// A mechanism that there cannot be.
    #[error("there is no mechanism {mechanism} of subnet {netuid}")]
    NoIndex {
        /// The number of the subnet.
        netuid: u16,
        /// Number of the mechanism within the subnet.
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

/// Whether the only weight is for the hotkey that sets it.
pub(super) fn is_own(raw: &[(u16, f64)], limits: &WeightLimits) -> bool {
    matches!((raw, limits.own), ([(uid, _)], Some(own)) if *uid == own)
}

/// Whether uids ascend, each once.
pub(super) fn check_order(uids: impl Iterator<Item = u16>) -> Result<(), VectorError> {
    let mut last = None;
    for uid in uids {
        match last {
            Some(before) if uid <= before => return Err(VectorError::Order { before, uid }),
            _ => last = Some(uid),
        }
    }
    Ok(())
}
