//! Checks the chain's own rules for setting weights, in its order, before anything is sent.

use super::{Vector, WEIGHT_MAX, WeightLimits};
use crate::chain::keys::Hotkey;
use crate::chain::metagraph::Rao;

/// Commits of one hotkey that may wait for their revelation.
pub const COMMITS_MAX: usize = 10;

/// What the chain says of one hotkey's right to set weights, all read at one block.
#[derive(Clone, PartialEq, Debug)]
pub struct Standing {
    /// The number of the subnet.
    pub netuid: u16,
    /// The mechanism of the subnet that the weights are for; most have only the first, 0.
    pub mechanism: u8,
    /// How many mechanisms the subnet has.
    pub mechanisms: u8,
    /// The hotkey that is to set weights.
    pub hotkey: Hotkey,
    /// The block at which all this was read.
    pub block: u64,
    /// Members of the subnet.
    pub neurons: u16,
    /// The hotkey's place, where it is registered.
    pub uid: Option<u16>,
    /// Stake as it counts for validators.
    pub stake: Rao,
    /// Whether stake may be more than is known.
    pub is_stake_partial: bool,
    /// Stake from which on weights may be set.
    pub stake_threshold: Rao,
    /// Whether the hotkey owns the subnet: stake and permit are not asked of it.
    pub is_owner: bool,
    /// Whether the hotkey may validate.
    pub permit: bool,
    /// Version that weights must at least name; 0 where any will do.
    pub weights_version: u64,
    /// Blocks between two settings of weights.
    pub rate_limit: u64,
    /// Block of its last weights or commit; 0 where there were none.
    pub last_update: u64,
    /// Weights that a vector must at least have.
    pub min_allowed: u16,
    /// Largest share of one weight, of 65,535.
    pub max_limit: u16,
    /// Whether weights are committed first and revealed later.
    pub commit_reveal: bool,
    /// Its commits of this epoch that wait for their revelation.
    pub commits: usize,
}

/// A rule of the chain that is not met. Nothing was sent.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum Unmet {
    /// `CanNotSetRootNetworkWeights`.
    #[error("weights cannot be set on subnet 0")]
    Root,
    /// `MechanismDoesNotExist`.
    #[error("subnet {netuid} has {count} mechanisms: there is no number {mechanism}")]
    NoMechanism {
        /// The number of the subnet.
        netuid: u16,
        /// Which one was meant.
        mechanism: u8,
        /// How many there are.
        count: u8,
    },
    /// `UidsLengthExceedUidsInSubNet`.
    #[error("{given} weights for the {neurons} members of subnet {netuid}")]
    TooMany {
        /// The number of the subnet.
        netuid: u16,
        /// How many weights the vector has.
        given: usize,
        /// How many members the subnet has: no vector may be longer.
        neurons: u16,
    },
    /// `HotKeyNotRegisteredInSubNet`.
    #[error(
        "the hotkey {hotkey} is not registered on subnet {netuid}: register it with btcli subnets \
         register"
    )]
    NotRegistered {
        /// The hotkey that has no uid.
        hotkey: Hotkey,
        /// The number of the subnet.
        netuid: u16,
    },
    /// `NotEnoughStakeToSetWeights`.
    #[error("the hotkey's stake of {stake} is below the {threshold} that setting weights needs")]
    Stake {
        /// The stake that the hotkey has.
        stake: Rao,
        /// The stake that is needed.
        threshold: Rao,
    },
    /// `IncorrectWeightVersionKey`.
    #[error("the subnet wants weights of version {wanted} or newer, these are of {given}")]
    Version {
        /// What the weights name.
        given: u64,
        /// What they must at least name.
        wanted: u64,
    },
    /// `SettingWeightsTooFast`, `CommittingWeightsTooFast`.
    #[error(
        "weights were set {since} blocks ago, at block {last}, and the rate limit is {limit} \
         blocks: again from block {next} on"
    )]
    TooFast {
        /// Blocks since the last ones.
        since: u64,
        /// The block of the last ones.
        last: u64,
        /// Blocks that must lie between.
        limit: u64,
        /// The first block at which it may be done again.
        next: u64,
    },
    /// `NeuronNoValidatorPermit`.
    #[error("uid {uid} has no validator permit on subnet {netuid}: it needs more stake")]
    NoPermit {
        /// The uid of the hotkey that sets weights.
        uid: u16,
        /// The number of the subnet.
        netuid: u16,
    },
    /// `UidVecContainInvalidOne`.
    #[error("there is no uid {uid} among the {neurons} members of subnet {netuid}")]
    NoSuchUid {
        /// The uid that has no member.
        uid: u16,
        /// How many members the subnet has: uids lie below.
        neurons: u16,
        /// The number of the subnet.
        netuid: u16,
    },
    /// `WeightVecLengthIsLow`.
    #[error("subnet {netuid} wants at least {wanted} weights, got {given}")]
    TooFew {
        /// How many weights the vector has.
        given: usize,
        /// Weights that must be.
        wanted: u16,
        /// The number of the subnet.
        netuid: u16,
    },
    /// `MaxWeightExceeded`.
    #[error(
        "the weight of uid {uid} is {share:.5} of the sum, and subnet {netuid} allows {limit:.5} \
         (max_weights_limit {max_limit} of 65535)"
    )]
    MaxWeight {
        /// The uid in the vector.
        uid: u16,
        /// The weight over the sum of all.
        share: f64,
        /// What that may be.
        limit: f64,
        /// The same as the chain has it.
        max_limit: u16,
        /// The number of the subnet.
        netuid: u16,
    },
    /// `TooManyUnrevealedCommits`.
    #[error("{count} commits of this epoch wait for their revelation: there may be 10")]
    TooManyCommits {
        /// How many commits wait.
        count: usize,
    },
}

impl Unmet {
    /// Whether the same may be sent later without anybody doing anything.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::TooFast { .. } | Self::TooManyCommits { .. })
    }
}

impl Standing {
    /// What the subnet asks of a vector.
    pub fn limits(&self) -> WeightLimits {
        let Self { neurons, min_allowed, max_limit, uid: own, .. } = *self;
        WeightLimits { neurons, min_allowed, max_limit, own }
    }

    /// Whether the chain would take these weights now: its own checks in its own order. Those of
    /// the rate and of stake it makes for a commit as well; the others it makes again, silently,
    /// when a commit is revealed.
    ///
    /// # Errors
    /// The first rule that is not met.
    pub fn check(&self, vector: &Vector, version_key: u64) -> Result<(), Unmet> {
        let netuid = self.netuid;
        let given = vector.values().len();
        if netuid == 0 {
            return Err(Unmet::Root);
        }
        if self.mechanism >= self.mechanisms {
            let (mechanism, count) = (self.mechanism, self.mechanisms);
            return Err(Unmet::NoMechanism { netuid, mechanism, count });
        }
        if given > usize::from(self.neurons) {
            return Err(Unmet::TooMany { netuid, given, neurons: self.neurons });
        }
        let hotkey = self.hotkey;
        let uid = self.uid.ok_or(Unmet::NotRegistered { hotkey, netuid })?;
        self.check_stake()?;
        if version_key < self.weights_version {
            return Err(Unmet::Version { given: version_key, wanted: self.weights_version });
        }
        self.check_rate()?;
        let is_own = matches!(vector.values(), [(only, _)] if *only == uid);
        if !self.permit && !is_own && !self.is_owner {
            return Err(Unmet::NoPermit { uid, netuid });
        }
        // Uids have no gaps.
        if let Some((uid, _)) = vector.values().iter().find(|(uid, _)| *uid >= self.neurons) {
            return Err(Unmet::NoSuchUid { uid: *uid, neurons: self.neurons, netuid });
        }
        let wanted = self.min_allowed.min(self.neurons);
        if given < usize::from(wanted) && !is_own {
            return Err(Unmet::TooFew { given, wanted, netuid });
        }
        if is_own { Ok(()) } else { self.check_largest(vector) }
    }

    fn check_stake(&self) -> Result<(), Unmet> {
        let is_known = !self.is_stake_partial;
        if self.stake < self.stake_threshold && is_known && !self.is_owner {
            return Err(Unmet::Stake { stake: self.stake, threshold: self.stake_threshold });
        }
        Ok(())
    }

    fn check_rate(&self) -> Result<(), Unmet> {
        let (last, limit) = (self.last_update, self.rate_limit);
        let since = self.block.saturating_sub(last);
        if last != 0 && since < limit {
            return Err(Unmet::TooFast { since, last, limit, next: last.saturating_add(limit) });
        }
        if self.commit_reveal && self.commits >= COMMITS_MAX {
            return Err(Unmet::TooManyCommits { count: self.commits });
        }
        Ok(())
    }

    fn check_largest(&self, vector: &Vector) -> Result<(), Unmet> {
        let max_limit = self.max_limit;
        let sum: u64 = vector.weights().into_iter().map(u64::from).sum();
        let largest = vector.values().iter().max_by_key(|(_, value)| *value);
        let Some((uid, value)) = largest.filter(|_| max_limit != WEIGHT_MAX) else {
            return Ok(());
        };
        if u64::from(*value) * u64::from(WEIGHT_MAX) > u64::from(max_limit) * sum {
            return Err(Unmet::MaxWeight {
                uid: *uid,
                share: f64::from(*value) / sum as f64,
                limit: f64::from(max_limit) / f64::from(WEIGHT_MAX),
                max_limit,
                netuid: self.netuid,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing() -> Standing {
        Standing {
            netuid: 4,
            mechanism: 0,
            mechanisms: 1,
            hotkey: Hotkey([7; 32]),
            block: 1000,
            neurons: 4,
            uid: Some(1),
            stake: Rao(5_000_000_000),
            is_stake_partial: false,
            stake_threshold: Rao(5_000_000_000),
            is_owner: false,
            permit: true,
            weights_version: 7,
            rate_limit: 100,
            last_update: 900,
            min_allowed: 2,
            max_limit: WEIGHT_MAX,
            commit_reveal: false,
            commits: 0,
        }
    }

    #[test]
    fn rules_are_checked_in_the_order_of_the_chain() {
        let vector = Vector::new(vec![(0, 65_535), (2, 65_535)]).unwrap();
        // Each of these breaks one rule more, ahead of those before: the first is what is told.
        type Break = (fn(&mut Standing), &'static str);
        let breaks: [Break; 9] = [
            (|s| s.max_limit = 32_000, "the weight of uid 2 is 0.50000 of the sum"),
            (|s| s.min_allowed = 3, "at least 3 weights, got 2"),
            (|s| s.neurons = 2, "no uid 2 among the 2 members"),
            (|s| s.permit = false, "uid 1 has no validator permit on subnet 4"),
            (|s| s.last_update = 901, "99 blocks ago, at block 901"),
            (|s| s.weights_version = 8, "version 8 or newer, these are of 7"),
            (|s| s.stake = Rao(4_999_999_999), "stake of 5.000 is below"),
            (|s| s.uid = None, "is not registered on subnet 4"),
            (|s| s.mechanism = 1, "subnet 4 has 1 mechanisms: there is no number 1"),
        ];
        let mut standing = standing();
        standing.check(&vector, 7).unwrap();
        for (change, want) in breaks {
            change(&mut standing);
            let unmet = standing.check(&vector, 7).unwrap_err();
            assert!(unmet.to_string().contains(want), "{unmet}, not {want}");
            assert_eq!(unmet.is_passing(), matches!(unmet, Unmet::TooFast { .. }));
        }
        standing.netuid = 0;
        assert_eq!(standing.check(&vector, 7), Err(Unmet::Root));
    }

    #[test]
    fn owners_self_weights_and_first_weights_are_exempt() {
        let own = Vector::new(vec![(1, 65_535)]).unwrap();
        let two = Vector::new(vec![(0, 65_535), (2, 1)]).unwrap();
        let hard = Standing { permit: false, max_limit: 100, min_allowed: 4, ..standing() };
        hard.check(&own, 7).unwrap();
        let owner = Standing { permit: false, is_owner: true, stake: Rao(0), ..standing() };
        owner.check(&two, 7).unwrap();
        let partial = Standing { is_stake_partial: true, stake: Rao(0), ..standing() };
        partial.check(&two, 7).unwrap();
        let first = Standing { last_update: 0, block: 1, ..standing() };
        first.check(&two, 7).unwrap();
        let any = Standing { weights_version: 0, ..standing() };
        any.check(&two, 0).unwrap();
        let third = Vector::new(vec![(0, 65_535), (2, 65_535), (3, 65_535)]).unwrap();
        Standing { max_limit: 21_845, ..standing() }.check(&third, 7).unwrap();
        assert!(Standing { max_limit: 21_844, ..standing() }.check(&third, 7).is_err());
        let five = Vector::new((0..5).map(|uid| (uid, 65_535)).collect()).unwrap();
        assert!(matches!(standing().check(&five, 7), Err(Unmet::TooMany { given: 5, .. })));
        let waiting = Standing { commit_reveal: true, commits: 10, ..standing() };
        assert_eq!(waiting.check(&two, 7), Err(Unmet::TooManyCommits { count: 10 }));
    }
}
